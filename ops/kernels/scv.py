"""Launchers of `accept_mask` and of `judge`, which share how a request's drafts are judged.

NOTE [addresses]: the judge gets its tensors as integers, addresses with a bit that says whether
the elements are int64. One compiled kernel then serves every dtype, stride and count that an engine
may come with, so that no step waits for a compiler, and integers are the cheapest arguments of a
launch. See NOTE [kept kernels] in `launch`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.kernels.launch import KeptLaunch, launch, on_device
from nwor_compile.ops.scv import JudgePlan, Verdict

MAX_POSITIONS = 32  # positions (columns) a pass; more are looped over
_TILE = 4096  # requests x positions a pass of `accept_mask`
_JUDGED = 64  # requests a program of the judge
_BLOCK = 256  # layers, or anything else, that it takes at a time

_NEVER = tl.constexpr(0x7FFFFFFF)  # a position past every draft

# Bits of the judge's `flags`, for the launcher and for the kernel.
WIDE_SAMPLED, WIDE_DRAFTS, WIDE_COUNT, WIDE_REJECTED, HAS_COUNT, HAS_REJECTED = (
    1 << i for i in range(6)
)
_WIDE_SAMPLED, _WIDE_DRAFTS = tl.constexpr(WIDE_SAMPLED), tl.constexpr(WIDE_DRAFTS)
_WIDE_COUNT, _WIDE_REJECTED = tl.constexpr(WIDE_COUNT), tl.constexpr(WIDE_REJECTED)
_HAS_COUNT, _HAS_REJECTED = tl.constexpr(HAS_COUNT), tl.constexpr(HAS_REJECTED)


@triton.jit
def load_ids(words, index, wide, mask):
    """Elements `index` (int64) of int32 or, if `wide`, int64 memory at an int32 pointer, as int64.

    Zero where `mask` is not set.
    """
    place = words + index * (1 + wide)
    low = tl.load(place, mask=mask, other=0)
    high = tl.load(place + wide, mask=mask, other=0)  # the same word, if not wide
    high = tl.where(wide > 0, high, low >> 31)
    return (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _leading_ids(ids, wide, real, columns, s_column, R: tl.constexpr, K: tl.constexpr):
    """int32 `[R]`: how many ids stand before the first placeholder (a negative one)."""
    position = tl.arange(0, K)[None, :]
    count = tl.zeros([R], tl.int32) + columns
    for j in range(0, columns, K):
        column = j + position
        inside = real[:, None] & (column < columns)
        sampled = load_ids(ids, column.to(tl.int64) * s_column, wide, inside)
        placeholder = tl.where(inside & (sampled < 0), column, columns)
        count = tl.minimum(count, tl.min(placeholder, axis=1))
    return count


@triton.jit
def judge_drafts(
    ids, wide_ids, draft_ids, wide_drafts, real, start, drafts, count, rows, s_column, s_draft,
    K: tl.constexpr,
):  # fmt: skip
    """Judge the drafts of R requests.

    Args:
        ids: int32 pointers `[R, 1]`, each to the sampled ids of a request.
        real, start, drafts, count: `[R]`: is a request, its first draft, its drafts, its sampled
            ids (at most the columns there are).
        rows: ids in `draft_ids`; a draft behind them neither matches nor fails.
    Returns:
        accepted drafts, and 1 where fewer drafts match than the sampler accepted; int32 `[R]`.
    """
    position = tl.arange(0, K)[None, :]
    # The matching prefix ends at the first position that fails.
    longest = tl.max(drafts, axis=0)
    prefix = drafts
    for j in range(0, longest, K):
        column = j + position
        row = start[:, None] + column
        owned = real[:, None] & (column < drafts[:, None]) & (row < rows)
        inside = owned & (column < count[:, None])
        sampled = load_ids(ids, column.to(tl.int64) * s_column, wide_ids, inside)
        draft = load_ids(draft_ids, row.to(tl.int64) * s_draft, wide_drafts, inside)
        fails = owned & ((sampled != draft) | (column >= count[:, None]))
        prefix = tl.minimum(prefix, tl.min(tl.where(fails, column, _NEVER), axis=1))
    taken = tl.maximum(tl.minimum(prefix, count - 1), 0)
    return taken, (real & (prefix < count - 1)).to(tl.int32)


@triton.jit
def mark(mask, real, start, drafts, taken, rows, K: tl.constexpr):
    """Write the part of the mask that belongs to these requests; arguments as for `judge_drafts`"""
    position = tl.arange(0, K)[None, :]
    for j in range(0, tl.max(drafts, axis=0), K):
        column = j + position
        row = start[:, None] + column
        owned = real[:, None] & (column < drafts[:, None]) & (row < rows)
        tl.store(mask + row, (column < taken[:, None]).to(tl.uint8), mask=owned)


@triton.jit
def said_counts(
    ids, num_sampled, flags, real, wide_request, columns, s_column, s_count, R: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """How many ids each of R requests sampled, as it was said (int64) or as its ids show, and the
    same within the columns (int32). num_sampled: int32 words; see `load_ids`."""
    if flags & _HAS_COUNT != 0:
        wide = (flags & _WIDE_COUNT != 0).to(tl.int32)
        said = load_ids(num_sampled, wide_request * s_count, wide, real)
        count = tl.minimum(tl.maximum(said, 0), columns).to(tl.int32)
    else:
        wide = (flags & _WIDE_SAMPLED != 0).to(tl.int32)
        count = _leading_ids(ids, wide, real, columns, s_column, R, K)
        said = count.to(tl.int64)
    return said.to(tl.int32), count


@triton.jit
def refused_counts(num_rejected, flags, request, wide_request, requests, s_rejected):
    """`num_rejected` of R requests, int32; zeros without. num_rejected: int32 words."""
    known = request < tl.where(flags & _HAS_REJECTED != 0, requests, 0)
    wide = (flags & _WIDE_REJECTED != 0).to(tl.int32)
    return load_ids(num_rejected, wide_request * s_rejected, wide, known).to(tl.int32)


@triton.jit
def refuse(mask, first, rows, BLOCK: tl.constexpr):
    """Rows `[first, rows)` of the mask, which no request owns."""
    for low in range(first, rows, BLOCK):
        row = low + tl.arange(0, BLOCK)
        tl.store(mask + row, tl.zeros([BLOCK], tl.uint8), mask=row < rows)


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(do_not_specialize=["requests", "columns", "rows"])
def _accept_kernel(
    sampled_ids, draft_ids, cu_num_drafts, num_sampled, mask, accepted, mismatch,
    requests, columns, rows,
    s_request, s_column, s_draft, s_cu, s_count,
    WIDE_SAMPLED: tl.constexpr, WIDE_DRAFTS: tl.constexpr, HAS_COUNT: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One program, because `mismatch` is a reduction over all requests that has to be zero without
    a second launch to clear it."""
    sampled_ids = sampled_ids.to(mismatch.dtype)  # int32 words; see `load_ids`
    draft_ids = draft_ids.to(mismatch.dtype)
    disagree = tl.zeros([R], tl.int32)
    for first in range(0, requests, R):
        request = first + tl.arange(0, R)
        real = request < requests
        end = tl.load(cu_num_drafts + request * s_cu, mask=real, other=0).to(tl.int32)
        before = real & (request > 0)
        start = tl.load(cu_num_drafts + (request - 1) * s_cu, mask=before, other=0).to(tl.int32)
        ids = sampled_ids + (request.to(tl.int64)[:, None] * s_request) * (1 + WIDE_SAMPLED)
        if HAS_COUNT:
            count = tl.load(num_sampled + request * s_count, mask=real, other=0)
            count = tl.minimum(tl.maximum(count, 0), columns).to(tl.int32)
        else:
            count = _leading_ids(ids, WIDE_SAMPLED, real, columns, s_column, R, K)
        drafts = end - start
        taken, wrong = judge_drafts(
            ids, WIDE_SAMPLED, draft_ids, WIDE_DRAFTS, real, start, drafts, count, rows,
            s_column, s_draft, K,
        )  # fmt: skip
        mark(mask, real, start, drafts, taken, rows, K)
        tl.store(accepted + request, taken, mask=real)
        disagree = tl.maximum(disagree, wrong)
    tl.store(mismatch, tl.max(disagree, axis=0))
    total = 0
    if requests > 0:
        total = tl.load(cu_num_drafts + (requests - 1) * s_cu).to(tl.int32)
    refuse(mask, total, rows, R * K)


@triton.jit
def layer_faults(
    staged, state, layers, max_requests, COUNT_MISMATCH: tl.constexpr, OVERFLOW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Error bits: a layer that staged another number of rows, or met one too many."""
    expected = tl.zeros([BLOCK], tl.int32)
    for first in range(0, max_requests, BLOCK):
        request = first + tl.arange(0, BLOCK)
        expected += tl.load(staged + request, mask=request < max_requests, other=0)
    total = tl.sum(expected, axis=0)
    found = tl.zeros([BLOCK], tl.int32)
    for first in range(0, layers, BLOCK):
        layer = first + tl.arange(0, BLOCK)
        here = layer < layers
        count = tl.load(state + 2 * layer, mask=here, other=0)
        over = tl.load(state + 2 * layer + 1, mask=here, other=0)
        found |= tl.where(here & (count != total), COUNT_MISMATCH, 0)
        found |= tl.where(over != 0, OVERFLOW, 0)
    uneven = tl.max(found & COUNT_MISMATCH, axis=0)
    return uneven | tl.max(found & OVERFLOW, axis=0)


@triton.jit(
    do_not_specialize=[
        "drafts", "staged", "state", "layers", "max_requests", "mask", "numbers", "room", "rows",
        "sampled_ids", "draft_ids", "num_sampled", "num_rejected", "flags", "requests", "columns",
        "ids", "s_request", "s_column", "s_draft", "s_count", "s_rejected",
    ]
)  # fmt: skip
def _judge_kernel(
    error, drafts, staged, state, layers, max_requests, mask, numbers, room, rows,
    sampled_ids, draft_ids, num_sampled, num_rejected, flags, requests, columns, ids,
    s_request: tl.int64, s_column: tl.int64, s_draft: tl.int64, s_count: tl.int64,
    s_rejected: tl.int64,
    ID_MISMATCH: tl.constexpr, COUNT_MISMATCH: tl.constexpr, OVERFLOW: tl.constexpr,
    R: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program 0 looks at the layers; program i judges requests `[(i - 1) * R, i * R)`, and the last
    one fills what is behind them. They meet in the error flag, which only gains bits."""
    drafts = drafts.to(error.dtype)  # see NOTE [addresses]
    program = tl.program_id(0)
    if program == 0:
        faults = layer_faults(
            staged.to(error.dtype), state.to(error.dtype), layers, max_requests, COUNT_MISMATCH,
            OVERFLOW, BLOCK,
        )  # fmt: skip
        if faults != 0:
            tl.atomic_or(error, faults, sem="relaxed")
        return
    sampled_ids = sampled_ids.to(error.dtype)
    draft_ids = draft_ids.to(error.dtype)
    numbers = numbers.to(error.dtype)
    mask = mask.to(tl.pointer_type(tl.uint8))
    wide_sampled = (flags & _WIDE_SAMPLED != 0).to(tl.int32)
    wide_drafts = (flags & _WIDE_DRAFTS != 0).to(tl.int32)

    begin = (program - 1) * R
    request = begin + tl.arange(0, R)
    real = request < requests
    wide_request = request.to(tl.int64)
    own = tl.load(drafts + request, mask=real, other=0)
    earlier = tl.zeros([BLOCK], tl.int32)
    for first in range(0, begin, BLOCK):
        other = first + tl.arange(0, BLOCK)
        earlier += tl.load(drafts + other, mask=other < begin, other=0)
    before = tl.sum(earlier, axis=0)
    start = before + tl.cumsum(own, axis=0) - own
    total = before + tl.sum(own, axis=0)

    at = sampled_ids + (wide_request[:, None] * s_request) * (1 + wide_sampled)
    rejected = refused_counts(
        num_rejected.to(error.dtype), flags, request, wide_request, requests, s_rejected
    )
    said, count = said_counts(
        at, num_sampled.to(error.dtype), flags, real, wide_request, columns, s_column, s_count, R, K
    )
    taken, wrong = judge_drafts(
        at, wide_sampled, draft_ids, wide_drafts, real, start, own, count, ids, s_column, s_draft, K
    )
    mark(mask, real, start, own, taken, ids, K)
    tl.store(numbers + request, taken, mask=real)
    tl.store(numbers + room + request, said, mask=real)
    tl.store(numbers + 2 * room + request, rejected, mask=real)
    bits = tl.max(wrong, axis=0) * ID_MISMATCH
    if program == tl.num_programs(0) - 1:
        # Drafts without an id would count as accepted, and their rows would be lost.
        bits |= tl.where(total > ids, ID_MISMATCH, 0)
        refuse(mask, tl.minimum(total, ids), rows, BLOCK)
        for first in range(requests, room, BLOCK):
            nobody = first + tl.arange(0, BLOCK)
            zero = tl.zeros([BLOCK], tl.int32)
            tl.store(numbers + nobody, zero, mask=nobody < room)
            tl.store(numbers + room + nobody, zero, mask=nobody < room)
            tl.store(numbers + 2 * room + nobody, zero, mask=nobody < room)
    if bits != 0:
        tl.atomic_or(error, bits, sem="relaxed")


def accept_mask(
    sampled_ids: Tensor,
    draft_ids: Tensor,
    cu_num_drafts: Tensor,
    num_sampled: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`accept_mask_reference` in one launch."""
    requests, columns = sampled_ids.shape
    rows, device = draft_ids.shape[0], sampled_ids.device
    mask = torch.empty(rows, dtype=torch.bool, device=device)
    accepted = torch.empty(requests, dtype=torch.int32, device=device)
    mismatch = torch.empty(1, dtype=torch.int32, device=device)
    positions = min(MAX_POSITIONS, triton.next_power_of_2(max(columns, 2)))
    block = min(triton.next_power_of_2(max(requests, 1)), _TILE // positions)
    with on_device(sampled_ids):
        launch(
            _accept_kernel, (1,),
            sampled_ids, draft_ids, cu_num_drafts, num_sampled, mask.view(torch.uint8), accepted,
            mismatch,
            requests, columns, rows,
            *sampled_ids.stride(), draft_ids.stride(0), cu_num_drafts.stride(0),
            0 if num_sampled is None else num_sampled.stride(0),
            WIDE_SAMPLED=int(sampled_ids.dtype == torch.int64),
            WIDE_DRAFTS=int(draft_ids.dtype == torch.int64),
            HAS_COUNT=num_sampled is not None, R=block, K=positions,
            num_warps=8 if block * positions >= 1024 else 4,
        )  # fmt: skip
    return mask, accepted, mismatch


class JudgeLaunch(NamedTuple):
    """How the judge of one window is launched, always the same compiled kernel: see NOTE
    [addresses].

    somewhere: stands for addresses that are not used, since 0 would be an integer of another type.
    """

    kept: KeptLaunch
    constants: tuple[int, ...]
    somewhere: int


def judge_launch(plan: JudgePlan) -> JudgeLaunch:
    """What every launch over `plan` has in common."""
    fixed = (
        plan.error, plan.drafts.data_ptr(), plan.staged.data_ptr(), plan.state.data_ptr(),
        plan.state.shape[0], plan.drafts.shape[0],
    )  # fmt: skip
    positions = min(MAX_POSITIONS, 1 << plan.max_drafts.bit_length())
    return JudgeLaunch(
        KeptLaunch(_judge_kernel, plan.error.device, fixed),
        (plan.id_mismatch, plan.count_mismatch, plan.overflow, _JUDGED, positions, _BLOCK),
        plan.error.data_ptr(),
    )


def flags_of(
    sampled_ids: Tensor, draft_ids: Tensor, num_sampled: Tensor | None, num_rejected: Tensor | None
) -> int:
    """What kernels are told of these tensors: which there are, and which have int64 elements."""
    flags, wide = 0, torch.int64
    for bit, tensor in (
        (WIDE_SAMPLED, sampled_ids), (WIDE_DRAFTS, draft_ids), (WIDE_COUNT, num_sampled),
        (WIDE_REJECTED, num_rejected),
    ):  # fmt: skip
        if tensor is not None and tensor.dtype is wide:
            flags |= bit
    flags |= HAS_COUNT if num_sampled is not None else 0
    flags |= HAS_REJECTED if num_rejected is not None else 0
    return flags


def where(
    somewhere: int,
    sampled_ids: Tensor,
    draft_ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Addresses of these tensors, `somewhere` for those that are missing or empty, and strides."""
    count = rejected = somewhere
    s_count = s_rejected = 0
    if num_sampled is not None:
        count, (s_count,) = num_sampled.data_ptr(), num_sampled.stride()
    if num_rejected is not None:
        rejected, (s_rejected,) = num_rejected.data_ptr(), num_rejected.stride()
    return (
        (sampled_ids.data_ptr() or somewhere, draft_ids.data_ptr() or somewhere, count, rejected),
        (*sampled_ids.stride(), *draft_ids.stride(), s_count, s_rejected),
    )


class Judging:
    """`nwor_compile.ops.scv.judge` in one launch, for arguments of the form that it is made with:
    what follows from shapes and dtypes is worked out once, addresses and strides at each call."""

    def __init__(
        self,
        plan: JudgePlan,
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
        verdict: Verdict,
    ) -> None:
        self.kept, self.constants, self.somewhere = plan.launch
        flags = flags_of(sampled_ids, draft_ids, num_sampled, num_rejected)
        requests, columns = sampled_ids.shape
        mask, numbers, room, rows = verdict.place
        self.programs = 2 + max(0, requests - 1) // _JUDGED
        self.places = (mask or self.somewhere, numbers or self.somewhere, room, rows)
        self.sizes = (flags, requests, columns, draft_ids.shape[0])

    def __call__(
        self,
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
    ) -> None:
        places, strides = where(self.somewhere, sampled_ids, draft_ids, num_sampled, num_rejected)
        self.kept(
            self.programs, numbers=(*self.places, *places, *self.sizes, *strides),
            constants=self.constants,
        )  # fmt: skip


def judge(
    plan: JudgePlan,
    sampled_ids: Tensor,
    draft_ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
    verdict: Verdict,
) -> None:
    """`nwor_compile.ops.scv.judge` in one launch."""
    given = (sampled_ids, draft_ids, num_sampled, num_rejected)
    Judging(plan, *given, verdict)(*given)
