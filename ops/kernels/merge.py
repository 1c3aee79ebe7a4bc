"""The second kernel of split attention: pieces of a unit into rows of the output.

A program merges one row of the output: a token and a query head. Which pieces the token has, the
attention kernel writes down, as it has worked it out already.

NOTE [overlap]: with OVERLAP the kernel is launched while the attention kernel still runs, and waits
(`griddepcontrol.wait`: until that kernel is complete and its stores are visible) before it reads
anything. Every program waits, so that what comes after this kernel comes after both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nwor_compile.ops.kernels.tiles import store_out

# What is known of a token: int32 each.
FIRST_PIECE = tl.constexpr(0)
PIECES = tl.constexpr(1)  # 1: its unit was not cut
IN_UNIT = tl.constexpr(2)  # which token of its unit it is
FIELDS = tl.constexpr(4)


@triton.jit
def _row(
    part, part_max, part_sum, first_piece, pieces, kv_head, row,
    KV_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, M: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A row of the output `[D_PAD]`, from AT_ONCE pieces at a time."""
    d = tl.arange(0, D_PAD)
    top = tl.full([1], float("-inf"), tl.float32)
    weights = tl.zeros([1], tl.float32)
    acc = tl.zeros([D_PAD], tl.float32)
    for low in range(0, pieces, AT_ONCE):
        piece = low + tl.arange(0, AT_ONCE)
        used = piece < pieces
        line = ((first_piece + piece) * KV_HEADS + kv_head).to(tl.int64) * M + row
        best = tl.load(part_max + line, mask=used, other=float("-inf"))
        sums = tl.load(part_sum + line, mask=used, other=0.0)
        rows = tl.load(
            part + line[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0
        )
        new_top = tl.maximum(top, tl.max(best, axis=0))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - finite)
        weight = tl.exp2(best - finite)
        weights = weights * shrink + tl.sum(weight * sums, axis=0)
        acc = acc * shrink + tl.sum(rows * weight[:, None], axis=0)
        top = new_top
    return acc / tl.where(weights == 0.0, 1.0, weights)


@triton.jit
def merge_kernel(
    out, part, part_max, part_sum, notes,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    M: tl.constexpr, AT_ONCE: tl.constexpr, EXACT_BF16: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program token * HEADS + head. AT_ONCE: pieces that are loaded together."""
    KV_HEADS: tl.constexpr = HEADS // GROUP
    line = tl.program_id(0)
    head = line % HEADS
    if OVERLAP:
        gdc_wait()
    note = notes + (line // HEADS) * FIELDS
    pieces = tl.load(note + PIECES)
    first_piece = tl.load(note + FIRST_PIECE)
    row = tl.load(note + IN_UNIT) * GROUP + head % GROUP
    if pieces <= 1:
        return
    d = tl.arange(0, D_PAD)
    place = out + line.to(tl.int64) * D + d
    acc = _row(
        part, part_max, part_sum, first_piece, pieces, head // GROUP, row,
        KV_HEADS, D, D_PAD, M, AT_ONCE,
    )  # fmt: skip
    store_out(place, acc, d < D, EXACT_BF16)
