"""`commit_kv`: accepted staged rows to their slots, every layer of a cache group in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nwor_compile.ops.counters import COUNTERS, FIXED
from nwor_compile.ops.layout import (
    check_cache,
    check_index,
    check_same_device,
    logical_key,
    logical_value,
    scatter_rows,
)
from nwor_compile.ops.library import define


def _check_commit(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    staged_key: Tensor,
    staged_value: Tensor,
    slots: Tensor,
    mask: Tensor,
    error: Tensor,
    num_drafts: Tensor,
    accepted: Tensor,
    counters: Tensor | None = None,
    cache_table: Tensor | None = None,
    num_layers: int = 0,
) -> None:
    layers = len(key_caches)
    if layers == 0 or layers != len(value_caches):
        raise ValueError(
            f"caches: expected as many key as value caches, at least one; got {layers} and "
            f"{len(value_caches)}"
        )
    if staged_key.dim() != 4 or staged_key.shape[0] != layers:
        raise ValueError(
            f"staged_key: expected [layers = {layers}, rows, kv_heads, head_size], got "
            f"{list(staged_key.shape)}"
        )
    if staged_key.shape != staged_value.shape or staged_key.stride() != staged_value.stride():
        raise ValueError("staged_key and staged_value: expected equal shapes and strides")
    if staged_key.dtype != staged_value.dtype:
        raise TypeError(f"staged_key is {staged_key.dtype}, staged_value is {staged_value.dtype}")
    _check_geometry(key_caches, value_caches, staged_key)
    check_index("slots", slots)
    check_index("accepted", accepted)
    check_index("num_drafts", num_drafts, accepted.shape[0])
    _check_flag_and_counters(error, counters)
    if mask.dtype != torch.bool or mask.dim() != 1 or mask.shape[0] > staged_key.shape[1]:
        raise ValueError(
            f"mask: expected bool [rows <= {staged_key.shape[1]}], got {mask.dtype} "
            f"{list(mask.shape)}"
        )
    if slots.shape[0] < mask.shape[0]:
        raise ValueError(f"slots: expected at least {mask.shape[0]}, got {slots.shape[0]}")
    check_same_device(
        cache=key_caches[0], staged_key=staged_key, slots=slots, mask=mask, error=error,
        num_drafts=num_drafts, accepted=accepted, counters=counters, cache_table=cache_table,
    )  # fmt: skip


def _check_flag_and_counters(error: Tensor, counters: Tensor | None) -> None:
    if error.dtype != torch.int32 or list(error.shape) != [1]:
        raise ValueError(f"error: expected int32 [1], got {error.dtype} {list(error.shape)}")
    if counters is not None and (
        counters.dtype != torch.int64 or counters.dim() != 1 or counters.shape[0] < FIXED
    ):
        raise ValueError(
            f"counters: expected int64 [counter_size(max_drafts) >= {FIXED}], got {counters.dtype} "
            f"{list(counters.shape)}"
        )


def _check_geometry(
    key_caches: Sequence[Tensor], value_caches: Sequence[Tensor], staged_key: Tensor
) -> None:
    key, value = key_caches[0], value_caches[0]
    check_cache(key, value, staged_key.shape[2], staged_key.shape[3])
    # fp8 may be kept as uint8 on either side; every other dtype must be the same one.
    if staged_key.dtype != key.dtype and (key.element_size(), staged_key.element_size()) != (1, 1):
        raise TypeError(f"staged rows are {staged_key.dtype}, the cache is {key.dtype}")
    for layer, (k, v) in enumerate(zip(key_caches, value_caches, strict=True)):
        same_key = k.shape == key.shape and k.stride() == key.stride() and k.dtype == key.dtype
        same_value = v.shape == value.shape and v.stride() == value.stride()
        if not same_key or not same_value or v.dtype != value.dtype:
            raise ValueError(
                f"caches: layer {layer} has key {list(k.shape)} strides {k.stride()} {k.dtype}, "
                f"layer 0 has {list(key.shape)} strides {key.stride()} {key.dtype}; layers of "
                "different geometry are a call each"
            )


def commit_kv_reference(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    staged_key: Tensor,
    staged_value: Tensor,
    slots: Tensor,
    mask: Tensor,
    error: Tensor,
    num_drafts: Tensor,
    accepted: Tensor,
    counters: Tensor | None = None,
    cache_table: Tensor | None = None,
    num_layers: int = 0,
) -> None:
    """The specification of `commit_kv`."""
    rows = mask.shape[0]
    place = slots[:rows].long()
    blocks, block_size = logical_key(key_caches[0]).shape[:2]
    valid = mask & (error == 0) & (place >= 0) & (place < blocks * block_size)
    index = (place // block_size, place % block_size)
    for layer, (key_cache, value_cache) in enumerate(zip(key_caches, value_caches, strict=True)):
        scatter_rows(logical_key(key_cache), index, staged_key[layer, :rows], valid)
        scatter_rows(
            logical_value(key_cache, value_cache), index, staged_value[layer, :rows], valid
        )
    if counters is not None:
        _count(counters, num_drafts, accepted, error, num_layers)


def _count(
    counters: Tensor, num_drafts: Tensor, accepted: Tensor, error: Tensor, num_layers: int
) -> None:
    drafts = num_drafts.long()
    taken = torch.where(error == 0, accepted.long(), 0)
    staged, committed = drafts.sum(), taken.sum()
    step = {
        "windows": (staged > 0).long(),
        "staged": staged,
        "committed": committed,
        "rejected": staged - committed,
        "stage_operations": staged * num_layers,
        "errors": (error != 0).long().view(()),
    }
    for name, amount in step.items():
        counters[COUNTERS[name]] += amount
    positions = (counters.shape[0] - FIXED) // 2
    k = torch.arange(positions, device=counters.device).unsqueeze(1)
    counters[FIXED : FIXED + positions] += (k < drafts).sum(1)
    counters[FIXED + positions :] += (k < taken).sum(1)


_commit_kv = define(
    "commit_kv(Tensor(a!)[] key_caches, Tensor(b!)[] value_caches, Tensor staged_key, "
    "Tensor staged_value, Tensor slots, Tensor mask, Tensor error, Tensor num_drafts, "
    "Tensor accepted, Tensor(c!)? counters=None, Tensor? cache_table=None, int num_layers=0) -> ()",
    reference=commit_kv_reference,
    fake=lambda *args, **kwargs: None,
    check=_check_commit,
    kernel="commit:commit_kv",
)


def commit_kv(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    staged_key: Tensor,
    staged_value: Tensor,
    slots: Tensor,
    mask: Tensor,
    error: Tensor,
    num_drafts: Tensor,
    accepted: Tensor,
    counters: Tensor | None = None,
    cache_table: Tensor | None = None,
    num_layers: int = 0,
) -> None:
    """Move accepted staged rows of all layers of a cache group to their slots, in one launch.

    All or nothing: with `error` set, no row of any layer moves.

    Args:
        key_caches, value_caches: mutated; one a layer, different tensors of equal shape, strides
            and dtype (see `nwor_compile.ops.layout`). Groups of other geometry are calls of their
            own.
        staged_key, staged_value: `[layers, S, kv_heads, head_size]`, in the cache's dtype.
        slots: `[>= N]` int32 or int64, slot of each staged row; outside the cache: skipped.
        mask: bool `[N <= S]`, the rows to move.
        error: int32 `[1]`, not zero: move nothing, count the window's drafts as rejected.
        num_drafts, accepted: `[R]`, for the counters.
        counters: mutated; int64, `nwor_compile.ops.counter_size(max_drafts)` long; None for all
            but one group of a window, since rows are counted once.
        cache_table: `cache_table(key_caches, value_caches)`, made once; the Triton kernel reads
            cache addresses from it. Made anew when None, which cannot be captured in a CUDA graph.
        num_layers: layers of the whole window, for `stage_operations`.
    Raises:
        ValueError, TypeError: before any device work; caches and counters unchanged.
    """
    _commit_kv(
        key_caches,
        value_caches,
        staged_key,
        staged_value,
        slots,
        mask,
        error,
        num_drafts,
        accepted,
        counters,
        cache_table,
        num_layers,
    )


def cache_table(key_caches: Sequence[Tensor], value_caches: Sequence[Tensor]) -> Tensor:
    """Addresses of a group's caches, int64 `[2, layers]` on their device (keys, then values).

    Valid while the caches live where they are; make it once, when the caches are allocated.
    """
    rows = [[cache.data_ptr() for cache in caches] for caches in (key_caches, value_caches)]
    return torch.tensor(rows, dtype=torch.int64).to(key_caches[0].device)
