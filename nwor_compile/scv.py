"""Speculative Cache Validation: from the sampler's ids to a committed window.

`validate` is the whole device-side path: mask, error flag, commit of every batch, counters. It is
straight-line device code, so it runs as plain launches (vectorised) or as one captured CUDA graph.
`host_loop` is the oracle: the same decision, made in Python after a synchronisation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nwor_compile.groups import LayerBatch
from nwor_compile.ops import accept_mask, commit_kv
from nwor_compile.ops.ranges import span
from nwor_compile.ops.staging import Routing
from nwor_compile.routing import COUNT_MISMATCH, ID_MISMATCH, OVERFLOW

log = logging.getLogger("nwor_compile")


@dataclass(frozen=True)
class Committed:
    """What a window came to; tensors on the device.

    accepted: int32 `[R]`, drafts accepted a request (0 everywhere if `error`).
    mask: bool `[N]`, staged rows that moved to the cache.
    error: int32 `[1]`, bits of `nwor_compile.routing`; the next `begin` clears it.
    """

    accepted: Tensor
    mask: Tensor
    error: Tensor


@dataclass(frozen=True)
class WindowTensors:
    """What validation works on: persistent, and the same for every window.

    drafts: int32 `[max_requests]`, the step's draft counts (routing's are zero in direct mode).
    error: int32 `[1]`. state: int32 `[layers, 2]`. counters: int64.
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


def validate(
    tensors: WindowTensors,
    sampled_ids: Tensor,
    draft_ids: Tensor,
    num_sampled: Tensor | None,
    ids_given: Tensor | int | None = None,
) -> Committed:
    """Accept, check and commit on the device; no synchronisation, one shape for every outcome.

    ids_given: how many entries of `draft_ids` the caller gave, if not all of them.
    """
    requests = sampled_ids.shape[0]
    ends = tensors.drafts[:requests].cumsum(0, dtype=torch.int32)
    with span("nwor.accept"):
        mask, accepted, mismatch = accept_mask(sampled_ids, draft_ids, ends, num_sampled)
    # Drafts without an id would count as accepted, and their rows would be lost.
    short = ends[-1:] > (draft_ids.shape[0] if ids_given is None else ids_given)
    return finish(tensors, mask, accepted, ((mismatch != 0) | short).to(torch.int32) * ID_MISMATCH)


def finish(tensors: WindowTensors, mask: Tensor, accepted: Tensor, bits: Tensor) -> Committed:
    """Fold all error sources into the window's flag, then commit all batches or none."""
    requests = accepted.shape[0]
    staged = tensors.routing.num_drafts.sum(dtype=torch.int32)
    uneven = (tensors.state[:, 0] != staged).any().to(torch.int32)
    overflow = (tensors.state[:, 1] != 0).any().to(torch.int32)
    error = tensors.error
    error |= bits | uneven * COUNT_MISMATCH | overflow * OVERFLOW
    if tensors.share_error is not None:
        tensors.share_error(error)
    accepted = torch.where(error == 0, accepted, 0)
    mask = mask & (error == 0)
    if not tensors.staging:
        return Committed(accepted, mask, error)
    with span("nwor.commit"):
        for index, batch in enumerate(tensors.batches):
            commit_kv(
                batch.key_caches,
                batch.value_caches,
                batch.staged_key,
                batch.staged_value,
                batch.slots,
                mask,
                error,
                tensors.drafts[:requests],
                accepted,
                tensors.counters if index == 0 else None,
                batch.table,
                tensors.state.shape[0],
            )
    return Committed(accepted, mask, error)


def host_loop(
    tensors: WindowTensors, sampled_ids: Tensor, draft_ids: Tensor, num_sampled: Tensor | None
) -> Committed:
    """The oracle: the decision of `accept_mask` as a loop on the host. Synchronises."""
    rows, drafts = sampled_ids.tolist(), draft_ids.tolist()
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
    )


@dataclass
class _Captured:
    """A CUDA graph of `validate` for one size, with the buffers it reads and writes."""

    graph: torch.cuda.CUDAGraph
    sampled_ids: Tensor
    draft_ids: Tensor
    num_sampled: Tensor
    ids_given: Tensor
    result: Committed
    faster: bool = True


@dataclass
class GraphValidator:
    """`validate` as one CUDA graph a size bucket (requests, rounded up to a power of two).

    Graphs are captured by `warm_up` only: capturing synchronises, and a window must not. A size
    without a graph, a machine without CUDA and a capture that failed run vectorised; each is
    logged once and counted in `vectorised` by reason.
    """

    tensors: WindowTensors
    max_drafts: int
    adaptive: bool
    graphs: dict[int, _Captured] = field(default_factory=dict)
    vectorised: dict[str, int] = field(default_factory=dict)

    def __call__(
        self, sampled_ids: Tensor, draft_ids: Tensor, num_sampled: Tensor | None
    ) -> Committed:
        captured = self._graph_for(sampled_ids, draft_ids)
        if captured is None:
            return validate(self.tensors, sampled_ids, draft_ids, num_sampled)
        return _replay(captured, sampled_ids, draft_ids, num_sampled)

    def _graph_for(self, sampled_ids: Tensor, draft_ids: Tensor) -> _Captured | None:
        if sampled_ids.device.type != "cuda":
            self._run_vectorised("CUDA is missing")
            return None
        if torch.cuda.is_current_stream_capturing():
            return None  # the launches become part of the caller's graph; graphs do not nest
        fitting = (
            size
            for size, graph in self.graphs.items()
            if size >= sampled_ids.shape[0] and graph.draft_ids.shape[0] >= draft_ids.shape[0]
        )
        bucket = min(fitting, default=None)
        if bucket is None:
            self._run_vectorised("no graph was captured for this size")
            return None
        captured = self.graphs[bucket]
        if sampled_ids.shape[1] > captured.sampled_ids.shape[1]:
            self._run_vectorised("more sampled columns than the graph's buffers")
            return None
        if self.adaptive and not captured.faster:
            return None
        return captured

    def _run_vectorised(self, reason: str) -> None:
        if reason not in self.vectorised:
            log.warning("SCV graph mode runs vectorised: %s", reason)
        self.vectorised[reason] = self.vectorised.get(reason, 0) + 1

    def warm_up(self, sizes: Iterable[int]) -> None:
        """Capture a graph for each number of requests in `sizes`; time it if adaptive.

        Call it before the first window. Counters and caches are unchanged.
        """
        if self.tensors.error.device.type != "cuda":
            self._run_vectorised("CUDA is missing")
            return
        for size in sorted(set(sizes)):
            self._capture(size)

    def _capture(self, size: int) -> None:
        tensors = self.tensors
        kept = tensors.counters.clone(), tensors.error.clone(), tensors.drafts.clone()
        device = tensors.error.device
        rows = min(size * self.max_drafts, tensors.batches[0].slots.shape[0] - 1)
        sampled = torch.full((size, self.max_drafts + 1), -1, dtype=torch.int64, device=device)
        drafts = torch.zeros(rows, dtype=torch.int64, device=device)
        counts = torch.zeros(size, dtype=torch.int32, device=device)
        given = torch.zeros(1, dtype=torch.int32, device=device)
        try:
            # The first calls compile the kernels and must not be part of the graph. The draft
            # counts are zero, so they move nothing.
            tensors.drafts.zero_()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                validate(tensors, sampled, drafts, counts, given)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = validate(tensors, sampled, drafts, counts, given)
            captured = _Captured(graph, sampled, drafts, counts, given, result)
            if self.adaptive:
                captured.faster = self._time(size, captured)
            self.graphs[size] = captured
        except (RuntimeError, NotImplementedError) as error:
            # torch raises plain RuntimeError for every capture failure; NWOR goes on without.
            self._run_vectorised(f"capture failed: {error}")
        finally:
            torch.cuda.synchronize()
            for tensor, value in zip(
                (tensors.counters, tensors.error, tensors.drafts), kept, strict=True
            ):
                tensor.copy_(value)

    def _time(self, size: int, captured: _Captured) -> bool:
        sampled, drafts = captured.sampled_ids.clone(), captured.draft_ids.clone()
        counts = captured.num_sampled.clone()
        graph_us = _microseconds(lambda: _replay(captured, sampled, drafts, counts))
        plain_us = _microseconds(lambda: validate(self.tensors, sampled, drafts, counts))
        log.info(
            "SCV adaptive, %d requests: graph %.1f us, vectorised %.1f us; %s is kept",
            size, graph_us, plain_us, "graph" if graph_us <= plain_us else "vectorised",
        )  # fmt: skip
        return graph_us <= plain_us


def _replay(
    captured: _Captured, sampled_ids: Tensor, draft_ids: Tensor, num_sampled: Tensor | None
) -> Committed:
    requests, columns = sampled_ids.shape
    # What an earlier window left behind these is never read: counts say how far each goes.
    captured.sampled_ids[:requests, :columns].copy_(sampled_ids)
    captured.draft_ids[: draft_ids.shape[0]].copy_(draft_ids)
    captured.ids_given.fill_(draft_ids.shape[0])
    captured.num_sampled.zero_()
    if num_sampled is None:
        num_sampled = (sampled_ids >= 0).to(torch.int32).cumprod(1).sum(1)
    captured.num_sampled[:requests].copy_(num_sampled)
    captured.num_sampled[:requests].clamp_(max=columns)
    with span("nwor.commit"):  # acceptance too: one graph
        captured.graph.replay()
    result = captured.result
    return Committed(result.accepted[:requests], result.mask[: draft_ids.shape[0]], result.error)


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
