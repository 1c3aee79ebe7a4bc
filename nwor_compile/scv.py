"""Speculative Cache Validation: from the sampler's ids to a committed window.

`validate` is the whole device-side path, in two steps: judge (acceptance and all error flags), then
settle (the commit of every batch, counters, routing back to direct mode). Between them ranks share
their error flags. It is straight-line device code: two launches, more with several batches. Where
requests are few one launch does both; else, in graph mode, the second step is a captured CUDA graph
and the first reads the caller's tensors where they are. `host_loop` is the oracle: the same
decision, made in Python after a synchronisation.

After `validate`, `finish` or `host_loop` the routing is closed: every token is certain.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nwor_compile.capture import CAPTURE_ERRORS, capture
from nwor_compile.layer_batch import LayerBatch
from nwor_compile.ops.commit import COMMIT, Closing, CommitPlan
from nwor_compile.ops.counters import FIXED
from nwor_compile.ops.decide import DECIDING, MOST_IDS, Decide, DecidePlan, fits, kinds
from nwor_compile.ops.error_bits import COUNT_MISMATCH, ID_MISMATCH, OVERFLOW
from nwor_compile.ops.library import pick
from nwor_compile.ops.ranges import span
from nwor_compile.ops.scv import JUDGE, JUDGING, JudgePlan, Verdict, layer_faults, verdict_buffers
from nwor_compile.ops.staging import Routing

log = logging.getLogger("nwor_compile")


class Committed(NamedTuple):
    """What a window came to; tensors on the device. The first three are valid until the next
    `begin`, the others are the caller's.

    accepted: int32 `[R]`, drafts accepted a request (0 everywhere if `error`).
    mask: bool `[N]`, drafts whose staged rows moved to the cache.
    error: int32 `[1]`, bits of `nwor_compile.routing`; the next `begin` clears it.
    num_sampled, num_rejected: int32 `[R]`, if they were given: what the engine should go on with.
        `num_sampled` is at most `accepted + 1`, and `num_rejected` has grown by what that took
        away, so that with the error flag up each request keeps its first sampled token alone.
    """

    accepted: Tensor
    mask: Tensor
    error: Tensor
    num_sampled: Tensor | None = None
    num_rejected: Tensor | None = None


@dataclass(frozen=True)
class WindowTensors:
    """What validation works on: persistent, and the same for every window.

    drafts: int32 `[max_requests]`, the step's draft counts (routing's are zero in direct mode).
    error: int32 `[1]`. state: int32 `[layers, 2]`. counters: int64.
    rows: int32 `[capacity]`, staging row of each draft; None if draft n is staged in row n.
    draft_ids: int64 `[capacity]`, ids of the step's drafts, request after request, for callers that
        do not give them.
    mirrors: tensors on the host, like `counters`: each commit copies the counters there.
    share_error: where several ranks hold shares of one model, leaves the largest of their error
        flags in each one's; see `Window`.
    """

    routing: Routing
    drafts: Tensor
    error: Tensor
    state: Tensor
    counters: Tensor
    batches: list[LayerBatch]
    staging: bool
    share_error: Callable[[Tensor], None] | None = None
    rows: Tensor | None = None
    draft_ids: Tensor | None = None
    mirrors: list[Tensor] = field(default_factory=list)

    @cached_property
    def plans(self) -> tuple[CommitPlan, ...]:
        """What the commits of each batch have in common; made at the first, and kept."""
        return tuple(
            CommitPlan(
                batch.key_caches,
                batch.value_caches,
                batch.staged_keys,
                batch.staged_values,
                batch.table,
            )
            for batch in self.batches
        )

    @cached_property
    def judging(self) -> JudgePlan:
        """What all judgements have in common."""
        return JudgePlan(
            self.drafts, self.routing.num_drafts, self.state, self.error,
            max_drafts=(self.counters.shape[0] - FIXED) // 2, id_mismatch=ID_MISMATCH,
            count_mismatch=COUNT_MISMATCH, overflow=OVERFLOW,
        )  # fmt: skip

    @cached_property
    def deciding(self) -> DecidePlan | None:
        """What windows that are decided in one launch have in common. None where that cannot be:
        layers of several geometries, error flags of several ranks, nothing staged."""
        if len(self.batches) > 1 or self.share_error is not None or not self.staging:
            return None
        (batch,), (commit,) = self.batches, self.plans
        mask = torch.zeros(batch.slots.shape[0] - 1, dtype=torch.bool, device=self.error.device)
        return DecidePlan(
            commit, self.judging, batch.slots, self.rows, mask, self.counters,
            self.routing.row_map, self.routing.num_drafts,
        )  # fmt: skip


def validate(
    tensors: WindowTensors,
    sampled_ids: Tensor,
    draft_ids: Tensor | None = None,
    num_sampled: Tensor | None = None,
    num_rejected: Tensor | None = None,
) -> Committed:
    """Accept, check and commit on the device; no synchronisation, one shape for every outcome.

    Closes the routing. Arguments as for `accept_mask`, with

    draft_ids: None for `tensors.draft_ids`; every draft then has an id.
    num_rejected: `[R]` int32 or int64, with `num_sampled` only; see `Committed`.
    """
    ids = _ids(tensors, draft_ids, sampled_ids.shape[0])
    verdict = verdict_buffers(sampled_ids.shape[0], ids.shape[0], tensors.error.device)
    _judge(tensors, sampled_ids, ids, num_sampled, num_rejected, verdict)
    _settle(tensors, verdict)
    numbers = (verdict.accepted, verdict.num_sampled, verdict.num_rejected)
    return _committed(tensors, verdict.mask, numbers, num_sampled, num_rejected)


def finish(
    tensors: WindowTensors,
    mask: Tensor,
    accepted: Tensor,
    bits: Tensor,
    num_sampled: Tensor | None = None,
    num_rejected: Tensor | None = None,
) -> Committed:
    """For a decision made elsewhere: fold all error sources into the window's flag, then commit all
    batches or none. Closes the routing.

    Args:
        mask: bool `[N]`. accepted: int32 `[R]`. bits: int32 `[1]`, for the error flag.
        num_sampled, num_rejected: `[R]` int32 or int64, or the second None, or both.
    """
    verdict = verdict_buffers(accepted.shape[0], mask.shape[0], tensors.error.device)
    verdict.mask.copy_(mask)
    verdict.numbers.zero_()
    verdict.accepted.copy_(accepted)
    if num_sampled is not None:
        verdict.num_sampled.copy_(num_sampled)
    if num_rejected is not None:
        verdict.num_rejected.copy_(num_rejected)
    tensors.error.bitwise_or_(bits | layer_faults(tensors.judging))
    _settle(tensors, verdict)
    numbers = (verdict.accepted, verdict.num_sampled, verdict.num_rejected)
    return _committed(tensors, verdict.mask, numbers, num_sampled, num_rejected)


def _ids(tensors: WindowTensors, draft_ids: Tensor | None, requests: int) -> Tensor:
    if draft_ids is not None:
        return draft_ids
    known = tensors.draft_ids
    if known is None:
        raise ValueError("draft_ids: expected a tensor, since this window does not keep draft ids")
    return known[: requests * (known.shape[0] // tensors.drafts.shape[0])]


def _judge(
    tensors: WindowTensors,
    sampled_ids: Tensor,
    draft_ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
    verdict: Verdict,
) -> None:
    """Fill `verdict`, and add this rank's faults to the error flag."""
    with span("nwor.accept"):
        pick(JUDGE, tensors.error.device)(
            tensors.judging, sampled_ids, draft_ids, num_sampled, num_rejected, verdict
        )


def _settle(tensors: WindowTensors, verdict: Verdict) -> None:
    """Share the error flag, then do what `verdict` says: all of it or, with the flag up, nothing.

    The first launch counts and closes as well; `Closing` says what that is.
    """
    if tensors.share_error is not None:
        tensors.share_error(tensors.error)
    routing = tensors.routing
    closing: Closing | None = Closing(verdict, routing.row_map, routing.num_drafts)
    counters: Tensor | None = tensors.counters
    mask = verdict.mask
    plans = tensors.plans
    if not tensors.staging:  # nothing was staged and nothing is counted
        counters, mask, plans = None, mask[:0], plans[:1]
    commit = pick(COMMIT, tensors.error.device)
    with span("nwor.commit"):
        for plan, batch in zip(plans, tensors.batches, strict=False):
            commit(
                plan, batch.slots, tensors.rows, mask, tensors.error, tensors.drafts,
                verdict.accepted, counters, tensors.state.shape[0], closing,
            )  # fmt: skip
            counters = closing = None
        for mirror in tensors.mirrors:
            mirror.copy_(tensors.counters, non_blocking=True)


def _committed(
    tensors: WindowTensors,
    mask: Tensor,
    numbers: Sequence[Tensor],
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
) -> Committed:
    """numbers: accepted, and the counts as they came out, which the caller has if it gave them."""
    accepted, kept, rejected = numbers
    return Committed(
        accepted, mask, tensors.error, None if num_sampled is None else kept,
        None if num_rejected is None else rejected,
    )  # fmt: skip


def host_loop(
    tensors: WindowTensors,
    sampled_ids: Tensor,
    draft_ids: Tensor | None = None,
    num_sampled: Tensor | None = None,
    num_rejected: Tensor | None = None,
) -> Committed:
    """The oracle: the decision of `validate` as a loop on the host. Synchronises."""
    rows = sampled_ids.tolist()
    drafts = _ids(tensors, draft_ids, len(rows)).tolist()
    counts = tensors.drafts[: len(rows)].tolist()
    given = num_sampled.tolist() if num_sampled is not None else None
    mask, accepted, start = [False] * len(drafts), [], 0
    mismatch = sum(counts) > len(drafts)
    for r, (row, count) in enumerate(zip(rows, counts, strict=True)):
        if given is None:
            total = next((i for i, token in enumerate(row) if token < 0), len(row))
        else:
            total = min(max(given[r], 0), len(row))
        prefix = 0
        known = min(count, total, len(drafts) - start)
        while prefix < known and row[prefix] == drafts[start + prefix]:
            prefix += 1
        taken = max(0, min(prefix, total - 1))
        mismatch |= prefix < total - 1
        mask[start : start + taken] = [True] * taken
        accepted.append(taken)
        start += count
    device = sampled_ids.device
    return finish(
        tensors,
        torch.tensor(mask, dtype=torch.bool, device=device),
        torch.tensor(accepted, dtype=torch.int32, device=device),
        torch.tensor([ID_MISMATCH if mismatch else 0], dtype=torch.int32, device=device),
        num_sampled,
        num_rejected,
    )


class _Captured(NamedTuple):
    """A CUDA graph of `_settle` for one size, and the verdict that it reads and completes.

    room: drafts that it can hold. faster: than without it.
    """

    graph: torch.cuda.CUDAGraph
    verdict: Verdict
    room: int
    faster: bool = True


class _Replay(NamedTuple):
    """A judgement and a replay, as far as shapes and dtypes of the arguments say what they are.

    accepted, mask, counts: the parts of the graph's verdict that a step of this form has; counts
    `[2, R]`.
    """

    tensors: WindowTensors
    graph: torch.cuda.CUDAGraph
    judge: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], None]
    accepted: Tensor
    mask: Tensor
    counts: Tensor

    def __call__(
        self,
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
    ) -> Committed:
        """Commit with arguments that look like those it was prepared for."""
        # The judge reads the caller's tensors where they are and fills the graph's whole verdict,
        # so no input is copied, and nothing of an earlier window is left.
        with span("nwor.accept"):
            self.judge(sampled_ids, draft_ids, num_sampled, num_rejected)
        with span("nwor.commit"):
            self.graph.replay()
        if num_sampled is None:
            return Committed(self.accepted, self.mask, self.tensors.error)
        # A copy: an engine may hand these to another stream, which the next commit, that overwrites
        # the graph's, does not wait for.
        numbers = (self.accepted, *self.counts.clone().unbind(0))
        return _committed(self.tensors, self.mask, numbers, num_sampled, num_rejected)


class _OneLaunch(NamedTuple):
    """The same for windows that are decided in one launch."""

    tensors: WindowTensors
    decide: Decide
    mask: Tensor

    def __call__(
        self,
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
    ) -> Committed:
        """Commit with arguments that look like those it was prepared for."""
        given = (sampled_ids, draft_ids, num_sampled, num_rejected)
        tensors, requests = self.tensors, sampled_ids.shape[0]
        numbers = torch.empty(3, requests, dtype=torch.int32, device=tensors.error.device)
        with span("nwor.commit"):
            self.decide(*given, numbers, tensors.mirrors[0] if tensors.mirrors else None)
        return _committed(tensors, self.mask, numbers.unbind(0), num_sampled, num_rejected)


_KEPT_FORMS = 1024


@dataclass
class GraphValidator:
    """`validate` in fewer calls: one launch where requests are few (`ops/decide.py`), else a CUDA
    graph a size bucket (requests, rounded up to a power of two).

    Graphs are captured by `warm_up` only: capturing synchronises, and a window must not. A size
    without a graph, a machine without CUDA and a capture that failed run vectorised; each is
    logged once and counted in `vectorised` by reason.

    one_launch: False to have graphs for few requests too. prepared: what calls of a form ran, for
    further ones. own_ids: by requests, the drafts' ids where the caller gives none.
    """

    tensors: WindowTensors
    max_drafts: int
    adaptive: bool
    one_launch: bool = True
    graphs: dict[int, _Captured] = field(default_factory=dict)
    vectorised: dict[str, int] = field(default_factory=dict)
    prepared: dict[Hashable, _Replay | _OneLaunch] = field(default_factory=dict)
    own_ids: dict[int, Tensor] = field(default_factory=dict)

    def __call__(
        self,
        sampled_ids: Tensor,
        draft_ids: Tensor | None = None,
        num_sampled: Tensor | None = None,
        num_rejected: Tensor | None = None,
        *,
        form: Hashable = None,
    ) -> Committed:
        """As `validate`.

        form: an object that stands for the shapes, dtypes and devices of the arguments: calls that
            have the same one agree in them.
        """
        if draft_ids is None:
            requests = sampled_ids.shape[0]
            if requests not in self.own_ids:
                self.own_ids[requests] = _ids(self.tensors, None, requests)
            draft_ids = self.own_ids[requests]
        given = (sampled_ids, draft_ids, num_sampled, num_rejected)
        prepared = self.prepared.get(form)
        if prepared is None or torch.cuda.is_current_stream_capturing():
            prepared = self._prepare(*given)
            if prepared is None:
                return validate(self.tensors, *given)
            if form is not None:
                if len(self.prepared) >= _KEPT_FORMS:
                    self.prepared.clear()
                self.prepared[form] = prepared
        return prepared(*given)

    def _prepare(
        self,
        sampled_ids: Tensor,
        ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
    ) -> _Replay | _OneLaunch | None:
        given = (sampled_ids, ids, num_sampled, num_rejected)
        if not sampled_ids.is_cuda:
            self._run_vectorised("CUDA is missing")
            return None
        if torch.cuda.is_current_stream_capturing():
            return None  # the launches become part of the caller's graph; graphs do not nest
        if self.in_one_launch(sampled_ids.shape[0], ids.shape[0]):
            return _one_launch(self.tensors, *given)
        captured = self._graph_for(sampled_ids, ids)
        return None if captured is None else _replay(self.tensors, captured, *given)

    def in_one_launch(self, requests: int, ids: int) -> bool:
        """Whether a window of so many requests and drafts' ids is decided in one launch."""
        if not self.one_launch or self.tensors.deciding is None:
            return False
        # The kernel stores to the mirror by itself.
        reachable = all(mirror.is_pinned() for mirror in self.tensors.mirrors)
        return reachable and fits(requests, ids)

    def forget(self) -> None:
        """Drop all graphs, and what is kept of calls."""
        self.graphs.clear()
        self.prepared.clear()

    def _graph_for(self, sampled_ids: Tensor, draft_ids: Tensor) -> _Captured | None:
        requests, drafts = sampled_ids.shape[0], draft_ids.shape[0]
        for size, captured in self.graphs.items():  # smallest first
            if size >= requests and captured.room >= drafts:
                return None if self.adaptive and not captured.faster else captured
        self._run_vectorised("no graph was captured for this size")
        return None

    def _run_vectorised(self, reason: str) -> None:
        if reason not in self.vectorised:
            log.warning("SCV graph mode runs vectorised: %s", reason)
        self.vectorised[reason] = self.vectorised.get(reason, 0) + 1

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Compile the one launch, and capture a graph for each number of requests in `sizes` that
        it does not do for; time the graph if adaptive.

        Call it before the first window. Counters and caches are unchanged.
        """
        if self.tensors.error.device.type != "cuda":
            self._run_vectorised("CUDA is missing")
            return
        if self.in_one_launch(1, 1):
            for requests in kinds(self.tensors.drafts.shape[0]):
                self._compile(requests)
        for size in sorted(set(sizes)):
            if not self.in_one_launch(size, self._most_ids(size)):
                self._capture(size)
        self.graphs = dict(sorted(self.graphs.items()))
        self.prepared.clear()

    def _most_ids(self, size: int) -> int:
        """Drafts' ids of a window of so many requests that all have the most drafts."""
        return min(size * self.max_drafts, self.tensors.batches[0].slots.shape[0] - 1)

    def _compile(self, requests: int) -> None:
        """Run the one launch for so many requests, whatever their drafts' ids come to."""
        with _undone(self.tensors):
            given = self._nothing(requests, min(self._most_ids(requests), MOST_IDS))
            _one_launch(self.tensors, *given)(*given)

    def _capture(self, size: int) -> None:
        tensors, rows = self.tensors, self._most_ids(size)
        given = self._nothing(size, rows)
        verdict = verdict_buffers(size, rows, tensors.error.device)

        def compile_all() -> None:
            _judge(tensors, *given, verdict)
            _settle(tensors, verdict)

        with _undone(tensors):
            try:
                run = partial(_settle, tensors, verdict)
                graph = capture(run, compile_all, device=tensors.error.device)
                captured = _Captured(graph, verdict, rows)
                if self.adaptive and not self._faster(size, captured, given):
                    captured = captured._replace(faster=False)
                self.graphs[size] = captured
            except CAPTURE_ERRORS as error:  # NWOR goes on without
                self._run_vectorised(f"capture failed: {error}")

    def _nothing(self, requests: int, ids: int) -> tuple[Tensor, Tensor, None, None]:
        """What a sampler says that accepted nothing of so many ids."""
        ints: dict[str, Any] = {"dtype": torch.int64, "device": self.tensors.error.device}
        sampled = torch.full((requests, self.max_drafts + 1), -1, **ints)
        return sampled, torch.zeros(ids, **ints), None, None

    def _faster(
        self, size: int, captured: _Captured, given: tuple[Tensor, Tensor, None, None]
    ) -> bool:
        replay = _replay(self.tensors, captured, *given)
        graph_us = _microseconds(lambda: replay(*given))
        plain_us = _microseconds(lambda: validate(self.tensors, *given))
        log.info(
            "SCV adaptive, %d requests: graph %.1f us, vectorised %.1f us; %s is kept",
            size, graph_us, plain_us, "graph" if graph_us <= plain_us else "vectorised",
        )  # fmt: skip
        return graph_us <= plain_us


@contextlib.contextmanager
def _undone(tensors: WindowTensors) -> Iterator[None]:
    """Commits in here find no drafts, so they move nothing, and what they leave is put back."""
    changed = (tensors.counters, tensors.error, tensors.drafts)
    kept = [tensor.clone() for tensor in changed]
    tensors.drafts.zero_()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        for tensor, value in zip(changed, kept, strict=True):
            tensor.copy_(value)


def _replay(
    tensors: WindowTensors,
    captured: _Captured,
    sampled_ids: Tensor,
    ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
) -> _Replay:
    verdict, requests = captured.verdict, sampled_ids.shape[0]
    judge = pick(JUDGING, tensors.error.device)(
        tensors.judging, sampled_ids, ids, num_sampled, num_rejected, verdict
    )
    return _Replay(
        tensors, captured.graph, judge, verdict.accepted[:requests],
        verdict.mask[: ids.shape[0]], verdict.numbers[1:, :requests],
    )  # fmt: skip


def _one_launch(
    tensors: WindowTensors,
    sampled_ids: Tensor,
    ids: Tensor,
    num_sampled: Tensor | None,
    num_rejected: Tensor | None,
) -> _OneLaunch:
    plan = tensors.deciding
    if plan is None:
        raise ValueError("deciding: these windows are not decided in one launch")
    decide = pick(DECIDING, tensors.error.device)(plan, sampled_ids, ids, num_sampled, num_rejected)
    return _OneLaunch(tensors, decide, plan.mask[: ids.shape[0]])


def _microseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median wall time of `call` with a synchronisation around it, in microseconds."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e6)
    return sorted(times)[repeats // 2]
