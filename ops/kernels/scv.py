"""Launcher of `accept_mask`: one program, vectorised over requests x positions.

One program, because `mismatch` is a reduction over all requests that has to be zero without a
second launch to clear it; a batch of 256 requests with up to 16 drafts is one pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.kernels.launch import on_device

_MAX_POSITIONS = 32  # positions (columns) a pass; more are looped over
_TILE = 4096  # requests x positions a pass


_NEVER = tl.constexpr(0x7FFFFFFF)  # a position past every draft


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(do_not_specialize=["requests", "columns", "rows"])
def _accept_kernel(
    sampled_ids, draft_ids, cu_num_drafts, num_sampled, mask, accepted, mismatch,
    requests, columns, rows,
    s_request, s_column, s_draft, s_cu, s_count,
    HAS_COUNT: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    position = tl.arange(0, K)[None, :]
    disagree = tl.zeros([R], tl.int32)
    for first in range(0, requests, R):
        request = first + tl.arange(0, R)
        real = request < requests
        end = tl.load(cu_num_drafts + request * s_cu, mask=real, other=0).to(tl.int32)
        before = real & (request > 0)
        start = tl.load(cu_num_drafts + (request - 1) * s_cu, mask=before, other=0).to(tl.int32)
        drafts = end - start
        ids = sampled_ids + request.to(tl.int64)[:, None] * s_request

        # How many ids the sampler gave: said, or those before the first placeholder.
        if HAS_COUNT:
            count = tl.load(num_sampled + request * s_count, mask=real, other=0)
            count = tl.minimum(tl.maximum(count, 0), columns).to(tl.int32)
        else:
            count = tl.zeros([R], tl.int32) + columns
            for j in range(0, columns, K):
                column = j + position
                inside = real[:, None] & (column < columns)
                sampled = tl.load(ids + column * s_column, mask=inside, other=0)
                placeholder = tl.where(inside & (sampled < 0), column, columns)
                count = tl.minimum(count, tl.min(placeholder, axis=1))

        # The matching prefix ends at the first position that fails.
        longest = tl.max(drafts, axis=0)
        prefix = drafts
        for j in range(0, longest, K):
            column = j + position
            row = start[:, None] + column
            owned = real[:, None] & (column < drafts[:, None]) & (row < rows)
            inside = owned & (column < count[:, None])
            sampled = tl.load(ids + column * s_column, mask=inside, other=0).to(tl.int64)
            draft = tl.load(draft_ids + row * s_draft, mask=inside, other=0).to(tl.int64)
            fails = owned & ((sampled != draft) | (column >= count[:, None]))
            prefix = tl.minimum(prefix, tl.min(tl.where(fails, column, _NEVER), axis=1))

        taken = tl.maximum(tl.minimum(prefix, count - 1), 0)
        tl.store(accepted + request, taken, mask=real)
        disagree = tl.maximum(disagree, (real & (prefix < count - 1)).to(tl.int32))
        for j in range(0, longest, K):
            column = j + position
            row = start[:, None] + column
            owned = real[:, None] & (column < drafts[:, None]) & (row < rows)
            tl.store(mask + row, (column < taken[:, None]).to(tl.uint8), mask=owned)
    tl.store(mismatch, tl.max(disagree, axis=0))

    # Rows that no request owns.
    total = 0
    if requests > 0:
        total = tl.load(cu_num_drafts + (requests - 1) * s_cu).to(tl.int32)
    for first in range(total, rows, R * K):
        row = first + tl.arange(0, R * K)
        tl.store(mask + row, tl.zeros([R * K], tl.uint8), mask=row < rows)


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
    positions = min(_MAX_POSITIONS, triton.next_power_of_2(max(columns, 2)))
    block = min(triton.next_power_of_2(max(requests, 1)), _TILE // positions)
    with on_device(sampled_ids):
        _accept_kernel[(1,)](
            sampled_ids, draft_ids, cu_num_drafts, num_sampled, mask.view(torch.uint8), accepted,
            mismatch,
            requests, columns, rows,
            *sampled_ids.stride(), draft_ids.stride(0), cu_num_drafts.stride(0),
            0 if num_sampled is None else num_sampled.stride(0),
            HAS_COUNT=num_sampled is not None, R=block, K=positions,
            num_warps=8 if block * positions >= 1024 else 4,
        )  # fmt: skip
    return mask, accepted, mismatch
