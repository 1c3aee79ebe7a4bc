"""Launcher of `redirect`: a step's block table with its tails in tail blocks, and the rows that
those blocks share with the cache and do not have yet, in one launch a batch of layers. And of
`pass_table`: the block table of a step without a window.

The specifications are `redirect_reference` and `pass_reference` of `nwor_compile.tail_blocks`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.kernels.launch import KeptLaunch, bits, cache_strides

_COLUMNS = 1024  # block table entries of a program
_ROWS = 4  # cache rows at a time
_PROGRAMS = 2048  # copying programs, about: more would come one after another


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(
    do_not_specialize=[
        "first_block", "units", "requests", "table_rows", "columns", "table_programs", "parts",
        "each",
    ]
)  # fmt: skip
def _redirect_kernel(
    table, element, num_drafts, redirected, records, epoch, first_block, units,
    s_table, s_red_row, s_red_column,
    kc_block, kc_offset, kc_head, kc_inner, vc_block, vc_offset, vc_head, vc_inner,
    block_table, seq_lens, query_start_loc,
    s_bt_row, s_bt_column, s_length, s_start,
    requests, table_rows, columns, table_programs, parts, each,
    H: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """The first `table_programs` programs write the table, one a request and COLUMNS entries. Each
    of the others copies, of one request, `each` of its `units`: a layer's ROWS rows. `parts` of
    them are a request's. TAIL: tail blocks of a request.

    Records: NOTE [kept tails] in `nwor_compile.tail_blocks`.
    """
    program = tl.program_id(0)
    now = tl.load(epoch)
    if program < table_programs:
        r = program % table_rows
        length = tl.load(seq_lens + r * s_length, mask=r < requests, other=0).to(tl.int32)
        drafts = tl.load(num_drafts + r, mask=r < requests, other=0)
        first = (length - drafts) // BLOCK_SIZE
        last = tl.where(drafts > 0, (length - 1) // BLOCK_SIZE, -1)
        if (drafts > 0) & (program < table_rows):
            noted = records + r.to(tl.int64) * 8 + now % 2 * 4
            own_block = tl.load(block_table + r.to(tl.int64) * s_bt_row + first * s_bt_column)
            tl.store(noted, now + 1)
            tl.store(noted + 1, own_block)
            tl.store(noted + 2, first)
            tl.store(noted + 3, length)
        column = (program // table_rows) * COLUMNS + tl.arange(0, COLUMNS)
        entry = tl.load(
            block_table + r.to(tl.int64) * s_bt_row + column * s_bt_column,
            mask=column < columns, other=0,
        )  # fmt: skip
        moved = (column >= first) & (column <= last)
        entry = tl.where(moved, first_block + r * TAIL + column - first, entry)
        tl.store(
            redirected + r.to(tl.int64) * s_red_row + column * s_red_column, entry,
            mask=column < columns,
        )  # fmt: skip
        return
    program -= table_programs
    r = program // parts
    start = (program % parts) * each
    drafts = tl.load(num_drafts + r)
    length = tl.load(seq_lens + r * s_length).to(tl.int32)
    span = tl.load(query_start_loc + (r + 1) * s_start) - tl.load(query_start_loc + r * s_start)
    block = tl.maximum(length - drafts, 0) // BLOCK_SIZE
    place = tl.maximum(length - drafts, 0) % BLOCK_SIZE
    committed = length - span.to(tl.int32)
    kept = tl.minimum(place, tl.maximum(0, committed - block * BLOCK_SIZE))
    source = tl.load(
        block_table + r.to(tl.int64) * s_bt_row + block * s_bt_column, mask=drafts > 0, other=0
    ).to(tl.int64)
    noted = records + r.to(tl.int64) * 8 + (now + 1) % 2 * 4
    there = (tl.load(noted) == now) & (tl.load(noted + 1) == source)
    there = there & (tl.load(noted + 2) == block) & (committed <= tl.load(noted + 3))
    kept = tl.where(there | (drafts <= 0), 0, kept)
    if kept > 0:
        own = (first_block + r * TAIL).to(tl.int64)
        for unit in range(start, tl.minimum(start + each, units)):
            layer = unit // TILES
            tile = unit % TILES
            if tile * ROWS < kept:
                key_cache = tl.load(table + layer).to(element.dtype)
                value_cache = tl.load(table + s_table + layer).to(element.dtype)
                if ALIGNED:
                    key_cache = tl.multiple_of(key_cache, 16)
                    value_cache = tl.multiple_of(value_cache, 16)
                row = tile * ROWS + tl.arange(0, ROWS)
                for low in tl.static_range(0, H * D, BLOCK):
                    spot = low + tl.arange(0, BLOCK)[None, :]
                    head = (spot // D).to(tl.int64)
                    d = (spot % D).to(tl.int64)
                    inside = (row < kept)[:, None] & (spot < H * D)
                    to_key = row.to(tl.int64)[:, None] * kc_offset + head * kc_head + d * kc_inner
                    to_value = row.to(tl.int64)[:, None] * vc_offset + head * vc_head + d * vc_inner
                    key = tl.load(key_cache + source * kc_block + to_key, mask=inside)
                    value = tl.load(value_cache + source * vc_block + to_value, mask=inside)
                    tl.store(key_cache + own * kc_block + to_key, key, mask=inside)
                    tl.store(value_cache + own * vc_block + to_value, value, mask=inside)


@triton.jit(do_not_specialize=["table_rows", "columns", "parts"])
def _pass_kernel(
    redirected, epoch, s_red_row, s_red_column,
    block_table,
    s_bt_row, s_bt_column,
    table_rows, columns, parts,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """`parts` programs a row of the table; there is one at least, which counts the epoch up."""
    program = tl.program_id(0)
    if program == 0:
        tl.store(epoch, tl.load(epoch) + 1)
    r = program // parts
    column = (program % parts) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < tl.where(r < table_rows, columns, 0)
    from_row = block_table + r.to(tl.int64) * s_bt_row
    to_row = redirected + r.to(tl.int64) * s_red_row
    entry = tl.load(from_row + column * s_bt_column, mask=inside, other=0)
    tl.store(to_row + column * s_red_column, entry, mask=inside)


class RedirectConstants(NamedTuple):
    """What every launch over a `RedirectPlan` has in common. units: a layer's _ROWS rows each."""

    kept: KeptLaunch
    passing: KeptLaunch
    constants: tuple[int, ...]
    units: int
    write_table: bool


def redirect_constants(plan: Any) -> RedirectConstants:
    """The constants of `plan`, a `RedirectPlan`."""
    key_cache, value_cache, tail = plan.key_caches[0], plan.value_caches[0], plan.tail
    heads, size = key_cache.shape[2:]
    k_strides, v_strides = cache_strides(key_cache, value_cache)
    tiles = max(1, triton.cdiv(tail.block_size - 1, _ROWS))
    units = tiles * len(plan.key_caches)
    fixed = (
        plan.cache_table, bits(key_cache), plan.num_drafts, plan.redirected, plan.records,
        plan.epoch, plan.first_block, units, plan.cache_table.stride(0), *plan.redirected.stride(),
        *k_strides[:3], k_strides.inner, *v_strides[:3], v_strides.inner,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(heads * size))
    return RedirectConstants(
        KeptLaunch(_redirect_kernel, key_cache.device, fixed, num_warps=4),
        KeptLaunch(
            _pass_kernel, key_cache.device,
            (plan.redirected, plan.epoch, *plan.redirected.stride()), num_warps=4,
        ),
        (
            heads, size, tail.block_size, tail.rows // tail.block_size, _ROWS, block, _COLUMNS,
            tiles, int(plan.aligned),
        ),
        units,
        plan.write_table,
    )  # fmt: skip


def redirect(plan: Any, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor) -> None:
    """`nwor_compile.tail_blocks.redirect_reference` in one launch."""
    kept, _, constants, units, write_table = plan.constants
    (requests,), (table_rows, columns) = seq_lens.shape, block_table.shape
    tables = table_rows * -(-columns // _COLUMNS) if write_table else 0
    each = -(-units * requests // _PROGRAMS)
    parts = -(-units // each)
    kept(
        tables + parts * requests,
        (block_table, seq_lens, query_start_loc),
        (*block_table.stride(), *seq_lens.stride(), *query_start_loc.stride()),
        (requests, table_rows, columns, tables, parts, each),
        constants,
    )


def pass_table(plan: Any, block_table: Tensor) -> None:
    """`nwor_compile.tail_blocks.pass_reference` in one launch."""
    rows, columns = block_table.shape
    parts = max(1, -(-columns // _COLUMNS))
    plan.constants.passing(
        max(1, rows * parts), (block_table,), block_table.stride(), (rows, columns, parts),
        (_COLUMNS,),
    )  # fmt: skip
