"""One KV tile of paged attention: its rows, from the cache and from staging, and online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from nwor_compile.ops.kernels.fp8 import NATIVE, decode_fp8, native_fp8, round_bf16

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def blocks_of(table, s_column, tile, width, last, N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
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
    ALIKE: tl.constexpr,
):  # fmt: skip
    """Rows `[N, D]` of K or V at positions `p`; with TAIL, those of drafts from staging.

    ALIKE: the elements of a row lie alike in cache and staging, so that a row is chosen by its
    address alone.
    """
    N: tl.constexpr = p.shape[0]
    base, s_block, s_offset, element = cache
    # Whole blocks: the place in a block is the same for every tile, so it leaves the loop.
    offset = tl.arange(0, N) % BLOCK_SIZE if N % BLOCK_SIZE == 0 else p % BLOCK_SIZE
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    places = base + (block.to(index) * s_block + offset.to(index) * s_offset)
    rows = places[:, None] + element.to(index)[None, :]
    if TAIL:
        staged_base, s_row, staged_element, staging_rows = staged
        draft = p - prefix
        row = tl.minimum(tl.maximum(tail + draft, 0), staging_rows - 1).to(index) * s_row
        is_draft = (draft >= 0) & (draft < drafts)
        if ALIKE:
            rows = tl.where(is_draft, staged_base + row, places)[:, None]
            rows = rows + element.to(index)[None, :]
        else:
            staged_rows = staged_base + (row[:, None] + staged_element.to(index)[None, :])
            rows = tl.where(is_draft[:, None], staged_rows, rows)
    if MASKED:
        return tl.load(rows, mask=wanted, other=0)
    return tl.load(rows)


@triton.jit
def _operand(rows, FP8: tl.constexpr, like: tl.constexpr):
    """Rows as an operand of tl.dot. fp8 scales are applied to the scores and the output."""
    if FP8 > NATIVE:
        return native_fp8(rows, FP8).to(like)
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
def _attend(
    q, best, total, acc, tile, block, key, value, staged_key, staged_value,
    tail, prefix, drafts, position, first_seen, high, scale, softcap,
    D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Attend to one KV tile. WHOLE: to all of it, but for what the window hides."""
    p = tile * N + tl.arange(0, N)
    masked: tl.constexpr = not WHOLE or WINDOW > 0
    some: tl.constexpr = masked or D != D_PAD
    wanted = p >= 0
    seen = True
    if not WHOLE:
        wanted &= p < high
        seen = p[None, :] <= position[:, None]
    if WINDOW > 0:
        wanted &= p >= first_seen
        seen &= p[None, :] > position[:, None] - WINDOW
    wanted = wanted[:, None]
    if D != D_PAD:
        wanted = wanted & (tl.arange(0, D_PAD) < D)[None, :]
    k = _rows(
        key, staged_key, block, p, wanted, tail, prefix, drafts, BLOCK_SIZE, TAIL, some, WIDE, ALIKE
    )
    v = _rows(
        value, staged_value, block, p, wanted, tail, prefix, drafts, BLOCK_SIZE, TAIL, some, WIDE,
        ALIKE,
    )  # fmt: skip
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    k, v = _operand(k, FP8, q.dtype), _operand(v, FP8, q.dtype)
    score = tl.dot(q, tl.trans(k), input_precision=precision) * scale
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1); core Triton has no tanh.
        score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * (score / softcap)) + 1.0)) * LOG2E
    if masked:
        score = tl.where(seen, score, float("-inf"))
    return _accumulate(score, v, best, total, acc, precision)


@triton.jit
def walk(
    q, best, total, acc, block, first, last, table, s_column, width, last_block,
    key, value, staged_key, staged_value, tail, prefix, drafts, position, first_seen, high,
    scale, softcap,
    D: tl.constexpr, D_PAD: tl.constexpr, N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr, TAIL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    FP8: tl.constexpr, WIDE: tl.constexpr, ALIKE: tl.constexpr,
):  # fmt: skip
    """Attend to KV tiles `[first, last)`; `block` has the blocks of the first.

    key, value: a tuple of base pointer, strides of a block and of a place in it, offsets `[D_PAD]`
    of the elements of a row. staged_key, staged_value: base, stride of a row, offsets, rows.
    """
    # Of tiles that are not whole there are one or two: not worth a pipeline.
    for tile in tl.range(first, last, num_stages=None if WHOLE else 1):
        # Loaded one tile ahead: the address of a row must not wait for its block.
        this = block
        block = blocks_of(table, s_column, tile + 1, width, last_block, N, BLOCK_SIZE)
        best, total, acc = _attend(
            q, best, total, acc, tile, this, key, value, staged_key, staged_value,
            tail, prefix, drafts, position, first_seen, high, scale, softcap,
            D, D_PAD, N, BLOCK_SIZE, WHOLE, TAIL, WINDOW, SOFTCAP, FP8, WIDE, ALIKE,
        )  # fmt: skip
    return best, total, acc, block


@triton.jit
def store_out(out, acc, mask, EXACT_BF16: tl.constexpr):
    """Store in the dtype of the output; EXACT_BF16: see NOTE [integer casts] in `fp8`."""
    if EXACT_BF16:
        tl.store(out, round_bf16(acc), mask=mask)
    else:
        tl.store(out, acc.to(out.dtype.element_ty), mask=mask)
