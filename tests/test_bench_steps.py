"""`nwor bench steps` without vLLM: planning, turns, void points, resume, intervals, tables."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from nwor_compile.bench import steps as command
from nwor_compile.bench import steps_engine, steps_meter
from nwor_compile.bench.engine_process import EngineError
from nwor_compile.bench.engine_rows import NworFigures
from nwor_compile.bench.steps import engine_environment, make_plan, write
from nwor_compile.bench.steps_engine import StepsWorker
from nwor_compile.bench.steps_points import (
    Configuration,
    Mode,
    Point,
    grid,
    parse_configuration,
    parse_mode,
    parse_point,
    unique,
)
from nwor_compile.bench.steps_record import Profile, Row, RowFile
from nwor_compile.bench.steps_run import GIB, Run
from nwor_compile.bench.steps_screen import markdown
from nwor_compile.bench.steps_stats import Middle, Ratio, student
from nwor_compile.cli import app
from nwor_compile.errors import ConfigError

Answers = Callable[[str, dict[str, Any]], dict[str, Any]]


def window(step_ms: float, *, staged: int | None) -> dict[str, Any]:
    nwor = NworFigures(
        windows=9, staged=staged or 0, committed=1, rejected=1, certain=1, cache_bytes=1,
        staging_bytes=1, direct_bytes=1, fallbacks=0, error_windows=0, vectorised=0,
    )  # fmt: skip
    return {
        "step_ms": step_ms, "mean_ms": step_ms, "p90_ms": step_ms, "wall_ms": step_ms,
        "tokens_per_second": 1000 / step_ms, "tokens_per_step": 2.5, "context": 520.0,
        "graphs": {"FULL": 38}, "nwor": None if staged is None else nwor.model_dump(),
    }  # fmt: skip


class FakeEngine:
    """Answers like `steps_engine`; `answers` may say otherwise, or raise, by operation."""

    def __init__(self, harness: Harness, configuration: Configuration, mode: Mode) -> None:
        self.harness, self.configuration, self.mode = harness, configuration, mode
        self.windows = 0

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        harness, label = self.harness, self.mode.label
        if operation == "start":
            harness.log.append(f"start {label}")
            harness.started.append(arguments)
        else:
            place = f"{arguments['batch']}x{arguments['context']}"
            harness.log.append(f"{operation} {label} {place}")
        if operation == "start":
            answer: dict[str, Any] = {
                "start_seconds": 1.0, "blocks": harness.blocks(arguments["llm"]), "block_size": 16,
                "device": "FAKE", "cold": True,
            }  # fmt: skip
        elif operation == "fill":
            answer = {"seconds": 0.1}
        else:
            self.windows += 1
            step_ms = 4.0 if label == "stock" else 3.8
            answer = window(step_ms, staged=10 if self.mode.staged else None)
            if arguments["profile"]:
                kernels = {f"kernel of {label}": (60, 600.0)}
                answer["profile"] = Profile.of(kernels, 6).model_dump()
        override = harness.override(self, operation, arguments)
        return {**answer, **(override or {})}

    def close(self) -> None:
        self.harness.log.append(f"close {self.mode.label}")


class Harness:
    """Runs over fake engines in a folder."""

    def __init__(self, folder: Path, **given: Any) -> None:
        lists = {"configs": "3b", "modes": "stock,stage", "points": "1x512,16x512"}
        lists |= {"profile": "none", **{k: given.pop(k) for k in list(given) if k in (
            "configs", "modes", "points", "profile")}}  # fmt: skip
        self.plan = make_plan(**lists, **{"repeats": 3, **given})
        self.folder = folder
        self.log: list[str] = []
        self.started: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.now = 0.0
        self.memory: int | None = 140 * GIB

    def blocks(self, llm: dict[str, Any]) -> int:
        """At 1 MiB a block; an engine alone finds 100 GiB."""
        return int(llm.get("kv_cache_memory_bytes", 100 * GIB)) // 2**20

    def override(
        self, engine: FakeEngine, operation: str, arguments: dict[str, Any]
    ) -> dict[str, Any] | None:
        return None

    def run(self, *, resume: bool = False) -> dict[str, Row]:
        rows = RowFile(self.folder)
        rows.open(self.plan.workload(), resume=resume)

        def launch(configuration: Configuration, mode: Mode) -> FakeEngine:
            return FakeEngine(self, configuration, mode)

        self.made = Run(
            self.plan, rows, launch, self.said.append, self.memory, clock=lambda: self.now
        )
        self.made.measure()
        self.rows = rows
        return {f"{row.batch}x{row.context}": row for row in rows.rows.values()}

    def windows(self, place: str) -> list[str]:
        return [line.split()[1] for line in self.log if line.startswith("window") and place in line]


# Points, configurations, modes


def test_configurations_are_named_by_what_differs() -> None:
    found = unique("3b, 3b:k=8,3b:acceptance=1.5,3b:cache=fp8,3b:tp=2,8b", parse_configuration)
    assert [c.label for c in found] == [
        "3b", "3b:k=8", "3b:acceptance=1.5", "3b:cache=fp8", "3b:tp=2", "8b"
    ]  # fmt: skip
    assert found[1] == Configuration(k=8)
    assert found[3].speculative_config("head")["synthetic_acceptance_length"] == 2.5
    assert [c.compiled_as for c in found[:3]] == ["3b", "3b:k=8", "3b"]


@pytest.mark.parametrize(
    "text", ["70b", "3b:k", "3b:k=x", "3b:k=0", "3b:acceptance=6", "3b:cache=int4", "3b:depth=2"]
)
def test_a_configuration_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_configuration(text)


def test_a_mode_carries_its_settings_to_vllm() -> None:
    stock, stage, tuned = unique("stock,stage,stage:attention=stock:rope=false", parse_mode)
    assert stock.nwor is None
    assert not stock.staged
    assert stage.nwor == {"mode": "stage"}
    assert tuned.nwor == {"mode": "stage", "attention": "stock", "rope": False}
    assert tuned.staged
    plan = make_plan("3b", "stock,stage:attention=stock", None, "none")
    arguments = plan.llm(Configuration(), plan.modes[1], None)
    assert arguments["additional_config"] == {"nwor": {"mode": "stage", "attention": "stock"}}
    assert "additional_config" not in plan.llm(Configuration(), plan.modes[0], None)


@pytest.mark.parametrize("text", ["direct", "stock:attention=auto", "stage:attention", "stage:=1"])
def test_a_mode_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"expected|no settings"):
        parse_mode(text)


def test_engines_differ_by_nwor_alone() -> None:
    plan = make_plan("3b", "stock,stage", None, "none")
    stock, stage = (plan.llm(Configuration(), mode, 5 * GIB) for mode in plan.modes)
    assert stage.pop("additional_config") == {"nwor": {"mode": "stage"}}
    assert stock == stage


def test_the_full_grid_is_that_of_plain_3b() -> None:
    assert len(grid(Configuration())) == 15
    assert Point(256, 32768) in grid(Configuration())
    assert len(grid(Configuration(k=8))) == 6
    assert max(grid(Configuration("1b"))) == Point(64, 4096)


def test_a_request_has_room_for_its_prompt_its_window_and_drafts() -> None:
    point, configuration = Point(16, 512), Configuration(k=4, acceptance=5)
    longest = point.longest(configuration, 38)
    assert longest >= 512 + 38 * 5 + 5
    assert point.blocks(configuration, 38, 16) == 16 * math.ceil(longest / 16)
    plan = make_plan("3b:acceptance=5", "stock,stage", "16x512,1x4096", "none")
    arguments = plan.llm(next(iter(plan.points)), plan.modes[0], None)
    assert arguments["max_model_len"] > 4096 + 38 * 5


@pytest.mark.parametrize("text", ["16", "0x512", "16x1", "ax512", "-1x512", "1x999999"])
def test_a_point_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="BATCHxCONTEXT"):
        parse_point(text)


def test_weights_are_those_of_the_models() -> None:
    assert 6.3e9 < Configuration("3b").weight_bytes < 7.2e9
    assert 15.5e9 < Configuration("8b").weight_bytes < 17.5e9
    assert Configuration("8b", tp=2).weight_bytes == Configuration("8b").weight_bytes // 2


# Intervals


def test_the_ratio_is_the_geometric_mean_with_students_interval() -> None:
    ratio = Ratio.of([4.0, 4.0, 4.0], [4.0, 2.0, 1.0])
    assert ratio.ratio == pytest.approx(2.0)
    # logs 0, ln 2, ln 4: deviation ln 2; t(2) = 4.303
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert ratio.low == pytest.approx(2 * math.exp(-half))
    assert ratio.high == pytest.approx(2 * math.exp(half))
    assert ratio.spread == pytest.approx(3.0)
    assert Ratio.of([2.0, 2.0], [1.0, 1.0]).low == pytest.approx(2.0)


def test_a_ratio_needs_two_pairs() -> None:
    with pytest.raises(ValueError, match="at least two pairs"):
        Ratio.of([1.0], [1.0])
    with pytest.raises(ValueError, match="2 and 3"):
        Ratio.of([1.0, 1.0], [1.0, 1.0, 1.0])


@pytest.mark.parametrize(("pairs", "cut"), [(6, 0), (8, 0), (9, 1), (20, 5), (40, 13)])
def test_the_middle_pair_has_the_sign_tests_interval(pairs: int, cut: int) -> None:
    middle = Middle.of([float(pairs - index) for index in range(pairs)], [1.0] * pairs)
    assert middle == Middle((1 + pairs) / 2, 1 + cut, pairs - cut, pairs)
    assert str(middle) == f"{(1 + pairs) / 2:.3f} [{1 + cut:.3f}, {pairs - cut:.3f}]"


def test_the_middle_pair_is_one_of_pairs() -> None:
    baseline, mode = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [7.0, 6.0, 5.0, 2.0, 4.0, 3.0, 1.0]
    assert Middle.of(baseline, mode) == Middle(5 / 4, 1 / 7, 7.0, 7)
    with pytest.raises(ValueError, match="zip"):
        Middle.of(baseline, mode[:6])


def test_few_pairs_have_a_middle_and_no_interval() -> None:
    middle = Middle.of([2.0] * 5, [1.0, 0.1, 4.0, 1.0, 1.0])
    assert str(middle) == "2.000"
    assert (middle.low, middle.high, middle.pairs) == (None, None, 5)


@pytest.mark.parametrize(("freedom", "point"), [(1, 12.706), (4, 2.776), (30, 2.042), (100, 1.984)])
def test_students_points(freedom: int, point: float) -> None:
    assert student(freedom) == pytest.approx(point, abs=2e-3)


# The run


def test_engines_start_once_and_take_turns_in_changing_order(tmp_path: Path) -> None:
    harness = Harness(tmp_path, repeats=4)
    rows = harness.run()
    assert [line for line in harness.log if line.startswith(("start", "close"))] == [
        "start stock", "start stage", "close stock", "close stage"
    ]  # fmt: skip
    warm_up, turns = harness.windows("16x512")[:2], harness.windows("16x512")[2:]
    assert warm_up == ["stock", "stage"]
    assert turns == ["stock", "stage", "stage", "stock"] * 2
    row = rows["16x512"]
    assert (row.status, row.interleaved, row.attempts) == ("ok", True, 1)
    assert len(row.windows["stage"]) == 4
    for metric in ("step_ms", "wall_ms", "tokens_per_second"):
        assert row.ratios["stage"][metric].ratio == pytest.approx(4.0 / 3.8)


def test_two_modes_are_compared_with_the_first_each(tmp_path: Path) -> None:
    rows = Harness(tmp_path, modes="stock,stage,stage:attention=stock").run()
    assert set(rows["1x512"].ratios) == {"stage", "stage:attention=stock"}


class Noisy(Harness):
    """Every second window of `stage` takes longer, for as many windows as `noise` says."""

    noise = 10_000

    def override(
        self, engine: FakeEngine, operation: str, arguments: dict[str, Any]
    ) -> dict[str, Any] | None:
        if operation != "window" or engine.mode.label == "stock" or engine.windows > self.noise:
            return None
        return window(3.8 * (1.1 if engine.windows % 2 else 1.0), staged=10)


def test_a_void_point_is_measured_again_so_often_and_then_printed_as_void(tmp_path: Path) -> None:
    harness = Noisy(tmp_path, points="1x512", attempts=3)
    row = harness.run()["1x512"]
    assert (row.status, row.attempts) == ("void", 3)
    assert "10.0%" in (row.reason or "")
    assert len(harness.windows("1x512")) == 2 + 3 * 6  # two warm up
    assert sum("again" in line for line in harness.said) == 2
    assert row.ratios["stage"]["step_ms"].spread == pytest.approx(0.1)
    # The pairs of all attempts are there: the middle one says what the outliers hide.
    assert [len(windows) for windows in row.windows.values()] == [9, 9]
    slow, quick = 4.0 / (3.8 * 1.1), 4.0 / 3.8
    middle = f"{quick:.3f} [{slow:.3f}, {quick:.3f}]"  # of 5 quick ones and 4 slow
    text = markdown(write(harness.rows, harness.plan, [], [], tmp_path))
    assert f"void: stage: pairs differ by 10.0%; middle of 9 pairs: stage {middle}" in text


def test_windows_of_engines_that_take_no_turns_are_no_pairs(tmp_path: Path) -> None:
    harness = Noisy(tmp_path, points="1x512", repeats=8, one_at_a_time=True)
    row = harness.run()["1x512"]
    assert row.status == "void"
    assert row.middle("stage") is None
    text = markdown(write(harness.rows, harness.plan, [], [], tmp_path))
    assert "void: stage: pairs differ by 10.0%; one engine at a time" in text


class TwoNoisyModes(Noisy):
    """Less and less noise, on which the wall's clock has no share."""

    def override(
        self, engine: FakeEngine, operation: str, arguments: dict[str, Any]
    ) -> dict[str, Any] | None:
        if operation != "window" or engine.mode.label == "stock":
            return None
        noise = 1 + 0.6 / engine.windows if engine.windows % 2 else 1.0
        step_ms = (3.8 if engine.mode.label == "stage" else 2.0) * noise
        return {**window(step_ms, staged=10), "wall_ms": 5.0}


def test_ratios_of_a_void_point_are_of_all_its_pairs(tmp_path: Path) -> None:
    harness = TwoNoisyModes(
        tmp_path, points="1x512", attempts=2, modes="stock,stage,stage:attention=stock"
    )
    row = harness.run()["1x512"]
    assert [len(windows) for windows in row.windows.values()] == [6, 6, 6]
    for mode, step_ms in (("stage", 3.8), ("stage:attention=stock", 2.0)):
        assert row.ratios[mode]["step_ms"].pairs == 6
        # The first measured window was the second of all: the third is the slowest.
        assert row.ratios[mode]["step_ms"].spread == pytest.approx(0.6 / 3)
        middle = row.middle(mode)
        assert middle is not None
        assert middle.ratio == pytest.approx(4.0 / step_ms * (1 + 1 / (1 + 0.6 / 7)) / 2)
        assert (middle.high, middle.pairs) == (pytest.approx(4.0 / step_ms), 6)
        text = markdown(write(harness.rows, harness.plan, [], [], tmp_path))
        assert f"middle of 6 pairs: {mode} {middle}" in text


def test_a_point_that_settles_counts_by_its_last_attempt(tmp_path: Path) -> None:
    harness = Noisy(tmp_path, points="1x512", attempts=3)
    harness.noise = 4  # the one that warms up, and the first attempt
    row = harness.run()["1x512"]
    assert (row.status, row.attempts, row.reason) == ("ok", 2, None)
    assert [len(windows) for windows in row.windows.values()] == [3, 3]
    assert row.ratios["stage"]["step_ms"].spread < 1e-9


def test_resume_skips_what_is_there_and_measures_void_points_again(tmp_path: Path) -> None:
    Noisy(tmp_path, points="1x512", attempts=1).run()
    Harness(tmp_path, points="16x512").run(resume=True)
    harness = Harness(tmp_path, points="1x512,16x512")
    rows = harness.run(resume=True)
    assert harness.windows("16x512") == []
    assert harness.windows("1x512")
    assert {row.status for row in rows.values()} == {"ok"}
    again = Harness(tmp_path, points="1x512,16x512")
    again.run(resume=True)
    assert again.log == []


def test_resume_drops_a_line_that_a_kill_cut_short(tmp_path: Path) -> None:
    Harness(tmp_path).run()
    path = tmp_path / "rows.jsonl"
    whole, cut = path.read_text().splitlines()
    path.write_text(whole + "\n" + cut[:50])
    harness = Harness(tmp_path)
    rows = harness.run(resume=True)
    assert harness.windows("1x512") == []
    assert len(rows) == 2
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_rows_of_another_workload_are_not_mixed_in(tmp_path: Path) -> None:
    Harness(tmp_path).run()
    with pytest.raises(ConfigError, match="--resume"):
        Harness(tmp_path).run()
    with pytest.raises(ConfigError, match="steps is 16 now and was 32"):
        Harness(tmp_path, steps=16).run(resume=True)


def test_large_points_run_one_engine_at_a_time_and_larger_ones_not_at_all(tmp_path: Path) -> None:
    harness = Harness(tmp_path, points="16x512,16x32768,64x4096,64x32768")
    # 52 GiB a mode side by side, 100 GiB alone, at 1.8125 MiB a block
    harness.blocks = lambda llm: int(  # type: ignore[method-assign]
        llm.get("kv_cache_memory_bytes", 100 * GIB) / (1.8125 * 2**20)
    )
    rows = harness.run()
    assert {place: row.status for place, row in rows.items()} == {
        "16x512": "ok", "16x32768": "ok", "64x4096": "ok", "64x32768": "memory"
    }  # fmt: skip
    assert not rows["16x32768"].interleaved
    assert rows["64x4096"].interleaved
    assert "needs" in (rows["64x32768"].reason or "")
    starts = [line for line in harness.log if line.startswith(("start", "close"))]
    assert starts == [
        "start stock", "start stage", "close stock", "close stage",
        "start stock", "close stock", "start stage", "close stage",
    ]  # fmt: skip
    assert "kv_cache_memory_bytes" in harness.started[0]["llm"]
    assert "kv_cache_memory_bytes" not in harness.started[2]["llm"]
    assert harness.windows("16x32768") == ["stock"] * 4 + ["stage"] * 4


def test_a_run_that_is_killed_between_points_keeps_those_that_all_engines_measured(
    tmp_path: Path,
) -> None:
    harness = Harness(tmp_path, points="1x512,16x512", one_at_a_time=True)

    def override(engine: FakeEngine, operation: str, arguments: dict[str, Any]) -> None:
        if engine.mode.staged and operation == "fill" and arguments["batch"] == 16:
            raise SystemExit

    harness.override = override  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        harness.run()
    assert written(tmp_path) == [(1, "ok")]


@pytest.mark.parametrize("failing", ["stock", "off", "stage"])
def test_engines_alone_that_fail_or_are_lost_cost_what_those_side_by_side_do(
    failing: str, tmp_path: Path
) -> None:
    harness = Harness(
        tmp_path, modes="stock,off,stage", points="1x512,4x512,16x512,64x512", profile="4x512",
        one_at_a_time=True,
    )  # fmt: skip

    def override(engine: FakeEngine, operation: str, arguments: dict[str, Any]) -> None:
        if operation != "window" or engine.mode.label != failing:
            return
        if arguments["batch"] == 1:
            raise EngineError("RuntimeError: 3 preemptions", kind="RuntimeError", alive=True)
        if arguments["batch"] == 16:
            raise EngineError("the engine's process ended with -9")

    harness.override = override  # type: ignore[method-assign]
    rows = harness.run()
    assert written(tmp_path) == [(1, "failed"), (4, "ok"), (16, "failed"), (64, "failed")]
    assert rows["1x512"].reason == f"{failing}: RuntimeError: 3 preemptions"
    assert rows["64x512"].reason == f"{failing}: the engine's process ended with -9"
    assert rows["4x512"].attempts == 1
    assert set(rows["4x512"].profiles) == {"stock", "off", "stage"}
    # No engine measures a point that another one failed, and a lost one is asked nothing more.
    order = ["stock", "off", "stage"]
    asked = [line.split()[1] for line in harness.log if line.endswith("16x512")]
    assert set(asked) == set(order[: order.index(failing) + 1])
    assert f"fill {failing} 64x512" not in harness.log


@pytest.mark.parametrize("points", ["1x512,16x512", "16x512"])
def test_no_engine_is_started_that_nothing_is_left_for(points: str, tmp_path: Path) -> None:
    """The first one is lost at the first point it has blocks for; it has none for 16 requests."""
    harness = Harness(tmp_path, modes="stock,off,stage", points=points, one_at_a_time=True)

    def override(engine: FakeEngine, operation: str, arguments: dict[str, Any]) -> Any:
        if operation == "window":
            raise EngineError("the engine's process ended with -9")
        return {"blocks": 100} if operation == "start" else None

    harness.override = override  # type: ignore[method-assign]
    harness.run()
    wanted = [(1, "failed"), (16, "memory")]
    assert written(tmp_path) == wanted[-len(points.split(",")) :]
    assert [line for line in harness.log if line.startswith("start")] == ["start stock"]
    assert harness.log[-1] == "close stock"


def written(folder: Path) -> list[tuple[int, str]]:
    """Requests and status of each line of the rows' file."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    rows = [Row.model_validate_json(line) for line in lines]
    return [(row.batch, row.status) for row in rows]


def test_a_point_that_fits_one_mode_alone_is_a_memory_row(tmp_path: Path) -> None:
    harness = Harness(tmp_path, points="16x512", one_at_a_time=True)
    harness.override = lambda engine, operation, arguments: (  # type: ignore[method-assign]
        {"blocks": 10} if operation == "start" and engine.mode.staged else None
    )
    row = harness.run()["16x512"]
    assert row.status == "memory"
    assert "stage has 10" in (row.reason or "")
    assert set(harness.windows("16x512")) == {"stock"}


def test_without_alone_large_points_are_memory_rows(tmp_path: Path) -> None:
    harness = Harness(tmp_path, points="16x512,16x32768", alone=False)
    harness.blocks = lambda llm: 20_000  # type: ignore[method-assign]
    rows = harness.run()
    assert (rows["16x512"].status, rows["16x32768"].status) == ("ok", "memory")
    assert sum(line.startswith("start") for line in harness.log) == 2


def test_an_engine_that_does_not_start_fails_its_configuration_only(tmp_path: Path) -> None:
    harness = Harness(tmp_path, configs="3b:cache=fp8,3b:k=8", points="1x512")

    def override(engine: FakeEngine, operation: str, arguments: dict[str, Any]) -> None:
        if operation == "start" and engine.configuration.cache == "fp8" and engine.mode.staged:
            raise EngineError("RuntimeError: fp8 is refused", kind="RuntimeError")

    harness.override = override  # type: ignore[method-assign]
    harness.run()
    rows = {row.configuration: row for row in harness.rows.rows.values()}
    assert rows["3b:cache=fp8"].status == "failed"
    assert "fp8 is refused" in (rows["3b:cache=fp8"].reason or "")
    assert rows["3b:k=8"].status == "ok"
    assert harness.log.count("close stock") == 2


def test_a_window_that_fails_costs_its_point_and_a_lost_engine_the_rest(tmp_path: Path) -> None:
    harness = Harness(tmp_path, points="1x512,4x512,16x512,64x512")

    def override(engine: FakeEngine, operation: str, arguments: dict[str, Any]) -> None:
        if operation == "window" and arguments["batch"] == 1:
            raise EngineError("RuntimeError: 3 preemptions", kind="RuntimeError", alive=True)
        if operation == "window" and arguments["batch"] == 16:
            raise EngineError("the engine's process ended with -9")

    harness.override = override  # type: ignore[method-assign]
    rows = harness.run()
    assert {place: row.status for place, row in rows.items()} == {
        "1x512": "failed", "4x512": "ok", "16x512": "failed", "64x512": "failed"
    }  # fmt: skip
    assert "3 preemptions" in (rows["1x512"].reason or "")
    assert "ended with -9" in (rows["64x512"].reason or "")


def test_a_stage_engine_that_stages_nothing_is_no_measurement(tmp_path: Path) -> None:
    harness = Harness(tmp_path, points="1x512")
    harness.override = lambda engine, operation, arguments: (  # type: ignore[method-assign]
        window(3.0, staged=0) if operation == "window" and engine.mode.staged else None
    )
    row = harness.run()["1x512"]
    assert row.status == "failed"
    assert "staged nothing" in (row.reason or "")


def test_after_the_time_limit_no_point_is_begun(tmp_path: Path) -> None:
    harness = Harness(tmp_path, stop_after=100.0)

    def override(engine: FakeEngine, operation: str, arguments: dict[str, Any]) -> None:
        harness.now += 20

    harness.override = override  # type: ignore[method-assign]
    rows = harness.run()
    assert set(rows) == {"1x512"}
    assert "--resume goes on" in harness.made.notes[0]
    assert harness.log[-2:] == ["close stock", "close stage"]


def test_engines_that_run_one_at_a_time_are_finished_once_begun(tmp_path: Path) -> None:
    harness = Harness(tmp_path, points="1x512", one_at_a_time=True, stop_after=50.0)

    def override(engine: FakeEngine, operation: str, arguments: dict[str, Any]) -> None:
        harness.now += 20

    harness.override = override  # type: ignore[method-assign]
    assert harness.run()["1x512"].status == "ok"


def test_profiles_come_after_all_points_and_are_kept_with_their_row(tmp_path: Path) -> None:
    harness = Harness(tmp_path, profile="1x512,64x4096")
    rows = harness.run()
    assert [line.split()[2] for line in harness.log if line.startswith("window")][-2:] == [
        "1x512", "1x512"
    ]  # fmt: skip
    profile = rows["1x512"].profiles["stage"].profile
    assert profile is not None
    assert (profile.launches, profile.busy_us) == (10.0, 100.0)
    assert len(rows["1x512"].windows["stage"]) == 3
    assert rows["16x512"].profiles == {}
    again = RowFile(tmp_path)
    again.open(harness.plan.workload(), resume=True)
    assert again.rows["3b", Point(1, 512)].profiles


# Files and command


def test_the_record_says_what_ran_and_resumes_its_history(tmp_path: Path) -> None:
    harness = Harness(tmp_path, points="1x512,16x512,64x32768", profile="16x512")
    harness.run()
    write(harness.rows, harness.plan, [], ["cold"], tmp_path)
    record = write(harness.rows, harness.plan, ["a note"], ["hot"], tmp_path)
    assert len(record.commands) == 2
    assert record.clocks == ["cold", "hot"]
    assert record.device == "FAKE"
    assert "torch" in record.versions
    assert (tmp_path / "record.png").stat().st_size > 1000
    text = markdown(record)
    assert "| 16 | 512 | 4.000 | 3.800 | 1.053 [1.053, 1.053] | 0.0% | 1.053 | 1.053 |" in text
    assert "memory: needs" in text
    assert "kernel of stage" in text
    assert "- a note" in text


def test_the_command_checks_its_arguments_and_needs_vllm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = CliRunner()
    base = ["bench", "steps", "--output", str(tmp_path)]
    done = runner.invoke(app, [*base, "--modes", "stage"])
    assert done.exit_code == 2
    assert "at least one other" in done.output
    monkeypatch.setattr(command, "has_vllm", lambda: False)
    done = runner.invoke(app, base)
    assert done.exit_code == 2
    assert "needs vLLM" in done.output
    assert "--stop-after" in runner.invoke(app, ["bench", "steps", "--help"]).output


def test_an_engine_is_one_process_with_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "off")
    environment = engine_environment(tmp_path / "stock")
    assert "VLLM_NWOR_MODE" not in environment
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["VLLM_CACHE_ROOT"] == str(tmp_path / "stock")


# The engine's side


def scheduled(*tokens: int) -> Any:
    counts = {str(index): count for index, count in enumerate(tokens)}
    return types.SimpleNamespace(
        num_scheduled_tokens=counts, total_num_scheduled_tokens=sum(tokens)
    )


def test_the_meter_times_from_one_steps_start_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    times = iter([1.0, 1.004, 1.009])
    monkeypatch.setattr(steps_meter.time, "perf_counter", lambda: next(times))
    ran: list[int] = []
    manager = types.SimpleNamespace(
        dispatch=lambda: types.SimpleNamespace(cg_mode=types.SimpleNamespace(name="FULL"))
    )
    runner = types.SimpleNamespace(
        execute_model=lambda output: ran.append(output.total_num_scheduled_tokens),
        cudagraph_manager=manager,
    )
    meter = steps_meter.Meter(runner)
    runner.execute_model(scheduled(100))  # before begin: runs, and is not timed
    meter.begin(profile=False)
    for tokens in ((5, 5), (), (5, 5), (5,)):
        runner.execute_model(scheduled(*tokens))
        manager.dispatch()
    found = meter.end()
    assert ran == [100, 10, 0, 10, 5]
    assert [(r, t, round(ms, 6)) for r, t, ms in found["spans"]] == [(2, 10, 4.0), (2, 10, 5.0)]
    assert found["graphs"] == {"FULL": 4}
    assert "kernels" not in found


def test_steps_of_another_shape_are_no_measurement() -> None:
    worker = StepsWorker()
    worker.verify_tokens = 5
    spans = [(2, 30, 9.0), (2, 10, 4.0), (2, 10, 5.0), (1, 5, 1.0)]
    assert worker._steady(spans, 2, warm=1, steps=2, preempted=0) == [4.0, 5.0]
    with pytest.raises(RuntimeError, match=r"expected steps of \[\(2, 10\)\] only"):
        worker._steady(spans, 2, warm=0, steps=2, preempted=0)
    with pytest.raises(RuntimeError, match="2 of 3 steps"):
        worker._steady(spans[:3], 2, warm=1, steps=3, preempted=0)
    with pytest.raises(RuntimeError, match="1 preemptions"):
        worker._steady(spans, 2, warm=1, steps=2, preempted=1)


class FakeVllm(types.ModuleType):
    """vLLM. free_at_start: cores allowed to the thread that makes its engine, as it does."""

    __version__ = "0.0.0"

    def __init__(self, *, cpu: bool) -> None:
        super().__init__("vllm")
        self.free_at_start: set[int] = set()
        self.current_platform = types.SimpleNamespace(
            is_cpu=lambda: cpu, get_device_name=lambda: "FAKE"
        )

    def LLM(self, **arguments: Any) -> Any:
        self.free_at_start = os.sched_getaffinity(0)
        ranks, like = arguments["tensor_parallel_size"], types.SimpleNamespace
        config = like(
            model_config=like(max_model_len=2048), parallel_config=like(worker_cls="a.Worker"),
            compilation_config=like(cudagraph_mode="FULL", use_inductor_graph_partition=False),
            scheduler_config=like(async_scheduling=True),
            cache_config=like(num_gpu_blocks=100, block_size=16),
        )  # fmt: skip
        return like(
            llm_engine=like(vllm_config=config),
            collective_rpc=lambda _: [{"attention": []}] * ranks,
        )


@pytest.mark.parametrize(("cpu", "ranks"), [(False, 1), (True, 1), (False, 2)])
def test_on_one_gpu_the_thread_that_steps_and_no_other_is_bound_once_its_engine_is_up(
    cpu: bool, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = FakeVllm(cpu=cpu)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.platforms", vllm)
    monkeypatch.setattr(steps_engine, "prepare_cpu", lambda *_: [])
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    configuration = Configuration(tp=ranks)
    llm = {"speculative_config": {"num_speculative_tokens": 4}, "tensor_parallel_size": ranks}
    command = {
        "model": configuration.hf_config(head=False), "head": configuration.hf_config(head=True),
        "llm": llm, "staged": False,
    }  # fmt: skip
    before = os.sched_getaffinity(0)
    worker = StepsWorker()
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(worker.start, command).result()
        during = thread.submit(os.sched_getaffinity, 0).result()
    assert answer["core"] == (max(before) if not cpu and ranks == 1 else None)
    assert during == ({answer["core"]} if answer["core"] is not None else before)
    assert os.sched_getaffinity(0) == vllm.free_at_start == before
    assert answer["cold"]
    worker.llm = None
    worker.stop({})


def test_prompts_share_no_beginning_and_are_those_of_every_engine() -> None:
    one, other = StepsWorker(), StepsWorker()
    one.vocabulary = other.vocabulary = 1000
    prompts = [tuple(one._prompt(index, 64)) for index in range(32)]
    assert len({prompt[:16] for prompt in prompts}) == 32
    assert prompts == [tuple(other._prompt(index, 64)) for index in range(32)]
    assert max(map(max, prompts)) < 1000
