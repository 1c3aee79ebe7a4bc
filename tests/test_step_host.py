"""`benchmarks/step_host.py` without vLLM: engines take turns, timers are read window by window."""

from __future__ import annotations

import importlib.util
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest

from nwor_compile.bench.steps_points import Configuration, Point, parse_mode
from nwor_compile.bench.steps_run import Plan

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "step_host.py"


@pytest.fixture(scope="module")
def step_host() -> Any:
    spec = importlib.util.spec_from_file_location("step_host", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_host"] = module
    spec.loader.exec_module(module)
    return module


class FakeProcess:
    """An engine's process: its windows take longer each time, and longer with timers."""

    def __init__(self, name: str, log: list[tuple[str, str]]) -> None:
        self.name, self.log = name, log
        self.windows, self.timed = 0, False

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        self.log.append((operation, self.name))
        if operation == "set_timers":
            self.timed = True
        if operation == "window":
            assert (arguments["batch"], arguments["context"]) == (16, 512)
            self.windows += 1
            return {"step_ms": self.windows + 100.0 * self.timed}
        mine = {"step": 10.0 * self.windows, f"only {self.name}": 1.0}
        return {"us_a_step": mine, "calls_a_step": dict.fromkeys(mine, 1.0)}


def test_engines_take_turns_in_changing_order(
    step_host: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    modes, points = [parse_mode("stock"), parse_mode("stage")], {Configuration(): [Point(16, 512)]}
    plan = Plan(modes, points, repeats=3)
    log: list[tuple[str, str]] = []
    engines = {name: FakeProcess(name, log) for name in ("stock", "stage")}
    stock, stage = step_host.measure(plan, engines)
    turns = ["stock", "stage", "stage", "stock", "stock", "stage"]
    windows = [name for operation, name in log if operation == "window"]
    assert windows == ["stock", "stage", *turns, *turns]
    assert [name for operation, name in log if operation == "read_timers"] == turns
    for found in (stock, stage):
        assert found.step_ms == [2.0, 3.0, 4.0]  # the first does not count
        assert found.timed_step_ms == [105.0, 106.0, 107.0]
        assert found.us_a_step["step"] == [50.0, 60.0, 70.0]
    step_host.show([stock, stage])
    shown = capsys.readouterr().out
    assert "60.0  1.00" in shown
    assert "only stage" in shown


def test_timers_tell_what_was_since_the_last_reading(step_host: Any) -> None:
    timers = step_host.Timers()
    engine = types.SimpleNamespace(step=lambda: time.sleep(0.01), idle=lambda: None)
    for name in ("step", "idle", "missing"):
        timers.wrap(engine, name)
    engine.step()
    engine.step()
    engine.idle()
    read = timers.read()
    assert read["calls_a_step"] == {"step": 1.0, "idle": 0.5}
    assert read["us_a_step"]["step"] >= 10_000
    engine.step()
    read = timers.read()
    assert read["calls_a_step"] == {"step": 1.0, "idle": 0.0}
    assert read["us_a_step"]["idle"] == 0.0
    with pytest.raises(RuntimeError, match="expected set_timers first"):
        step_host.HostWorker().read_timers({})


def test_an_engine_that_does_not_start_ends_all(
    step_host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    closed = []

    class Failing(FakeProcess):
        def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
            if self.name == "stock" and operation == "start":
                raise RuntimeError("no engine")
            return {}

        def close(self) -> None:
            closed.append(self.name)

    monkeypatch.setattr(
        step_host, "launch_engine", lambda folder, config, mode, *_: Failing(mode.label, [])
    )
    with pytest.raises(RuntimeError, match="no engine"):
        step_host.main(point="16x512", output=tmp_path, engine=False, modes="stock,stage",
                       config="3b", steps=8, json=None, timeout=1.0)  # fmt: skip
    assert sorted(closed) == ["stage", "stock"]
