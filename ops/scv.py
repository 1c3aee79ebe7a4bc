"""Speculative Cache Validation: which staged rows hold accepted tokens.

`accept_mask` is the op. `JUDGE` is what a window runs: the same decision, its error flags, and
checks of nothing, in one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nwor_compile.ops.layout import check_index, check_same_device
from nwor_compile.ops.library import Launcher, define

if TYPE_CHECKING:
    from nwor_compile.ops.kernels.scv import JudgeLaunch

_INTEGERS = (torch.int32, torch.int64)


def _check_accept(
    sampled_ids: Tensor,
    draft_ids: Tensor,
    cu_num_drafts: Tensor,
    num_sampled: Tensor | None = None,
) -> None:
    if sampled_ids.dim() != 2:
        raise ValueError(
            f"sampled_ids: expected 2-D [requests, columns], got {list(sampled_ids.shape)}"
        )
    if sampled_ids.dtype not in _INTEGERS:
        raise TypeError(f"sampled_ids: expected int32 or int64, got {sampled_ids.dtype}")
    check_index("draft_ids", draft_ids)
    check_index("cu_num_drafts", cu_num_drafts, sampled_ids.shape[0])
    if num_sampled is not None:
        check_index("num_sampled", num_sampled, sampled_ids.shape[0])
    check_same_device(
        sampled_ids=sampled_ids,
        draft_ids=draft_ids,
        cu_num_drafts=cu_num_drafts,
        num_sampled=num_sampled,
    )


def accept_mask_reference(
    sampled_ids: Tensor,
    draft_ids: Tensor,
    cu_num_drafts: Tensor,
    num_sampled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `accept_mask`: vectorised, one graph, no data-dependent shape."""
    requests, columns = sampled_ids.shape
    rows = draft_ids.shape[0]
    device = sampled_ids.device
    if requests == 0 or columns == 0:
        return (
            torch.zeros(rows, dtype=torch.bool, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
    ends = cu_num_drafts.long()
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    drafts = ends - starts
    if num_sampled is None:
        # Placeholders are trailing: count the leading ids that are not negative.
        count = (sampled_ids >= 0).to(torch.int64).cumprod(1).sum(1)
    else:
        count = num_sampled.long().clamp(0, columns)

    row = torch.arange(rows, device=device)
    request = torch.searchsorted(ends, row, right=True).clamp(max=requests - 1)
    position = row - starts[request]
    inside = (row < ends[request]) & (position < count[request])
    sampled = sampled_ids[request, position.clamp(0, columns - 1)]
    match = inside & (sampled == draft_ids)
    # The prefix ends at the first row that fails; a request without one matches throughout.
    first_fail = torch.where(match, drafts[request], position.clamp(min=0))
    owned = row < ends[request]
    first_fail = torch.where(owned, first_fail, rows)
    prefix = drafts.scatter_reduce(0, request, first_fail, "amin")
    accepted = torch.minimum(prefix, count - 1).clamp(min=0)
    mask = owned & (position < accepted[request])
    mismatch = (prefix < count - 1).any().to(torch.int32).view(1)
    return mask, accepted.to(torch.int32), mismatch


def _accept_mask_fake(
    sampled_ids: Tensor,
    draft_ids: Tensor,
    cu_num_drafts: Tensor,
    num_sampled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        draft_ids.new_empty(draft_ids.shape, dtype=torch.bool),
        sampled_ids.new_empty(sampled_ids.shape[0], dtype=torch.int32),
        sampled_ids.new_empty(1, dtype=torch.int32),
    )


_accept_mask = define(
    "accept_mask(Tensor sampled_ids, Tensor draft_ids, Tensor cu_num_drafts, "
    "Tensor? num_sampled=None) -> (Tensor mask, Tensor accepted, Tensor mismatch)",
    reference=accept_mask_reference,
    fake=_accept_mask_fake,
    check=_check_accept,
    kernel="scv:accept_mask",
)


def accept_mask(
    sampled_ids: Tensor,
    draft_ids: Tensor,
    cu_num_drafts: Tensor,
    num_sampled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Which draft rows the sampler accepted.

    With `prefix` the number of leading drafts whose id equals the sampled one,
    `accepted = max(0, min(prefix, num_sampled - 1))`: the last sampled id is the correction or
    bonus token, even where it happens to equal the draft at that place.

    Args:
        sampled_ids: `[R, C]` int32 or int64. Entries at and past `num_sampled` are never read;
            without `num_sampled` they are negative placeholders. C may be too small for the
            drafts: `num_sampled` is then clamped to it; C = 0 accepts nothing.
        draft_ids: `[N]`, request after request; N may exceed the drafts there are.
        cu_num_drafts: `[R]`, inclusive cumulative draft counts.
        num_sampled: `[R]` int32 or int64, or None.
    Returns:
        mask: bool `[N]`, True for the accepted prefix of each request.
        accepted: int32 `[R]`.
        mismatch: int32 `[1]`, 1 if some request matches fewer drafts than its sampler says it
            accepted (`prefix < num_sampled - 1`): ids and counts disagree, accept nothing.
    Raises:
        ValueError, TypeError: wrong rank, dtype or device, before any device work.
    """
    mask, accepted, mismatch = _accept_mask(sampled_ids, draft_ids, cu_num_drafts, num_sampled)
    return mask, accepted, mismatch


@dataclass(frozen=True, eq=False)
class Verdict:
    """What `judge` decides; the buffers are given to it, and it fills them whole.

    mask: bool `[N]`, drafts whose rows move. numbers: int32 `[3, R]`, contiguous; `accepted`,
    `num_sampled` and `num_rejected` are its rows.
    """

    mask: Tensor
    numbers: Tensor
    accepted: Tensor
    num_sampled: Tensor
    num_rejected: Tensor

    @cached_property
    def place(self) -> tuple[int, int, int, int]:
        """Addresses of the two, then how many requests and drafts there is room for."""
        mask, numbers = self.mask, self.numbers
        return mask.data_ptr(), numbers.data_ptr(), numbers.shape[1], mask.shape[0]


def verdict_buffers(requests: int, drafts: int, device: torch.device) -> Verdict:
    """Room for the verdict on `requests` requests and `drafts` drafts; not initialised."""
    numbers = torch.empty(3, requests, dtype=torch.int32, device=device)
    return Verdict(
        torch.empty(drafts, dtype=torch.bool, device=device), numbers, *numbers.unbind(0)
    )


@dataclass(frozen=True, eq=False)
class JudgePlan:
    """What every judgement of a window has in common; all tensors contiguous.

    drafts: int32 `[max_requests]`, draft counts. staged: int32 `[max_requests]`, what each layer
    should have staged, by request. state: int32 `[layers, 2]`, rows staged and overflow by layer.
    error: int32 `[1]`, to which three bits may be added: id_mismatch, count_mismatch, overflow.
    max_drafts: most drafts that a request may have; nothing depends on it but speed.
    """

    drafts: Tensor
    staged: Tensor
    state: Tensor
    error: Tensor
    max_drafts: int
    id_mismatch: int
    count_mismatch: int
    overflow: int

    @cached_property
    def launch(self) -> JudgeLaunch:
        """How the kernel is launched for this window; made at the first launch."""
        from nwor_compile.ops.kernels.scv import judge_launch  # needs Triton

        return judge_launch(self)


def judge(
    plan: JudgePlan,
    sampled_ids: Tensor,
    draft_ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
    verdict: Verdict,
) -> None:
    """Acceptance and all flags of a window; the specification of `JUDGE`.

    Args:
        sampled_ids, draft_ids, num_sampled: as for `accept_mask`, R requests and N ids. A draft
            without an id is a mismatch.
        num_rejected: `[R]` int32 or int64, or None for zeros; copied to the verdict.
        verdict: at least R requests and N drafts; zero behind them. `num_sampled` is the count of
            leading ids that are not negative, if not given.
    """
    requests, rows = sampled_ids.shape[0], draft_ids.shape[0]
    ends = plan.drafts[:requests].cumsum(0, dtype=torch.int32)
    mask, accepted, mismatch = accept_mask_reference(sampled_ids, draft_ids, ends, num_sampled)
    if num_sampled is None:
        num_sampled = (sampled_ids >= 0).to(torch.int32).cumprod(1).sum(1)
    verdict.mask.zero_()
    verdict.mask[:rows].copy_(mask)
    verdict.numbers.zero_()
    verdict.accepted[:requests].copy_(accepted)
    verdict.num_sampled[:requests].copy_(num_sampled)
    if num_rejected is not None:
        verdict.num_rejected[:requests].copy_(num_rejected)
    # Drafts without an id would count as accepted, and their rows would be lost.
    short = ends[-1:] > rows
    bits = ((mismatch != 0) | short).to(torch.int32) * plan.id_mismatch
    plan.error.bitwise_or_(bits | layer_faults(plan))


def layer_faults(plan: JudgePlan) -> Tensor:
    """Error bits, int32 scalar: a layer that staged another number of rows, or met one too many."""
    staged = plan.staged.sum(dtype=torch.int32)
    uneven = (plan.state[:, 0] != staged).any().to(torch.int32)
    over = (plan.state[:, 1] != 0).any().to(torch.int32)
    return uneven * plan.count_mismatch | over * plan.overflow


JUDGE = Launcher(judge, "scv:judge")


def judging(
    plan: JudgePlan,
    sampled_ids: Tensor,
    draft_ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
    verdict: Verdict,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]:
    """`judge` for arguments of the shapes, dtypes and device of these, to be called with them or
    with others that look the same. Does nothing yet."""

    def run(
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
    ) -> None:
        judge(plan, sampled_ids, draft_ids, num_sampled, num_rejected, verdict)

    return run


JUDGING = Launcher(judging, "scv:Judging")
