"""How the attention kernels cut their work: on the device, from the lengths of the step.

The host knows shapes only, and a captured graph is replayed for any lengths. So every program works
the cut out for itself, from `query_start_loc` and `seq_lens`: one vector load, some reductions.

A unit is one query tile of one request, for one KV head: so many KV tiles. It is cut into chunks of
one size, the last one smaller, and a chunk is a program; the chunks of one unit are pieces, which
`merge` puts together. The chunks of all units, laid end to end, make a line, the same for every KV
head. The tokens past the last request (padding) are one more request, of length 0.

NOTE [chunks]: `shares` programs a KV head run at once. Are there fewer units, then a chunk is as
small as leaves no more chunks than that: equal parts of every unit, or one size for all where the
requests differ much. Are there more, then units stay whole where they are alike, and else a chunk
is half of a share's part of the work, so that the last programs do not run alone. Sizes larger than
these leave the device idle. Smaller ones cost more starts, at 3 to 4 us each on an H200, than they
save: work cut evenly over requests, as stream-K does, was slower for every uniform batch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kv_tiles(length, room, PER: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr):
    """KV tiles of every unit of a request: those of the longest. At least one, so that a token that
    sees nothing is visited and gets its zeros.

    room: positions that the block table can hold.
    """
    tiles = (tl.maximum(tl.minimum(length, room), 1) + N - 1) // N
    if WINDOW > 0:
        # PER tokens see WINDOW - 1 + PER positions, which may begin anywhere in a tile.
        most: tl.constexpr = (WINDOW + PER + N - 2) // N + 1
        tiles = tl.minimum(tiles, most)
    return tiles


@triton.jit
def quotient(a, b):
    """a // b for 0 <= a < 2^24 and b > 0: a division of integers takes several times as long."""
    q = (a.to(tl.float32) / b.to(tl.float32)).to(tl.int32)
    # The quotient may be one off, because the division rounds.
    q -= (q * b > a).to(tl.int32)
    return q + ((q + 1) * b <= a).to(tl.int32)


@triton.jit
def line_of_chunks(
    query_start_loc, seq_lens, s_start, s_len, requests, tokens, room, shares,
    PER: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Where on the line each request ends `[R]`, R > requests; and the tiles of a chunk."""
    r = tl.arange(0, R)
    place = query_start_loc + r * s_start
    start = tl.load(place, mask=r <= requests, other=tokens).to(tl.int32)
    end = tl.load(place + s_start, mask=r < requests, other=tokens).to(tl.int32)
    length = tl.load(seq_lens + r * s_len, mask=r < requests, other=0).to(tl.int32)
    units = (tl.maximum(end - start, 0) + PER - 1) // PER
    if not SPLIT:
        return tl.cumsum(units, axis=0), room // N + 1
    tiles = kv_tiles(length, room, PER, N, WINDOW)
    all_units = tl.sum(units, axis=0)
    all_tiles = tl.sum(units * tiles, axis=0)
    most = tl.max(tl.where(units > 0, tiles, 1), axis=0)
    chunk = most
    if all_units <= shares:
        each = quotient(shares, tl.maximum(all_units, 1))
        chunk = quotient(most + each - 1, each)
        if all_units < shares:
            spare = shares - all_units
            chunk = tl.minimum(chunk, quotient(all_tiles + spare - 1, spare))
    elif most * all_units > all_tiles + all_tiles // 4:
        chunk = tl.minimum(most, all_tiles // (2 * shares) + 1)
    return tl.cumsum(units * quotient(tiles + chunk - 1, chunk), axis=0), chunk


@triton.jit
def request_at(ends, place):
    """The request at a place of the line, and where it begins."""
    passed = ends <= place
    request = tl.sum(passed.to(tl.int32), axis=0)
    return request, tl.max(tl.where(passed, ends, 0), axis=0)
