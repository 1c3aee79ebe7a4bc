"""Layers by geometry: staging memory and the one commit call of each batch of equal layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from nwor_compile.errors import StagingAllocationError, WindowInputError
from nwor_compile.layer_batch import LayerBatch
from nwor_compile.ops import cache_table
from nwor_compile.ops.layout import check_cache, check_dtype, logical_key, logical_value
from nwor_compile.tail_blocks import TailBlocks, tail_rows

Caches = Mapping[str, tuple[Tensor, Tensor]]


def staging_bytes(
    layers: int,
    kv_heads: int,
    head_size: int,
    element_bytes: int,
    max_requests: int,
    max_drafts: int,
) -> int:
    """Device memory of staging: `max_requests x max_drafts` rows of K and V in every layer."""
    return max_requests * max_drafts * layers * 2 * kv_heads * head_size * element_bytes


def build_batches(
    layers: Caches,
    groups: Mapping[str, str],
    capacity: int,
    state: Tensor,
    tail: TailBlocks | None = None,
    tail_blocks: int = 0,
) -> list[LayerBatch]:
    """Sort `layers` into batches and allocate their staging, or find it in their tail blocks.

    Args:
        layers: name to (key cache, value cache).
        groups: name to slot group, for layers that are not in the default group `kv`.
        capacity: drafts of a step; without tail blocks, staging rows a layer.
        state: int32 `[len(layers), 2]`; each batch takes a slice.
        tail: where the tail blocks begin, and tail_blocks: how many each layer has.
    Raises:
        StagingAllocationError: out of memory, with the bytes asked for.
        WindowInputError: a cache without those tail blocks.
    """
    buckets: dict[tuple[object, ...], list[str]] = {}
    for name, (key, value) in layers.items():
        group = groups.get(name, "kv")
        geometry = (key.shape, key.stride(), key.dtype, value.shape, value.stride())
        buckets.setdefault((group, *geometry), []).append(name)
    slots = _allocate_slots((str(bucket[0]) for bucket in buckets), capacity, state.device)
    batches, first = [], 0
    for bucket, names in buckets.items():
        group = str(bucket[0])
        keys = [layers[name][0] for name in names]
        values = [layers[name][1] for name in names]
        if tail is None:
            staged_keys, staged_values = _allocate(keys[0], values[0], len(names), capacity)
        else:
            first_block = tail.first[group]
            staged_keys = [tail_rows(cache, first_block, tail_blocks) for cache in keys]
            staged_values = [tail_rows(cache, first_block, tail_blocks) for cache in values]
        batches.append(
            LayerBatch(
                group=group,
                names=tuple(names),
                key_caches=keys,
                value_caches=values,
                staged_keys=staged_keys,
                staged_values=staged_values,
                state=state[first : first + len(names)],
                slots=slots[group],
                table=cache_table(keys, values, staged_keys, staged_values),
            )
        )
        first += len(names)
    return batches


def _allocate_slots(
    groups: Iterable[str], capacity: int, device: torch.device
) -> dict[str, Tensor]:
    names = list(dict.fromkeys(groups))
    wanted = 8 * len(names) * (capacity + 1)
    with _typed_out_of_memory(f"{len(names)} slot buffers", wanted, device):
        return {
            name: torch.full((capacity + 1,), -1, dtype=torch.int64, device=device)
            for name in names
        }


def _allocate(
    key_cache: Tensor, value_cache: Tensor, layers: int, capacity: int
) -> tuple[list[Tensor], list[Tensor]]:
    heads = logical_key(key_cache).shape[2]
    size = logical_value(key_cache, value_cache).shape[3]
    shape = (layers, capacity, heads, size)
    wanted = 2 * layers * capacity * heads * size * key_cache.element_size()
    what = f"staging of {layers} layers x {capacity} rows x {heads} heads x {size}"
    with _typed_out_of_memory(what, wanted, key_cache.device):
        # Zeros, not empty: a row that was never staged must not read as NaN under a mask.
        return (
            list(torch.zeros(shape, dtype=key_cache.dtype, device=key_cache.device)),
            list(torch.zeros(shape, dtype=value_cache.dtype, device=value_cache.device)),
        )


@contextlib.contextmanager
def _typed_out_of_memory(what: str, wanted: int, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch's CPU allocator raises a plain RuntimeError; its text is all there is to go by.
        typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not typed and "allocate memory" not in str(error) and "overflow" not in str(error):
            raise
        raise StagingAllocationError(
            f"{what} needs {wanted} bytes on {device}: lower max_requests or max_drafts, or give "
            "the KV cache less memory"
        ) from error


def check_layers(
    layers: Caches,
    groups: Mapping[str, str],
    *,
    poison: bool,
    kv_cache_dtype: str,
    by_name: bool = False,
) -> None:
    """Raise WindowInputError unless these caches can be staged in one window.

    With `by_name`, layers of different slot groups may share memory: an engine gives each block to
    one group at a time.
    """
    if not layers:
        raise WindowInputError("layers: expected at least one named (key cache, value cache) pair")
    unknown = [name for name in groups if name not in layers]
    if unknown:
        raise WindowInputError(f"groups: {unknown} are no layers; there are {list(layers)}")
    devices = {cache.device for pair in layers.values() for cache in pair}
    if len(devices) > 1:
        listing = ", ".join(sorted(str(device) for device in devices))
        raise WindowInputError(
            f"layers: all caches of a window must be on one device, got {listing}"
        )
    for name, (key, value) in layers.items():
        try:
            rows = logical_key(key).shape
            heads = rows[2] if len(rows) > 2 else 0
            check_cache(key, value, heads, math.prod(rows[3:]))
            if poison:
                check_dtype("key cache", key, kv_cache_dtype, key.dtype)
        except (ValueError, TypeError) as error:
            raise WindowInputError(f"layer {name!r}: {error}") from error
    _check_distinct(layers, groups if by_name else {})


def _check_distinct(layers: Caches, groups: Mapping[str, str]) -> None:
    owners: dict[tuple[str, int], str] = {}
    for name, pair in layers.items():
        for kind, cache in zip(("key", "value"), pair, strict=True):
            mine = f"{kind} cache of {name!r}"
            other = owners.setdefault((groups.get(name, "kv"), cache.data_ptr()), mine)
            if other != mine:
                raise WindowInputError(
                    f"layers: the {mine} is the {other}; layers that share a cache are one layer"
                )


def check_sizes(**sizes: int) -> None:
    """Raise WindowInputError for a size below 1."""
    for name, number in sizes.items():
        if number < 1:
            raise WindowInputError(f"{name}: expected at least 1, got {number}")
