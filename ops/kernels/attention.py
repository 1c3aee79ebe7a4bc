"""Launchers of `paged_attention` and `verify_attention`: flash decoding over a paged cache.

A program computes one chunk of the step's work (`schedule` says what that is): a tile of tokens of
one request and one KV head, the query heads that share it packed into the rows of the tile, against
a run of KV tiles: first those that every token sees whole in the cache, without masks; then the
last one or two, where a row of the tail `[seq_len - num_drafts, seq_len)` is fetched through
another pointer, chosen before the load.

NOTE [same bits]: `verify_attention` equals `paged_attention` over a cache that holds the same rows
bit for bit. Both take the same plan, chunks, tiles and order, and what follows a load does not know
where a row came from. They may disagree on which tiles are whole: masking nothing changes no bit,
because the compiler may not fuse a multiplication and an addition here and not there
(`enable_fp_fusion`).

NOTE [zero-filled V]: rows that no token of the tile can see are never loaded (they may hold
poison; 0 x NaN is NaN). A row that a later token of the tile sees is loaded for all of them: NaN
in it reaches the earlier tokens of its own request, as it does in FlashAttention.

NOTE [grid]: the grid comes from shapes alone, for CUDA graphs, and has room for every cut that
`schedule` makes. A program finds its chunk by counting; those left over come last, so that they do
not hold a place on the device that another waits for.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nwor_compile.ops.kernels.fp8 import NATIVE
from nwor_compile.ops.kernels.launch import (
    FP8_CODE,
    INTERPRETED,
    bits,
    cache_strides,
    decodes_fp8,
    element_offset,
    launch,
    on_device,
    overlaps,
    scale_stride,
)
from nwor_compile.ops.kernels.merge import FIELDS, FIRST_PIECE, IN_UNIT, PIECES, merge_kernel
from nwor_compile.ops.kernels.schedule import kv_tiles, line_of_chunks, quotient, request_at
from nwor_compile.ops.kernels.tiles import LOG2E, blocks_of, store_out, walk

# Counts change from step to step: specialising on them would compile again in the middle of one.
_COUNTS = ["tokens", "requests", "shares", "table_width", "blocks", "staging_rows", "s_table"]


@triton.jit(do_not_specialize=_COUNTS)
def _attention_kernel(
    query, key_cache, value_cache, staged_key, staged_value, block_table, seq_lens,
    query_start_loc, num_drafts, tail_start, k_scale, v_scale, out, part, part_max, part_sum,
    notes, tokens, requests, shares, table_width, blocks, staging_rows, score_scale, softcap,
    s_token, s_head, s_d,
    kc_block, kc_offset, kc_head, kc_outer, kc_inner,
    vc_block, vc_offset, vc_head, vc_inner,
    sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
    s_table, s_column, s_len, s_start, s_drafts, s_tail, s_k_scale, s_v_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    X: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FP8: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr, TAIL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    UPCAST: tl.constexpr, EXACT_BF16: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
    SPLIT: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program p * KV heads + h: chunk p of the line, for KV head h."""
    PER: tl.constexpr = M // GROUP  # tokens of a tile
    KV_HEADS: tl.constexpr = HEADS // GROUP
    if OVERLAP:  # see NOTE [overlap] in `merge`
        gdc_wait()
        gdc_launch_dependents()
    program = tl.program_id(0)
    kv_head = (program % KV_HEADS).to(tl.int64)
    place = program // KV_HEADS
    room = table_width * BLOCK_SIZE
    ends, chunk = line_of_chunks(
        query_start_loc, seq_lens, s_start, s_len, requests, tokens, room, shares,
        PER, N, WINDOW, R, SPLIT,
    )  # fmt: skip
    if place >= tl.max(ends, axis=0):
        return

    m = tl.arange(0, M)
    d = tl.arange(0, D_PAD)
    head = kv_head * GROUP + m % GROUP
    request, begin = request_at(ends, place)
    owned = request < requests  # else these tokens are padding
    start = tl.load(query_start_loc + request * s_start).to(tl.int32)
    # Masks and no branch: the loads do not wait for each other.
    end = tl.load(query_start_loc + (request + 1) * s_start, mask=owned, other=tokens)
    end = end.to(tl.int32)
    length = tl.load(seq_lens + request * s_len, mask=owned, other=0).to(tl.int32)
    drafts = 0
    tail = 0
    if TAIL:
        drafts = tl.load(num_drafts + request * s_drafts, mask=owned, other=0).to(tl.int32)
        tail = tl.load(tail_start + request * s_tail, mask=owned, other=0).to(tl.int32)
    pieces = 1
    if SPLIT:
        pieces = quotient(kv_tiles(length, room, PER, N, WINDOW) + chunk - 1, chunk)
    tile = place - begin
    number = 0
    if SPLIT:
        tile = quotient(place - begin, pieces)
        number = place - begin - tile * pieces
    first_token = start + tile * PER

    token = first_token + m // GROUP
    real = (token < end) & (token < tokens) & (m < PER * GROUP)
    first_position = length - end + first_token
    high = tl.minimum(length - end + tl.minimum(first_token + PER, end), length)
    high = tl.where(owned & (first_token < end), high, 0)
    high = tl.minimum(high, room)  # past the last position that is seen
    # Position of a token: the last one of the request is at length - 1. Padding sees nothing.
    position = tl.minimum(length - end + token, high - 1)
    position = tl.where(real & owned, position, -1)
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(first_position - WINDOW + 1, 0)
    from_tile = first_seen // N + number * chunk
    to_tile = tl.minimum(from_tile + chunk, (tl.maximum(high, 0) + N - 1) // N)
    # Of them, the tiles that lie in the cache and that every token sees to their last row.
    whole_tile = tl.maximum(tl.minimum(length - drafts, first_position + 1), 0) // N
    whole_tile = tl.maximum(tl.minimum(whole_tile, to_tile), from_tile)

    scale = score_scale
    if K_SCALED:
        scale = scale * tl.load(k_scale + kv_head * s_k_scale)
    if not SOFTCAP:
        scale = scale * LOG2E  # exp2 is the faster one
    key = (key_cache + kv_head * kc_head, kc_block, kc_offset,
           element_offset(d, kc_outer, kc_inner, D, X))  # fmt: skip
    value = (value_cache + kv_head * vc_head, vc_block, vc_offset,
             element_offset(d, 0, vc_inner, D, D))  # fmt: skip
    key_tail = (staged_key + kv_head * sk_head, sk_row, d.to(tl.int64) * sk_d, staging_rows)
    value_tail = (staged_value + kv_head * sv_head, sv_row, d.to(tl.int64) * sv_d, staging_rows)

    q_place = query + (token.to(tl.int64) * s_token + head * s_head)[:, None]
    keep = real[:, None] & (d < D)[None, :]
    q = tl.load(q_place + d.to(tl.int64)[None, :] * s_d, mask=keep, other=0)
    q = q.to(tl.float32 if UPCAST else query.dtype.element_ty)
    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PAD], tl.float32)
    table = block_table + request.to(tl.int64) * s_table
    width = tl.where(from_tile < to_tile, table_width, 0)
    block = blocks_of(table, s_column, from_tile, width, blocks - 1, N, BLOCK_SIZE)
    best, total, acc, block = walk(
        q, best, total, acc, block, from_tile, whole_tile, table, s_column, width, blocks - 1,
        key, value, key_tail, value_tail, tail, length - drafts, drafts, position, first_seen,
        high, scale, softcap,
        D, D_PAD, N, BLOCK_SIZE, True, False, WINDOW, SOFTCAP, FP8, WIDE, ALIKE,
    )  # fmt: skip
    best, total, acc, block = walk(
        q, best, total, acc, block, whole_tile, to_tile, table, s_column, width, blocks - 1,
        key, value, key_tail, value_tail, tail, length - drafts, drafts, position, first_seen,
        high, scale, softcap,
        D, D_PAD, N, BLOCK_SIZE, False, TAIL, WINDOW, SOFTCAP, FP8, WIDE, ALIKE,
    )  # fmt: skip

    if V_SCALED:
        acc = acc * tl.load(v_scale + kv_head * s_v_scale)
    if pieces == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        line = token.to(tl.int64) * HEADS + head
        store_out(out + line[:, None] * D + d[None, :], acc, keep, EXACT_BF16)
    else:
        line = program.to(tl.int64) * M + m
        tl.store(part_max + line, best, mask=real)
        tl.store(part_sum + line, total, mask=real)
        tl.store(part + line[:, None] * D + d[None, :], acc, mask=keep)
    if SPLIT:  # noqa: SIM102 (decided at compile time)
        if number == 0:  # every KV head writes the same
            note = notes + token * FIELDS
            known = real & (m % GROUP == 0)
            tl.store(note + FIRST_PIECE, tl.zeros([M], tl.int32) + place, mask=known)
            tl.store(note + PIECES, tl.zeros([M], tl.int32) + pieces, mask=known)
            tl.store(note + IN_UNIT, token - first_token, mask=known)


class Plan(NamedTuple):
    """Tile sizes and grid of one launch; a function of shapes, so that graphs can replay it."""

    m: int  # rows of a query tile: tokens x query heads of a KV head
    n: int  # KV positions a step
    shares: int  # programs a KV head that run at once
    warps: int
    stages: int
    registers: int  # the most a thread may take; 0: no limit
    merge_warps: int  # for 4096 elements of pieces


_forced: dict[str, int] = {}


@contextlib.contextmanager
def forced(**changes: int) -> Iterator[None]:
    """Launch with these fields of `Plan` instead of the chosen ones, for tests and measurements.

    Raises ValueError for a name that is no field of `Plan`.
    """
    unknown = [name for name in changes if name not in Plan._fields]
    if unknown:
        raise ValueError(f"forced: {unknown} are no fields of Plan {Plan._fields}")
    before = dict(_forced)
    _forced.update(changes)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


@functools.cache
def _processors(index: int | None) -> int:
    """Multiprocessors of a CUDA device; a small number in the interpreter, so that it splits."""
    if index is None:
        return 4
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _shared_memory(index: int | None) -> int:
    """Bytes of shared memory that a program may have."""
    if index is None:
        return 2**17
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]


def _is_wide(cache: Tensor) -> bool:
    """Whether offsets of elements need 64 bits."""
    last = sum((n - 1) * stride for n, stride in zip(cache.shape, cache.stride(), strict=True))
    return last >= 2**31


def plan(
    tokens: int, requests: int, group: int, kv_heads: int, size: int, itemsize: int,
    processors: int, shared: int,
) -> Plan:  # fmt: skip
    """Tiles for `requests` with `tokens` in all, of query elements of `itemsize` bytes."""
    per_request = triton.cdiv(tokens, max(requests, 1))
    pad = triton.next_power_of_2(size)
    m = min(64, triton.next_power_of_2(per_request * group))
    m = max(16, m, triton.next_power_of_2(group))
    n = 32 if pad > 128 or itemsize == 4 else 64
    warps = 8 if m * pad > 8192 else 4
    # K and V of a tile are loaded two tiles ahead, where shared memory holds three.
    stages = (shared - m * (pad + n) * itemsize) // (2 * n * pad * itemsize)
    at_once = processors * (2 if warps == 4 else 1)
    shares, stages = max(1, at_once // kv_heads), max(1, min(stages, 3))
    return Plan(**Plan(m, n, shares, warps, stages, 0, 1)._asdict() | _forced)


def verify_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor | None,
    staged_value: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor | None,
    tail_start: Tensor | None,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`verify_attention_reference`; without staging, `paged_attention_reference`.

    out: contiguous, like `query`, to write the result to; None makes one.
    """
    tokens, heads, size = query.shape
    requests = seq_lens.shape[0]
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    k_strides, v_strides = cache_strides(key_cache, value_cache)
    five_d = key_cache.dim() == 5
    block_size = key_cache.shape[3] if five_d else key_cache.shape[1]
    kv_heads = key_cache.shape[1] if five_d else key_cache.shape[2]
    group = heads // kv_heads
    fp8 = FP8_CODE[kv_cache_dtype]
    if fp8 and decodes_fp8(query.device.index):
        fp8 += NATIVE.value
    if fp8:
        key_cache, value_cache = bits(key_cache), bits(value_cache)
    tail = staged_key is not None
    staged_strides: tuple[int, ...]
    if staged_key is None or staged_value is None:
        staged_key, staged_value, staged_strides = key_cache, value_cache, (0,) * 6
    else:
        staged_strides = (*staged_key.stride(), *staged_value.stride())
        if fp8:
            staged_key, staged_value = bits(staged_key), bits(staged_value)
    upcast = INTERPRETED or query.dtype == torch.float32
    exact_bf16 = INTERPRETED and query.dtype == torch.bfloat16
    p = plan(
        tokens, requests, group, kv_heads, size, 4 if upcast else 2,
        _processors(query.device.index), _shared_memory(query.device.index),
    )  # fmt: skip
    room = block_table.shape[1] * block_size
    per = p.m // group
    programs = (tokens + (requests + 1) * (per - 1)) // per  # the most units that there can be
    # Many units fill the device whole; and what a cut needs of memory must not grow with them.
    split = p.shares > 1 and room > p.n and programs <= 4 * p.shares
    part = part_max = part_sum = notes = out
    padded = triton.next_power_of_2(size)
    at_once = 1
    if split:
        # About as many pieces as a unit has where requests are alike; more take another round.
        at_once = triton.next_power_of_2(triton.cdiv(p.shares, programs))
        at_once = max(2, min(at_once, 8192 // padded))
        programs = p.shares if programs <= p.shares else programs + 2 * p.shares
        lines = (programs * kv_heads, p.m)
        part = torch.empty((*lines, size), dtype=torch.float32, device=query.device)
        part_max = torch.empty(lines, dtype=torch.float32, device=query.device)
        part_sum = torch.empty(lines, dtype=torch.float32, device=query.device)
        notes = torch.empty((tokens, FIELDS.value), dtype=torch.int32, device=query.device)
    wide = any(map(_is_wide, (key_cache, value_cache, staged_key, staged_value)))
    overlap = overlaps(query.device.index)
    shape = {
        "HEADS": heads, "GROUP": group, "D": size, "D_PAD": padded, "M": p.m,
        "EXACT_BF16": exact_bf16, "OVERLAP": overlap,
    }  # fmt: skip
    with on_device(query):
        launch(
            _attention_kernel, (programs * kv_heads,),
            query, key_cache, value_cache, staged_key, staged_value, block_table, seq_lens,
            query_start_loc, num_drafts, tail_start, k_scale, v_scale, out, part, part_max,
            part_sum, notes,
            tokens, requests, p.shares, block_table.shape[1], key_cache.shape[0],
            staged_key.shape[0], float(scale), float(softcap),
            *query.stride(), *k_strides[:5], *v_strides[:3], v_strides.inner, *staged_strides,
            *block_table.stride(), seq_lens.stride(0), query_start_loc.stride(0),
            0 if num_drafts is None else num_drafts.stride(0),
            0 if tail_start is None else tail_start.stride(0),
            scale_stride(k_scale), scale_stride(v_scale),
            **shape, N=p.n, X=k_strides.x, BLOCK_SIZE=block_size, WINDOW=sliding_window,
            SOFTCAP=softcap > 0, FP8=fp8,
            K_SCALED=fp8 > 0 and k_scale is not None, V_SCALED=fp8 > 0 and v_scale is not None,
            # One lane a request and one for padding.
            R=max(32, triton.next_power_of_2(requests + 1)),
            TAIL=tail, UPCAST=upcast, WIDE=wide, SPLIT=split,
            ALIKE=tail and k_strides.x == size and v_strides.inner == 1
            and (k_strides.inner, *staged_strides[2::3]) == (1, 1, 1),
            num_warps=p.warps, num_stages=p.stages, maxnreg=p.registers or None,
            enable_fp_fusion=False, launch_pdl=overlap,
        )  # fmt: skip
        if split:
            launch(
                merge_kernel, (tokens * heads,), out, part, part_max, part_sum, notes, **shape,
                AT_ONCE=at_once, launch_pdl=overlap,
                num_warps=p.merge_warps * max(1, at_once * padded // 4096),
            )  # fmt: skip
    return out


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`paged_attention_reference`."""
    return verify_attention(
        query, key_cache, value_cache, None, None, block_table, seq_lens, query_start_loc, None,
        None, scale, sliding_window, softcap, kv_cache_dtype, k_scale, v_scale,
    )  # fmt: skip


def paged_attention_out(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """`paged_attention_out_reference`."""
    verify_attention(
        query, key_cache, value_cache, None, None, block_table, seq_lens, query_start_loc, None,
        None, scale, sliding_window, softcap, kv_cache_dtype, k_scale, v_scale, out,
    )  # fmt: skip
