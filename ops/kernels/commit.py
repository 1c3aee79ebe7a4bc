"""Launcher of `commit_kv`: every layer of a cache group, and the counters, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.commit import cache_table as make_cache_table
from nwor_compile.ops.counters import COUNTERS, FIXED
from nwor_compile.ops.kernels.launch import bits, cache_strides, element_offset, on_device

_WINDOWS = tl.constexpr(COUNTERS["windows"])
_STAGED = tl.constexpr(COUNTERS["staged"])
_COMMITTED = tl.constexpr(COUNTERS["committed"])
_REJECTED = tl.constexpr(COUNTERS["rejected"])
_STAGE_OPERATIONS = tl.constexpr(COUNTERS["stage_operations"])
_ERRORS = tl.constexpr(COUNTERS["errors"])
_FIXED = tl.constexpr(FIXED)

# From this many rows on, a program takes several: most rows of a large batch are rejected, and a
# program a row would be mostly launches of empty blocks.
_MANY_ROWS = 128


@triton.jit
def _add(counter, amount, mask):
    # Only one program of the grid counts, so no atomic is needed.
    tl.store(counter, tl.load(counter, mask=mask) + amount, mask=mask)


@triton.jit
def _count(
    counters, num_drafts, accepted, failed, requests, num_layers, positions,
    s_counter, s_drafts, s_accepted, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The update of the counters; `nwor_compile.ops.commit._count` says what they are."""
    staged = tl.zeros([1], tl.int64)
    committed = tl.zeros([1], tl.int64)
    for first in range(0, requests, R):
        request = first + tl.arange(0, R)
        real = request < requests
        drafts = tl.load(num_drafts + request * s_drafts, mask=real, other=0).to(tl.int64)
        taken = tl.load(accepted + request * s_accepted, mask=real, other=0)
        staged += tl.sum(drafts, axis=0)
        taken = tl.where(failed == 0, taken.to(tl.int64), 0)
        committed += tl.sum(taken, axis=0)
    one = tl.arange(0, 1)
    yes = one == 0
    _add(counters + _WINDOWS * s_counter + one, (staged > 0).to(tl.int64), yes)
    _add(counters + _STAGED * s_counter + one, staged, yes)
    _add(counters + _COMMITTED * s_counter + one, committed, yes)
    _add(counters + _REJECTED * s_counter + one, staged - committed, yes)
    _add(counters + _STAGE_OPERATIONS * s_counter + one, staged * num_layers, yes)
    errors = tl.zeros([1], tl.int64) + tl.where(failed == 0, 0, 1)
    _add(counters + _ERRORS * s_counter + one, errors, yes)
    for low in range(0, positions, K):
        position = low + tl.arange(0, K)
        drafted = tl.zeros([K], tl.int64)
        kept = tl.zeros([K], tl.int64)
        for first in range(0, requests, R):
            request = first + tl.arange(0, R)
            real = request < requests
            drafts = tl.load(num_drafts + request * s_drafts, mask=real, other=0)
            taken = tl.load(accepted + request * s_accepted, mask=real, other=0)
            taken = tl.where(failed == 0, taken, 0)
            drafted += tl.sum((position[:, None] < drafts[None, :]).to(tl.int64), axis=1)
            kept += tl.sum((position[:, None] < taken[None, :]).to(tl.int64), axis=1)
        place = counters + (_FIXED + position) * s_counter
        _add(place, drafted, position < positions)
        _add(place + positions * s_counter, kept, position < positions)


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(do_not_specialize=["rows", "tiles", "requests", "num_layers", "positions"])
def _commit_kernel(
    table, element, staged_key, staged_value, slots, mask, error, num_drafts, accepted, counters,
    rows, tiles, slots_in_cache, requests, num_layers, positions,
    s_table, s_layer, s_row, s_head, s_d,
    kc_block, kc_offset, kc_head, kc_outer, kc_inner,
    vc_block, vc_offset, vc_head, vc_inner,
    s_slot, s_mask, s_counter, s_drafts, s_accepted,
    H: tl.constexpr, D: tl.constexpr, X: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
    COUNT: tl.constexpr, COUNT_R: tl.constexpr, COUNT_K: tl.constexpr,
):  # fmt: skip
    """Program l * tiles + i moves the accepted rows of tile i to the caches of layer l; with COUNT,
    one before them counts, because that takes the longest."""
    failed = tl.load(error)
    program = tl.program_id(0)
    if COUNT:
        if program == 0:
            _count(
                counters, num_drafts, accepted, failed, requests, num_layers, positions,
                s_counter, s_drafts, s_accepted, COUNT_R, COUNT_K,
            )  # fmt: skip
            return
        program -= 1
    tile = program % tiles
    layer = (program // tiles).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    real = row < tl.where(failed == 0, rows, 0)  # an error: no row moves
    slot = tl.load(slots + row * s_slot, mask=real, other=-1).to(tl.int64)
    wanted = tl.load(mask + row * s_mask, mask=real, other=0) != 0
    valid = wanted & (slot >= 0) & (slot < slots_in_cache)
    # `element` only lends its type: the table holds plain addresses. Loaded before it is known that
    # they are needed, so as not to wait.
    key_cache = tl.load(table + layer).to(element.dtype)
    value_cache = tl.load(table + s_table + layer).to(element.dtype)
    if tl.max(valid.to(tl.int32), axis=0) > 0:
        if ALIGNED:
            key_cache = tl.multiple_of(key_cache, 16)
            value_cache = tl.multiple_of(value_cache, 16)
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        source = (layer * s_layer + row.to(tl.int64) * s_row)[:, None]
        key_row = (block * kc_block + offset * kc_offset)[:, None]
        value_row = (block * vc_block + offset * vc_offset)[:, None]
        for start in tl.static_range(0, H * D, BLOCK):
            place = start + tl.arange(0, BLOCK)[None, :]
            head = (place // D).to(tl.int64)
            d = place % D
            inside = valid[:, None] & (place < H * D)
            staged = source + head * s_head + d.to(tl.int64) * s_d
            key = tl.load(staged_key + staged, mask=inside)
            value = tl.load(staged_value + staged, mask=inside)
            to_key = element_offset(d, kc_outer, kc_inner, D, X)
            tl.store(key_cache + (key_row + head * kc_head + to_key), key, mask=inside)
            to_value = head * vc_head + d.to(tl.int64) * vc_inner
            tl.store(value_cache + (value_row + to_value), value, mask=inside)


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
    """`commit_kv_reference` in one launch."""
    if cache_table is None:
        cache_table = make_cache_table(key_caches, value_caches)
    rows, requests, layers = mask.shape[0], accepted.shape[0], len(key_caches)
    if rows == 0 and counters is None:
        return
    heads, size = staged_key.shape[2:]
    k_strides, v_strides = cache_strides(key_caches[0], value_caches[0])
    key_cache = key_caches[0]
    block_size = key_cache.shape[3] if key_cache.dim() == 5 else key_cache.shape[1]
    positions = 0 if counters is None else (counters.shape[0] - FIXED) // 2
    tile = 4 if rows >= _MANY_ROWS else 1
    staged_bits = bits(staged_key)
    # Without it the compiler must assume element-aligned addresses and moves one at a time.
    aligned = all(cache.data_ptr() % 16 == 0 for cache in (*key_caches, *value_caches))
    count = counters is not None
    tiles = triton.cdiv(rows, tile)
    with on_device(staged_key):
        _commit_kernel[(tiles * layers + count,)](
            cache_table, staged_bits, staged_bits, bits(staged_value), slots,
            mask.view(torch.uint8), error, num_drafts, accepted, counters,
            rows, tiles, key_cache.shape[0] * block_size, requests, num_layers, positions,
            cache_table.stride(0), *staged_key.stride(),
            *k_strides[:5], *v_strides[:3], v_strides.inner,
            slots.stride(0), mask.stride(0), 0 if counters is None else counters.stride(0),
            num_drafts.stride(0), accepted.stride(0),
            H=heads, D=size, X=k_strides.x, BLOCK_SIZE=block_size,
            ROWS=tile, BLOCK=min(1024, triton.next_power_of_2(heads * size)), ALIGNED=aligned,
            COUNT=count,
            COUNT_R=min(256, triton.next_power_of_2(max(requests, 1))),
            COUNT_K=min(16, triton.next_power_of_2(max(positions, 1))),
        )  # fmt: skip
