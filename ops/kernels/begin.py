"""Launcher of `begin_rows`: what a window does when it opens, in one launch a slot group.

The specification is `nwor_compile.routing.route` and `snapshot_slots`. Every program works out the
requests for itself (one vector load, one scan) and routes a block of tokens; the first one also
writes what there is once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.counters import COUNTERS
from nwor_compile.ops.kernels.launch import on_device

_LANES = (16, 64, 256, 1024, 4096)  # one a request; few sizes, as each is compiled
_TILE = 16384  # tokens x requests of a program
_CERTAIN = tl.constexpr(COUNTERS["certain"])


@triton.jit
def _any_slot(slot_mapping, s_slot, tokens, BLOCK: tl.constexpr):
    """1 if some token has a slot; 0 in a warm-up step."""
    found = 0
    for first in range(0, tokens, BLOCK):
        token = first + tl.arange(0, BLOCK)
        slot = tl.load(slot_mapping + token * s_slot, mask=token < tokens, other=-1)
        found = tl.maximum(found, tl.max((slot >= 0).to(tl.int32), axis=0))
    return found


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(
    do_not_specialize=[
        "tokens",
        "requests",
        "max_requests",
        "capacity",
        "rows",
        "max_drafts",
        "words",
    ]
)
def _begin_kernel(
    num_drafts, query_start_loc, slot_mapping, row_map, out_drafts, tail_start, drafts_kept, error,
    state, counters, slots,
    tokens, requests, max_requests, capacity, rows, max_drafts, words,
    s_drafts, s_start, s_slot, s_counter,
    R: tl.constexpr, T: tl.constexpr, FIRST: tl.constexpr,
    BAD: tl.constexpr, OVERFLOW: tl.constexpr,
):  # fmt: skip
    """Program i routes tokens `[i * T, (i + 1) * T)`; without FIRST it only copies their slots."""
    r = tl.arange(0, R)
    real = r < requests
    has_slots = _any_slot(slot_mapping, s_slot, tokens, 1024)
    count = tl.load(num_drafts + r * s_drafts, mask=real, other=0).to(tl.int32) * has_slots
    start = tl.load(query_start_loc + r * s_start, mask=real, other=0).to(tl.int32)
    end = tl.load(query_start_loc + (r + 1) * s_start, mask=real, other=0).to(tl.int32)
    # With no drafts a span may be empty; with drafts a certain token must precede them.
    contradicted = (count < 0) | ((count > 0) & (count >= end - start))
    bad = tl.max((real & (contradicted | (count > max_drafts))).to(tl.int32), axis=0)
    overflow = (tl.sum(tl.maximum(count, 0).to(tl.int64), axis=0) > capacity).to(tl.int32)
    flagged = (bad | overflow) > 0
    drafts = tl.where(contradicted, 0, count)
    tails = tl.cumsum(drafts, axis=0) - drafts

    token = tl.program_id(0) * T + tl.arange(0, T)
    inside = token < tokens
    passed = (real[None, :] & (end[None, :] <= token[:, None])).to(tl.int32)
    owner = tl.minimum(tl.sum(passed, axis=1), requests - 1)
    own = r[None, :] == owner[:, None]
    first_draft = tl.sum(tl.where(own, (end - drafts)[None, :], 0), axis=1)
    tail = tl.sum(tl.where(own, tails[None, :], 0), axis=1)
    last = tl.sum(tl.where(r == requests - 1, end, 0), axis=0)
    is_draft = inside & (token < last) & (token >= first_draft)
    row = tl.where(flagged, capacity, tail + token - first_draft)
    slot = tl.load(slot_mapping + token * s_slot, mask=inside, other=-1).to(tl.int64)
    tl.store(slots + row, slot, mask=is_draft & (row < capacity))
    if FIRST:
        tl.store(row_map + token, tl.where(is_draft, row, -1), mask=inside)
        certain = tl.sum(((slot >= 0) & (is_draft == 0)).to(tl.int64), axis=0)
        tl.atomic_add(counters + _CERTAIN * s_counter, certain)

    if tl.program_id(0) == 0:
        used = tl.where(flagged, 0, tl.sum(drafts, axis=0))
        for first in range(0, rows, 1024):
            unused = first + tl.arange(0, 1024)
            gone = tl.zeros([1024], tl.int64) - 1
            tl.store(slots + unused, gone, mask=(unused >= used) & (unused < rows))
        if FIRST:
            tl.store(error, bad * BAD + overflow * OVERFLOW)
            known = tl.where(flagged | (real == 0), 0, drafts)
            room = r < max_requests
            tl.store(out_drafts + r, known, mask=room)
            tl.store(drafts_kept + r, known, mask=room)
            tl.store(tail_start + r, tl.where(real, tails, 0), mask=room)
            for first in range(R, max_requests, R):
                nobody = first + r
                zero = tl.zeros([R], tl.int32)
                tl.store(out_drafts + nobody, zero, mask=nobody < max_requests)
                tl.store(drafts_kept + nobody, zero, mask=nobody < max_requests)
                tl.store(tail_start + nobody, zero, mask=nobody < max_requests)
            for first in range(0, words, 256):
                word = first + tl.arange(0, 256)
                tl.store(state + word, tl.zeros([256], tl.int32), mask=word < words)


def begin_rows(
    num_drafts: Tensor,
    query_start_loc: Tensor,
    slot_mappings: list[Tensor],
    row_map: Tensor,
    out_drafts: Tensor,
    tail_start: Tensor,
    drafts_kept: Tensor,
    error: Tensor,
    state: Tensor,
    counters: Tensor,
    slots: list[Tensor],
    *,
    max_drafts: int,
    capacity: int,
    bad_counts: int,
    overflow: int,
) -> None:
    """Open a window: routing, error flag, staging state, certain rows and the slots of its drafts.

    Args:
        num_drafts, query_start_loc: `[R]` and `[R + 1]` integer, R at least 1.
        slot_mappings: one `[T]` integer a slot group; the first says whether there are slots.
        row_map: int32 `[max_tokens]`, -1 everywhere; its first T entries are written.
        out_drafts, tail_start, drafts_kept: int32 `[max_requests]`, written whole.
        error: int32 `[1]`, overwritten. state: int32, contiguous, zeroed. counters: int64, to which
            the certain rows are added.
        slots: one int64 `[capacity + 1]` a slot group, overwritten; -1 where no draft is.
        max_drafts: most drafts a request may have. capacity: staging rows there are.
        bad_counts, overflow: bits of the error flag.
    """
    requests = num_drafts.shape[0]
    few = (lanes for lanes in _LANES if lanes >= requests)
    lanes = next(few, triton.next_power_of_2(requests))
    block = max(16, min(128, _TILE // lanes))
    with on_device(row_map):
        for index, (mapping, kept) in enumerate(zip(slot_mappings, slots, strict=True)):
            tokens = mapping.shape[0]
            _begin_kernel[(max(1, triton.cdiv(tokens, block)),)](
                num_drafts, query_start_loc, mapping, row_map, out_drafts, tail_start, drafts_kept,
                error, state, counters, kept,
                tokens, requests, out_drafts.shape[0], capacity, kept.shape[0], max_drafts,
                state.numel(),
                num_drafts.stride(0), query_start_loc.stride(0), mapping.stride(0),
                counters.stride(0),
                R=lanes, T=block, FIRST=index == 0, BAD=bad_counts, OVERFLOW=overflow,
                num_warps=4,
            )  # fmt: skip
