"""Which tokens of a step are drafts, and where their rows go: computed on the device.

A verify span is one or more certain tokens followed by the request's drafts. Draft j of request r
goes to staging row `tail_start[r] + j`, request after request; every other token is certain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nwor_compile.ops.counters import COUNTERS
from nwor_compile.ops.library import Launcher
from nwor_compile.ops.staging import Routing

# Bits of the window's error flag.
OVERFLOW = 1  # more drafts than staging rows, or a layer met a draft without a row
BAD_COUNTS = 2  # a negative count, more drafts than max_drafts, or no certain token before them
COUNT_MISMATCH = 4  # a layer staged another number of rows than the window has drafts
ID_MISMATCH = 8  # sampled ids and counts contradict the drafts
EARLY_WRITE = 16  # poison mode: a draft slot was written before its commit

ERROR_NAMES = {
    OVERFLOW: "staging overflow",
    BAD_COUNTS: "impossible draft counts",
    COUNT_MISMATCH: "layers staged different numbers of rows",
    ID_MISMATCH: "sampled ids contradict the drafts",
    EARLY_WRITE: "a draft slot was written before its commit",
}


def describe_error(bits: int) -> str:
    """The error flag in words; empty for 0."""
    return ", ".join(text for bit, text in ERROR_NAMES.items() if bits & bit)


def allocate_routing(max_tokens: int, max_requests: int, device: torch.device) -> Routing:
    """Buffers that say: every token is certain."""
    return Routing(
        row_map=torch.full((max_tokens,), -1, dtype=torch.int32, device=device),
        num_drafts=torch.zeros(max_requests, dtype=torch.int32, device=device),
        tail_start=torch.zeros(max_requests, dtype=torch.int32, device=device),
    )


def clear(routing: Routing) -> None:
    """Direct mode: every token is certain, no request has a tail."""
    routing.row_map.fill_(-1)
    routing.num_drafts.zero_()


def route(
    routing: Routing,
    num_drafts: Tensor,
    query_start_loc: Tensor,
    *,
    has_slots: Tensor,
    max_drafts: int,
    capacity: int,
) -> Tensor:
    """Fill `routing` for one step; return the error bits as an int32 `[1]` tensor.

    Impossible counts leave every request without a tail. The tokens that were said to be drafts
    then get a staging row that does not exist, and so go nowhere: a draft row may not reach the
    cache because some count was wrong. Where a count leaves no certain token, or is negative, it
    does not say which tokens are drafts; all tokens of that request are certain.

    Args:
        num_drafts: `[R]` integer, R <= max_requests.
        query_start_loc: `[R + 1]` integer, R of `num_drafts`; tokens past the last are padding.
        has_slots: bool scalar; False for a warm-up step, which has no drafts whatever its counts.
        max_drafts: most drafts a request may have.
        capacity: staging rows there are.
    """
    requests = num_drafts.shape[0]
    starts = query_start_loc.long()
    spans = starts[1:] - starts[:-1]
    counts = torch.where(has_slots, num_drafts.long(), 0)
    # With no drafts a span may be empty; with drafts a certain token must precede them.
    contradicted = (counts < 0) | ((counts > 0) & (counts >= spans))
    bad = (contradicted | (counts > max_drafts)).any()
    overflow = counts.clamp(min=0).sum() > capacity
    flagged = bad | overflow
    drafts = torch.where(contradicted, 0, counts)
    tails = drafts.cumsum(0) - drafts

    token = torch.arange(routing.row_map.shape[0], device=routing.row_map.device)
    owner = torch.searchsorted(starts[1:], token, right=True).clamp(max=requests - 1)
    draft = token - (starts[owner + 1] - drafts[owner])
    is_draft = (token < starts[requests]) & (draft >= 0)
    row = torch.where(flagged, capacity, tails[owner] + draft)
    routing.row_map.copy_(torch.where(is_draft, row, -1))
    routing.num_drafts.zero_()
    routing.num_drafts[:requests].copy_(torch.where(flagged, 0, drafts))
    routing.tail_start.zero_()
    routing.tail_start[:requests].copy_(tails)
    bits = bad.to(torch.int32) * BAD_COUNTS + overflow.to(torch.int32) * OVERFLOW
    return bits.view(1)


def snapshot_slots(slots: Tensor, row_map: Tensor, slot_mapping: Tensor) -> None:
    """Copy the slots of the draft rows out of the step's slot mapping.

    The engine may overwrite its slot mapping before the commit (a drafter does), so the window
    keeps its own.

    Args:
        slots: int64 `[capacity + 1]`, overwritten; -1 for rows that are not in use. The last entry
            takes the tokens without a staging row and means nothing.
        row_map: `[max_tokens]`.
        slot_mapping: `[T <= max_tokens]`.
    """
    tokens = slot_mapping.shape[0]
    row = row_map[:tokens].long()
    last = slots.shape[0] - 1
    slots.fill_(-1)
    slots.scatter_(0, torch.where(row >= 0, row, last), slot_mapping.long())
    slots[last:].fill_(-1)


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
    """What a window does when it opens; the specification of the kernel of this name.

    Args:
        num_drafts, query_start_loc: as for `route`.
        slot_mappings: one `[T]` a slot group; whether the step has slots is asked of the first.
        row_map, out_drafts, tail_start: the routing that is filled.
        drafts_kept: int32 `[max_requests]`, a copy of `out_drafts`.
        error: int32 `[1]`, overwritten. state: int32, zeroed. counters: int64, to which the certain
            rows are added.
        slots: one a slot group, as for `snapshot_slots`.
        max_drafts, capacity: as for `route`. bad_counts, overflow: bits of the error flag.
    """
    routing = Routing(row_map, out_drafts, tail_start)
    first = slot_mappings[0]
    bits = route(
        routing,
        num_drafts,
        query_start_loc,
        has_slots=(first >= 0).any(),
        max_drafts=max_drafts,
        capacity=capacity,
    )
    del bad_counts, overflow  # `route` has them
    state.zero_()
    error.copy_(bits)
    drafts_kept.copy_(out_drafts)
    for mapping, kept in zip(slot_mappings, slots, strict=True):
        snapshot_slots(kept, row_map, mapping)
    certain = (first >= 0) & (row_map[: first.shape[0]] < 0)
    counters[COUNTERS["certain"]] += certain.sum()


BEGIN = Launcher(begin_rows, "begin:begin_rows")
