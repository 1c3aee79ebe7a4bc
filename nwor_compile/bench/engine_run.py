"""The run behind `nwor bench engine`: starts engines, asks for batches in turns, loses nothing."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from nwor_compile.bench.engine_options import EngineKey, Options
from nwor_compile.bench.engine_process import EngineError
from nwor_compile.bench.engine_result import EngineReport
from nwor_compile.bench.engine_rows import Figures, Row, RowFile, RowKey, failure, plan
from nwor_compile.bench.engine_screen import Screen
from nwor_compile.demo.text import WEIGHTS

# Of the memory that is free, how much another engine may take.
HEADROOM = 0.9


class Engine(Protocol):
    """What a run needs of an engine; `EngineProcess` is one."""

    def ask(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Send a command; the answer, or EngineError."""

    def close(self) -> None:
        """End it."""


def free_memory() -> int | None:
    """Bytes that new processes can have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


class Run:
    """One command's rows. `reports` and `notes` fill up while it runs."""

    def __init__(
        self,
        options: Options,
        rows: RowFile,
        screen: Screen,
        launch: Callable[[EngineKey], Engine],
        memory: Callable[[], int | None] = free_memory,
    ) -> None:
        self.options, self.rows, self.screen = options, rows, screen
        self.launch, self.memory = launch, memory
        self.session = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.reports: dict[EngineKey, EngineReport] = {}
        self.notes: list[str] = []
        self.pending = [key for key in plan(options) if not rows.finished(key)]

    def measure(self) -> None:
        """Measure what is missing, with as many engines at a time as are wanted and fit."""
        wanted = {key.engine for key in self.pending}
        for engine in self.options.engines():
            status = "pending" if engine in wanted else "resumed"
            known = {} if engine in wanted else self.rows.engines.get(engine.label, {})
            self.reports[engine] = EngineReport.model_validate(
                {**known, **engine._asdict(), "label": engine.label, "status": status}
            )
        queue = [engine for engine in self.options.engines() if engine in wanted]
        # On a GPU every engine takes its share at start, so all of them are counted.
        share = self.options.memory_share / (1 if self.options.one_at_a_time else len(queue) or 1)
        with self.screen.running(len(self.pending)):
            while queue:
                self._measure_group(queue, share)

    def _measure_group(self, queue: list[EngineKey], share: float) -> None:
        group: dict[EngineKey, Engine] = {}
        try:
            while queue and (not group or self._another(queue[0], group)):
                key = queue.pop(0)
                self._start(key, share, group)
            for key in group:
                others = [other.label for other in group if other != key]
                self.reports[key].interleaved_with = others
                self.rows.add_engine(key.label, self.reports[key].model_dump())
            for row in [row for row in self.pending if row.engine in group]:
                if row.engine in group:
                    self._batch(row, group)
        finally:
            for engine in group.values():
                engine.close()

    def _another(self, key: EngineKey, group: dict[EngineKey, Engine]) -> bool:
        """Whether one more engine is wanted beside those that run, and fits in memory."""
        if self.options.one_at_a_time:
            return False
        free = self.memory()
        taken = max((self.reports[other].resident_bytes or 0 for other in group), default=0)
        if free is None or taken <= HEADROOM * free:
            return True
        self._note(
            f"{key.label} runs after {', '.join(other.label for other in group)} and not in turns "
            f"with them: an engine takes {taken / 2**30:.1f} GiB and {free / 2**30:.1f} are free"
        )
        return False

    def _start(self, key: EngineKey, share: float, group: dict[EngineKey, Engine]) -> None:
        report = self.reports[key]
        self.screen.doing(f"{key.label}: starting vLLM (a minute or more)")
        engine = self.launch(key)
        group[key] = engine
        try:
            answer = engine.ask(
                "start",
                llm=self.options.llm_arguments(key),
                gpu_share=share,
                text=str(WEIGHTS / "heldout.txt"),
                warm_up=self._request(0, 0),
            )
        except EngineError as error:
            self._fail_engine(key, f"did not start: {error}", group)
            return
        self.reports[key] = EngineReport.model_validate(
            {**report.model_dump(), **answer, "status": "ok"}
        )
        self.screen.say(
            f"{key.label}: vLLM {answer.get('vllm')} started in {answer['startup_seconds']:.0f} s, "
            f"warmed up in {answer['warm_up_seconds']:.1f} s"
        )

    def _request(self, seed: int, batch: int) -> dict[str, Any]:
        return {
            "seed": seed,
            "batch": batch,
            "shapes": self.options.shapes(),
            "temperature": self.options.temperature,
        }

    def _batch(self, key: RowKey, group: dict[EngineKey, Engine]) -> None:
        label = key.engine.label
        self.screen.at(f"{label}: seed {key.seed}, repeat {key.repeat}, batch {key.batch}")
        try:
            answer = group[key.engine].ask("batch", **self._request(key.seed, key.batch))
        except EngineError as error:
            self._add(key, None, str(error))
            if not error.alive:
                self._fail_engine(key.engine, f"lost in a batch: {error}", group)
            return
        figures = Figures.model_validate(answer)
        self._add(key, figures, failure(figures, key.engine, self.options))

    def _add(self, key: RowKey, figures: Figures | None, error: str | None) -> None:
        row = Row(
            **key.engine._asdict(), seed=key.seed, repeat=key.repeat, batch=key.batch,
            status="failed" if error else "ok", error=error, session=self.session, figures=figures,
        )  # fmt: skip
        self.rows.add(row)
        self.screen.row(row)

    def _fail_engine(self, key: EngineKey, error: str, group: dict[EngineKey, Engine]) -> None:
        """Report it and go on with the others."""
        report = self.reports[key]
        report.status, report.error = "failed", error
        group.pop(key).close()
        self.screen.say(f"{key.label}: FAILED: {error}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.screen.say(f"note: {text}")
