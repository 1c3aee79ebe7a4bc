"""Launcher of `deciding`: acceptance, flags, the rows of every layer, counters and closing in one
kernel, for windows of few requests.

NOTE [judged by all]: no row may move before every fault is known, and programs of one launch do not
wait for each other. So each judges all requests and looks at all layers itself: a few hundred ids,
which are in the L2 cache after the first. All read the same and come to the same verdict. What the
closing program writes, no other reads, but for the error flag: they may find it with or without the
bits that it adds, and have found the same bits themselves. What the launch before wrote (staging,
the layers' states, begin's notes) is complete.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.counters import COUNTERS, FIXED
from nwor_compile.ops.decide import LANES, Counts, DecidePlan
from nwor_compile.ops.kernels.commit import (
    close_routing,
    constants_of,
    count_position,
    count_totals,
    move_rows,
)
from nwor_compile.ops.kernels.launch import KeptLaunch
from nwor_compile.ops.kernels.scv import (
    HAS_COUNT,
    MAX_POSITIONS,
    WIDE_DRAFTS,
    WIDE_SAMPLED,
    flags_of,
    judge_drafts,
    layer_faults,
    mark,
    refuse,
    refused_counts,
    said_counts,
    where,
)

_WIDE_SAMPLED, _WIDE_DRAFTS = tl.constexpr(WIDE_SAMPLED), tl.constexpr(WIDE_DRAFTS)
_HAS_COUNT = tl.constexpr(HAS_COUNT)
_CERTAIN = tl.constexpr(COUNTERS["certain"])
_FIXED = tl.constexpr(FIXED)
# Of a program; `docs/kernels.md` has what others take. Each judges all requests, so few programs do
# that less often, and one warp does it without waiting for others.
_NUM_WARPS, _ROWS = 1, 4
_MANY = 512  # tiles of all layers from which on a program takes those of two layers


# Addresses come as integers: NOTE [addresses] in `scv`.
@triton.jit(
    do_not_specialize=[
        "layers", "slots_in_cache", "staged_rows", "positions", "tokens", "max_requests",
        "mirror", "kept_out", "refused_out", "sampled_ids", "draft_ids", "num_sampled",
        "num_rejected", "flags", "requests", "columns", "ids", "tiles", "each", "s_request",
        "s_column", "s_draft", "s_count", "s_rejected",
    ]
)  # fmt: skip
def _decide_kernel(
    table, element, slots, rows, mask, accepted, error, drafts, state, counters, row_map,
    open_drafts,
    layers, slots_in_cache: tl.int64, staged_rows, positions, tokens, max_requests,
    s_table, sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
    kc_block, kc_offset, kc_head, kc_outer, kc_inner, vc_block, vc_offset, vc_head, vc_inner,
    mirror: tl.int64, kept_out: tl.int64, refused_out: tl.int64, sampled_ids: tl.int64,
    draft_ids: tl.int64, num_sampled: tl.int64, num_rejected: tl.int64,
    flags, requests, columns, ids, tiles, each,
    s_request: tl.int64, s_column: tl.int64, s_draft: tl.int64, s_count: tl.int64,
    s_rejected: tl.int64,
    H: tl.constexpr, D: tl.constexpr, X: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, PLACED: tl.constexpr,
    ID_MISMATCH: tl.constexpr, COUNT_MISMATCH: tl.constexpr, OVERFLOW: tl.constexpr,
    ROWS: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Program 0 counts and closes; program 1 + l * tiles + i moves the accepted rows of tile i to
    the caches of layers `[l * each, (l + 1) * each)`."""
    request = tl.arange(0, R)
    real = request < requests
    wide_request = request.to(tl.int64)
    own = tl.load(drafts + request, mask=real, other=0)
    start = tl.cumsum(own, axis=0) - own
    total = tl.sum(own, axis=0)
    wide_sampled = (flags & _WIDE_SAMPLED != 0).to(tl.int32)
    wide_drafts = (flags & _WIDE_DRAFTS != 0).to(tl.int32)
    at = sampled_ids.to(error.dtype) + (wide_request[:, None] * s_request) * (1 + wide_sampled)
    said, count = said_counts(
        at, num_sampled.to(error.dtype), flags, real, wide_request, columns, s_column, s_count, R, K
    )
    taken, wrong = judge_drafts(
        at, wide_sampled, draft_ids.to(error.dtype), wide_drafts, real, start, own, count, ids,
        s_column, s_draft, K,
    )  # fmt: skip
    bits = tl.max(wrong, axis=0) * ID_MISMATCH
    # Drafts without an id would count as accepted, and their rows would be lost.
    bits |= tl.where(total > ids, ID_MISMATCH, 0)
    bits |= layer_faults(drafts, state, layers, max_requests, COUNT_MISMATCH, OVERFLOW, 128)
    failed = tl.load(error) | bits
    taken = tl.where(failed == 0, taken, 0)

    program = tl.program_id(0)
    if program == 0:
        if bits != 0:
            tl.atomic_or(error, bits, sem="relaxed")
        refused = refused_counts(
            num_rejected.to(error.dtype), flags, request, wide_request, requests, s_rejected
        )
        kept = tl.minimum(said, taken + 1)
        tl.store(accepted + request, taken, mask=real)
        counted = request < tl.where(flags & _HAS_COUNT != 0, requests, 0)
        tl.store(kept_out.to(error.dtype) + request, kept, mask=counted)
        tl.store(refused_out.to(error.dtype) + request, refused + said - kept, mask=counted)
        mark(mask, real, start, own, taken, ids, K)
        refuse(mask, tl.minimum(total, ids), ids, 256)
        close_routing(row_map, open_drafts, tokens, max_requests, 1024)
        copy = mirror.to(tl.int64).to(counters.dtype)  # the interpreter has 0 as int32
        mirrored = tl.where(mirror != 0, 1, 0)
        rest = _CERTAIN + tl.arange(0, _FIXED - _CERTAIN)  # that no commit adds to
        tl.store(copy + rest, tl.load(counters + rest), mask=rest < mirrored * _FIXED)
        staged = tl.zeros([1], tl.int64) + total
        committed = tl.zeros([1], tl.int64) + tl.sum(taken, axis=0)
        count_totals(counters, copy, mirrored, staged, committed, failed, layers, 1)
        for low in range(0, positions, K):
            position = low + tl.arange(0, K)
            drafted = tl.sum((position[:, None] < own[None, :]).to(tl.int64), axis=1)
            moved = tl.sum((position[:, None] < taken[None, :]).to(tl.int64), axis=1)
            place = _FIXED + position
            count_position(counters, copy, mirrored, place, drafted, position < positions)
            count_position(counters, copy, mirrored, place + positions, moved, position < positions)
        return
    program -= 1
    tile = program % tiles
    first = program // tiles * each
    draft = tile * ROWS + tl.arange(0, ROWS)
    behind = draft[:, None] - start[None, :]
    valid = tl.max(((behind >= 0) & (behind < taken[None, :])).to(tl.int32), axis=1) != 0
    slot = tl.load(slots + draft, mask=valid, other=-1)
    valid &= (slot >= 0) & (slot < slots_in_cache)
    if PLACED:
        row = tl.load(rows + draft, mask=valid, other=-1)
        valid &= (row >= 0) & (row < staged_rows)
    else:
        row = draft
    for i in range(tl.minimum(each, layers - first)):
        move_rows(
            valid, row, slot, first.to(tl.int64) + i, table, element,
            s_table, sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
            kc_block, kc_offset, kc_head, kc_outer, kc_inner,
            vc_block, vc_offset, vc_head, vc_inner,
            H, D, X, BLOCK_SIZE, BLOCK, ALIGNED,
        )  # fmt: skip


class DecideLaunch(NamedTuple):
    """How windows of one plan are decided.

    constants: but for the last two. somewhere: stands for addresses that are not used.
    """

    kept: KeptLaunch
    constants: tuple[int, ...]
    layers: int
    positions: int
    somewhere: int


def decide_launch(plan: DecidePlan) -> DecideLaunch:
    """What every launch over `plan` has in common."""
    common, judging = constants_of(plan.commit), plan.judging
    meta = common.meta
    fixed = (
        plan.commit.table, common.element, plan.slots, plan.rows, plan.mask.view(torch.uint8),
        plan.accepted, judging.error, judging.drafts, judging.state, plan.counters, plan.row_map,
        plan.num_drafts,
        common.layers, *common.sizes, (plan.counters.shape[0] - FIXED) // 2,
        plan.row_map.shape[0], judging.drafts.shape[0], *common.strides,
    )  # fmt: skip
    return DecideLaunch(
        KeptLaunch(_decide_kernel, judging.error.device, fixed, num_warps=_NUM_WARPS),
        (
            meta["H"], meta["D"], meta["X"], meta["BLOCK_SIZE"], meta["BLOCK"],
            int(meta["ALIGNED"]), int(plan.rows is not None), judging.id_mismatch,
            judging.count_mismatch, judging.overflow, _ROWS,
        ),
        common.layers,
        min(MAX_POSITIONS, max(2, triton.next_power_of_2(judging.max_drafts))),
        judging.error.data_ptr(),
    )  # fmt: skip


class Deciding:
    """`nwor_compile.ops.decide.deciding` in one launch, for arguments of the form that it is made
    with: what follows from shapes and dtypes is worked out once, addresses and strides each time.
    """

    def __init__(
        self,
        plan: DecidePlan,
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
    ) -> None:
        self.kept, constants, layers, positions, self.somewhere = plan.launch
        requests, columns = sampled_ids.shape
        ids = draft_ids.shape[0]
        lanes = next(lanes for lanes in LANES if lanes >= requests)
        tiles = max(1, -(-ids // _ROWS))
        flags = flags_of(sampled_ids, draft_ids, num_sampled, num_rejected)
        each = 1 if tiles * layers < _MANY else 2
        self.programs = 1 + tiles * -(-layers // each)
        self.sizes = (flags, requests, columns, ids, tiles, each)
        self.constants = (*constants, lanes, positions)

    def __call__(
        self,
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
        counts: Counts | None,
        mirror: Tensor | None,
    ) -> None:
        places, strides = where(self.somewhere, sampled_ids, draft_ids, num_sampled, num_rejected)
        copy = 0 if mirror is None else mirror.data_ptr()
        kept = refused = self.somewhere
        if counts is not None:
            kept, refused = counts[0].data_ptr(), counts[1].data_ptr()
        self.kept(
            self.programs, numbers=(copy, kept, refused, *places, *self.sizes, *strides),
            constants=self.constants,
        )  # fmt: skip
