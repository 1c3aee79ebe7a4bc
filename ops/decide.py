"""A window's judgement and commit as one call, for windows of few requests.

Judge and commit are two launches because the error flag must be known before any row moves. Where
requests are few it costs less to have every program of the commit judge them all again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from nwor_compile.ops.commit import Closing, CommitPlan, commit_batch
from nwor_compile.ops.library import Launcher
from nwor_compile.ops.scv import JudgePlan, judge, verdict_buffers

if TYPE_CHECKING:
    from nwor_compile.ops.kernels.decide import DecideLaunch

LANES = (16, 64)  # requests that one vector has; each is a kernel to compile
MOST_REQUESTS = LANES[-1]
MOST_IDS = 512  # that every program reads again; more are judged by a launch of their own


@dataclass(frozen=True, eq=False)
class DecidePlan:
    """What every decision of a window of one batch of layers has in common.

    slots, rows: of the drafts, as `commit_kv` has them. mask: bool `[capacity]`, accepted: int32
    `[max_requests]`; overwritten. counters, row_map, num_drafts: as for `commit_kv` and
    `Closing`. num_drafts is `judging.staged`; judging.drafts agrees with it, and the kernel reads
    that.
    """

    commit: CommitPlan
    judging: JudgePlan
    slots: Tensor
    rows: Tensor | None
    mask: Tensor
    accepted: Tensor
    counters: Tensor
    row_map: Tensor
    num_drafts: Tensor

    @cached_property
    def launch(self) -> DecideLaunch:
        """How the kernel is launched for this window; made at the first launch."""
        from nwor_compile.ops.kernels.decide import decide_launch  # needs Triton

        return decide_launch(self)


def kinds(max_requests: int) -> tuple[int, ...]:
    """Numbers of requests, up to `max_requests`, one for each kernel that they may need."""
    return tuple(most for most in (1, LANES[0] + 1) if most <= max_requests)


def fits(requests: int, ids: int) -> bool:
    """Whether a window of so many requests and drafts' ids can be decided in one launch."""
    return requests <= MOST_REQUESTS and ids <= MOST_IDS


Counts = tuple[Tensor, Tensor]
Decide = Callable[
    [Tensor, Tensor, Tensor | None, Tensor | None, Counts | None, Tensor | None], None
]


def deciding(
    plan: DecidePlan,
    sampled_ids: Tensor,
    draft_ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
) -> Decide:
    """The whole of a window's validation, for arguments of the shapes, dtypes and device of these:
    a function of them, of `counts` and of `mirror`. The specification of `DECIDING`; does nothing
    yet.

    What it does is `judge`, then `commit_batch` with counters and closing.

    counts: two int32 `[R]`, contiguous, overwritten: `num_sampled` and `num_rejected`, as `Closing`
        leaves them in a verdict. None exactly if `num_sampled` is.
    mirror: int64 on the host, as long as the counters, or None: gets a copy of them. On CUDA memory
        that the device can write to.
    """

    def decide(
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
        counts: Counts | None,
        mirror: Tensor | None,
    ) -> None:
        judging, state = plan.judging, plan.judging.state
        requests, ids = sampled_ids.shape[0], draft_ids.shape[0]
        verdict = verdict_buffers(requests, ids, judging.error.device)
        judge(judging, sampled_ids, draft_ids, num_sampled, num_rejected, verdict)
        commit_batch(
            plan.commit, plan.slots, plan.rows, verdict.mask, judging.error, judging.drafts,
            verdict.accepted, plan.counters, state.shape[0],
            Closing(verdict, plan.row_map, plan.num_drafts),
        )  # fmt: skip
        plan.mask[:ids].copy_(verdict.mask)
        plan.accepted[:requests].copy_(verdict.accepted)
        if counts is not None:
            counts[0].copy_(verdict.num_sampled)
            counts[1].copy_(verdict.num_rejected)
        if mirror is not None:
            mirror.copy_(plan.counters, non_blocking=True)

    return decide


DECIDING = Launcher(deciding, "decide:Deciding")
