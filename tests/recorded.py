"""Buffers that an engine keeps for its steps, and windows whose opening is recorded over them. Used
by test_window_recorded.py and gpu/test_recorded_gpu.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cases import Span, make_batch
from torch import Tensor
from window_support import Rig

from nwor_compile import Committed

# One certain token a request, as in a step of decodes that all have drafts or none.
FIRST = (Span(5, 1, 3), Span(9, 1), Span(7, 1, 5), Span(2, 1, 1))
SECOND = (Span(1, 1, 2), Span(0, 1, 4))
THIRD = (Span(14, 1, 5), Span(3, 1, 2), Span(0, 1), Span(15, 1, 4), Span(6, 1, 1))


class Kept:
    """What an engine keeps: as large as the largest step, and padded behind the step's own part."""

    def __init__(self, r: Rig) -> None:
        requests, device = r.window.max_requests, r.window.tensors.error.device
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.starts = torch.zeros(requests + 1, **ints)
        self.slots = torch.full((r.window.max_tokens,), -1, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(requests, **ints)
        self.ids = torch.zeros(r.window.max_tokens, **ints)
        self.table = torch.zeros(requests, r.batch.block_table.shape[1], **ints)

    def arguments(self, requests: int) -> dict[str, Any]:
        """Of `Window.record_begin`, for so many requests."""
        return {
            "num_drafts": None,
            "query_start_loc": self.starts[: requests + 1],
            "slot_mapping": self.slots,
            "block_table": self.table[:requests],
            "seq_lens": self.lengths[:requests],
            "token_ids": self.ids,
            "one_certain": True,
        }

    def fill(self, r: Rig) -> None:
        """With the step that the rig has."""
        batch = r.batch
        requests, tokens = len(batch.spans), batch.slot_mapping.shape[0]
        self.starts[: requests + 1] = batch.query_start_loc
        self.starts[requests + 1 :] = batch.query_start_loc[-1]
        self.slots[:tokens], self.slots[tokens:] = batch.slot_mapping, -1
        self.lengths[:requests], self.lengths[requests:] = batch.seq_lens, 0
        self.ids[:tokens] = drafted(r)
        self.table.zero_()
        self.table[:requests, : batch.block_table.shape[1]] = batch.block_table


def drafted(r: Rig) -> Tensor:
    """Token ids of the rig's step: those of its drafts, and -5."""
    batch = r.batch
    tokens = torch.full_like(batch.row_map, -5)
    drafts = batch.row_map >= 0
    tokens[drafts] = batch.draft_ids[batch.row_map[drafts]].to(tokens.dtype)
    return tokens[: batch.slot_mapping.shape[0]]


def take(r: Rig, kept: Kept, spans: Sequence[Span], seed: int) -> None:
    """Make these spans the rig's step, in the buffers too."""
    geometry = r.steps[0].batch.geometry
    r.change_batch(make_batch(spans, geometry, seed, padding=3), seed)
    kept.fill(r)


def commit(r: Rig, accepted: Sequence[int]) -> Committed:
    """As the V2 runner does: by the ids that begin was given."""
    sampling = r.sampling(accepted)
    return r.window.commit(sampling.sampled_ids, None, sampling.num_sampled)
