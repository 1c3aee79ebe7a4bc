"""Launchers of `paged_attention` and `verify_attention`: flash decoding over a paged cache.

A program serves a tile of tokens of one request and one KV head, the query heads that share it
packed into the rows of the tile, and walks a share of the KV positions: first the tiles that every
token sees whole in the cache, without masks; then the last one or two, where a row of the tail
`[seq_len - num_drafts, seq_len)` is fetched through another pointer, chosen before the load.

NOTE [same bits]: `verify_attention` equals `paged_attention` over a cache that holds the same rows
bit for bit. Both take the same plan, tiles and order, and what follows a load does not know where a
row came from. They may disagree on which tiles are whole: masking nothing changes no bit, because
the compiler may not fuse a multiplication and an addition here and not there (`enable_fp_fusion`).

NOTE [zero-filled V]: rows that no token of the tile can see are never loaded (they may hold
poison; 0 x NaN is NaN). A row that a later token of the tile sees is loaded for all of them: NaN
in it reaches the earlier tokens of its own request, as it does in FlashAttention.

NOTE [grid]: the grid comes from shapes alone, for CUDA graphs: it has room for the last, partial
tile of every request. A program finds its request by counting the tiles of all of them. Padding
tokens are one more request, which sees nothing. Programs left over come last, so that they do not
hold a place on the device that another waits for.
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
def _find_request(
    query_start_loc, s_start, requests, tokens, tile, PER: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """The request that owns query tile `tile`, and which of its tiles it is; see NOTE [grid]."""
    request = 0
    ahead = 0  # tiles of the requests before it
    total = 0
    for first in range(0, requests + 1, R):
        r = first + tl.arange(0, R)
        place = query_start_loc + r * s_start
        start = tl.load(place, mask=r <= requests, other=tokens).to(tl.int32)
        end = tl.load(place + s_start, mask=r < requests, other=tokens).to(tl.int32)
        tiles = (tl.maximum(end - start, 0) + PER - 1) // PER
        passed = total + tl.cumsum(tiles, axis=0) <= tile
        request += tl.sum(passed.to(tl.int32), axis=0)
        ahead += tl.sum(tl.where(passed, tiles, 0), axis=0)
        total += tl.sum(tiles, axis=0)
    return request, tile - ahead


@triton.jit
def _share(first, last, split, splits):
    """Share `split` of the KV tiles `[first, last)`: even, and the last share is not the larger,
    because the tail is in it."""
    tiles = tl.maximum(last - first, 0)
    from_tile = first + (tiles * split + splits - 1) // splits
    return from_tile, first + (tiles * (split + 1) + splits - 1) // splits


@triton.jit
def _blocks(table, s_column, tile, width, last, N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
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
def _rows(
    cache, staged, block, p, wanted, tail, prefix, drafts,
    BLOCK_SIZE: tl.constexpr, TAIL: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows `[N, D]` of K or V at positions `p`; with TAIL, those of drafts from staging."""
    N: tl.constexpr = p.shape[0]
    base, s_block, s_offset, element = cache
    # Whole blocks: the place in a block is the same for every tile, so it leaves the loop.
    offset = tl.arange(0, N) % BLOCK_SIZE if N % BLOCK_SIZE == 0 else p % BLOCK_SIZE
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    slot = block.to(index) * s_block + offset.to(index) * s_offset
    rows = base + (slot[:, None] + element.to(index)[None, :])
    if TAIL:
        staged_base, s_row, staged_element, staging_rows = staged
        draft = p - prefix
        row = tl.minimum(tl.maximum(tail + draft, 0), staging_rows - 1).to(index) * s_row
        staged_rows = staged_base + (row[:, None] + staged_element.to(index)[None, :])
        rows = tl.where(((draft >= 0) & (draft < drafts))[:, None], staged_rows, rows)
    if MASKED:
        return tl.load(rows, mask=wanted, other=0)
    return tl.load(rows)


@triton.jit
def _operand(rows, FP8: tl.constexpr, like: tl.constexpr):
    """Rows as an operand of tl.dot. fp8 scales are applied to the scores and the output."""
    if FP8 > 0:
        return decode_fp8(rows, FP8).to(like)
    return rows.to(like)


@triton.jit
def _accumulate(score, v, best, total, acc, precision: tl.constexpr):
    """Online softmax: the running maximum, sum and weighted V after the scores of one more tile."""
    new_best = tl.maximum(best, tl.max(score, axis=1))
    # A row that has seen nothing keeps -inf; subtract 0 there, or -inf - -inf is NaN.
    finite = tl.where(new_best == float("-inf"), 0.0, new_best)
    shrink = tl.exp2(best - finite)
    weight = tl.exp2(score - finite[:, None])
    total = total * shrink + tl.sum(weight, axis=1)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision=precision)
    return new_best, total, acc


@triton.jit
def _step(
    q, best, total, acc, tile, block, key, value, staged_key, staged_value,
    tail, prefix, drafts, position, first_seen, high, scale, softcap,
    D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attend to one KV tile. WHOLE: to all of it, but for what the window hides."""
    p = tile * N + tl.arange(0, N)
    wanted = (tl.arange(0, D_PAD) < D)[None, :]
    seen = True
    if not WHOLE:
        wanted &= (p < high)[:, None]
        seen = p[None, :] <= position[:, None]
    if WINDOW > 0:
        wanted &= (p >= first_seen)[:, None]
        seen &= p[None, :] > position[:, None] - WINDOW
    masked: tl.constexpr = not WHOLE or WINDOW > 0
    some: tl.constexpr = masked or D != D_PAD
    k = _rows(key, staged_key, block, p, wanted, tail, prefix, drafts, BLOCK_SIZE, TAIL, some, WIDE)
    v = _rows(
        value, staged_value, block, p, wanted, tail, prefix, drafts, BLOCK_SIZE, TAIL, some, WIDE
    )
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    k, v = _operand(k, FP8, q.dtype), _operand(v, FP8, q.dtype)
    score = tl.dot(q, tl.trans(k), input_precision=precision) * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); core Triton has no tanh.
        score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (score / softcap)) + 1.0)) * _LOG2E
    if masked:
        score = tl.where(seen, score, float("-inf"))
    return _accumulate(score, v, best, total, acc, precision)


@triton.jit
def _walk(
    q, best, total, acc, block, first, last, table, s_column, width, last_block,
    key, value, staged_key, staged_value, tail, prefix, drafts, position, first_seen, high,
    scale, softcap,
    D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attend to KV tiles `[first, last)`; `block` has the blocks of the first."""
    # Of tiles that are not whole there are one or two: not worth a pipeline.
    for tile in tl.range(first, last, num_stages=None if WHOLE else 1):
        # Loaded one tile ahead: the address of a row must not wait for its block.
        this = block
        block = _blocks(table, s_column, tile + 1, width, last_block, N, BLOCK_SIZE)
        best, total, acc = _step(
            q, best, total, acc, tile, this, key, value, staged_key, staged_value,
            tail, prefix, drafts, position, first_seen, high, scale, softcap,
            D, D_PAD, N, BLOCK_SIZE, WHOLE, TAIL, WINDOW, SOFTCAP, FP8, WIDE,
        )  # fmt: skip
    return best, total, acc, block


@triton.jit
def _store_out(out, acc, mask, EXACT_BF16: tl.constexpr):
    if EXACT_BF16:
        tl.store(out, round_bf16(acc), mask=mask)
    else:
        tl.store(out, acc.to(out.dtype.element_ty), mask=mask)


# Counts change from step to step: specialising on them would compile again in the middle of one.
_COUNTS = ["tokens", "requests", "splits", "table_width", "blocks", "staging_rows", "s_table"]


@triton.jit(do_not_specialize=_COUNTS)
def _attention_kernel(
    query, key_cache, value_cache, staged_key, staged_value, block_table, seq_lens,
    query_start_loc, num_drafts, tail_start, k_scale, v_scale, out, part, part_max, part_sum,
    tokens, requests, splits, table_width, blocks, staging_rows, score_scale, softcap,
    s_token, s_head, s_d,
    kc_block, kc_offset, kc_head, kc_outer, kc_inner,
    vc_block, vc_offset, vc_head, vc_inner,
    sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
    s_table, s_column, s_len, s_start, s_drafts, s_tail, s_k_scale, s_v_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    X: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FP8: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr, TAIL: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, R: tl.constexpr,
    UPCAST: tl.constexpr, EXACT_BF16: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Query tile i, share s of its KV tiles, KV head h: program (i * splits + s) * KV heads + h."""
    PER: tl.constexpr = M // GROUP  # tokens of a tile
    KV_HEADS: tl.constexpr = HEADS // GROUP
    program = tl.program_id(0)
    kv_head = (program % KV_HEADS).to(tl.int64)
    split = program // KV_HEADS % splits
    request, tile = _find_request(
        query_start_loc, s_start, requests, tokens, program // KV_HEADS // splits, PER, R
    )
    if request > requests:
        return
    owned = request < requests  # else these tokens are padding
    start = tl.load(query_start_loc + request * s_start).to(tl.int32)
    # Masks and no branch: the loads do not wait for each other.
    end = tl.load(query_start_loc + (request + 1) * s_start, mask=owned, other=tokens).to(tl.int32)
    length = tl.load(seq_lens + request * s_len, mask=owned, other=0).to(tl.int32)
    drafts = 0
    tail = 0
    if TAIL:
        drafts = tl.load(num_drafts + request * s_drafts, mask=owned, other=0).to(tl.int32)
        tail = tl.load(tail_start + request * s_tail, mask=owned, other=0).to(tl.int32)
    first_token = start + tile * PER

    m = tl.arange(0, M)
    d = tl.arange(0, D_PAD)
    real_d = d < D
    token = first_token + m // GROUP
    real = (token < end) & (token < tokens) & (m < PER * GROUP)
    head = kv_head * GROUP + m % GROUP
    first_position = length - end + first_token
    high = tl.minimum(length - end + tl.minimum(first_token + PER, end), length)
    high = tl.where(owned & (first_token < end), high, 0)
    high = tl.minimum(high, table_width * BLOCK_SIZE)  # past the last position that is seen
    # Position of a token: the last one of the request is at length - 1. Padding sees nothing.
    position = tl.minimum(length - end + token, high - 1)
    position = tl.where(real & owned, position, -1)
    first_seen = 0
    if WINDOW > 0:
        first_seen = tl.maximum(first_position - WINDOW + 1, 0)
    from_tile, to_tile = _share(first_seen // N, (tl.maximum(high, 0) + N - 1) // N, split, splits)
    # Of them, the tiles that lie in the cache and that every token sees to their last row.
    whole_tile = tl.maximum(tl.minimum(length - drafts, first_position + 1), 0) // N
    whole_tile = tl.minimum(tl.maximum(whole_tile, from_tile), to_tile)

    q_place = query + (token.to(tl.int64) * s_token + head * s_head)[:, None]
    keep = real[:, None] & real_d[None, :]
    q = tl.load(q_place + d.to(tl.int64)[None, :] * s_d, mask=keep, other=0)
    q = q.to(tl.float32 if UPCAST else query.dtype.element_ty)
    scale = score_scale
    if K_SCALED:
        scale = scale * tl.load(k_scale + kv_head * s_k_scale)
    if not SOFTCAP:
        scale = scale * _LOG2E  # exp2 is the faster one

    best = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PAD], tl.float32)
    key = (key_cache + kv_head * kc_head, kc_block, kc_offset,
           element_offset(d, kc_outer, kc_inner, D, X))  # fmt: skip
    value = (value_cache + kv_head * vc_head, vc_block, vc_offset,
             element_offset(d, 0, vc_inner, D, D))  # fmt: skip
    key_tail = (staged_key + kv_head * sk_head, sk_row, d.to(tl.int64) * sk_d, staging_rows)
    value_tail = (staged_value + kv_head * sv_head, sv_row, d.to(tl.int64) * sv_d, staging_rows)
    table = block_table + request.to(tl.int64) * s_table
    width = tl.where(from_tile < to_tile, table_width, 0)
    block = _blocks(table, s_column, from_tile, width, blocks - 1, N, BLOCK_SIZE)
    best, total, acc, block = _walk(
        q, best, total, acc, block, from_tile, whole_tile, table, s_column, width, blocks - 1,
        key, value, key_tail, value_tail, tail, length - drafts, drafts, position, first_seen, high,
        scale, softcap,
        D, D_PAD, N, BLOCK_SIZE, True, False, WINDOW, SOFTCAP, FP8, WIDE,
    )  # fmt: skip
    best, total, acc, block = _walk(
        q, best, total, acc, block, whole_tile, to_tile, table, s_column, width, blocks - 1,
        key, value, key_tail, value_tail, tail, length - drafts, drafts, position, first_seen, high,
        scale, softcap,
        D, D_PAD, N, BLOCK_SIZE, False, TAIL, WINDOW, SOFTCAP, FP8, WIDE,
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
):  # fmt: skip
    """Program i: line i (token x head) of the output from the shares of its KV positions."""
    line = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, S_PAD)
    d = tl.arange(0, D_PAD)
    partial = s.to(tl.int64) * lines + line
    real = s < splits
    best = tl.load(part_max + partial, mask=real, other=float("-inf"))
    sums = tl.load(part_sum + partial, mask=real, other=0.0)
    # Also those that are not used: waiting to know which costs more.
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
def _shared_memory(index: int | None) -> int:
    """Bytes of shared memory that a program may have."""
    if index is None:
        return 2**17
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]


def _is_wide(cache: Tensor) -> bool:
    """Whether offsets of elements need 64 bits."""
    last = sum((n - 1) * stride for n, stride in zip(cache.shape, cache.stride(), strict=True))
    return last >= 2**31


def _splits(programs: int, processors: int) -> int:
    """Into how many shares the KV of each of `programs` goes, for them to fill the device.

    Two programs run on a multiprocessor at a time. Measured on an H200 (5-row spans, bf16): as many
    shares as run at once are best; where the programs alone are more than that, what matters is how
    full the last round is, and a program costs an eighth of what the KV of a request of 2048 does.
    """
    at_once = 2 * processors
    if programs <= processors:
        return min(at_once // programs, 32)

    def time(splits: int) -> float:
        return triton.cdiv(programs * splits, at_once) * (1 / splits + 1 / 8)

    return min((1, 2, 3), key=time)


def plan(
    tokens: int, requests: int, group: int, kv_heads: int, size: int, itemsize: int, context: int,
    processors: int, shared: int,
) -> Plan:  # fmt: skip
    """Tiles for `requests` with `tokens` in all; `context` is what the block table can hold."""
    per_request = triton.cdiv(tokens, max(requests, 1))
    pad = triton.next_power_of_2(size)
    m = min(64, triton.next_power_of_2(per_request * group))
    m = max(16, m, triton.next_power_of_2(group))
    tiles = max(min(requests, tokens), triton.cdiv(tokens, m // group))
    programs = max(1, kv_heads * tiles)
    n = 32 if pad > 128 or itemsize == 4 else 64
    splits = min(_splits(programs, processors), max(1, triton.cdiv(context, n)))
    # K and V of a tile are loaded two tiles ahead, where shared memory holds three.
    stages = (shared - m * (pad + n) * itemsize) // (2 * n * pad * itemsize)
    merge_warps = max(1, triton.next_power_of_2(splits) * pad // 4096)
    return Plan(m, n, splits, 8 if m * pad > 8192 else 4, max(1, min(stages, 3)), merge_warps)


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
        _shared_memory(query.device.index),
    )  # fmt: skip
    part = part_max = part_sum = None
    if p.splits > 1:
        lines = (p.splits, tokens, heads)
        part = torch.empty((*lines, size), dtype=torch.float32, device=query.device)
        part_max = torch.empty(lines, dtype=torch.float32, device=query.device)
        part_sum = torch.empty(lines, dtype=torch.float32, device=query.device)
    padded = triton.next_power_of_2(size)
    per = p.m // group
    tiles = (tokens + (requests + 1) * (per - 1)) // per  # the most that there can be
    wide = any(map(_is_wide, (key_cache, value_cache, staged_key, staged_value)))
    with on_device(query):
        _attention_kernel[(tiles * kv_heads * p.splits,)](
            query, key_cache, value_cache, staged_key, staged_value, block_table, seq_lens,
            query_start_loc, num_drafts, tail_start, k_scale, v_scale, out, part, part_max,
            part_sum,
            tokens, requests, p.splits, block_table.shape[1], key_cache.shape[0],
            staged_key.shape[0], float(scale), float(softcap),
            *query.stride(), *k_strides[:5], *v_strides[:3], v_strides.inner, *staged_strides,
            *block_table.stride(), seq_lens.stride(0), query_start_loc.stride(0),
            0 if num_drafts is None else num_drafts.stride(0),
            0 if tail_start is None else tail_start.stride(0),
            scale_stride(k_scale), scale_stride(v_scale),
            HEADS=heads, GROUP=group, D=size, D_PAD=padded, X=k_strides.x, BLOCK_SIZE=block_size,
            WINDOW=sliding_window, SOFTCAP=softcap > 0, FP8=fp8,
            K_SCALED=fp8 > 0 and k_scale is not None, V_SCALED=fp8 > 0 and v_scale is not None,
            TAIL=tail, M=p.m, N=p.n, SPLIT=p.splits > 1,
            # Up to 32 a warp counts alone; few sizes, as each is compiled.
            R=32 if requests < 32 else 128 if requests < 128 else 1024,
            UPCAST=upcast, EXACT_BF16=exact_bf16,
            WIDE=wide,
            num_warps=p.warps, num_stages=p.stages, enable_fp_fusion=False,
        )  # fmt: skip
        if p.splits > 1:
            _merge_kernel[(tokens * heads,)](
                out, part, part_max, part_sum, tokens * heads, p.splits,
                D=size, D_PAD=padded, S_PAD=triton.next_power_of_2(p.splits),
                EXACT_BF16=exact_bf16,
                num_warps=p.merge_warps,
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
