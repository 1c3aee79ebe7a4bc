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
def _rows(
    cache, staged, block, offset, row, in_cache, in_tail, d, real_d,
    s_block, s_offset, s_outer, s_inner, s_row, s_d,
    D: tl.constexpr, X: tl.constexpr, TAIL: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """A tile `[N, D]` of K or V: each row from its slot of the cache, or from staging."""
    cache_row = cache + (block * s_block + offset * s_offset)
    if not TAIL:
        place = cache_row[:, None] + element_offset(d, s_outer, s_inner, D, X)[None, :]
    elif ALIKE:
        # One pointer a row to choose, not one an element.
        chosen = tl.where(in_tail, staged + row * s_row, cache_row)
        place = chosen[:, None] + element_offset(d, s_outer, s_inner, D, X)[None, :]
    else:
        place = cache_row[:, None] + element_offset(d, s_outer, s_inner, D, X)[None, :]
        staged_place = (staged + row * s_row)[:, None] + (d.to(tl.int64) * s_d)[None, :]
        place = tl.where(in_tail[:, None], staged_place, place)
    return tl.load(place, mask=(in_cache | in_tail)[:, None] & real_d[None, :], other=0)


@triton.jit
def _operand(rows, FP8: tl.constexpr, like: tl.constexpr):
    """Rows as an operand of tl.dot. fp8 scales are applied to the scores and the output."""
    if FP8 > 0:
        return decode_fp8(rows, FP8).to(like)
    return rows.to(like)


@triton.jit
def _store_out(out, acc, mask, EXACT_BF16: tl.constexpr):
    if EXACT_BF16:
        tl.store(out, round_bf16(acc), mask=mask)
    else:
        tl.store(out, acc.to(out.dtype.element_ty), mask=mask)


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(do_not_specialize=["tokens", "requests"])
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
    M: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr,
    UPCAST: tl.constexpr, EXACT_BF16: tl.constexpr,
    K_ALIKE: tl.constexpr, V_ALIKE: tl.constexpr,
):  # fmt: skip
    """Program (i, h, s): query tile i, KV head h, share s of the KV tiles."""
    PER: tl.constexpr = M // GROUP  # tokens of a tile
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
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
    high = tl.minimum(length - end + tl.minimum(first_token + PER, end), length)
    high = tl.where(owned & (first_token < end), high, 0)
    high = tl.minimum(high, table_width * BLOCK_SIZE)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - end + first_token - WINDOW + 1, 0) // N
    high_tile = (tl.maximum(high, 0) + N - 1) // N
    share = (tl.maximum(high_tile - low, 0) + SPLITS - 1) // SPLITS
    from_tile = low + split * share
    to_tile = tl.minimum(from_tile + share, high_tile)

    q_place = query + (token.to(tl.int64) * s_token + head * s_head)[:, None]
    keep = real[:, None] & real_d[None, :]
    q = tl.load(q_place + d.to(tl.int64)[None, :] * s_d, mask=keep, other=0)
    operand: tl.constexpr = tl.float32 if UPCAST else query.dtype.element_ty
    precision: tl.constexpr = "ieee" if UPCAST else "tf32"
    q = q.to(operand)
    scale = score_scale
    if K_SCALED:
        scale = scale * tl.load(k_scale + kv_head * s_k_scale)

    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PAD], tl.float32)
    key_base = key_cache + kv_head * kc_head
    value_base = value_cache + kv_head * vc_head
    staged_key_base = staged_key + kv_head * sk_head
    staged_value_base = staged_value + kv_head * sv_head
    table = block_table + request.to(tl.int64) * s_table
    for kv_tile in range(from_tile, to_tile):
        p = kv_tile * N + tl.arange(0, N)
        wanted = p < high
        if TAIL:
            draft = p - (length - drafts)
            in_tail = wanted & (draft >= 0) & (draft < drafts)
            row = tl.minimum(tl.maximum(tail + draft, 0), staging_rows - 1)
        else:
            in_tail = p < 0
            row = p.to(tl.int64)
        in_cache = wanted & (in_tail == 0)
        # Entries past the request's length may be garbage: not loaded. The clamp keeps a corrupt
        # entry inside the cache.
        column = p // BLOCK_SIZE
        block = tl.load(table + column * s_column, mask=in_cache, other=0).to(tl.int64)
        block = tl.minimum(tl.maximum(block, 0), blocks - 1)
        offset = (p % BLOCK_SIZE).to(tl.int64)
        k = _rows(
            key_base, staged_key_base, block, offset, row, in_cache, in_tail, d, real_d,
            kc_block, kc_offset, kc_outer, kc_inner, sk_row, sk_d, D, X, TAIL, K_ALIKE,
        )  # fmt: skip
        v = _rows(
            value_base, staged_value_base, block, offset, row, in_cache, in_tail, d, real_d,
            vc_block, vc_offset, 0, vc_inner, sv_row, sv_d, D, D, TAIL, V_ALIKE,
        )  # fmt: skip
        k = _operand(k, FP8, operand)
        v = _operand(v, FP8, operand)

        score = tl.dot(q, tl.trans(k), input_precision=precision) * scale
        if SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1); core Triton has no tanh.
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (score / softcap)) + 1.0))
        seen = p[None, :] <= position[:, None]
        seen &= wanted[None, :]
        if WINDOW > 0:
            seen &= p[None, :] > position[:, None] - WINDOW
        score = tl.where(seen, score * _LOG2E, float("-inf"))
        new_best = tl.maximum(best, tl.max(score, axis=1))
        # A row that has seen nothing keeps -inf; subtract 0 there, or -inf - -inf is NaN.
        finite = tl.where(new_best == float("-inf"), 0.0, new_best)
        shrink = tl.exp2(best - finite)
        weight = tl.exp2(score - finite[:, None])
        total = total * shrink + tl.sum(weight, axis=1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(operand), v, acc, input_precision=precision)
        best = new_best

    if V_SCALED:
        acc = acc * tl.load(v_scale + kv_head * s_v_scale)
    line = token.to(tl.int64) * HEADS + head
    if SPLITS == 1:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        _store_out(out + line[:, None] * D + d[None, :], acc, keep, EXACT_BF16)
    else:
        partial = (split.to(tl.int64) * tokens) * HEADS + line
        tl.store(part_max + partial, best, mask=real)
        tl.store(part_sum + partial, total, mask=real)
        if from_tile < to_tile:
            tl.store(part + partial[:, None] * D + d[None, :], acc, mask=keep)


@triton.jit(do_not_specialize=["lines"])
def _merge_kernel(
    out, part, part_max, part_sum, lines,
    D: tl.constexpr, D_PAD: tl.constexpr, SPLITS: tl.constexpr, S_PAD: tl.constexpr,
    EXACT_BF16: tl.constexpr,
):  # fmt: skip
    """Program i: line i (token x head) of the output from the shares of its KV positions."""
    line = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, S_PAD)
    d = tl.arange(0, D_PAD)
    partial = s.to(tl.int64) * lines + line
    real = s < SPLITS
    best = tl.load(part_max + partial, mask=real, other=float("-inf"))
    top = tl.max(best, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    # Shares that saw nothing wrote no `part`. NaN counts as seen, so that it comes out.
    sums = tl.load(part_sum + partial, mask=real, other=0.0)
    used = sums != 0.0
    weight = tl.where(used, tl.exp2(best - top), 0.0)
    total = tl.sum(weight * sums, axis=0)
    rows = tl.load(
        part + partial[:, None] * D + d[None, :],
        mask=used[:, None] & (d < D)[None, :],
        other=0.0,
    )
    acc = tl.sum(rows * weight[:, None], axis=0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    _store_out(out + line * D + d, acc, d < D, EXACT_BF16)


class Plan(NamedTuple):
    """Tile sizes and grid of one launch; a function of shapes, so that graphs can replay it."""

    m: int  # rows of a query tile: tokens x query heads of a KV head
    n: int  # KV positions a step
    splits: int
    warps: int
    stages: int


@functools.cache
def _processors(index: int | None) -> int:
    """Multiprocessors of a CUDA device; a small number in the interpreter, so that it splits."""
    if index is None:
        return 4
    return torch.cuda.get_device_properties(index).multi_processor_count


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
    return Plan(m, n, splits, 8 if m * pad > 8192 else 4, 2)


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
            TAIL=tail, M=p.m, N=p.n, SPLITS=p.splits,
            R=min(1024, triton.next_power_of_2(requests + 1)),
            UPCAST=upcast, EXACT_BF16=exact_bf16,
            # Elements of a row lie alike in cache and staging.
            K_ALIKE=k_strides.x == size and k_strides.inner == staged_strides[2],
            V_ALIKE=v_strides.inner == staged_strides[5],
            num_warps=p.warps, num_stages=p.stages,
        )  # fmt: skip
        if p.splits > 1:
            _merge_kernel[(tokens * heads,)](
                out, part, part_max, part_sum, tokens * heads,
                D=size, D_PAD=padded, SPLITS=p.splits,
                S_PAD=triton.next_power_of_2(p.splits), EXACT_BF16=exact_bf16,
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
