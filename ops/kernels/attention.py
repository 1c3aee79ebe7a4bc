"""Launchers of `paged_attention` and `verify_attention`: flash decoding over a paged cache.

A program serves a tile of tokens of one request and one KV head, the query heads that share it
packed into the rows of the tile, and walks a share of the KV positions. Rows of the tail
`[seq_len - num_drafts, seq_len)` are fetched through another pointer, chosen per row before the
load; what follows does not know where a row came from. So `verify_attention` equals
`paged_attention` over a cache that holds the same rows bit for bit: same plan, same tiles, same
order.

NOTE [zero-filled V]: rows that no token of the tile can see are never loaded (they may hold
poison; 0 x NaN is NaN). A row that a later token of the tile sees is loaded for all of them: NaN
in it reaches the earlier tokens of its own request, as it does in FlashAttention.

NOTE [grid]: the grid comes from shapes alone, for CUDA graphs. Request r starts at tile
`query_start_loc[r] // tokens_per_tile + r`, which leaves room for its last, partial tile; a program
finds its request by comparing with all of them. Padding tokens are one more request, which sees
nothing.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nwor_compile.ops.kernels.fp8 import decode_fp8, round_bf16
from nwor_compile.ops.kernels.launch import (
    FP8_CODE,
    INTERPRETED,
    bits,
    cache_strides,
    element_offset,
    on_device,
    scale_stride,
)

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_request(query_start_loc, s_start, requests, tile, PER: tl.constexpr, R: tl.constexpr):
    """The request that owns query tile `tile`; see NOTE [grid]."""
    found = -1
    for first in range(0, requests + 1, R):
        r = first + tl.arange(0, R)
        start = tl.load(query_start_loc + r * s_start, mask=r <= requests, other=0).to(tl.int32)
        begun = (r <= requests) & (start // PER + r <= tile)
        found += tl.sum(begun.to(tl.int32), axis=0)
    return found


@triton.jit
def _tile_blocks(table, s_column, tile, width, last, N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """The cache block of each position of a KV tile; 0 past the `width` of the table.

    Entries past the request's length may be garbage. Their rows are not loaded, and the clamp keeps
    a corrupt entry inside the cache.
    """
    if N % BLOCK_SIZE == 0:
        column = tile * (N // BLOCK_SIZE) + tl.arange(0, N) // BLOCK_SIZE
    else:
        column = (tile * N + tl.arange(0, N)) // BLOCK_SIZE
    block = tl.load(table + column * s_column, mask=column < width, other=0)
    return tl.minimum(tl.maximum(block, 0), last).to(tl.int32)


@triton.jit
def _cache_rows(
    cache, block, p, element, s_block, s_offset,
    N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pointers to the cache rows `[N, D]` at positions `p`, which start a KV tile."""
    # Whole blocks: the place in a block is the same for every tile, so it leaves the loop.
    offset = tl.arange(0, N) % BLOCK_SIZE if N % BLOCK_SIZE == 0 else p % BLOCK_SIZE
    if WIDE:
        row = block.to(tl.int64) * s_block + offset.to(tl.int64) * s_offset
    else:
        row = block * s_block + offset * s_offset
        element = element.to(tl.int32)
    return cache + (row[:, None] + element[None, :])


@triton.jit
def _choose_rows(
    cache, staged, in_tail, row, d, s_row, s_d, TAIL: tl.constexpr,
):  # fmt: skip
    """The pointers `cache`, or for rows in the tail those of their staging row."""
    if not TAIL:
        return cache
    place = (staged + row * s_row)[:, None] + (d.to(tl.int64) * s_d)[None, :]
    return tl.where(in_tail[:, None], place, cache)


@triton.jit
def _operand(rows, FP8: tl.constexpr, like: tl.constexpr):
    """Rows as an operand of tl.dot. fp8 scales are applied to the scores and the output."""
    if FP8 > 0:
        return decode_fp8(rows, FP8).to(like)
    return rows.to(like)


@triton.jit
def _attend(
    q, k, v, seen, scale, softcap, best, total, acc,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """One step of the softmax over a KV tile. Masking nothing gives the bits of no mask."""
    score = tl.dot(q, tl.trans(k), input_precision=precision) * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); core Triton has no tanh.
        score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (score / softcap)) + 1.0)) * _LOG2E
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    new_best = tl.maximum(best, tl.max(score, axis=1))
    # A row that has seen nothing keeps -inf; subtract 0 there, or -inf - -inf is NaN.
    finite = tl.where(new_best == float("-inf"), 0.0, new_best)
    shrink = tl.exp2(best - finite)
    weight = tl.exp2(score - finite[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
    return new_best, total, acc


@triton.jit
def _store_out(out, acc, mask, EXACT_BF16: tl.constexpr):
    if EXACT_BF16:
        tl.store(out, round_bf16(acc), mask=mask)
    else:
        tl.store(out, acc.to(out.dtype.element_ty), mask=mask)


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(
    do_not_specialize=["tokens", "requests", "table_width", "blocks", "staging_rows", "s_table"]
)
def _attention_kernel(
    query, key_cache, value_cache, staged_key, staged_value, block_table, seq_lens,
    query_start_loc, num_drafts, tail_start, k_scale, v_scale, out, part, part_max, part_sum,
    tokens, requests, table_width, blocks, staging_rows, score_scale, softcap,
    s_token, s_head, s_d,
    kc_block, kc_offset, kc_head, kc_outer, kc_inner,
    vc_block, vc_offset, vc_head, vc_inner,
    sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
    s_table, s_column, s_len, s_start, s_drafts, s_tail, s_k_scale, s_v_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    X: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FP8: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr, TAIL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr,
    UPCAST: tl.constexpr, EXACT_BF16: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, h, s): query tile i, KV head h, share s of the KV tiles."""
    PER: tl.constexpr = M // GROUP  # tokens of a tile
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    splits = tl.num_programs(2)
    if PDL:
        gdc_launch_dependents()  # the merge may start up, and waits for the end of this kernel
    request = _find_request(query_start_loc, s_start, requests, tile, PER, R)
    owned = request < requests  # else these tokens are padding
    start = tl.load(query_start_loc + request * s_start).to(tl.int32)
    end = tokens
    length = 0
    drafts = 0
    tail = tl.full([], 0, tl.int64)
    if owned:
        end = tl.load(query_start_loc + (request + 1) * s_start).to(tl.int32)
        length = tl.load(seq_lens + request * s_len).to(tl.int32)
        if TAIL:
            drafts = tl.load(num_drafts + request * s_drafts).to(tl.int32)
            tail = tl.load(tail_start + request * s_tail).to(tl.int64)
    first_token = start + (tile - (start // PER + request)) * PER

    m = tl.arange(0, M)
    d = tl.arange(0, D_PAD)
    real_d = d < D
    token = first_token + m // GROUP
    real = (token < end) & (token < tokens) & (m < PER * GROUP)
    head = kv_head * GROUP + m % GROUP
    # Position of a token: the last one of the request is at length - 1. Padding sees nothing.
    position = tl.where(real & owned, length - end + token, -1)

    # The KV tiles that some token of the tile sees, and this program's share of them.
    first_position = length - end + first_token
    high = tl.minimum(length - end + tl.minimum(first_token + PER, end), length)
    high = tl.where(owned & (first_token < end), high, 0)
    high = tl.minimum(high, table_width * BLOCK_SIZE)
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(first_position - WINDOW + 1, 0)
    low = first_seen // N
    high_tile = (tl.maximum(high, 0) + N - 1) // N
    share = (tl.maximum(high_tile - low, 0) + splits - 1) // splits
    from_tile = low + split * share
    to_tile = tl.minimum(from_tile + share, high_tile)
    # Of them, the tiles that lie in the cache and that every token sees to their last row.
    whole_tile = tl.maximum(tl.minimum(length - drafts, first_position + 1), 0) // N
    whole_tile = tl.minimum(tl.maximum(whole_tile, from_tile), to_tile)

    q_place = query + (token.to(tl.int64) * s_token + head * s_head)[:, None]
    keep = real[:, None] & real_d[None, :]
    q = tl.load(q_place + d.to(tl.int64)[None, :] * s_d, mask=keep, other=0)
    operand: tl.constexpr = tl.float32 if UPCAST else query.dtype.element_ty
    precision: tl.constexpr = "ieee" if UPCAST else "tf32"
    q = q.to(operand)
    scale = score_scale
    if K_SCALED:
        scale = scale * tl.load(k_scale + kv_head * s_k_scale)
    if not SOFTCAP:
        scale = scale * _LOG2E  # exp2 is the faster one

    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PAD], tl.float32)
    key_base = key_cache + kv_head * kc_head
    value_base = value_cache + kv_head * vc_head
    staged_key_base = staged_key + kv_head * sk_head
    staged_value_base = staged_value + kv_head * sv_head
    key_element = element_offset(d, kc_outer, kc_inner, D, X)
    value_element = element_offset(d, 0, vc_inner, D, D)
    table = block_table + request.to(tl.int64) * s_table
    width = tl.where(from_tile < to_tile, table_width, 0)
    # Loaded one tile ahead: a row's address must not wait for its block.
    block = _tile_blocks(table, s_column, from_tile, width, blocks - 1, N, BLOCK_SIZE)
    for kv_tile in range(from_tile, whole_tile):
        p = kv_tile * N + tl.arange(0, N)
        wanted = real_d[None, :]
        seen = wanted
        if WINDOW > 0:
            wanted &= (p >= first_seen)[:, None]
            seen = p[None, :] > position[:, None] - WINDOW
        k_rows = _cache_rows(
            key_base, block, p, key_element, kc_block, kc_offset, N, BLOCK_SIZE, WIDE
        )
        v_rows = _cache_rows(
            value_base, block, p, value_element, vc_block, vc_offset, N, BLOCK_SIZE, WIDE
        )
        if D == D_PAD and WINDOW == 0:
            k, v = tl.load(k_rows), tl.load(v_rows)
        else:
            k, v = tl.load(k_rows, mask=wanted, other=0), tl.load(v_rows, mask=wanted, other=0)
        block = _tile_blocks(table, s_column, kv_tile + 1, width, blocks - 1, N, BLOCK_SIZE)
        best, total, acc = _attend(
            q, _operand(k, FP8, operand), _operand(v, FP8, operand), seen, scale, softcap,
            best, total, acc, WINDOW > 0, SOFTCAP, precision,
        )  # fmt: skip
    for kv_tile in tl.range(whole_tile, to_tile, num_stages=1):
        p = kv_tile * N + tl.arange(0, N)
        draft = p - (length - drafts)
        in_tail = (draft >= 0) & (draft < drafts)
        row = tl.minimum(tl.maximum(tail + draft, 0), staging_rows - 1)
        wanted = ((p < high) & (p >= first_seen))[:, None] & real_d[None, :]
        seen = (p[None, :] <= position[:, None]) & (p < high)[None, :]
        if WINDOW > 0:
            seen &= p[None, :] > position[:, None] - WINDOW
        k_rows = _cache_rows(
            key_base, block, p, key_element, kc_block, kc_offset, N, BLOCK_SIZE, WIDE
        )
        v_rows = _cache_rows(
            value_base, block, p, value_element, vc_block, vc_offset, N, BLOCK_SIZE, WIDE
        )
        k_rows = _choose_rows(k_rows, staged_key_base, in_tail, row, d, sk_row, sk_d, TAIL)
        v_rows = _choose_rows(v_rows, staged_value_base, in_tail, row, d, sv_row, sv_d, TAIL)
        k, v = tl.load(k_rows, mask=wanted, other=0), tl.load(v_rows, mask=wanted, other=0)
        block = _tile_blocks(table, s_column, kv_tile + 1, width, blocks - 1, N, BLOCK_SIZE)
        best, total, acc = _attend(
            q, _operand(k, FP8, operand), _operand(v, FP8, operand), seen, scale, softcap,
            best, total, acc, True, SOFTCAP, precision,
        )  # fmt: skip

    if V_SCALED:
        acc = acc * tl.load(v_scale + kv_head * s_v_scale)
    line = token.to(tl.int64) * HEADS + head
    if not SPLIT:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        _store_out(out + line[:, None] * D + d[None, :], acc, keep, EXACT_BF16)
    else:
        partial = (split.to(tl.int64) * tokens) * HEADS + line
        tl.store(part_max + partial, best, mask=real)
        tl.store(part_sum + partial, total, mask=real)
        if from_tile < to_tile:
            tl.store(part + partial[:, None] * D + d[None, :], acc, mask=keep)


@triton.jit(do_not_specialize=["lines", "splits"])
def _merge_kernel(
    out, part, part_max, part_sum, lines, splits,
    D: tl.constexpr, D_PAD: tl.constexpr, S_PAD: tl.constexpr, EXACT_BF16: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program i: line i (token x head) of the output from the shares of its KV positions."""
    line = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, S_PAD)
    d = tl.arange(0, D_PAD)
    partial = s.to(tl.int64) * lines + line
    real = s < splits
    if PDL:
        gdc_wait()
    best = tl.load(part_max + partial, mask=real, other=float("-inf"))
    sums = tl.load(part_sum + partial, mask=real, other=0.0)
    rows = tl.load(
        part + partial[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0
    )
    top = tl.max(best, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    # Shares that saw nothing wrote no `part`. NaN counts as seen, so that it comes out.
    used = sums != 0.0
    weight = tl.where(used, tl.exp2(best - top), 0.0)
    total = tl.sum(weight * sums, axis=0)
    acc = tl.sum(tl.where(used[:, None], rows, 0.0) * weight[:, None], axis=0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    _store_out(out + line * D + d, acc, d < D, EXACT_BF16)


class Plan(NamedTuple):
    """Tile sizes and grid of one launch; a function of shapes, so that graphs can replay it."""

    m: int  # rows of a query tile: tokens x query heads of a KV head
    n: int  # KV positions a step
    splits: int
    warps: int
    stages: int
    merge_warps: int


@functools.cache
def _processors(index: int | None) -> int:
    """Multiprocessors of a CUDA device; a small number in the interpreter, so that it splits."""
    if index is None:
        return 4
    return torch.cuda.get_device_properties(index).multi_processor_count


@functools.cache
def _has_pdl(index: int | None) -> bool:
    """Whether a kernel can start up while the one before it runs (programmatic dependent launch)."""
    if index is None or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(index)[0] >= 9


def _is_wide(cache: Tensor) -> bool:
    """Whether offsets of elements need 64 bits."""
    last = sum((n - 1) * stride for n, stride in zip(cache.shape, cache.stride(), strict=True))
    return last >= 2**31


def plan(
    tokens: int, requests: int, group: int, kv_heads: int, size: int, itemsize: int, context: int,
    processors: int,
) -> Plan:  # fmt: skip
    """Tiles for `requests` with `tokens` in all; `context` is what the block table can hold."""
    per_request = triton.cdiv(tokens, max(requests, 1))
    pad = triton.next_power_of_2(size)
    most = 64 if pad > 128 or itemsize == 4 else 128
    m = min(most, triton.next_power_of_2(per_request * group))
    m = max(16, m, triton.next_power_of_2(group))
    tiles = max(min(requests, tokens), triton.cdiv(tokens, m // group))
    programs = max(1, kv_heads * tiles)
    # Measured on an H200 (5-row spans, bf16): 128 positions a step beat 64 where the tiles alone
    # fill the device; below that, shares of the KV have to fill it, and small steps do.
    wide = m <= 64 and programs >= 0.75 * processors
    n = 32 if pad > 128 or itemsize == 4 else 128 if wide else 64
    # Two programs a multiprocessor fill the device; a share is at least one KV tile.
    splits = max(1, min(2 * processors // programs, triton.cdiv(context, n), 64))
    return Plan(m, n, splits, 8 if m * pad > 8192 else 4, 3, 1)


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
) -> Tensor:
    """`verify_attention_reference`; without staging, `paged_attention_reference`."""
    tokens, heads, size = query.shape
    requests = seq_lens.shape[0]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    k_strides, v_strides = cache_strides(key_cache, value_cache)
    five_d = key_cache.dim() == 5
    block_size = key_cache.shape[3] if five_d else key_cache.shape[1]
    kv_heads = key_cache.shape[1] if five_d else key_cache.shape[2]
    group = heads // kv_heads
    fp8 = FP8_CODE[kv_cache_dtype]
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
        block_table.shape[1] * block_size, _processors(query.device.index),
    )  # fmt: skip
    part = part_max = part_sum = None
    if p.splits > 1:
        lines = (p.splits, tokens, heads)
        part = torch.empty((*lines, size), dtype=torch.float32, device=query.device)
        part_max = torch.empty(lines, dtype=torch.float32, device=query.device)
        part_sum = torch.empty(lines, dtype=torch.float32, device=query.device)
    padded = triton.next_power_of_2(size)
    pdl = p.splits > 1 and _has_pdl(query.device.index)
    launch = {"launch_pdl": True} if pdl else {}
    with on_device(query):
        _attention_kernel[(tokens // (p.m // group) + requests + 1, kv_heads, p.splits)](
            query, key_cache, value_cache, staged_key, staged_value, block_table, seq_lens,
            query_start_loc, num_drafts, tail_start, k_scale, v_scale, out, part, part_max,
            part_sum,
            tokens, requests, block_table.shape[1], key_cache.shape[0], staged_key.shape[0],
            float(scale), float(softcap),
            *query.stride(), *k_strides[:5], *v_strides[:3], v_strides.inner, *staged_strides,
            *block_table.stride(), seq_lens.stride(0), query_start_loc.stride(0),
            0 if num_drafts is None else num_drafts.stride(0),
            0 if tail_start is None else tail_start.stride(0),
            scale_stride(k_scale), scale_stride(v_scale),
            HEADS=heads, GROUP=group, D=size, D_PAD=padded, X=k_strides.x, BLOCK_SIZE=block_size,
            WINDOW=sliding_window, SOFTCAP=softcap > 0, FP8=fp8,
            K_SCALED=fp8 > 0 and k_scale is not None, V_SCALED=fp8 > 0 and v_scale is not None,
            TAIL=tail, M=p.m, N=p.n, SPLIT=p.splits > 1,
            R=128 if requests < 128 else 1024,
            UPCAST=upcast, EXACT_BF16=exact_bf16,
            WIDE=_is_wide(key_cache) or _is_wide(value_cache), PDL=pdl,
            num_warps=p.warps, num_stages=p.stages, enable_fp_fusion=False,
        )  # fmt: skip
        if p.splits > 1:
            _merge_kernel[(tokens * heads,)](
                out, part, part_max, part_sum, tokens * heads, p.splits,
                D=size, D_PAD=padded, S_PAD=triton.next_power_of_2(p.splits),
                EXACT_BF16=exact_bf16, PDL=pdl, num_warps=p.merge_warps, **launch,
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
