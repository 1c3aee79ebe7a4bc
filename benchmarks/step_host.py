"""Where the host's time of a decode step goes: stock and staged engines, with timers around calls.

    python benchmarks/step_host.py --config 1b --point 1x512 --output DIR --json FILE

Engines are those of `nwor bench steps` (dummy weights, synthetic acceptance, one process each), one
after the other. Windows of steps are timed first without the timers, then with them. A timer takes
part of a microsecond, and calls nest: `step` holds all others.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pydantic import BaseModel

from nwor_compile.bench import steps_engine
from nwor_compile.bench.engine_process import EngineProcess
from nwor_compile.bench.record import Machine, this_machine
from nwor_compile.bench.steps import engine_environment, gpu_memory
from nwor_compile.bench.steps_points import (
    Mode,
    parse_configuration,
    parse_mode,
    parse_point,
    unique,
)
from nwor_compile.bench.steps_run import GIB, Plan
from nwor_compile.ops.kernels.launch import KeptLaunch

WINDOWS = 5
KV_BYTES = 10 * GIB
RUNNER = (
    "execute_model", "prepare_inputs", "prepare_attn", "_model_forward", "sample_tokens", "sample",
    "_sample",
)  # fmt: skip
WINDOW = ("begin_recorded", "begin", "commit", "pass_through")


class Timed(BaseModel):
    """Of one engine. step_ms: of each window without timers; us_a_step: with them, by call."""

    mode: str
    step_ms: list[float]
    timed_step_ms: float
    us_a_step: dict[str, float]
    calls_a_step: dict[str, float]


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


class HostWorker(steps_engine.StepsWorker):
    """`StepsWorker` with timers, from `set_timers` on; `read_timers` says what they found."""

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
        """Microseconds and calls a step, since the timers were set."""
        if self.timers is None:
            raise RuntimeError("read_timers: expected set_timers first")
        steps = max(1, self.timers.calls["step"])
        return {
            "us_a_step": {k: 1e6 * v / steps for k, v in self.timers.seconds.items()},
            "calls_a_step": {k: v / steps for k, v in self.timers.calls.items()},
        }


def timed(plan: Plan, mode: Mode, folder: Path, timeout: float) -> tuple[Timed, dict[str, Any]]:
    """Start one engine and time it; its figures, and what it said of itself."""
    ((configuration, (point,)),) = plan.points.items()
    name = f"{configuration.label}-{mode.label}".replace(":", "_").replace("=", "_")
    environment = engine_environment(folder / "cache" / name)
    command = (sys.executable, "-u", __file__, "--engine")
    engine = EngineProcess(folder / f"{name}.log", environment, timeout, command)
    where = {"batch": point.batch, "context": point.context}
    window = {**where, "warm": plan.warm, "steps": plan.steps, "profile": False}
    try:
        about = engine.ask(
            "start", model=configuration.hf_config(head=False),
            head=configuration.hf_config(head=True), staged=mode.staged,
            llm=plan.llm(configuration, mode, None if gpu_memory() is None else KV_BYTES),
        )  # fmt: skip
        engine.ask("fill", **where)
        engine.ask("window", **window)
        step_ms = [engine.ask("window", **window)["step_ms"] for _ in range(WINDOWS)]
        engine.ask("set_timers")
        with_timers = engine.ask("window", **window)["step_ms"]
        read = engine.ask("read_timers")
    finally:
        engine.close()
    found = Timed(mode=mode.label, step_ms=step_ms, timed_step_ms=with_timers, **read)
    return found, about


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
    plan = Plan(chosen, {parse_configuration(config): [parse_point(point)]}, steps=steps)
    found, about = [], {}
    for mode in chosen:
        one, about = timed(plan, mode, output, timeout)
        found.append(one)
        print(f"{mode.label}: {statistics.median(one.step_ms):.3f} ms a step")
        for name, microseconds in one.us_a_step.items():
            print(f"  {name:24s} {microseconds:9.1f} us, {one.calls_a_step[name]:.2f} calls a step")
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
