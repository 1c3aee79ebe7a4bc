"""Who proposes tokens: a small model with its own paged cache, or lookup in the text so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nwor_compile.demo.paged import PagedCache
from nwor_compile.demo.sampling import DRAFT, generator, race
from nwor_compile.demo.schedule import Batch, Request, Span, build_batch

Forward = Callable[[Batch, PagedCache], Tensor]


class Drafter(Protocol):
    """Sets `drafts` (and `draft_probs`, if it is not deterministic) of requests that decode."""

    def propose(self, requests: Sequence[Request | None]) -> None:
        """Propose for each request of a batch's rows."""

    def release(self, request: Request) -> None:
        """Forget a request."""


class NgramDrafter:
    """Prompt lookup: what followed the last occurrence of the latest tokens.

    Args:
        max_drafts: most proposals.
        longest, shortest: lengths of the suffix to look for, longest first.
    """

    def __init__(self, max_drafts: int, longest: int = 4, shortest: int = 2) -> None:
        self.max_drafts, self.longest, self.shortest = max_drafts, longest, shortest

    def propose(self, requests: Sequence[Request | None]) -> None:
        """Drafts may be fewer than `max_drafts`, or none."""
        for request in requests:
            if request is not None and request.decoding:
                request.drafts, request.draft_probs = self.lookup(request.tokens), None

    def lookup(self, tokens: list[int]) -> list[int]:
        """The continuation of the latest earlier occurrence of the longest matching suffix."""
        for size in range(self.longest, self.shortest - 1, -1):
            suffix = tokens[-size:]
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == suffix:
                    return tokens[start + size : start + size + self.max_drafts]
        return []

    def release(self, request: Request) -> None:
        """Nothing is kept."""


class ModelDrafter:
    """A small model, greedy or sampled. It runs between windows, so its own writes stay direct.

    Args:
        forward: the model.
        cache: its paged cache.
        max_drafts: proposals a request.
        temperature: 0 proposes the argmax; otherwise proposals are drawn, and `draft_probs` says
            from what.
        seed: of the draws.
    """

    def __init__(
        self,
        forward: Forward,
        cache: PagedCache,
        *,
        max_drafts: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.forward, self.cache = forward, cache
        self.max_drafts, self.temperature, self.seed = max_drafts, temperature, seed
        self._rows: dict[int, list[int]] = {}  # tokens whose rows are in the cache, in order

    def propose(self, requests: Sequence[Request | None]) -> None:
        """One pass over what the draft model has not seen, then one token a request and pass."""
        counts = [self._count(request) for request in requests]
        chosen: list[list[int]] = [[] for _ in requests]
        probs: list[list[Tensor]] = [[] for _ in requests]
        noise: list[Tensor | None] = [None] * len(requests)
        for turn in range(max(counts, default=0)):
            spans = [
                self._span(request, chosen[row]) if request and turn < counts[row] else None
                for row, request in enumerate(requests)
            ]
            batch = build_batch(spans, self.cache, 0)
            logits = self.forward(batch, self.cache)
            last = logits[(batch.query_start_loc[1:].long() - 1).clamp(min=0)]
            greedy = last.argmax(-1).tolist() if self.temperature == 0 else None
            for row, span in enumerate(spans):
                if span is None:
                    continue
                if greedy is not None:
                    chosen[row].append(greedy[row])
                    continue
                if turn == 0:
                    noise[row] = self._noise(span.request, last.shape[1])
                q = torch.softmax(last[row].double() / self.temperature, -1)
                draws = noise[row]
                if draws is not None:
                    chosen[row].append(int(race(q, draws[turn]).item()))
                probs[row].append(q)
        for row, request in enumerate(requests):
            if request is not None and request.decoding:
                request.drafts = chosen[row]
                request.draft_probs = torch.stack(probs[row]) if probs[row] else None

    def release(self, request: Request) -> None:
        """Return its blocks."""
        self._rows.pop(request.id, None)
        self.cache.release(request.id)

    def _count(self, request: Request | None) -> int:
        if request is None or not request.decoding:
            return 0
        return min(self.max_drafts, max(0, request.remaining - 1))

    def _span(self, request: Request, chosen: list[int]) -> Span:
        """The tokens without a row. Rows of drafts that fell are behind the common prefix, and
        are overwritten."""
        tokens = request.tokens + chosen
        rows = self._rows.get(request.id, [])
        pairs = zip(rows, tokens, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(rows), len(tokens)))
        start = min(same, len(tokens) - 1)
        self._rows[request.id] = tokens
        return Span(request, start, tokens[start:], 0, samples=True)

    def _noise(self, request: Request, vocab_size: int) -> Tensor:
        source = generator(self.seed, request.id, len(request.tokens), DRAFT)
        draws = torch.empty(self.max_drafts, vocab_size, dtype=torch.float64)
        return draws.exponential_(generator=source)
