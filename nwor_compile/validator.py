"""`validate` in fewer calls: where requests are few, one launch; else a judgement, which reads the
caller's tensors where they are, and a captured CUDA graph of the rest."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nwor_compile.capture import CAPTURE_ERRORS, capture
from nwor_compile.ops.decide import DECIDING, MOST_IDS, Decide, fits, kinds
from nwor_compile.ops.library import pick
from nwor_compile.ops.ranges import span
from nwor_compile.ops.scv import JUDGING, Verdict, verdict_buffers
from nwor_compile.scv import (
    Committed,
    WindowTensors,
    ids_of,
    judge_window,
    outcome,
    settle,
    validate,
)

log = logging.getLogger("nwor_compile")


class _Captured(NamedTuple):
    """A CUDA graph of `settle` for one size, and the verdict that it reads and completes.

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
        return outcome(self.tensors, self.mask, numbers, num_sampled, num_rejected)


class _OneLaunch(NamedTuple):
    """The same for windows that are decided in one launch.

    counts: what each window hands to its caller.
    """

    tensors: WindowTensors
    decide: Decide
    accepted: Tensor
    mask: Tensor
    counts: _OwnCounts

    def __call__(
        self,
        sampled_ids: Tensor,
        draft_ids: Tensor,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
    ) -> Committed:
        """Commit with arguments that look like those it was prepared for."""
        tensors, decide, accepted, mask, counts = self
        given = (sampled_ids, draft_ids, num_sampled, num_rejected)
        mirror = tensors.mirrors[0] if tensors.mirrors else None
        own = None if num_sampled is None else counts.take()
        with span("nwor.commit"):
            decide(*given, own, mirror)
        if own is None:
            return Committed(accepted, mask, tensors.error)
        return outcome(tensors, mask, (accepted, *own), num_sampled, num_rejected)


_MADE = 128  # tensors at a time


class _OwnCounts:
    """Tensors int32 `[requests]`, not initialised, that belong to whoever takes them.

    Many are made at a time: to allocate each window's would take the host a third as long as all
    the rest of a commit. Each begins at a multiple of 16 bytes, as an allocation does, because
    Triton compiles the kernels that read it by that.
    """

    def __init__(self, requests: int, device: torch.device) -> None:
        self.requests, self.device = requests, device
        self.made: list[Tensor] = []

    def take(self) -> tuple[Tensor, Tensor]:
        """Two of them."""
        if not self.made:
            columns = -(-self.requests // 4) * 4
            with torch.inference_mode(False):  # a window in that mode would make them for it alone
                some = torch.empty(_MADE, columns, dtype=torch.int32, device=self.device)
            self.made = list(some[:, : self.requests].unbind(0))
        return self.made.pop(), self.made.pop()


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
                self.own_ids[requests] = ids_of(self.tensors, None, requests)
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

    def compile(self, sizes: Iterable[int]) -> None:
        """Call once each kernel that `warm_up` needs, for `compile_together`."""
        for requests in self._kinds():
            self._decide_nothing(requests)
        for size in self._sizes_of_graphs(sizes):
            given, verdict = self._buffers(size)
            judge_window(self.tensors, *given, verdict)
            settle(self.tensors, verdict)

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Run the one launch, and capture a graph for each number of requests in `sizes` that it
        does not do for; time the graph if adaptive.

        Call it before the first window. Counters and caches are unchanged.
        """
        if self.tensors.error.device.type != "cuda":
            self._run_vectorised("CUDA is missing")
            return
        for requests in self._kinds():
            with _undone(self.tensors):
                self._decide_nothing(requests)
        for size in self._sizes_of_graphs(sizes):
            self._capture(size)
        self.graphs = dict(sorted(self.graphs.items()))
        self.prepared.clear()

    def _kinds(self) -> tuple[int, ...]:
        """Numbers of requests, one for each kernel of the one launch."""
        return kinds(self.tensors.drafts.shape[0]) if self.in_one_launch(1, 1) else ()

    def _sizes_of_graphs(self, sizes: Iterable[int]) -> list[int]:
        return [
            size
            for size in sorted(set(sizes))
            if not self.in_one_launch(size, self._most_ids(size))
        ]

    def _most_ids(self, size: int) -> int:
        """Drafts' ids of a window of so many requests that all have the most drafts."""
        return min(size * self.max_drafts, self.tensors.batches[0].slots.shape[0] - 1)

    def _decide_nothing(self, requests: int) -> None:
        """The one launch for so many requests, whatever their drafts' ids come to."""
        given = self._nothing(requests, min(self._most_ids(requests), MOST_IDS))
        _one_launch(self.tensors, *given)(*given)

    def _buffers(self, size: int) -> tuple[tuple[Tensor, Tensor, None, None], Verdict]:
        rows = self._most_ids(size)
        return self._nothing(size, rows), verdict_buffers(size, rows, self.tensors.error.device)

    def _capture(self, size: int) -> None:
        tensors, (given, verdict) = self.tensors, self._buffers(size)

        def compile_all() -> None:
            judge_window(tensors, *given, verdict)
            settle(tensors, verdict)

        with _undone(tensors):
            try:
                run = partial(settle, tensors, verdict)
                graph = capture(run, compile_all, device=tensors.error.device)
                captured = _Captured(graph, verdict, verdict.mask.shape[0])
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
    requests = sampled_ids.shape[0]
    return _OneLaunch(
        tensors, decide, plan.accepted[:requests], plan.mask[: ids.shape[0]],
        _OwnCounts(requests, tensors.error.device),
    )  # fmt: skip


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
