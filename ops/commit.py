"""`commit_kv`: accepted staged rows to their slots, every layer of a cache group in one call.

`CommitPlan` is what all commits of a batch of layers have in common. A window makes it once and
commits through `COMMIT`, which checks nothing; the op makes and checks it at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

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
from nwor_compile.ops.library import Launcher, define
from nwor_compile.ops.scv import Verdict

if TYPE_CHECKING:
    from nwor_compile.ops.kernels.commit import Constants

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True, eq=False)
class CommitPlan:
    """Layers of one geometry: caches, and staging `[S, kv_heads, head_size]`, one a layer.

    table: their addresses, `cache_table(...)`.
    """

    key_caches: Sequence[Tensor]
    value_caches: Sequence[Tensor]
    staged_keys: Sequence[Tensor]
    staged_values: Sequence[Tensor]
    table: Tensor

    @cached_property
    def constants(self) -> Constants:
        """What the kernel is launched with every time; worked out at the first launch."""
        from nwor_compile.ops.kernels.commit import constants_of  # needs Triton

        return constants_of(self)


@dataclass(frozen=True, eq=False)
class Closing:
    """What the first commit of a window does beside moving rows.

    With the error flag up it zeroes `verdict`'s mask and accepted counts. It clamps the verdict's
    `num_sampled` to `accepted + 1` and adds to `num_rejected` what that took away. It makes the
    routing say that every token is certain.

    row_map: int32 `[max_tokens]`, set to -1. num_drafts: int32 `[max_requests]`, zeroed.
    """

    verdict: Verdict
    row_map: Tensor
    num_drafts: Tensor


def _check_commit(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    staged_keys: Sequence[Tensor],
    staged_values: Sequence[Tensor],
    slots: Tensor,
    mask: Tensor,
    error: Tensor,
    num_drafts: Tensor,
    accepted: Tensor,
    counters: Tensor | None = None,
    cache_table: Tensor | None = None,
    num_layers: int = 0,
    rows: Tensor | None = None,
) -> None:
    _check_lists(key_caches, value_caches, staged_keys, staged_values)
    _check_geometry(key_caches, value_caches, staged_keys[0])
    check_index("slots", slots)
    check_index("accepted", accepted)
    check_index("num_drafts", num_drafts, accepted.shape[0])
    _check_flag_and_counters(error, counters)
    staged_rows = staged_keys[0].shape[0]
    if mask.dtype != torch.bool or mask.dim() != 1:
        raise ValueError(f"mask: expected bool [drafts], got {mask.dtype} {list(mask.shape)}")
    drafts = mask.shape[0]
    if rows is None:
        if drafts > staged_rows:
            raise ValueError(
                f"mask: expected at most {staged_rows} entries (staging rows) without `rows`, got "
                f"{drafts}"
            )
    elif rows.dtype != torch.int32 or rows.dim() != 1 or rows.shape[0] < drafts:
        raise ValueError(
            f"rows: expected int32 [at least {drafts}], got {rows.dtype} {list(rows.shape)}"
        )
    if drafts > 0 and staged_rows == 0:
        raise ValueError("staged_keys: expected at least one staging row")
    if slots.shape[0] < drafts:
        raise ValueError(f"slots: expected at least {drafts}, got {slots.shape[0]}")
    layers = len(key_caches)
    if cache_table is not None and (
        cache_table.dtype != torch.int64 or list(cache_table.shape) != [4, layers]
    ):
        raise ValueError(
            f"cache_table: expected int64 [4, layers = {layers}], got {cache_table.dtype} "
            f"{list(cache_table.shape)}"
        )
    check_same_device(
        cache=key_caches[0], staged_keys=staged_keys[0], slots=slots, mask=mask, error=error,
        num_drafts=num_drafts, accepted=accepted, counters=counters, cache_table=cache_table,
        rows=rows,
    )  # fmt: skip


def _check_lists(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    staged_keys: Sequence[Tensor],
    staged_values: Sequence[Tensor],
) -> None:
    layers = len(key_caches)
    if layers == 0 or layers != len(value_caches):
        raise ValueError(
            f"caches: expected as many key as value caches, at least one; got {layers} and "
            f"{len(value_caches)}"
        )
    for name, staged in (("staged_keys", staged_keys), ("staged_values", staged_values)):
        if len(staged) != layers:
            raise ValueError(f"{name}: expected one for each of {layers} layers, got {len(staged)}")
        first = staged[0]
        if first.dim() != 3:
            raise ValueError(
                f"{name}: expected [rows, kv_heads, head_size] a layer, got {list(first.shape)}"
            )
        for layer, rows in enumerate(staged):
            if rows.shape != first.shape or rows.stride() != first.stride():
                raise ValueError(
                    f"{name}: layer {layer} has {list(rows.shape)} strides {rows.stride()}, layer "
                    f"0 has {list(first.shape)} strides {first.stride()}"
                )
            if rows.dtype != first.dtype:
                raise TypeError(f"{name}: layer {layer} is {rows.dtype}, layer 0 is {first.dtype}")
    key, value = staged_keys[0], staged_values[0]
    if key.shape != value.shape:
        raise ValueError(
            f"staged_keys and staged_values: expected equal shapes, got {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    if key.dtype != value.dtype:
        raise TypeError(f"staged_keys are {key.dtype}, staged_values are {value.dtype}")


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
    check_cache(key, value, staged_key.shape[1], staged_key.shape[2])
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
    staged_keys: Sequence[Tensor],
    staged_values: Sequence[Tensor],
    slots: Tensor,
    mask: Tensor,
    error: Tensor,
    num_drafts: Tensor,
    accepted: Tensor,
    counters: Tensor | None = None,
    cache_table: Tensor | None = None,
    num_layers: int = 0,
    rows: Tensor | None = None,
) -> None:
    """The specification of `commit_kv`."""
    drafts, staged_rows = mask.shape[0], staged_keys[0].shape[0]
    place = slots[:drafts].long()
    blocks, block_size = logical_key(key_caches[0]).shape[:2]
    valid = mask & (error == 0) & (place >= 0) & (place < blocks * block_size)
    source = torch.arange(drafts, device=mask.device) if rows is None else rows[:drafts].long()
    valid &= (source >= 0) & (source < staged_rows)
    source = torch.where(valid, source, 0)
    index = (place // block_size, place % block_size)
    if drafts > 0:
        for key_cache, value_cache, staged_key, staged_value in zip(
            key_caches, value_caches, staged_keys, staged_values, strict=True
        ):
            value_view = logical_value(key_cache, value_cache)
            _move(logical_key(key_cache), index, staged_key, source, valid)
            _move(value_view, index, staged_value, source, valid)
    if counters is not None:
        _count(counters, num_drafts, accepted, error, num_layers)


def _move(
    cache: Tensor, index: tuple[Tensor, ...], staged: Tensor, source: Tensor, valid: Tensor
) -> None:
    # As bits: fp8 cannot be indexed everywhere. Indexing copies, and staging may share the cache's
    # memory.
    bits = _BITS.get(staged.element_size(), staged.dtype)
    scatter_rows(cache, index, staged.view(bits)[source].view(staged.dtype), valid)


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
    "commit_kv(Tensor(a!)[] key_caches, Tensor(b!)[] value_caches, Tensor[] staged_keys, "
    "Tensor[] staged_values, Tensor slots, Tensor mask, Tensor error, Tensor num_drafts, "
    "Tensor accepted, Tensor(c!)? counters=None, Tensor? cache_table=None, int num_layers=0, "
    "Tensor? rows=None) -> ()",
    reference=commit_kv_reference,
    fake=lambda *args, **kwargs: None,
    check=_check_commit,
    kernel="commit:commit_kv",
)


def commit_kv(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    staged_keys: Sequence[Tensor],
    staged_values: Sequence[Tensor],
    slots: Tensor,
    mask: Tensor,
    error: Tensor,
    num_drafts: Tensor,
    accepted: Tensor,
    counters: Tensor | None = None,
    cache_table: Tensor | None = None,
    num_layers: int = 0,
    rows: Tensor | None = None,
) -> None:
    """Move accepted staged rows of all layers of a cache group to their slots, in one launch.

    All or nothing: with `error` set, no row of any layer moves.

    Args:
        key_caches, value_caches: mutated; one a layer, different tensors of equal shape, strides
            and dtype (see `nwor_compile.ops.layout`). Groups of other geometry are calls of their
            own.
        staged_keys, staged_values: one `[S, kv_heads, head_size]` a layer in the cache's dtype,
            with equal strides within each list. They may be views into the caches, in rows that no
            slot of this call addresses.
        slots: `[>= N]` int32 or int64, slot of each draft; outside the cache: skipped.
        mask: bool `[N]`, the drafts whose rows move.
        error: int32 `[1]`, not zero: move nothing, count the window's drafts as rejected.
        num_drafts, accepted: `[R]`, for the counters.
        counters: mutated; int64, `nwor_compile.ops.counter_size(max_drafts)` long; None for all
            but one group of a window, since rows are counted once.
        cache_table: `cache_table(key_caches, value_caches, staged_keys, staged_values)`, made once;
            the Triton kernel reads addresses from it. Made anew when None, which cannot be captured
            in a CUDA graph.
        num_layers: layers of the whole window, for `stage_operations`.
        rows: int32 `[>= N]`, staging row of each draft, skipped if there is no such row; None if
            draft n is in row n, and N is then at most S.
    Raises:
        ValueError, TypeError: before any device work; caches and counters unchanged.
    """
    _commit_kv(
        key_caches,
        value_caches,
        staged_keys,
        staged_values,
        slots,
        mask,
        error,
        num_drafts,
        accepted,
        counters,
        cache_table,
        num_layers,
        rows,
    )


def cache_table(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    staged_keys: Sequence[Tensor],
    staged_values: Sequence[Tensor],
) -> Tensor:
    """Addresses of a group's memory, int64 `[4, layers]` on its device, in this order of rows.

    Valid while the tensors live where they are; make it once, when they are allocated.
    """
    lists = (key_caches, value_caches, staged_keys, staged_values)
    rows = [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    return torch.tensor(rows, dtype=torch.int64).to(key_caches[0].device)


def commit_batch(
    plan: CommitPlan,
    slots: Tensor,
    rows: Tensor | None,
    mask: Tensor,
    error: Tensor,
    num_drafts: Tensor,
    accepted: Tensor,
    counters: Tensor | None,
    num_layers: int,
    closing: Closing | None,
) -> None:
    """`commit_kv` of one batch of a window, and `closing`; the specification of `COMMIT`.

    Arguments as for `commit_kv`, unchecked. An empty `mask` moves nothing.
    """
    commit_kv_reference(
        plan.key_caches, plan.value_caches, plan.staged_keys, plan.staged_values, slots, mask,
        error, num_drafts, accepted, counters, None, num_layers, rows,
    )  # fmt: skip
    if closing is not None:
        _close(closing, error)


def _close(closing: Closing, error: Tensor) -> None:
    verdict, fine = closing.verdict, error == 0
    verdict.mask.logical_and_(fine)
    verdict.accepted.mul_(fine)
    kept = torch.minimum(verdict.num_sampled, verdict.accepted + 1)
    verdict.num_rejected.add_(verdict.num_sampled - kept)
    verdict.num_sampled.copy_(kept)
    closing.row_map.fill_(-1)
    closing.num_drafts.zero_()


COMMIT = Launcher(commit_batch, "commit:commit_batch")
