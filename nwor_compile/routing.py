"""Which tokens of a step are drafts, and where their rows go: computed on the device.

A verify span is one or more certain tokens followed by the request's drafts. Draft j of request r
goes to staging row `tail_start[r] + j`; every other token is certain.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nwor_compile.ops.counters import COUNTERS
from nwor_compile.ops.error_bits import BAD_COUNTS, OVERFLOW
from nwor_compile.ops.library import Launcher
from nwor_compile.ops.staging import Routing

if TYPE_CHECKING:
    from nwor_compile.ops.kernels.launch import KeptLaunch


class TailRows(NamedTuple):
    """Staging rows in tail blocks: each request of a step has `rows` of its own, whole blocks of
    `block_size`, and a draft has the place in its block that it will have in the cache."""

    block_size: int
    rows: int


class Kept(NamedTuple):
    """What a window notes for its commit when it opens.

    drafts: int32 `[max_requests]`, a copy of the routing's draft counts. error: int32 `[1]`.
    state: int32 `[layers, 2]`, zeroed. counters: int64. rows: int32 `[capacity]`, staging row of
    each draft, or None where draft n has row n. draft_ids: int64 `[capacity]` or None, not written
    without token ids. The last two are 0 past the step's drafts. epoch: int64 `[1]`, needed with
    tail blocks: counts what happens to them, one for each window and one more after a window that
    ended with the error flag up.
    """

    drafts: Tensor
    error: Tensor
    state: Tensor
    counters: Tensor
    rows: Tensor | None = None
    draft_ids: Tensor | None = None
    epoch: Tensor | None = None


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


@dataclass(frozen=True, eq=False)
class BeginPlan:
    """What every begin of a window has in common.

    routing: its tensors are filled.
    kept: what the commit needs, written whole; `certain` rows are added to its counters. Its error
        flag is read first, for the epoch: it is that of the window before.
    slots: one int64 `[> capacity]` a slot group, overwritten: the slots of the drafts in their
        order, -1 behind them. An engine may overwrite its slot mapping before the commit (a drafter
        does), so the window keeps its own.
    max_drafts, capacity: most drafts a request and a step may have.
    staging_rows: staging rows there are.
    tail: None, and draft n of the step is staged at row n; or see `TailRows`.
    """

    routing: Routing
    kept: Kept
    slots: list[Tensor]
    max_drafts: int
    capacity: int
    staging_rows: int
    tail: TailRows | None = None

    @cached_property
    def launches(self) -> list[KeptLaunch]:
        """How the kernel is launched for each slot group; made at the first begin."""
        from nwor_compile.ops.kernels.begin import begin_launches  # needs Triton

        return begin_launches(self)


def begin_rows(
    plan: BeginPlan,
    num_drafts: Tensor | None,
    query_start_loc: Tensor,
    slot_mappings: list[Tensor],
    seq_lens: Tensor | None = None,
    token_ids: Tensor | None = None,
) -> None:
    """What a window does when it opens; the specification of the kernel of this name.

    Impossible counts leave every request without a tail. The tokens that were said to be drafts
    then get a staging row that does not exist, and so go nowhere: a draft row may not reach the
    cache because some count was wrong. Where a count leaves no certain token, or is negative, it
    does not say which tokens are drafts; all tokens of that request are certain.

    Args:
        num_drafts: `[R]` integer, 1 <= R <= max_requests; or `[R + 1]`, the first logit of each
            request, which has one more than it has drafts; or None where the first token of each
            span is certain and all others are drafts.
        query_start_loc: `[R + 1]` integer; tokens past the last are padding.
        slot_mappings: one `[T]` integer a slot group. A step whose first mapping has no slot at
            all is a warm-up step, which has no drafts whatever its counts.
        seq_lens: `[R]` integer, tokens of each request, this step's among them; with `plan.tail`.
        token_ids: `[>= T]` integer or None: the step's tokens, of which `kept.draft_ids` takes the
            drafts'.
    """
    routing, kept, slots, tail = plan.routing, plan.kept, plan.slots, plan.tail
    requests, device = query_start_loc.shape[0] - 1, routing.row_map.device
    first, last = slot_mappings[0], slots[0].shape[0] - 1
    starts = query_start_loc.long()
    spans = starts[1:] - starts[:-1]
    if num_drafts is None:
        num_drafts = torch.where(spans == 0, 0, spans - 1)
    elif num_drafts.shape[0] > requests:
        num_drafts = num_drafts.diff() - 1
    counts = torch.where((first >= 0).any(), num_drafts.long(), 0)
    # With no drafts a span may be empty; with drafts a certain token must precede them.
    contradicted = (counts < 0) | ((counts > 0) & (counts >= spans))
    place = torch.zeros_like(counts)  # of a request's first draft in its tail rows
    if tail is not None and seq_lens is not None:
        contradicted |= (counts > 0) & (seq_lens < spans)
        place = (seq_lens.long() - counts).clamp(min=0) % tail.block_size
    bad = (contradicted | (counts > plan.max_drafts)).any()
    overflow = counts.clamp(min=0).sum() > plan.capacity
    flagged = bad | overflow
    drafts = torch.where(contradicted, 0, counts)
    order = drafts.cumsum(0) - drafts
    tails = order if tail is None else torch.arange(requests, device=device) * tail.rows + place

    token = torch.arange(routing.row_map.shape[0], device=device)
    owner = torch.searchsorted(starts[1:], token, right=True).clamp(max=requests - 1)
    draft = token - (starts[owner + 1] - drafts[owner])
    inside = (token >= starts[owner]) & (token < starts[requests])
    is_draft = inside & (draft >= 0)
    row = tails[owner] + draft
    # Certain rows in the block of the first draft: attention reads that block from the tail.
    mirrored = inside & (draft < 0) & (-draft <= place[owner]) & (drafts[owner] > 0) & ~flagged
    code = torch.where(mirrored, -row - 2, -1)
    routing.row_map.copy_(torch.where(is_draft, torch.where(flagged, plan.staging_rows, row), code))
    routing.num_drafts.zero_()
    routing.num_drafts[:requests].copy_(torch.where(flagged, 0, drafts))
    routing.tail_start.zero_()
    routing.tail_start[:requests].copy_(tails)

    kept.state.zero_()
    if tail is not None and kept.epoch is not None:
        kept.epoch.add_(1 + (kept.error != 0).long())
    kept.error.copy_(bad.to(torch.int32) * BAD_COUNTS + overflow.to(torch.int32) * OVERFLOW)
    kept.drafts.copy_(routing.num_drafts)
    tokens = first.shape[0]
    index = torch.where(is_draft & ~flagged, order[owner] + draft, last)
    for mapping, own in zip(slot_mappings, slots, strict=True):
        own.fill_(-1)
        own.scatter_(0, index[: mapping.shape[0]], mapping.long())
        own[last:].fill_(-1)
    for values, target in ((row, kept.rows), (token_ids, kept.draft_ids)):
        if values is not None and target is not None:
            full = torch.zeros(last + 1, dtype=target.dtype, device=device)
            full.scatter_(0, index[:tokens], values[:tokens].to(target.dtype))
            target.copy_(full[:last])
    certain = inside[:tokens] & (first >= 0) & (routing.row_map[:tokens] < 0)
    kept.counters[COUNTERS["certain"]] += certain.sum()


BEGIN = Launcher(begin_rows, "begin:begin_rows")
