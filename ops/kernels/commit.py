"""Launcher of `commit_kv`: every layer of a cache group, and the counters, in one kernel.

A window's first commit closes the window in the same launch.

NOTE [order]: programs of one launch run in any order, so none may read what another writes.
- Closing overwrites mask and accepted counts only where the error flag is up. The flag is constant
  from the judge to the next begin, and whoever reads mask or counts drops what it read where the
  flag is up. That holds within the launch and for the launches of the other batches.
- Clamping reads and writes `num_sampled` and `num_rejected` in one program; no other reads them.
- The routing is read by stage, attention and the judge, which are launches before this one. Commits
  read the copy of the draft counts that begin made, and so does the counting program.
- Staging rows may lie in the caches that are written, in blocks that no slot addresses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.commit import Closing, CommitPlan
from nwor_compile.ops.commit import cache_table as make_cache_table
from nwor_compile.ops.counters import COUNTERS, FIXED
from nwor_compile.ops.kernels.launch import bits, cache_strides, element_offset, launch, on_device

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
def count_position(counters, copy, mirrored, place, amount, mask):
    """Add to the counters at `place`; if `mirrored` is 1, not 0, leave the sums in `copy` too."""
    # Only one program of the grid counts, so no atomic is needed.
    now = tl.load(counters + place, mask=mask) + amount
    tl.store(counters + place, now, mask=mask)
    tl.store(copy + place, now, mask=tl.where(mask, mirrored, 0) != 0)


@triton.jit
def count_totals(
    counters, copy, mirrored, staged, committed, failed, num_layers, s_counter
):  # fmt: skip
    """Add a window to the counters that are no positions. staged, committed: int64 `[1]`, rows."""
    one = tl.arange(0, 1)
    yes = one == 0
    errors = tl.zeros([1], tl.int64) + tl.where(failed == 0, 0, 1)
    windows = (staged > 0).to(tl.int64)
    count_position(counters, copy, mirrored, _WINDOWS * s_counter + one, windows, yes)
    count_position(counters, copy, mirrored, _STAGED * s_counter + one, staged, yes)
    count_position(counters, copy, mirrored, _COMMITTED * s_counter + one, committed, yes)
    rejected = staged - committed
    count_position(counters, copy, mirrored, _REJECTED * s_counter + one, rejected, yes)
    operations = staged * num_layers
    count_position(counters, copy, mirrored, _STAGE_OPERATIONS * s_counter + one, operations, yes)
    count_position(counters, copy, mirrored, _ERRORS * s_counter + one, errors, yes)


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
    count_totals(counters, counters, 0, staged, committed, failed, num_layers, s_counter)
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
        place = (_FIXED + position) * s_counter
        count_position(counters, counters, 0, place, drafted, position < positions)
        place += positions * s_counter
        count_position(counters, counters, 0, place, kept, position < positions)


@triton.jit
def close_routing(row_map, open_drafts, tokens, max_requests, BLOCK: tl.constexpr):
    """Make the routing say that every token is certain."""
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        tl.store(row_map + token, tl.zeros([BLOCK], tl.int32) - 1, mask=token < tokens)
    for first in range(0, max_requests, BLOCK):
        request = first + tl.arange(0, BLOCK)
        tl.store(open_drafts + request, tl.zeros([BLOCK], tl.int32), mask=request < max_requests)


@triton.jit
def _close(
    failed, mask, accepted, num_sampled, num_rejected, row_map, open_drafts,
    rows, requests, tokens, max_requests, BLOCK: tl.constexpr,
):  # fmt: skip
    """`nwor_compile.ops.commit.Closing` says what this does. See NOTE [order]."""
    for first in range(0, requests, BLOCK):
        request = first + tl.arange(0, BLOCK)
        real = request < requests
        taken = tl.load(accepted + request, mask=real, other=0)
        taken = tl.where(failed == 0, taken, 0)
        said = tl.load(num_sampled + request, mask=real, other=0)
        refused = tl.load(num_rejected + request, mask=real, other=0)
        kept = tl.minimum(said, taken + 1)
        tl.store(accepted + request, taken, mask=request < tl.where(failed == 0, 0, requests))
        tl.store(num_sampled + request, kept, mask=real)
        tl.store(num_rejected + request, refused + said - kept, mask=real)
    for first in range(0, tl.where(failed == 0, 0, rows), BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(mask + row, tl.zeros([BLOCK], tl.uint8), mask=row < rows)
    close_routing(row_map, open_drafts, tokens, max_requests, BLOCK)


@triton.jit
def move_rows(
    valid, row, slot, layer, table, element,
    s_table, sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
    kc_block, kc_offset, kc_head, kc_outer, kc_inner, vc_block, vc_offset, vc_head, vc_inner,
    H: tl.constexpr, D: tl.constexpr, X: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Staging rows `row` of one layer to `slot`, where `valid`; vectors of one length."""
    # `element` only lends its type: the table holds plain addresses. Loaded before it is known that
    # they are needed, so as not to wait.
    key_cache = tl.load(table + layer).to(element.dtype)
    value_cache = tl.load(table + s_table + layer).to(element.dtype)
    staged_key = tl.load(table + 2 * s_table + layer).to(element.dtype)
    staged_value = tl.load(table + 3 * s_table + layer).to(element.dtype)
    if tl.max(valid.to(tl.int32), axis=0) > 0:
        if ALIGNED:
            key_cache = tl.multiple_of(key_cache, 16)
            value_cache = tl.multiple_of(value_cache, 16)
            staged_key = tl.multiple_of(staged_key, 16)
            staged_value = tl.multiple_of(staged_value, 16)
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        from_key = (row.to(tl.int64) * sk_row)[:, None]
        from_value = (row.to(tl.int64) * sv_row)[:, None]
        key_row = (block * kc_block + offset * kc_offset)[:, None]
        value_row = (block * vc_block + offset * vc_offset)[:, None]
        for start in tl.static_range(0, H * D, BLOCK):
            place = start + tl.arange(0, BLOCK)[None, :]
            head = (place // D).to(tl.int64)
            d = (place % D).to(tl.int64)
            inside = valid[:, None] & (place < H * D)
            key = tl.load(staged_key + (from_key + head * sk_head + d * sk_d), mask=inside)
            value = tl.load(staged_value + (from_value + head * sv_head + d * sv_d), mask=inside)
            to_key = element_offset(place % D, kc_outer, kc_inner, D, X)
            tl.store(key_cache + (key_row + head * kc_head + to_key), key, mask=inside)
            tl.store(value_cache + (value_row + head * vc_head + d * vc_inner), value, mask=inside)


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(
    do_not_specialize=[
        "moved", "tiles", "requests", "num_layers", "positions", "tokens", "max_requests", "judged",
    ]
)  # fmt: skip
def _commit_kernel(
    table, element, slots, rows, mask, error, num_drafts, accepted, counters,
    num_sampled, num_rejected, row_map, open_drafts,
    moved, tiles, slots_in_cache, staged_rows, requests, num_layers, positions, tokens,
    max_requests, judged,
    s_table, sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
    kc_block, kc_offset, kc_head, kc_outer, kc_inner,
    vc_block, vc_offset, vc_head, vc_inner,
    s_slot, s_place, s_mask, s_counter, s_drafts, s_accepted,
    H: tl.constexpr, D: tl.constexpr, X: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PLACED: tl.constexpr,
    COUNT: tl.constexpr, COUNT_R: tl.constexpr, COUNT_K: tl.constexpr, CLOSE: tl.constexpr,
):  # fmt: skip
    """Program l * tiles + i moves the accepted rows of tile i to the caches of layer l. With COUNT,
    one before them counts, because that takes the longest; with CLOSE, one closes the window."""
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
    if CLOSE:
        if program == 0:
            _close(
                failed, mask, accepted, num_sampled, num_rejected, row_map, open_drafts,
                judged, requests, tokens, max_requests, 1024,
            )  # fmt: skip
            return
        program -= 1
    tile = program % tiles
    layer = (program // tiles).to(tl.int64)
    draft = tile * ROWS + tl.arange(0, ROWS)
    real = draft < tl.where(failed == 0, moved, 0)  # an error: no row moves
    slot = tl.load(slots + draft * s_slot, mask=real, other=-1).to(tl.int64)
    wanted = tl.load(mask + draft * s_mask, mask=real, other=0) != 0
    valid = wanted & (slot >= 0) & (slot < slots_in_cache)
    if PLACED:
        row = tl.load(rows + draft * s_place, mask=real, other=-1)
        valid &= (row >= 0) & (row < staged_rows)
    else:
        row = draft
    move_rows(
        valid, row, slot, layer, table, element,
        s_table, sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
        kc_block, kc_offset, kc_head, kc_outer, kc_inner, vc_block, vc_offset, vc_head, vc_inner,
        H, D, X, BLOCK_SIZE, BLOCK, ALIGNED,
    )  # fmt: skip


class Constants(NamedTuple):
    """What every launch over a `CommitPlan` has in common."""

    element: Tensor
    layers: int
    sizes: tuple[int, int]  # slots in the cache, staging rows
    strides: tuple[int, ...]
    meta: dict[str, Any]


def constants_of(plan: CommitPlan) -> Constants:
    """The constants of `plan`."""
    key_cache, value_cache = plan.key_caches[0], plan.value_caches[0]
    staged_key, staged_value = plan.staged_keys[0], plan.staged_values[0]
    staged_rows, heads, size = staged_key.shape
    k_strides, v_strides = cache_strides(key_cache, value_cache)
    block_size = key_cache.shape[3] if key_cache.dim() == 5 else key_cache.shape[1]
    lists = (plan.key_caches, plan.value_caches, plan.staged_keys, plan.staged_values)
    return Constants(
        element=bits(key_cache),
        layers=len(plan.key_caches),
        sizes=(key_cache.shape[0] * block_size, staged_rows),
        strides=(
            plan.table.stride(0), *staged_key.stride(), *staged_value.stride(),
            *k_strides[:5], *v_strides[:3], v_strides.inner,
        ),
        meta={
            "H": heads, "D": size, "X": k_strides.x, "BLOCK_SIZE": block_size,
            "BLOCK": min(1024, triton.next_power_of_2(heads * size)),
            # Without it the compiler must assume element-aligned addresses and moves one at a time.
            "ALIGNED": all(tensor.data_ptr() % 16 == 0 for row in lists for tensor in row),
        },
    )  # fmt: skip


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
    """`nwor_compile.ops.commit.commit_batch` in one launch."""
    constants = plan.constants
    moved, requests = mask.shape[0], accepted.shape[0]
    tile = 4 if moved >= _MANY_ROWS else 1
    tiles = (moved + tile - 1) // tile
    programs = tiles * constants.layers + (counters is not None) + (closing is not None)
    if programs == 0:
        return
    flags, positions, s_counter = mask.view(torch.uint8), 0, 0
    if counters is not None:
        positions, s_counter = (counters.shape[0] - FIXED) // 2, counters.stride(0)
    num_sampled = num_rejected = row_map = open_drafts = None
    tokens = max_requests = judged = 0
    if closing is not None:
        verdict, row_map, open_drafts = closing.verdict, closing.row_map, closing.num_drafts
        num_sampled, num_rejected = verdict.num_sampled, verdict.num_rejected
        tokens, max_requests, judged = (
            row_map.shape[0], open_drafts.shape[0], verdict.mask.shape[0],
        )  # fmt: skip
        if moved == 0:
            flags = verdict.mask.view(torch.uint8)
    with on_device(error):
        launch(
            _commit_kernel, (programs,),
            plan.table, constants.element, slots, rows, flags, error, num_drafts, accepted,
            counters, num_sampled, num_rejected, row_map, open_drafts,
            moved, max(1, tiles), *constants.sizes, requests, num_layers, positions, tokens,
            max_requests, judged,
            *constants.strides,
            slots.stride(0), 0 if rows is None else rows.stride(0), mask.stride(0), s_counter,
            num_drafts.stride(0), accepted.stride(0),
            ROWS=tile, PLACED=rows is not None,
            COUNT=counters is not None, COUNT_R=64 if requests <= 64 else 512,
            COUNT_K=min(16, triton.next_power_of_2(max(positions, 1))), CLOSE=closing is not None,
            **constants.meta,
        )  # fmt: skip


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
    """`commit_kv_reference` in one launch."""
    lists = (key_caches, value_caches, staged_keys, staged_values)
    if cache_table is None:
        cache_table = make_cache_table(*lists)
    commit_batch(
        CommitPlan(*lists, cache_table), slots, rows, mask, error, num_drafts, accepted, counters,
        num_layers, None,
    )  # fmt: skip
