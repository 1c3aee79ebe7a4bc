"""Speculative Cache Validation: from the sampler's ids to a committed window.

`validate` is the whole device-side path, in two steps: judge (acceptance and all error flags), then
settle (the commit of every batch, counters, routing back to direct mode). Between them ranks share
their error flags. It is straight-line device code: two launches, more with several batches;
`nwor_compile/validator.py` has it in fewer calls. `host_loop` is the oracle: the same decision,
made in Python after a synchronisation.

After `validate`, `finish` or `host_loop` the routing is closed: every token is certain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from nwor_compile.layer_batch import LayerBatch
from nwor_compile.ops.commit import COMMIT, Closing, CommitPlan
from nwor_compile.ops.counters import FIXED
from nwor_compile.ops.decide import DecidePlan
from nwor_compile.ops.error_bits import COUNT_MISMATCH, ID_MISMATCH, OVERFLOW
from nwor_compile.ops.library import pick
from nwor_compile.ops.ranges import span
from nwor_compile.ops.scv import JUDGE, JudgePlan, Verdict, layer_faults, verdict_buffers
from nwor_compile.ops.staging import Routing


class Committed(NamedTuple):
    """What a window came to; tensors on the device. The first three are valid until the next
    `begin`, the others are the caller's.

    accepted: int32 `[R]`, drafts accepted a request (0 everywhere if `error`).
    mask: bool `[N]`, drafts whose staged rows moved to the cache.
    error: int32 `[1]`, bits of `nwor_compile.routing`; the next `begin` clears it.
    num_sampled, num_rejected: int32 `[R]`, if they were given: what the engine should go on with.
        `num_sampled` is at most `accepted + 1`, and `num_rejected` has grown by what that took
        away, so that with the error flag up each request keeps its first sampled token alone.
    """

    accepted: Tensor
    mask: Tensor
    error: Tensor
    num_sampled: Tensor | None = None
    num_rejected: Tensor | None = None


@dataclass(frozen=True)
class WindowTensors:
    """What validation works on: persistent, and the same for every window.

    drafts: int32 `[max_requests]`, the step's draft counts (routing's are zero in direct mode).
    error: int32 `[1]`. state: int32 `[layers, 2]`. counters: int64.
    rows: int32 `[capacity]`, staging row of each draft; None if draft n is staged in row n.
    draft_ids: int64 `[capacity]`, ids of the step's drafts, request after request, for callers that
        do not give them.
    mirrors: tensors on the host, like `counters`: each commit copies the counters there.
    share_error: where several ranks hold shares of one model, leaves the largest of their error
        flags in each one's; see `Window`.
    """

    routing: Routing
    drafts: Tensor
    error: Tensor
    state: Tensor
    counters: Tensor
    batches: list[LayerBatch]
    staging: bool
    share_error: Callable[[Tensor], None] | None = None
    rows: Tensor | None = None
    draft_ids: Tensor | None = None
    mirrors: list[Tensor] = field(default_factory=list)

    @cached_property
    def plans(self) -> tuple[CommitPlan, ...]:
        """What the commits of each batch have in common; made at the first, and kept."""
        return tuple(
            CommitPlan(
                batch.key_caches,
                batch.value_caches,
                batch.staged_keys,
                batch.staged_values,
                batch.table,
            )
            for batch in self.batches
        )

    @cached_property
    def judging(self) -> JudgePlan:
        """What all judgements have in common."""
        return JudgePlan(
            self.drafts, self.routing.num_drafts, self.state, self.error,
            max_drafts=(self.counters.shape[0] - FIXED) // 2, id_mismatch=ID_MISMATCH,
            count_mismatch=COUNT_MISMATCH, overflow=OVERFLOW,
        )  # fmt: skip

    @cached_property
    def deciding(self) -> DecidePlan | None:
        """What windows that are decided in one launch have in common. None where that cannot be:
        layers of several geometries, error flags of several ranks, nothing staged."""
        if len(self.batches) > 1 or self.share_error is not None or not self.staging:
            return None
        (batch,), (commit,) = self.batches, self.plans
        mask = torch.zeros(batch.slots.shape[0] - 1, dtype=torch.bool, device=self.error.device)
        return DecidePlan(
            commit, self.judging, batch.slots, self.rows, mask, torch.zeros_like(self.drafts),
            self.counters, self.routing.row_map, self.routing.num_drafts,
        )  # fmt: skip


def validate(
    tensors: WindowTensors,
    sampled_ids: Tensor,
    draft_ids: Tensor | None = None,
    num_sampled: Tensor | None = None,
    num_rejected: Tensor | None = None,
) -> Committed:
    """Accept, check and commit on the device; no synchronisation, one shape for every outcome.

    Closes the routing. Arguments as for `accept_mask`, with

    draft_ids: None for `tensors.draft_ids`; every draft then has an id.
    num_rejected: `[R]` int32 or int64, with `num_sampled` only; see `Committed`.
    """
    ids = ids_of(tensors, draft_ids, sampled_ids.shape[0])
    verdict = verdict_buffers(sampled_ids.shape[0], ids.shape[0], tensors.error.device)
    judge_window(tensors, sampled_ids, ids, num_sampled, num_rejected, verdict)
    settle(tensors, verdict)
    numbers = (verdict.accepted, verdict.num_sampled, verdict.num_rejected)
    return outcome(tensors, verdict.mask, numbers, num_sampled, num_rejected)


def finish(
    tensors: WindowTensors,
    mask: Tensor,
    accepted: Tensor,
    bits: Tensor,
    num_sampled: Tensor | None = None,
    num_rejected: Tensor | None = None,
) -> Committed:
    """For a decision made elsewhere: fold all error sources into the window's flag, then commit all
    batches or none. Closes the routing.

    Args:
        mask: bool `[N]`. accepted: int32 `[R]`. bits: int32 `[1]`, for the error flag.
        num_sampled, num_rejected: `[R]` int32 or int64, or the second None, or both.
    """
    verdict = verdict_buffers(accepted.shape[0], mask.shape[0], tensors.error.device)
    verdict.mask.copy_(mask)
    verdict.numbers.zero_()
    verdict.accepted.copy_(accepted)
    if num_sampled is not None:
        verdict.num_sampled.copy_(num_sampled)
    if num_rejected is not None:
        verdict.num_rejected.copy_(num_rejected)
    tensors.error.bitwise_or_(bits | layer_faults(tensors.judging))
    settle(tensors, verdict)
    numbers = (verdict.accepted, verdict.num_sampled, verdict.num_rejected)
    return outcome(tensors, verdict.mask, numbers, num_sampled, num_rejected)


def ids_of(tensors: WindowTensors, draft_ids: Tensor | None, requests: int) -> Tensor:
    """The drafts' ids: those given, else as many of the window's own as requests can have."""
    if draft_ids is not None:
        return draft_ids
    known = tensors.draft_ids
    if known is None:
        raise ValueError("draft_ids: expected a tensor, since this window does not keep draft ids")
    return known[: requests * (known.shape[0] // tensors.drafts.shape[0])]


def judge_window(
    tensors: WindowTensors,
    sampled_ids: Tensor,
    draft_ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
    verdict: Verdict,
) -> None:
    """Fill `verdict`, and add this rank's faults to the error flag."""
    with span("nwor.accept"):
        pick(JUDGE, tensors.error.device)(
            tensors.judging, sampled_ids, draft_ids, num_sampled, num_rejected, verdict
        )


def settle(tensors: WindowTensors, verdict: Verdict) -> None:
    """Share the error flag, then do what `verdict` says: all of it or, with the flag up, nothing.

    The first launch counts and closes as well; `Closing` says what that is.
    """
    if tensors.share_error is not None:
        tensors.share_error(tensors.error)
    routing = tensors.routing
    closing: Closing | None = Closing(verdict, routing.row_map, routing.num_drafts)
    counters: Tensor | None = tensors.counters
    mask = verdict.mask
    plans = tensors.plans
    if not tensors.staging:  # nothing was staged and nothing is counted
        counters, mask, plans = None, mask[:0], plans[:1]
    commit = pick(COMMIT, tensors.error.device)
    with span("nwor.commit"):
        for plan, batch in zip(plans, tensors.batches, strict=False):
            commit(
                plan, batch.slots, tensors.rows, mask, tensors.error, tensors.drafts,
                verdict.accepted, counters, tensors.state.shape[0], closing,
            )  # fmt: skip
            counters = closing = None
        for mirror in tensors.mirrors:
            mirror.copy_(tensors.counters, non_blocking=True)


def outcome(
    tensors: WindowTensors,
    mask: Tensor,
    numbers: Sequence[Tensor],
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
) -> Committed:
    """The result of a window.

    numbers: accepted, and the counts as they came out, which the caller gets if it gave them.
    """
    accepted, kept, rejected = numbers
    return Committed(
        accepted, mask, tensors.error, None if num_sampled is None else kept,
        None if num_rejected is None else rejected,
    )  # fmt: skip


def host_loop(
    tensors: WindowTensors,
    sampled_ids: Tensor,
    draft_ids: Tensor | None = None,
    num_sampled: Tensor | None = None,
    num_rejected: Tensor | None = None,
) -> Committed:
    """The oracle: the decision of `validate` as a loop on the host. Synchronises."""
    rows = sampled_ids.tolist()
    drafts = ids_of(tensors, draft_ids, len(rows)).tolist()
    counts = tensors.drafts[: len(rows)].tolist()
    given = num_sampled.tolist() if num_sampled is not None else None
    mask, accepted, start = [False] * len(drafts), [], 0
    mismatch = sum(counts) > len(drafts)
    for r, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if given is None:
            total = next((i for i, token in enumerate(row) if token < 0), len(row))
        else:
            total = min(max(given[r], 0), len(row))
        prefix = 0
        known = min(count, total, len(drafts) - start)
        while prefix < known and row[prefix] == drafts[start + prefix]:
            prefix += 1
        taken = max(0, min(prefix, total - 1))
        mismatch |= prefix < total - 1
        mask[start : start + taken] = [True] * taken
        accepted.append(taken)
        start += count
    device = sampled_ids.device
    return finish(
        tensors,
        torch.tensor(mask, dtype=torch.bool, device=device),
        torch.tensor(accepted, dtype=torch.int32, device=device),
        torch.tensor([ID_MISMATCH if mismatch else 0], dtype=torch.int32, device=device),
        num_sampled,
        num_rejected,
    )
