"""Times the steps of an engine inside its worker; functions for vLLM's `collective_rpc`.

A mark is set where `execute_model` of the model runner begins: a CUDA event on the stream that the
step's kernels go to. From one mark to the next is all that a step is: input preparation, target,
sampling, commit, drafting, and every gap between them, host's or device's. The next step is
launched while this one runs (asynchronous scheduling), and its mark waits in the stream for it.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch


class Meter:
    """Marks of one rank; silent until `begin`."""

    def __init__(self, runner: Any) -> None:
        self.on = False
        self.cuda = torch.cuda.is_available()
        self.marks: list[tuple[int, int, Any]] = []
        self.graphs: Counter[str] = Counter()
        self.profiler: Any = None
        self._wrap_execute(runner)
        manager = getattr(runner, "cudagraph_manager", None)
        if manager is not None:
            self._wrap_dispatch(manager)

    def _wrap_execute(self, runner: Any) -> None:
        original = runner.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if self.on and scheduled.total_num_scheduled_tokens:
                requests = len(scheduled.num_scheduled_tokens)
                self.marks.append((requests, scheduled.total_num_scheduled_tokens, self._mark()))
            return original(scheduled, *args, **kwargs)

        runner.execute_model = execute_model

    def _wrap_dispatch(self, manager: Any) -> None:
        original = manager.dispatch

        def dispatch(*args: Any, **kwargs: Any) -> Any:
            found = original(*args, **kwargs)
            if self.on:
                self.graphs[found.cg_mode.name] += 1
            return found

        manager.dispatch = dispatch

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, *, profile: bool) -> None:
        """Forget the marks; set new ones from now on, and count kernels if wanted."""
        self.synchronize()
        self.marks.clear()
        self.graphs.clear()
        self.on = True
        if profile:
            activity = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(
                activities=[activity.CUDA if self.cuda else activity.CPU]
            )
            self.profiler.__enter__()

    def end(self) -> dict[str, Any]:
        """spans: requests, tokens and milliseconds of each step; graphs: steps by graph mode;
        kernels: launches and GPU microseconds of each, if they were wanted."""
        self.synchronize()
        self.on = False
        spans = [
            (requests, tokens, self._elapsed(start, stop))
            for (requests, tokens, start), (_, _, stop) in zip(
                self.marks, self.marks[1:], strict=False
            )
        ]
        answer = {"spans": spans, "graphs": dict(self.graphs)}
        if self.profiler is not None:
            self.profiler.__exit__(None, None, None)
            answer["kernels"] = self._kernels()
            self.profiler = None
        return answer

    def _elapsed(self, start: Any, stop: Any) -> float:
        return float(start.elapsed_time(stop)) if self.cuda else 1000 * (stop - start)

    def _kernels(self) -> dict[str, tuple[int, float]]:
        def microseconds(event: Any) -> float:
            return float(event.self_device_time_total if self.cuda else event.self_cpu_time_total)

        return {
            event.key: (event.count, microseconds(event))
            for event in self.profiler.key_averages()
            if microseconds(event) > 0
        }

    def synchronize(self) -> None:
        """Wait until the device has done all: the next engine shall have it alone."""
        if self.cuda:
            torch.cuda.synchronize()


def install(worker: Any) -> dict[str, Any]:
    """Put a meter into this rank; what it found."""
    worker.nwor_meter = Meter(worker.model_runner)
    runner = type(worker.model_runner)
    layers = worker.vllm_config.compilation_config.static_forward_context
    attention = {type(layer.impl).__name__ for layer in layers.values() if hasattr(layer, "impl")}
    window = getattr(getattr(worker, "nwor", None), "window", None)
    return {
        "runner": f"{runner.__module__}.{runner.__name__}",
        "attention": sorted(attention),
        "staging_bytes": getattr(window, "staging_bytes", None),
        "memory_bytes": torch.cuda.memory_reserved() if torch.cuda.is_available() else None,
    }


def begin(worker: Any, profile: bool) -> None:
    """See `Meter.begin`."""
    worker.nwor_meter.begin(profile=profile)


def end(worker: Any) -> dict[str, Any]:
    """See `Meter.end`."""
    found: dict[str, Any] = worker.nwor_meter.end()
    return found
