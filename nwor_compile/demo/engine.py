"""The loop: schedule, begin, forward, sample, commit, advance, draft."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from nwor_compile.config import NworConfig
from nwor_compile.demo.audit import CacheAudit
from nwor_compile.demo.drafters import Drafter, Forward
from nwor_compile.demo.model import Llama
from nwor_compile.demo.paged import PagedCache
from nwor_compile.demo.result import RunResult
from nwor_compile.demo.sampling import Noise, draw_noise, verify, verify_rows
from nwor_compile.demo.schedule import Batch, Request, Scheduler, Span, build_batch
from nwor_compile.window import Window


class Mode(StrEnum):
    """How the target's cache is written.

    plain: no speculation. direct: every row is written. staged: draft rows are staged, and read
    from there. naive: draft rows are staged, and attention reads the cache alone.
    """

    PLAIN = "plain"
    DIRECT = "direct"
    STAGED = "staged"
    NAIVE = "naive"


@dataclass(frozen=True)
class Settings:
    """What a run needs to know besides its requests."""

    rows: int
    max_drafts: int
    chunk: int
    temperature: float = 0.0
    seed: int = 0
    scv: Literal["off", "graph", "adaptive"] = "graph"
    poison: Literal["off", "nan", "large"] = "off"

    @property
    def max_tokens(self) -> int:
        """Most tokens of a step."""
        return max(2, self.rows * max(self.chunk, self.max_drafts + 1))


@dataclass(frozen=True)
class Decision:
    """What one step decided for one request: accepted drafts, the token after them (None for a
    prefill chunk that is not the last), and the drafts that fell."""

    request: Request
    accepted: list[int]
    token: int | None
    rejected: list[int]


Observer = Callable[[list[Decision]], None]


class Engine:
    """One run of some requests in one mode.

    Args:
        forward: the target, compiled or not. The same graph serves every mode: which rows are
            staged is data on the device.
        model: the target itself, for the audit.
        cache: its paged cache.
        drafter: None for plain decoding.
    """

    def __init__(
        self,
        forward: Forward,
        model: Llama,
        cache: PagedCache,
        drafter: Drafter | None,
        mode: Mode,
        settings: Settings,
        observer: Observer | None = None,
    ) -> None:
        self.forward, self.model, self.cache, self.drafter = forward, model, cache, drafter
        self.mode, self.settings, self.observer = mode, settings, observer
        staging = mode in (Mode.STAGED, Mode.NAIVE)
        config = NworConfig(
            mode="stage" if staging else "off", scv=settings.scv, poison=settings.poison
        )
        self.window = Window(
            cache.layers,
            max_requests=settings.rows,
            max_drafts=settings.max_drafts,
            max_tokens=settings.max_tokens,
            config=config,
        )
        self.audit = CacheAudit(cache, model)
        self.result = RunResult.empty(mode.value, settings.temperature, settings.max_drafts)

    def run(self, requests: Sequence[Request]) -> RunResult:
        """Serve the requests to their end."""
        scheduler = Scheduler(requests, rows=self.settings.rows, chunk=self.settings.chunk)
        try:
            self.window.warm_up()
            while not scheduler.done:
                spans = scheduler.next_spans()
                batch = build_batch(spans, self.cache, self.settings.max_drafts)
                accepted, sampled = self._step(batch)
                with self._timed("audit"):
                    self.audit.after(spans, accepted)
                decisions = [
                    self._advance(span, count, row)
                    for span, count, row in zip(spans, accepted, sampled, strict=True)
                    if span is not None
                ]
                if self.observer:
                    self.observer(decisions)
                self._retire(scheduler)
                if self.drafter:
                    with self._timed("draft"):
                        self.drafter.propose(scheduler.running)
            self._conclude(requests)
        finally:
            self.window.close()
        return self.result

    def _step(self, batch: Batch) -> tuple[list[int], list[list[int]]]:
        """One window. Returns accepted drafts and new tokens, a list for each row."""
        window, settings = self.window, self.settings
        with window.step(batch.num_drafts, batch.query_start_loc, batch.slot_mapping):
            with self._timed("audit"):
                self.audit.before()
            with self._timed("forward"), self._hidden_tail():
                logits = self.forward(batch, self.cache)
            with self._timed("sample"):
                rows = verify_rows(batch.query_start_loc, batch.num_drafts, settings.max_drafts)
                sampled, num_sampled = verify(
                    logits[rows], batch.draft_ids, batch.num_drafts, batch.samples,
                    settings.temperature, self._noise(batch, logits.shape[1]),
                    self._draft_probs(batch, logits.shape[1]),
                )  # fmt: skip
            with self._timed("commit"):
                committed = window.commit(sampled, batch.flat_draft_ids, num_sampled)
        self.result.steps += 1
        accepted = committed.accepted.tolist()
        # With the error flag up nothing is accepted; the first sampled token stands.
        kept = torch.minimum(num_sampled, committed.accepted + 1).tolist()
        return accepted, [row[:count] for row, count in zip(sampled.tolist(), kept, strict=True)]

    @contextmanager
    def _hidden_tail(self) -> Iterator[None]:
        """The mistake that `naive` shows: rows are staged as ever, but no reader is told."""
        if self.mode is not Mode.NAIVE:
            yield
            return
        counts = self.window.tensors.routing.num_drafts
        kept = counts.clone()
        counts.zero_()
        yield
        counts.copy_(kept)

    def _noise(self, batch: Batch, vocab_size: int) -> Noise | None:
        if self.settings.temperature == 0:
            return None
        rows = [(s.request.id, len(s.request.tokens)) if s else None for s in batch.spans]
        return draw_noise(self.settings.seed, rows, self.settings.max_drafts, vocab_size)

    def _draft_probs(self, batch: Batch, vocab_size: int) -> Tensor | None:
        given = [s.request.draft_probs if s and s.drafts else None for s in batch.spans]
        if all(probs is None for probs in given):
            return None
        shape = (len(given), self.settings.max_drafts, vocab_size)
        q = torch.zeros(shape, dtype=torch.float64)
        for row, probs in enumerate(given):
            if probs is not None:
                q[row, : probs.shape[0]] = probs
        return q

    def _advance(self, span: Span, accepted: int, sampled: list[int]) -> Decision:
        request, result = span.request, self.result
        drafts = span.tokens[span.certain :]
        decoded = span.start >= len(request.prompt)
        request.computed = span.start + span.certain + accepted
        request.tokens += sampled
        request.drafts, request.draft_probs = [], None
        result.emitted += len(sampled)
        result.decoded += len(sampled) if decoded else 0
        result.windows += span.drafts > 0
        for position in range(span.drafts):
            result.drafted_per_position[position] += 1
            result.accepted_per_position[position] += position < accepted
        token = sampled[-1] if sampled else None
        return Decision(request, drafts[:accepted], token, drafts[accepted:])

    def _retire(self, scheduler: Scheduler) -> None:
        for request in scheduler.running:
            if request is not None and request.remaining <= 0:
                with self._timed("audit"):
                    self.audit.finish(request)
                scheduler.finish(request)
                self.cache.release(request.id)
                if self.drafter:
                    self.drafter.release(request)

    def _conclude(self, requests: Sequence[Request]) -> None:
        result, row = self.result, self.cache.row_bytes
        result.tokens = [request.tokens[len(request.prompt) :] for request in requests]
        result.audit = self.audit.result
        result.cache_bytes = result.audit.rows_written * row
        if self.mode in (Mode.STAGED, Mode.NAIVE):
            moved = sum(result.drafted_per_position) + sum(result.accepted_per_position)
            result.staging_bytes = moved * row
        result.row_bytes = row
        result.metrics = self.window.metrics()

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        taken = time.perf_counter() - start
        self.result.seconds[name] = self.result.seconds.get(name, 0.0) + taken
