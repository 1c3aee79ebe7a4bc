"""Requests, and the flat ragged batch of a step: prefill chunks, decodes and verify spans mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nwor_compile.demo.paged import PagedCache

# torch.compile specialises a graph on sizes 0 and 1, so no batch has fewer tokens than this.
MIN_TOKENS = 2


@dataclass
class Request:
    """One prompt and what became of it.

    tokens: the prompt and all tokens decided so far. computed: rows of it in the target's cache.
    drafts: proposals for the next step. arrival: the step at which it joins.
    """

    id: int
    prompt: list[int]
    max_new_tokens: int
    arrival: int = 0
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    draft_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1:
            raise ValueError(
                f"request {self.id}: expected at least one prompt token and one new token, got "
                f"{len(self.prompt)} and {self.max_new_tokens}"
            )
        self.tokens = list(self.prompt)

    @property
    def remaining(self) -> int:
        """New tokens still to come."""
        return self.max_new_tokens - (len(self.tokens) - len(self.prompt))

    @property
    def decoding(self) -> bool:
        """Every token but the last has its row in the cache."""
        return self.computed == len(self.tokens) - 1


@dataclass(frozen=True)
class Span:
    """The tokens of one request in a step: positions `start` on, the last `drafts` speculative.

    samples: the step decides new tokens for it (a prefill chunk before the last does not).
    """

    request: Request
    start: int
    tokens: list[int]
    drafts: int
    samples: bool

    @property
    def certain(self) -> int:
        """Tokens that are already decided."""
        return len(self.tokens) - self.drafts

    @property
    def stop(self) -> int:
        """One past its last position."""
        return self.start + len(self.tokens)


def plan(request: Request, chunk: int) -> Span:
    """The next span of a request: a prefill chunk, or its last token and its drafts."""
    pending = request.tokens[request.computed :]
    if request.decoding:
        # Drafts past the last wanted token could only be thrown away.
        drafts = request.drafts[: max(0, request.remaining - 1)]
        return Span(request, request.computed, pending + drafts, len(drafts), samples=True)
    part = pending[:chunk]
    return Span(request, request.computed, part, 0, samples=len(part) == len(pending))


@dataclass(frozen=True)
class Batch:
    """One step's tensors. R is fixed (empty rows have no tokens), T is at least MIN_TOKENS.

    token_ids, positions, slot_mapping: `[T]` int64. block_table: `[R, B]` int32. seq_lens,
    num_drafts: `[R]` int32. query_start_loc: `[R + 1]` int32. samples: bool `[R]`.
    draft_ids: `[R, K]` int64, -1 past a request's drafts. flat_draft_ids: `[R * K]` int64, request
    after request, -1 past the last.
    """

    spans: list[Span | None]
    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    num_drafts: Tensor
    samples: Tensor
    draft_ids: Tensor
    flat_draft_ids: Tensor

    @property
    def forward_args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The tensors that `Llama.forward` takes besides the caches."""
        return (
            self.token_ids, self.positions, self.slot_mapping,
            self.block_table, self.seq_lens, self.query_start_loc,
        )  # fmt: skip


def build_batch(spans: Sequence[Span | None], cache: PagedCache, max_drafts: int) -> Batch:
    """Lay the spans out one after the other and give them slots.

    Raises OutOfBlocksError if the cache is too small.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts, lengths, counts, flat = [0], [], [], []
    for span in spans:
        if span is not None:
            cache.grow(span.request.id, span.stop)
            token_ids += span.tokens
            positions += range(span.start, span.stop)
            slots += cache.slots(span.request.id, span.start, span.stop)
            flat += span.tokens[span.certain :]
        starts.append(len(token_ids))
        lengths.append(span.stop if span else 0)
        counts.append(span.drafts if span else 0)
    padding = max(0, MIN_TOKENS - len(token_ids))
    flat += [-1] * (len(spans) * max_drafts - len(flat))
    matrix = [_padded(span, max_drafts) for span in spans]
    return Batch(
        spans=list(spans),
        token_ids=torch.tensor(token_ids + [0] * padding, dtype=torch.int64),
        positions=torch.tensor(positions + [0] * padding, dtype=torch.int64),
        slot_mapping=torch.tensor(slots + [-1] * padding, dtype=torch.int64),
        block_table=cache.block_table([span.request.id if span else None for span in spans]),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        num_drafts=torch.tensor(counts, dtype=torch.int32),
        samples=torch.tensor([span is not None and span.samples for span in spans]),
        draft_ids=torch.tensor(matrix, dtype=torch.int64).view(len(spans), max_drafts),
        flat_draft_ids=torch.tensor(flat, dtype=torch.int64),
    )


def _padded(span: Span | None, max_drafts: int) -> list[int]:
    drafts = span.tokens[span.certain :] if span else []
    return drafts + [-1] * (max_drafts - len(drafts))


class Scheduler:
    """Which requests run in a step. Each keeps its row of the batch until it is done.

    Args:
        requests: in any order of arrival.
        rows: requests that run at a time, the fixed R of every batch.
        chunk: most prompt tokens of one request in a step.
    """

    def __init__(self, requests: Sequence[Request], *, rows: int, chunk: int) -> None:
        if rows < 1 or chunk < 1:
            raise ValueError(f"rows and chunk: expected at least 1, got {rows} and {chunk}")
        self.waiting = sorted(requests, key=lambda request: (request.arrival, request.id))
        self.running: list[Request | None] = [None] * rows
        self.chunk = chunk
        self.step = 0

    @property
    def done(self) -> bool:
        """No request is left."""
        return not self.waiting and not any(self.running)

    def next_spans(self) -> list[Span | None]:
        """Admit what has arrived, then one span a running request. Never all empty until `done`."""
        if not any(self.running) and self.waiting:
            self.step = max(self.step, self.waiting[0].arrival)
        for row, taken in enumerate(self.running):
            if taken is None and self.waiting and self.waiting[0].arrival <= self.step:
                self.running[row] = self.waiting.pop(0)
        self.step += 1
        return [plan(request, self.chunk) if request else None for request in self.running]

    def finish(self, request: Request) -> None:
        """Free the row of a request."""
        self.running[self.running.index(request)] = None
