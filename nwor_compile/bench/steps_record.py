"""Rows of `nwor bench steps`: one a point of a configuration, appended as it finishes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ValidationError

from nwor_compile.bench.engine_rows import NworFigures
from nwor_compile.bench.record import Machine
from nwor_compile.bench.steps_points import Configuration, Point
from nwor_compile.bench.steps_stats import Middle, Ratio
from nwor_compile.errors import ConfigError

# Pairs that differ by more than this say nothing about a difference of a few percent.
WIDEST = 0.03
TOP_KERNELS = 40
METRICS = ("step_ms", "wall_ms", "tokens_per_second")


class Profile(BaseModel):
    """Kernels of steps that were traced, by step; kernels: launches and microseconds."""

    steps: int
    launches: float
    busy_us: float
    kernels: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, kernels: Mapping[str, Sequence[float]], steps: int) -> Profile:
        """Of totals over `steps`; the kernels that take longest are kept by name."""
        longest = sorted(kernels.items(), key=lambda item: -item[1][1])[:TOP_KERNELS]
        return cls(
            steps=steps,
            launches=round(sum(count for count, _ in kernels.values()) / steps, 2),
            busy_us=round(sum(us for _, us in kernels.values()) / steps, 2),
            kernels={
                name[:160]: (round(count / steps, 3), round(us / steps, 3))
                for name, (count, us) in longest
            },
        )


class Window(BaseModel):
    """Steps of one engine at one point.

    step_ms, mean_ms, p90_ms: over steps, from a step's start to the next one's on the GPU.
    wall_ms: the host's time over the number of steps. context: tokens a request, in the middle.
    """

    step_ms: float
    mean_ms: float
    p90_ms: float
    wall_ms: float
    tokens_per_second: float
    tokens_per_step: float
    context: float
    graphs: dict[str, int] = {}
    nwor: NworFigures | None = None
    profile: Profile | None = None


class EngineReport(BaseModel):
    """One engine: how it started, or why it did not.

    beside: engines that started at the same time. cold: nothing of it had been compiled before.
    memory_bytes: what torch holds on the first GPU. core: the one that steps are taken on, if they
    are bound to one.
    """

    configuration: str = ""
    mode: str = ""
    beside: list[str] = []
    cold: bool | None = None
    error: str | None = None
    start_seconds: float | None = None
    import_seconds: float | None = None
    device: str | None = None
    vllm: str | None = None
    torch: str | None = None
    runner: str | None = None
    worker: str | None = None
    attention: list[str] = []
    cudagraph_mode: str | None = None
    async_scheduling: bool | None = None
    inductor_partition: bool | None = None
    blocks: int | None = None
    block_size: int | None = None
    kv_bytes: int | None = None  # what it was given; None: vLLM found out what is free
    staging_bytes: int | None = None
    memory_bytes: int | None = None
    core: int | None = None
    notes: list[str] = []


class Row(BaseModel):
    """One point: windows by mode, and for each mode but the first its ratios to the first.

    status: `void` where pairs differ by more than WIDEST after all attempts, and then it has the
    pairs of all of them; `memory` where it does not fit; `failed` where an engine could not measure
    it.
    interleaved: engines took turns, window by window.
    """

    configuration: str
    batch: int
    context: int
    status: Literal["ok", "void", "memory", "failed"]
    reason: str | None = None
    interleaved: bool = True
    attempts: int = 0
    session: str = ""
    fill_seconds: dict[str, float] = {}
    windows: dict[str, list[Window]] = {}
    profiles: dict[str, Window] = {}
    ratios: dict[str, dict[str, Ratio]] = {}

    @property
    def key(self) -> tuple[str, Point]:
        """Its place in the plan."""
        return self.configuration, Point(self.batch, self.context)

    def middle(self, mode: str) -> Middle | None:
        """The middle pair's ratio of steps, first mode over this one; None of engines that did not
        take turns, whose windows are no pairs."""
        if not self.interleaved:
            return None
        steps = {name: [window.step_ms for window in found] for name, found in self.windows.items()}
        return Middle.of(next(iter(steps.values())), steps[mode])


def conclude(row: Row) -> Row:
    """Fill in ratios, and the status that follows from their spread."""
    baseline, *others = row.windows
    for mode in others:
        row.ratios[mode] = {name: _ratio(row, name, baseline, mode) for name in METRICS}
    wide = {mode: found["step_ms"].spread for mode, found in row.ratios.items()}
    row.status, row.reason = "ok", None
    if any(spread > WIDEST for spread in wide.values()):
        row.status = "void"
        row.reason = ", ".join(f"{mode}: pairs differ by {wide[mode]:.1%}" for mode in wide)
    return row


def _ratio(row: Row, name: str, baseline: str, mode: str) -> Ratio:
    """Above 1 where the mode is better: times over the mode's, and its tokens over the others."""
    ours, theirs = (
        [getattr(window, name) for window in row.windows[which]] for which in (mode, baseline)
    )
    return Ratio.of(ours, theirs) if name == "tokens_per_second" else Ratio.of(theirs, ours)


class RowFile:
    """FOLDER/rows.jsonl and, for `--resume`, what must be equal for its rows to belong together."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.jsonl"
        self.engines_path = folder / "engines.jsonl"
        self.workload_path = folder / "workload.json"
        self.rows: dict[tuple[str, Point], Row] = {}
        self.engines: list[EngineReport] = []

    def open(self, workload: Mapping[str, Any], *, resume: bool) -> None:
        """Make the folder, or read its rows.

        Raises ConfigError if there are rows already and `resume` is not given, or if they are of
        another workload.
        """
        if self.path.exists() and not resume:
            raise ConfigError(
                f"{self.path} has rows already: expected --resume to go on with them, or another "
                "--output"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.workload_path.exists() and self.path.exists():
            before = json.loads(self.workload_path.read_text())
            for name, value in workload.items():
                if before.get(name) != value:
                    raise ConfigError(
                        f"--resume: {name} is {value!r} now and was {before.get(name)!r} for the "
                        "rows there; expected the same, or another --output"
                    )
        self.workload_path.write_text(json.dumps(workload, indent=1) + "\n")
        for row in _read(self.path, Row):
            self.rows[row.key] = row
        self.engines = _read(self.engines_path, EngineReport)

    def finished(self, configuration: Configuration, point: Point) -> bool:
        """True for a row that need not be measured again: void and failed ones are."""
        row = self.rows.get((configuration.label, point))
        return row is not None and row.status in ("ok", "memory")

    def add(self, row: Row) -> None:
        """Append a row; it replaces a former one of its key."""
        self.rows[row.key] = row
        _append(self.path, row)

    def add_engine(self, report: EngineReport) -> None:
        """Append an engine's report."""
        self.engines.append(report)
        _append(self.engines_path, report)


def _append(path: Path, model: BaseModel) -> None:
    with path.open("a") as file:
        file.write(model.model_dump_json() + "\n")


def _read(path: Path, kind: type[Any]) -> list[Any]:
    """The lines that are whole; one that a kill cut short is dropped, from the file too."""
    if not path.exists():
        return []
    found, lines = [], []
    for line in path.read_text().splitlines():
        try:
            found.append(kind.model_validate_json(line))
        except ValidationError:
            continue
        lines.append(line + "\n")
    path.write_text("".join(lines))
    return found


class Record(BaseModel):
    """Everything that one command measured, or several that resumed it."""

    benchmark: str = "steps"
    commands: list[str]
    machine: Machine
    device: str | None
    versions: dict[str, str]
    clocks: list[str]
    workload: dict[str, Any]
    engines: list[EngineReport]
    rows: list[Row]
    notes: list[str]
