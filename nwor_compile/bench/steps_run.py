"""The run behind `nwor bench steps`: engines side by side, windows in turns, voids again."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from nwor_compile.bench.engine_process import EngineError
from nwor_compile.bench.steps_points import LONGEST, TOKEN_BUDGET, Configuration, Mode, Point
from nwor_compile.bench.steps_record import EngineReport, Row, RowFile, Window, conclude

GIB = 2**30
# What an engine needs beside weights and cache: its CUDA context, graphs, activations and logits.
RESERVE = 7 * GIB
# Of that, what it needs at least; a point that does not fit even so starts no engine.
LEAST = 2 * GIB


@dataclass(frozen=True)
class Plan:
    """What to measure, and how."""

    modes: Sequence[Mode]
    points: dict[Configuration, list[Point]]
    repeats: int = 8
    steps: int = 32
    warm: int = 5
    attempts: int = 3
    profile: Sequence[Point] = ()
    memory_share: float = 0.95
    one_at_a_time: bool = False
    alone: bool = True  # points too large for engines side by side: one engine at a time
    stop_after: float | None = None  # seconds, after which no point is begun

    def __post_init__(self) -> None:
        if self.repeats < 2 or self.steps < 2 or self.warm < 1 or self.attempts < 1:
            raise ValueError("expected at least 2 repeats and steps, 1 warm step and attempt")

    @property
    def window_steps(self) -> int:
        """All steps of a window, and the one that ends the last span."""
        return self.warm + self.steps + 1

    def workload(self) -> dict[str, Any]:
        """What must be equal for rows of two runs to stand side by side."""
        return {
            "modes": [mode.label for mode in self.modes], "repeats": self.repeats,
            "steps": self.steps, "warm": self.warm,
        }  # fmt: skip

    def turns(self, names: Iterable[str]) -> list[str]:
        """AB, BA, AB, ...: whoever comes first in a repeat comes last in the next."""
        forth = list(names)
        back = forth[::-1]
        return [name for i in range(self.repeats) for name in (back if i % 2 else forth)]

    def start(
        self, configuration: Configuration, mode: Mode, kv_bytes: int | None
    ) -> dict[str, Any]:
        """Arguments of an engine's command `start`. kv_bytes: see `llm`."""
        return {
            "model": configuration.hf_config(head=False),
            "head": configuration.hf_config(head=True),
            "llm": self.llm(configuration, mode, kv_bytes),
            "staged": mode.staged,
        }

    def llm(self, configuration: Configuration, mode: Mode, kv_bytes: int | None) -> dict[str, Any]:
        """Arguments of `vllm.LLM`, but for the models' folders.

        With `kv_bytes` nothing is profiled, for other engines start beside it.
        """
        points = self.points[configuration]
        longest = max(point.longest(configuration, self.window_steps) for point in points)
        arguments: dict[str, Any] = {
            "load_format": "dummy",
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "seed": 0,
            "max_model_len": min(longest, LONGEST),
            "max_num_seqs": max(256, *(point.batch for point in points)),
            "max_num_batched_tokens": TOKEN_BUDGET,
            "tensor_parallel_size": configuration.tp,
            "kv_cache_dtype": configuration.cache,
            "speculative_config": configuration.speculative_config("head"),
        }
        if kv_bytes is None:
            arguments["gpu_memory_utilization"] = self.memory_share
        else:
            arguments |= {"kv_cache_memory_bytes": kv_bytes, "gpu_memory_utilization": 0.05}
        if mode.nwor is not None:
            arguments["additional_config"] = {"nwor": mode.nwor}
        return arguments


class Engine(Protocol):
    """What a run needs of an engine; `EngineProcess` is one."""

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Send a command; the answer, or EngineError."""

    def close(self) -> None:
        """End it."""


class OutOfTime(Exception):
    """`stop_after` has passed."""


class EngineLost(Exception):
    """An engine ended, or was ended, and answers no more."""


class Run:
    """One command. `notes` fills up while it runs.

    launch: starts an engine's process, given a configuration and a mode.
    memory: bytes of a GPU, or None where there is none.
    """

    def __init__(
        self,
        plan: Plan,
        rows: RowFile,
        launch: Callable[[Configuration, Mode], Engine],
        say: Callable[[str], None],
        memory: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.rows, self.launch, self.say, self.memory = plan, rows, launch, say, memory
        self.clock, self.begin = clock, clock()
        self.session = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.notes: list[str] = []

    def measure(self) -> None:
        """Measure what is missing."""
        try:
            for configuration, points in self.plan.points.items():
                missing = [p for p in points if not self.rows.finished(configuration, p)]
                if missing:
                    self._configuration(configuration, missing)
        except OutOfTime:
            self._note(f"stopped after {self.clock() - self.begin:.0f} s: --resume goes on")

    def _configuration(self, configuration: Configuration, points: list[Point]) -> None:
        large = points
        if not self.plan.one_at_a_time:
            large = self._together(configuration, points)
        if large and (self.plan.alone or self.plan.one_at_a_time):
            self._one_by_one(configuration, large)
        elif large:
            for point in large:
                self._unfit(configuration, point, "does not fit beside another engine (--alone)")

    # Engines side by side

    def _together(self, configuration: Configuration, points: list[Point]) -> list[Point]:
        """Measure the points that fit; the others come back."""
        self._check_time()
        share = self._kv_share(configuration)
        engines, reports = self._start(configuration, self.plan.modes, share)
        try:
            if len(engines) < len(self.plan.modes):
                self._fail(configuration, points, _errors(reports))
                return []
            large = [p for p in points if not self._fits(configuration, p, reports)]
            self._in_turns(configuration, [p for p in points if p not in large], engines)
        finally:
            _close(engines)
        return self._possible(configuration, large, reports)

    def _in_turns(
        self, configuration: Configuration, points: list[Point], engines: dict[str, Engine]
    ) -> None:
        left = list(points)
        try:
            while left:
                self._check_time()
                self._point(configuration, left[0], engines)
                left.pop(0)
            # Tracing may slow down what comes after it, so it comes last.
            for point in points:
                if point in self.plan.profile:
                    self._profile(configuration, point, engines)
        except EngineLost as error:
            self._fail(configuration, left, str(error))

    def _kv_share(self, configuration: Configuration) -> int | None:
        if self.memory is None:
            return None
        share = self.plan.memory_share * self.memory / len(self.plan.modes)
        return max(GIB, int(share - configuration.weight_bytes - RESERVE))

    def _start(
        self, configuration: Configuration, modes: Sequence[Mode], kv_bytes: int | None
    ) -> tuple[dict[str, Engine], dict[str, EngineReport]]:
        """Start engines at the same time; those that did."""
        engines = {mode.label: self.launch(configuration, mode) for mode in modes}
        reports: dict[str, EngineReport] = {}

        def start(mode: Mode) -> None:
            about = {
                "configuration": configuration.label,
                "mode": mode.label,
                "kv_bytes": kv_bytes,
                "beside": [other.label for other in modes if other != mode],
            }
            try:
                command = self.plan.start(configuration, mode, kv_bytes)
                answer = engines[mode.label].ask("start", **command)
            except EngineError as error:
                answer = {"error": str(error)}
            reports[mode.label] = EngineReport.model_validate({**answer, **about})

        with ThreadPoolExecutor(len(modes)) as pool:
            list(pool.map(start, modes))
        for mode in modes:
            report = reports[mode.label]
            self.rows.add_engine(report)
            self.say(f"{configuration.label} {_started(report)}")
            if report.error:
                engines.pop(mode.label).close()
        return engines, reports

    def _fits(
        self, configuration: Configuration, point: Point, reports: dict[str, EngineReport]
    ) -> bool:
        return all(
            self._needs(configuration, point, report) <= (report.blocks or 0)
            for report in reports.values()
        )

    def _needs(self, configuration: Configuration, point: Point, report: EngineReport) -> int:
        return point.blocks(configuration, self.plan.window_steps, report.block_size or 16)

    def _possible(
        self, configuration: Configuration, points: list[Point], reports: dict[str, EngineReport]
    ) -> list[Point]:
        """Points that may fit if an engine has the GPU for itself; the others become rows."""
        report = next(iter(reports.values()))
        if self.memory is None or not report.kv_bytes or not report.blocks:
            for point in points:
                self._unfit(configuration, point, self._shortage(configuration, point, reports))
            return []
        most = self.memory * self.plan.memory_share - configuration.weight_bytes - LEAST
        most_blocks = int(most * report.blocks / report.kv_bytes)
        possible = []
        for point in points:
            needed = self._needs(configuration, point, report)
            if needed <= most_blocks:
                possible.append(point)
            else:
                self._unfit(
                    configuration, point,
                    f"needs {needed} blocks; an engine alone has at most {most_blocks}",
                )  # fmt: skip
        return possible

    def _point(
        self, configuration: Configuration, point: Point, engines: dict[str, Engine]
    ) -> None:
        """All windows of a point, in turns; again while the pairs differ too much."""
        row = self._row(configuration, point)
        try:
            for name, engine in engines.items():
                row.fill_seconds[name] = engine.ask("fill", **_where(point))["seconds"]
                self._window(engine, point)  # not measured
            tried: dict[str, list[Window]] = {name: [] for name in engines}
            while row.attempts < self.plan.attempts:
                if row.attempts:
                    self.say(f"{_title(row)}: void ({row.reason}), again")
                    self._check_time()
                row.attempts += 1
                row.windows = self._turns(point, engines)
                if conclude(row).status == "ok":
                    break
                for name, windows in row.windows.items():
                    tried[name] += windows
                row.windows = tried
                conclude(row)
        except EngineError as error:
            if not error.kind:
                raise EngineLost(str(error)) from error
            row.status, row.reason = "failed", str(error)
            row.windows, row.ratios = {}, {}
        except OutOfTime:
            self._add(row)
            raise
        self._add(row)

    def _turns(self, point: Point, engines: dict[str, Engine]) -> dict[str, list[Window]]:
        """Windows of all engines, in turns."""
        found: dict[str, list[Window]] = {name: [] for name in engines}
        for name in self.plan.turns(engines):
            found[name].append(self._measured(name, engines[name], point))
        return found

    def _profile(
        self, configuration: Configuration, point: Point, engines: dict[str, Engine]
    ) -> None:
        """One traced window of each engine; the point's row is written again with them."""
        row = self.rows.rows[configuration.label, point]
        try:
            for name, engine in engines.items():
                row.profiles[name] = self._window(engine, point, profile=True)
        except EngineError as error:
            self._note(f"{_title(row)}: no profile: {error}")
            if not error.kind:
                raise EngineLost(str(error)) from error
            return
        self.rows.add(row)

    # One engine at a time

    def _one_by_one(self, configuration: Configuration, points: list[Point]) -> None:
        # Not between the modes: what one engine measured is worth nothing without the others.
        self._check_time()
        rows = {point: self._row(configuration, point) for point in points}
        reports: dict[str, EngineReport] = {}
        for index, mode in enumerate(self.plan.modes, 1):
            engines, found = self._start(configuration, [mode], None)
            reports |= found
            try:
                if not engines:
                    self._fail(configuration, points, _errors(found))
                    return
                last = index == len(self.plan.modes)
                self._alone(configuration, mode, engines[mode.label], rows, reports, last=last)
            finally:
                _close(engines)
            if not last and not self._left(configuration, rows, reports):
                for point, row in rows.items():
                    self._end_alone(configuration, point, row, reports)
                return

    def _alone(
        self, configuration: Configuration, mode: Mode, engine: Engine, rows: dict[Point, Row],
        reports: dict[str, EngineReport], *, last: bool,
    ) -> None:  # fmt: skip
        """One engine at all points. After the last engine a point is finished, and its row is
        written before the next is begun. reports: of this engine and those before."""
        lost = ""
        for point, row in rows.items():
            fits = self._fits(configuration, point, reports)
            if row.status != "failed" and fits:
                lost = self._windows_alone(mode.label, engine, point, row, lost)
            if last:
                self._end_alone(configuration, point, row, reports)

    def _left(
        self, configuration: Configuration, rows: dict[Point, Row], reports: dict[str, EngineReport]
    ) -> bool:
        """Whether there is a point for the next engine to measure."""
        return any(
            row.status != "failed" and self._fits(configuration, point, reports)
            for point, row in rows.items()
        )

    def _end_alone(
        self, configuration: Configuration, point: Point, row: Row, reports: dict[str, EngineReport]
    ) -> None:
        """Write the row of a point that no engine will be asked for any more."""
        row.interleaved, row.attempts = False, 1
        if self._fits(configuration, point, reports):
            self._add(row if row.status == "failed" else conclude(row))
        else:
            self._unfit(configuration, point, self._shortage(configuration, point, reports))

    def _windows_alone(self, name: str, engine: Engine, point: Point, row: Row, lost: str) -> str:
        """Measure a point on one engine. lost: why the engine answers no more, or an empty string.
        What comes back is that for the next point."""
        try:
            if lost:
                raise EngineError(lost)
            row.fill_seconds[name] = engine.ask("fill", **_where(point))["seconds"]
            self._window(engine, point)  # not measured
            row.windows[name] = [
                self._measured(name, engine, point) for _ in range(self.plan.repeats)
            ]
            if point in self.plan.profile:
                row.profiles[name] = self._window(engine, point, profile=True)
            self.say(f"{_title(row)}: {name} measured")
        except EngineError as error:
            row.status, row.reason = "failed", f"{name}: {error}"
            return "" if error.kind else str(error)
        return ""

    # Both

    def _measured(self, name: str, engine: Engine, point: Point) -> Window:
        window = self._window(engine, point)
        staged = next(mode.staged for mode in self.plan.modes if mode.label == name)
        if staged and (window.nwor is None or not window.nwor.staged):
            raise EngineError(f"{name}: NWOR staged nothing: its hooks did not run", kind="hooks")
        if window.nwor is not None and (window.nwor.error_windows or window.nwor.fallbacks):
            raise EngineError(f"{name}: not all was staged: {window.nwor}", kind="fallback")
        return window

    def _window(self, engine: Engine, point: Point, *, profile: bool = False) -> Window:
        answer = engine.ask(
            "window", warm=self.plan.warm, steps=self.plan.steps, profile=profile, **_where(point)
        )
        return Window.model_validate(answer)

    def _row(self, configuration: Configuration, point: Point) -> Row:
        return Row(
            configuration=configuration.label, batch=point.batch, context=point.context,
            status="ok", session=self.session,
        )  # fmt: skip

    def _fail(self, configuration: Configuration, points: list[Point], reason: str) -> None:
        for point in points:
            row = self._row(configuration, point)
            row.status, row.reason = "failed", reason
            self._add(row)

    def _unfit(self, configuration: Configuration, point: Point, reason: str) -> None:
        row = self._row(configuration, point)
        row.status, row.reason = "memory", reason
        self._add(row)

    def _shortage(
        self, configuration: Configuration, point: Point, reports: dict[str, EngineReport]
    ) -> str:
        has = ", ".join(f"{name} has {report.blocks}" for name, report in reports.items())
        needed = self._needs(configuration, point, next(iter(reports.values())))
        return f"needs {needed} blocks; {has}"

    def _add(self, row: Row) -> None:
        self.rows.add(row)
        self.say(f"{_title(row)}: {_outcome(row)}")

    def _check_time(self) -> None:
        limit = self.plan.stop_after
        if limit is not None and self.clock() - self.begin > limit:
            raise OutOfTime

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.say(f"note: {text}")


def _where(point: Point) -> dict[str, int]:
    return {"batch": point.batch, "context": point.context}


def _title(row: Row) -> str:
    return f"{row.configuration} {row.batch}x{row.context}"


def _outcome(row: Row) -> str:
    ratios = [f"{mode} {found['step_ms']}" for mode, found in row.ratios.items()]
    return ", ".join([row.status, *ratios, *([row.reason] if row.reason else [])])


def _started(report: EngineReport) -> str:
    if report.error:
        return f"{report.mode}: FAILED: {report.error}"
    return f"{report.mode}: up in {report.start_seconds:.1f} s, {report.blocks} blocks"


def _errors(reports: dict[str, EngineReport]) -> str:
    return "; ".join(f"{name} did not start: {r.error}" for name, r in reports.items() if r.error)


def _close(engines: dict[str, Engine]) -> None:
    for engine in engines.values():
        engine.close()
