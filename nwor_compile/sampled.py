"""What a window is committed with: the sampler's tensors, and what must hold of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Expected(NamedTuple):
    """What an open window knows of the tensors that it will be committed with.

    requests: of this window. capacity: most drafts. knows_ids: begin was given the tokens' ids.
    """

    requests: int
    capacity: int
    device: torch.device
    knows_ids: bool


def problem_of(
    expected: Expected,
    sampled_ids: Tensor,
    draft_ids: Tensor | None,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
) -> str | None:
    """What is wrong with the arguments of a commit, by their shapes and dtypes; None if nothing."""
    counts = {"num_sampled": num_sampled, "num_rejected": num_rejected}
    given = {"sampled_ids": sampled_ids}
    given.update({name: count for name, count in counts.items() if count is not None})
    if draft_ids is not None:
        given["draft_ids"] = draft_ids
    elif not expected.knows_ids:
        return "draft_ids: expected the drafts' ids, since begin was given no token ids"
    if num_rejected is not None and num_sampled is None:
        return "num_rejected: expected num_sampled with it"
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            return f"{name}: expected a tensor, got {type(tensor).__name__}"
    integers = (torch.int32, torch.int64)
    device = expected.device
    if sampled_ids.dim() != 2 or sampled_ids.shape[0] != expected.requests:
        return (
            f"sampled_ids: expected [{expected.requests}, columns], got {list(sampled_ids.shape)}"
        )
    if draft_ids is not None and (draft_ids.dim() != 1 or draft_ids.shape[0] > expected.capacity):
        return f"draft_ids: expected [at most {expected.capacity}], got {list(draft_ids.shape)}"
    for name, count in counts.items():
        if count is not None and list(count.shape) != [expected.requests]:
            return f"{name}: expected [{expected.requests}], got {list(count.shape)}"
    for name, tensor in given.items():
        if tensor.dtype not in integers or tensor.device != device:
            return (
                f"{name}: expected int32 or int64 on {device}, got {tensor.dtype} on "
                f"{tensor.device}"
            )
    return None
