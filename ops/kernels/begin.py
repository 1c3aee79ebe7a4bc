"""Launcher of `begin_rows`: what a window does when it opens, in one launch a slot group.

The specification is `nwor_compile.routing.begin_rows`. Every program works out the
requests for itself (one vector load, one scan) and routes a block of tokens; the first one also
writes what there is once.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.counters import COUNTERS
from nwor_compile.ops.error_bits import BAD_COUNTS, OVERFLOW
from nwor_compile.ops.kernels.launch import on_device
from nwor_compile.ops.staging import Routing

_LANES = (16, 64, 256, 1024, 4096)  # one a request; few sizes, as each is compiled
_TILE = 16384  # tokens x requests of a program
_CERTAIN = tl.constexpr(COUNTERS["certain"])
_BAD = tl.constexpr(BAD_COUNTS)
_OVERFLOW = tl.constexpr(OVERFLOW)


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
        "last_slot",
        "staging_rows",
        "max_drafts",
        "words",
    ]
)
def _begin_kernel(
    num_drafts, query_start_loc, seq_lens, slot_mapping, token_ids, row_map, out_drafts, tail_start,
    drafts_kept, error, state, counters, slots, rows, draft_ids,
    tokens, requests, max_requests, capacity, last_slot, staging_rows, max_drafts, words,
    s_drafts, s_start, s_length, s_slot, s_id, s_counter,
    R: tl.constexpr, T: tl.constexpr, FIRST: tl.constexpr,
    TAIL_BLOCK: tl.constexpr, TAIL_ROWS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Program i routes tokens `[i * T, (i + 1) * T)`; without FIRST it only copies their slots.

    TAIL_BLOCK: 0, or the block size of the tail blocks, TAIL_ROWS of whose rows a request has.
    """
    r = tl.arange(0, R)
    real = r < requests
    has_slots = _any_slot(slot_mapping, s_slot, tokens, 1024)
    count = tl.load(num_drafts + r * s_drafts, mask=real, other=0).to(tl.int32) * has_slots
    start = tl.load(query_start_loc + r * s_start, mask=real, other=0).to(tl.int32)
    end = tl.load(query_start_loc + (r + 1) * s_start, mask=real, other=0).to(tl.int32)
    # With no drafts a span may be empty; with drafts a certain token must precede them.
    contradicted = (count < 0) | ((count > 0) & (count >= end - start))
    place = tl.zeros([R], tl.int32)
    if TAIL_BLOCK > 0:
        length = tl.load(seq_lens + r * s_length, mask=real, other=0).to(tl.int32)
        contradicted |= (count > 0) & (length < end - start)
        place = tl.maximum(length - count, 0) % TAIL_BLOCK
    bad = tl.max((real & (contradicted | (count > max_drafts))).to(tl.int32), axis=0)
    overflow = (tl.sum(tl.maximum(count, 0).to(tl.int64), axis=0) > capacity).to(tl.int32)
    flagged = (bad | overflow) > 0
    drafts = tl.where(contradicted, 0, count)
    order = tl.cumsum(drafts, axis=0) - drafts
    tails = order
    if TAIL_BLOCK > 0:
        tails = r * TAIL_ROWS + place

    token = tl.program_id(0) * T + tl.arange(0, T)
    inside = token < tokens
    passed = (real[None, :] & (end[None, :] <= token[:, None])).to(tl.int32)
    owner = tl.minimum(tl.sum(passed, axis=1), requests - 1)
    own = r[None, :] == owner[:, None]
    first_draft = tl.sum(tl.where(own, (end - drafts)[None, :], 0), axis=1)
    before = tl.sum(tl.where(own, order[None, :], 0), axis=1)
    tail = before
    if TAIL_BLOCK > 0:
        tail = tl.sum(tl.where(own, tails[None, :], 0), axis=1)
    last = tl.sum(tl.where(r == requests - 1, end, 0), axis=0)
    is_draft = inside & (token < last) & (token >= first_draft)
    row = tail + token - first_draft
    index = before + token - first_draft
    known = is_draft & (index < tl.where(flagged, 0, capacity))
    slot = tl.load(slot_mapping + token * s_slot, mask=inside, other=-1).to(tl.int64)
    tl.store(slots + index, slot, mask=known)
    if FIRST:
        code = tl.full([T], -1, tl.int32)
        if TAIL_BLOCK > 0:
            # Certain rows in the first draft's block: attention reads that block from the tail.
            covered = tl.sum(tl.where(own & (drafts > 0)[None, :], place[None, :], 0), axis=1)
            covered = tl.where(flagged, 0, covered)
            from_here = first_draft - token
            opened = tl.sum(tl.where(own, start[None, :], 0), axis=1)
            mirrored = inside & (token < last) & (token >= opened)
            code = tl.where(mirrored & (from_here > 0) & (from_here <= covered), -row - 2, code)
            tl.store(rows + index, row, mask=known)
        if IDS:
            ids = tl.load(token_ids + token * s_id, mask=known, other=0).to(tl.int64)
            tl.store(draft_ids + index, ids, mask=known)
        goes = tl.where(flagged, staging_rows, row)
        tl.store(row_map + token, tl.where(is_draft, goes, code), mask=inside)
        certain = tl.sum(((slot >= 0) & (is_draft == 0)).to(tl.int64), axis=0)
        tl.atomic_add(counters + _CERTAIN * s_counter, certain, sem="relaxed")

    if tl.program_id(0) == 0:
        used = tl.where(flagged, 0, tl.sum(drafts, axis=0))
        for first in range(0, last_slot + 1, 1024):
            unused = first + tl.arange(0, 1024)
            gone = tl.zeros([1024], tl.int64)
            tl.store(slots + unused, gone - 1, mask=(unused >= used) & (unused <= last_slot))
            past = (unused >= used) & (unused < last_slot)
            if FIRST:
                if TAIL_BLOCK > 0:
                    tl.store(rows + unused, gone.to(tl.int32), mask=past)
                if IDS:
                    tl.store(draft_ids + unused, gone, mask=past)
        if FIRST:
            tl.store(error, bad * _BAD + overflow * _OVERFLOW)
            noted = tl.where(flagged | (real == 0), 0, drafts)
            room = r < max_requests
            tl.store(out_drafts + r, noted, mask=room)
            tl.store(drafts_kept + r, noted, mask=room)
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
    routing: Routing,
    kept: Any,
    slots: list[Tensor],
    *,
    max_drafts: int,
    capacity: int,
    staging_rows: int,
    tail: Any = None,
    seq_lens: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> None:
    """Open a window: `nwor_compile.routing.begin_rows`, whose arguments these are.

    Entries of `routing.row_map` past the step's tokens must be -1 already, as a window leaves them.
    """
    requests = num_drafts.shape[0]
    few = (lanes for lanes in _LANES if lanes >= requests)
    lanes = next(few, triton.next_power_of_2(requests))
    block = max(16, min(128, _TILE // lanes))
    ids = token_ids if kept.draft_ids is not None else None
    with on_device(routing.row_map):
        for index, (mapping, own) in enumerate(zip(slot_mappings, slots, strict=True)):
            tokens = mapping.shape[0]
            _begin_kernel[(max(1, triton.cdiv(tokens, block)),)](
                num_drafts, query_start_loc, seq_lens, mapping, ids, routing.row_map,
                routing.num_drafts, routing.tail_start, kept.drafts, kept.error, kept.state,
                kept.counters, own, kept.rows, kept.draft_ids,
                tokens, requests, kept.drafts.shape[0], capacity, own.shape[0] - 1, staging_rows,
                max_drafts, kept.state.numel(),
                num_drafts.stride(0), query_start_loc.stride(0),
                0 if seq_lens is None else seq_lens.stride(0), mapping.stride(0),
                0 if ids is None else ids.stride(0), kept.counters.stride(0),
                R=lanes, T=block, FIRST=index == 0,
                TAIL_BLOCK=0 if tail is None else tail.block_size,
                TAIL_ROWS=0 if tail is None else tail.rows, IDS=ids is not None,
                num_warps=4,
            )  # fmt: skip
