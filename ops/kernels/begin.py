"""Launcher of `begin_rows`: what a window does when it opens, in one launch a slot group.

The specification is `nwor_compile.routing.begin_rows`. A program a request: each reads the counts
of all of them (one vector), for where its own drafts come in order and for the error flag, and
routes the tokens of its own span. One more fills what belongs to nobody.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.counters import COUNTERS
from nwor_compile.ops.error_bits import BAD_COUNTS, OVERFLOW
from nwor_compile.ops.kernels.launch import KeptLaunch

_LANES = (16, 64, 256, 1024, 4096)  # one a request; few sizes, as each is compiled
_TOKENS = 256  # of a span, at a time
_CERTAIN = tl.constexpr(COUNTERS["certain"])
_BAD = tl.constexpr(BAD_COUNTS)
_OVERFLOW = tl.constexpr(OVERFLOW)

# What is known of the draft counts: themselves, the first logit of each request, or its span alone.
BY_COUNT, BY_LOGITS, BY_SPAN = range(3)
_BY_LOGITS, _BY_SPAN = tl.constexpr(BY_LOGITS), tl.constexpr(BY_SPAN)


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
        "max_requests", "capacity", "last_slot", "staging_rows", "max_drafts", "words", "tokens",
        "requests",
    ]
)  # fmt: skip
def _begin_kernel(
    row_map, out_drafts, tail_start, drafts_kept, error, state, counters, slots, rows, draft_ids,
    epoch, max_requests, capacity, last_slot, staging_rows, max_drafts, words, s_counter,
    num_drafts, query_start_loc, seq_lens, slot_mapping, token_ids,
    s_drafts, s_start, s_length, s_slot, s_id,
    tokens, requests,
    R: tl.constexpr, T: tl.constexpr, FIRST: tl.constexpr, COUNTS: tl.constexpr,
    TAIL_BLOCK: tl.constexpr, TAIL_ROWS: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    """Program i routes request i, the last one fills; without FIRST they only copy slots.

    COUNTS: what `num_drafts` is, one of the numbers above. TAIL_BLOCK: 0, or the block size of the
    tail blocks, TAIL_ROWS of whose rows a request has.
    """
    r = tl.arange(0, R)
    real = r < requests
    has_slots = _any_slot(slot_mapping, s_slot, tokens, 1024)
    start = tl.load(query_start_loc + r * s_start, mask=real, other=0).to(tl.int32)
    end = tl.load(query_start_loc + (r + 1) * s_start, mask=real, other=0).to(tl.int32)
    if COUNTS == _BY_SPAN:
        # An empty span has none. One that runs backwards is left to be a bad count.
        count = tl.where(end == start, 0, end - start - 1)
    else:
        count = tl.load(num_drafts + r * s_drafts, mask=real, other=0).to(tl.int32)
        if COUNTS == _BY_LOGITS:
            after = tl.load(num_drafts + (r + 1) * s_drafts, mask=real, other=0).to(tl.int32)
            count = tl.where(real, after - count - 1, 0)
    count = count * has_slots
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

    me = tl.program_id(0)
    if me < requests:
        mine = r == me
        own_drafts = tl.sum(tl.where(mine, drafts, 0), axis=0)
        opened = tl.sum(tl.where(mine, start, 0), axis=0)
        closed = tl.sum(tl.where(mine, end, 0), axis=0)
        before = tl.sum(tl.where(r < me, drafts, 0), axis=0)
        own_place = tl.sum(tl.where(mine, place, 0), axis=0)
        tail = before
        if TAIL_BLOCK > 0:
            tail = me * TAIL_ROWS + own_place
        first_draft = closed - own_drafts
        certain = tl.zeros([T], tl.int32)
        for token_0 in range(opened, closed, T):
            token = token_0 + tl.arange(0, T)
            inside = (token < closed) & (token < tokens)
            is_draft = inside & (token >= first_draft)
            row = tail + token - first_draft
            index = before + token - first_draft
            known = is_draft & (index < tl.where(flagged, 0, capacity))
            slot = tl.load(slot_mapping + token * s_slot, mask=inside, other=-1).to(tl.int64)
            tl.store(slots + index, slot, mask=known)
            if FIRST:
                code = tl.full([T], -1, tl.int32)
                if TAIL_BLOCK > 0:
                    # Certain rows in the first draft's block: attention reads that block from the
                    # tail.
                    covered = tl.where(flagged | (own_drafts == 0), 0, own_place)
                    code = tl.where(first_draft - token <= covered, -row - 2, code)
                    tl.store(rows + index, row, mask=known)
                if IDS:
                    ids = tl.load(token_ids + token * s_id, mask=known, other=0).to(tl.int64)
                    tl.store(draft_ids + index, ids, mask=known)
                goes = tl.where(flagged, staging_rows, row)
                tl.store(row_map + token, tl.where(is_draft, goes, code), mask=inside)
                certain += ((slot >= 0) & (is_draft == 0)).to(tl.int32)
        if FIRST:
            counted = tl.sum(certain, axis=0).to(tl.int64)
            tl.atomic_add(counters + _CERTAIN * s_counter, counted, sem="relaxed")
            noted = tl.where(flagged, 0, own_drafts)
            tl.store(out_drafts + me, noted)
            tl.store(drafts_kept + me, noted)
            tl.store(tail_start + me, tail)
    else:
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
            if TAIL_BLOCK > 0:
                # The flag is that of the window before; nobody else touches the epoch here.
                faulty = (tl.load(error) != 0).to(tl.int64)
                tl.store(epoch, tl.load(epoch) + 1 + faulty)
            tl.store(error, bad * _BAD + overflow * _OVERFLOW)
            last = tl.max(tl.where(real, end, 0), axis=0)
            for padding in range(last, tokens, 1024):
                token = padding + tl.arange(0, 1024)
                tl.store(row_map + token, tl.zeros([1024], tl.int32) - 1, mask=token < tokens)
            for first in range(requests, max_requests, R):
                nobody = first + r
                zero = tl.zeros([R], tl.int32)
                tl.store(out_drafts + nobody, zero, mask=nobody < max_requests)
                tl.store(drafts_kept + nobody, zero, mask=nobody < max_requests)
                tl.store(tail_start + nobody, zero, mask=nobody < max_requests)
            for first in range(0, words, 256):
                word = first + tl.arange(0, 256)
                tl.store(state + word, tl.zeros([256], tl.int32), mask=word < words)


def begin_launches(plan: Any) -> list[KeptLaunch]:
    """How the kernel is launched for each slot group of `plan`, a `BeginPlan`."""
    routing, kept = plan.routing, plan.kept
    return [
        KeptLaunch(
            _begin_kernel, routing.row_map.device,
            (
                routing.row_map, routing.num_drafts, routing.tail_start, kept.drafts, kept.error,
                kept.state, kept.counters, own, kept.rows, kept.draft_ids, kept.epoch,
                kept.drafts.shape[0], plan.capacity, own.shape[0] - 1, plan.staging_rows,
                plan.max_drafts, kept.state.numel(), kept.counters.stride(0),
            ),
            num_warps=4,
        )
        for own in plan.slots
    ]  # fmt: skip


def begin_rows(
    plan: Any,
    num_drafts: Tensor | None,
    query_start_loc: Tensor,
    slot_mappings: list[Tensor],
    seq_lens: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> None:
    """Open a window: `nwor_compile.routing.begin_rows`, whose arguments these are.

    Entries of `routing.row_map` past the step's tokens must be -1 already, as a window leaves them.
    """
    requests = query_start_loc.shape[0] - 1
    lanes = _lanes(requests)
    ids = token_ids if plan.kept.draft_ids is not None else None
    block, rows = plan.tail if plan.tail is not None else (0, 0)
    known, s_drafts, first = BY_SPAN, 0, 1
    if num_drafts is not None:
        known = BY_LOGITS if num_drafts.shape[0] > requests else BY_COUNT
        s_drafts = num_drafts.stride(0)
    for launch, mapping in zip(plan.launches, slot_mappings, strict=True):
        launch(
            requests + 1,
            (num_drafts, query_start_loc, seq_lens, mapping, ids),
            (
                s_drafts, *query_start_loc.stride(), 0 if seq_lens is None else seq_lens.stride(0),
                *mapping.stride(), 0 if ids is None else ids.stride(0),
            ),
            (mapping.shape[0], requests),
            (lanes, _TOKENS, first, known, block, rows, int(ids is not None)),
        )  # fmt: skip
        first = 0


def _lanes(requests: int) -> int:
    for lanes in _LANES:
        if lanes >= requests:
            return lanes
    return int(triton.next_power_of_2(requests))
