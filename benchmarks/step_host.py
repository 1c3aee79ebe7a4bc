"""Where the host's time of a decode step goes: stock and staged engines, with timers around calls.

    python benchmarks/step_host.py --config 1b --point 1x512 --output DIR --json FILE

Engines are those of `nwor bench steps` (dummy weights, synthetic acceptance, one process each), and
like there they take turns, window by window. Windows are timed first without the timers, then with
them. A timer takes part of a microsecond, and calls nest: `step` holds all others.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from nwor_compile.bench import steps_engine
from nwor_compile.bench.engine_process import EngineProcess
from nwor_compile.bench.record import Machine, this_machine
from nwor_compile.bench.steps import gpu_memory, launch_engine
from nwor_compile.bench.steps_points import (
    Mode,
    parse_configuration,
    parse_mode,
    parse_point,
    unique,
)
from nwor_compile.bench.steps_run import GIB, Plan
from nwor_compile.ops.kernels.launch import KeptLaunch

WINDOWS = 9
KV_BYTES = 10 * GIB
RUNNER = (
    "execute_model", "prepare_inputs", "prepare_attn", "_model_forward", "sample_tokens", "sample",
    "_sample",
)  # fmt: skip
WINDOW = ("begin_recorded", "begin", "commit", "pass_through")


class Timed(BaseModel):
    """Of one engine. step_ms, timed_step_ms: of each window, without timers and with them;
    us_a_step: of each such window, by call."""

    mode: str
    step_ms: list[float] = []
    timed_step_ms: list[float] = []
    us_a_step: dict[str, list[float]] = {}
    calls_a_step: dict[str, float] = {}

    def add(self, step_ms: float, read: dict[str, Any]) -> None:
        """A window with timers. read: what they found."""
        self.timed_step_ms.append(step_ms)
        for name, microseconds in read["us_a_step"].items():
            self.us_a_step.setdefault(name, []).append(microseconds)
        self.calls_a_step = read["calls_a_step"]


class Record(BaseModel):
    """What the command writes."""

    command: str
    note: str = ""
    machine: Machine
    device: str
    vllm: str
    config: str
    point: str
    steps: int
    engines: list[Timed]


class Timers:
    """Seconds and calls of the wrapped functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}

    def wrap(self, owner: Any, name: str, label: str | None = None) -> None:
        """Time `owner.name`, if there is such a function."""
        original: Callable[..., Any] | None = getattr(owner, name, None)
        if original is None:
            return
        key = label or name
        self.seconds[key], self.calls[key] = 0.0, 0

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[key] += time.perf_counter() - begin
                self.calls[key] += 1

        setattr(owner, name, timed)

    def read(self) -> dict[str, Any]:
        """Microseconds and calls a step since the last reading."""
        steps = max(1, self.calls["step"])
        found = {
            "us_a_step": {name: 1e6 * value / steps for name, value in self.seconds.items()},
            "calls_a_step": {name: value / steps for name, value in self.calls.items()},
        }
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.calls = dict.fromkeys(self.calls, 0)
        return found


class HostWorker(steps_engine.StepsWorker):
    """`StepsWorker` with timers, from `set_timers` on; `read_timers` says what they found since the
    last reading."""

    timers: Timers | None = None

    def set_timers(self, command: dict[str, Any]) -> dict[str, Any]:
        """Wrap the calls of a step."""
        timers = self.timers = Timers()
        core = self._core
        worker = core.model_executor.driver_worker.worker
        timers.wrap(self.llm.llm_engine, "step")
        for name in ("schedule", "update_from_output"):
            timers.wrap(core.scheduler, name)
        for name in RUNNER:
            timers.wrap(worker.model_runner, name)
        # On V2; the target's alone, without the drafter's.
        states = getattr(worker.model_runner, "model_state", None)
        timers.wrap(states, "prepare_attn", "attention metadata")
        for drafter in ("speculator", "drafter"):
            timers.wrap(getattr(worker.model_runner, drafter, None), "propose")
        hooks = getattr(worker, "nwor", None)
        timers.wrap(hooks, "_begin_step")
        for name in WINDOW:
            timers.wrap(getattr(hooks, "window", None), name, f"window.{name}")
        timers.wrap(KeptLaunch, "__call__", "kept launches")
        timers.wrap(torch.cuda.CUDAGraph, "replay", "graph replays")
        return {}

    def read_timers(self, command: dict[str, Any]) -> dict[str, Any]:
        """See `Timers.read`."""
        if self.timers is None:
            raise RuntimeError("read_timers: expected set_timers first")
        return self.timers.read()


def start(plan: Plan, mode: Mode, process: EngineProcess) -> dict[str, Any]:
    """Start its engine and fill the prefix cache; what the engine says of itself."""
    ((configuration, (point,)),) = plan.points.items()
    kv_bytes = None if gpu_memory() is None else KV_BYTES
    about = process.ask("start", **plan.start(configuration, mode, kv_bytes))
    process.ask("fill", batch=point.batch, context=point.context)
    return about


def measure(plan: Plan, engines: dict[str, EngineProcess]) -> list[Timed]:
    """Windows of all engines in turns: one that does not count, then without timers, then with."""
    ((_, (point,)),) = plan.points.items()
    found = {name: Timed(mode=name) for name in engines}

    def window(name: str) -> float:
        answer = engines[name].ask(
            "window", batch=point.batch, context=point.context, warm=plan.warm, steps=plan.steps,
            profile=False,
        )  # fmt: skip
        return float(answer["step_ms"])

    for name in engines:
        window(name)
    for name in plan.turns(engines):
        found[name].step_ms.append(window(name))
    for engine in engines.values():
        engine.ask("set_timers")
    for name in plan.turns(engines):
        found[name].add(window(name), engines[name].ask("read_timers"))
    return list(found.values())


def show(engines: list[Timed]) -> None:
    """A table: a row a call, a column an engine."""
    title = "us a step, median of windows; calls a step"
    shown = Table("", *(engine.mode for engine in engines), title=title)
    shown.add_row("without timers", *(_cell([1e3 * ms for ms in e.step_ms]) for e in engines))
    for name in dict.fromkeys(name for engine in engines for name in engine.us_a_step):
        cells = [
            f"{_cell(e.us_a_step[name])}  {e.calls_a_step[name]:.2f}" if name in e.us_a_step else ""
            for e in engines
        ]
        shown.add_row(name, *cells)
    Console().print(shown)


def _cell(microseconds: list[float]) -> str:
    return f"{statistics.median(microseconds):.1f}"


def main(
    config: Annotated[str, typer.Option(help="as for nwor bench steps")] = "1b",
    point: Annotated[str, typer.Option(help="BATCHxCONTEXT")] = "1x512",
    modes: Annotated[str, typer.Option(help="as for nwor bench steps")] = "stock,stage",
    steps: Annotated[int, typer.Option(help="of a window")] = 64,
    output: Annotated[Path, typer.Option(help="folder of logs and compile caches")] = Path("host"),
    json: Annotated[Path | None, typer.Option(help="write the record here")] = None,
    timeout: Annotated[float, typer.Option(help="seconds until an engine must answer")] = 900.0,
    engine: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Time, print, record."""
    if engine:
        steps_engine.main(HostWorker())
        return
    chosen = unique(modes, parse_mode)
    configuration = parse_configuration(config)
    points = {configuration: [parse_point(point)]}
    plan = Plan(chosen, points, repeats=WINDOWS, steps=steps)
    command = (sys.executable, "-u", __file__, "--engine")
    with ExitStack() as stack, ThreadPoolExecutor(len(chosen)) as threads:
        engines = {
            mode.label: launch_engine(output, configuration, mode, timeout, command)
            for mode in chosen
        }
        for process in engines.values():
            stack.callback(process.close)
        about, *_ = threads.map(lambda mode: start(plan, mode, engines[mode.label]), chosen)
        found = measure(plan, engines)
    show(found)
    record = Record(
        command=f"python benchmarks/step_host.py --config {config} --point {point} "
        f"--modes {modes} --steps {steps} --json FILE",
        machine=this_machine(), device=about["device"], vllm=about["vllm"], config=config,
        point=point, steps=steps, engines=found,
    )  # fmt: skip
    if json is not None:
        json.write_text(record.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
