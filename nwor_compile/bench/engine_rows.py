"""Rows of `nwor bench engine`: one a batch, appended to a file as it finishes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ValidationError

from nwor_compile.bench.engine_options import EngineKey, Options, flag
from nwor_compile.bench.record import Spread
from nwor_compile.errors import ConfigError


class NworFigures(BaseModel):
    """What NWOR's own counters said of one batch; rows are token rows, bytes are of all layers."""

    windows: int
    staged: int
    committed: int
    rejected: int
    certain: int
    cache_bytes: int
    staging_bytes: int
    direct_bytes: int
    fallbacks: int
    error_windows: int
    vectorised: int

    @classmethod
    def between(cls, before: Mapping[str, Any], after: Mapping[str, Any]) -> NworFigures:
        """The differences of two `nwor_metrics` snapshots."""
        return cls(**{
            name: after.get(counter, 0) - before.get(counter, 0)
            for name, counter in _COUNTERS.items()
        })  # fmt: skip


_COUNTERS = {
    "windows": "nwor_windows",
    "staged": "nwor_total_staged",
    "committed": "nwor_total_committed",
    "rejected": "nwor_total_rejected",
    "certain": "nwor_certain_rows",
    "cache_bytes": "nwor_cache_bytes",
    "staging_bytes": "nwor_staging_bytes_moved",
    "direct_bytes": "nwor_direct_bytes",
    "fallbacks": "nwor_fallback_count",
    "error_windows": "nwor_error_windows",
    "vectorised": "nwor_scv_vectorised",
}


class Figures(BaseModel):
    """One batch. `drafts` to `accepted_per_position` are vLLM's own spec-decode metrics.

    step_ms: over the engine's steps, prompts included. token_ms: over requests, the time per token
    after the first. first_token_ms: from the queue on. scheduled_rows: tokens that the scheduler
    sent through the target, prompts included.
    """

    seconds: float
    requests: int
    tokens: int
    tokens_hash: str
    steps: int
    step_ms: Spread
    token_ms: Spread | None
    first_token_ms: Spread | None
    scheduled_rows: int | None = None
    drafts: int
    draft_tokens: int
    accepted_tokens: int
    accepted_per_position: list[int]
    nwor: NworFigures | None

    @property
    def rows_direct(self) -> int:
        """Cache rows that direct writes take: as NWOR counted them; without it, what was
        scheduled, or at least one certain row and the drafts of each verify span."""
        if self.nwor is not None:
            return self.nwor.certain + self.nwor.staged
        if self.scheduled_rows is not None:
            return self.scheduled_rows
        return self.drafts + self.draft_tokens

    @property
    def rows_written(self) -> int:
        """Cache rows that were written; without staging, all of them."""
        if self.nwor is None:
            return self.rows_direct
        return self.nwor.certain + self.nwor.committed


class RowKey(NamedTuple):
    """Which batch of which engine."""

    engine: EngineKey
    seed: int
    repeat: int
    batch: int


class Row(BaseModel):
    """One batch of one engine: its figures, or why there are none."""

    mode: str
    scv: str | None
    seed: int
    repeat: int
    batch: int
    status: Literal["ok", "failed"]
    error: str | None = None
    session: str
    figures: Figures | None = None

    @property
    def engine(self) -> EngineKey:
        """Its engine."""
        return EngineKey(self.mode, self.scv)

    @property
    def key(self) -> RowKey:
        """Its place in the plan."""
        return RowKey(self.engine, self.seed, self.repeat, self.batch)


def plan(options: Options) -> list[RowKey]:
    """All rows, in the order in which they run when all engines are there.

    Engines take turns within a batch, and another one begins each time: what the machine does
    meanwhile then falls on all of them alike.
    """
    engines, keys, turn = options.engines(), [], 0
    for seed in options.seeds:
        for repeat in range(options.repeats):
            for batch in range(options.batches):
                first = turn % len(engines)
                turn += 1
                for engine in engines[first:] + engines[:first]:
                    keys.append(RowKey(engine, seed, repeat, batch))
    return keys


def failure(figures: Figures, engine: EngineKey, options: Options) -> str | None:
    """Why a batch that ran is no measurement, or None."""
    if figures.draft_tokens == 0:
        return "no draft was proposed: " + _no_draft_cause(figures, options)
    counted = figures.nwor
    if engine.mode == "stage" and (counted is None or counted.staged == 0):
        return (
            f"vLLM verified {figures.draft_tokens} drafts and NWOR staged none of them: its hooks "
            "did not run"
        )
    return None


def _no_draft_cause(figures: Figures, options: Options) -> str:
    if figures.tokens <= figures.requests:
        return "every request ended at its first token; raise --max-tokens"
    if options.method == "ngram":
        return (
            f"the ngram drafter found no pair of tokens repeated in prompts of "
            f"{max(s.prompt for s in options.shapes())} tokens and their output; use --scenario "
            "long, more --max-tokens, or a draft model"
        )
    return (
        f"the drafter ({options.names()[1]}) was given {figures.steps} steps and proposed nothing; "
        "is it made for this target, and does its own length limit leave room? The engine's log "
        "says how vLLM loaded it"
    )


class RowFile:
    """DIR/rows.jsonl, and for `--resume` options.json and engines.json (engines' reports)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.jsonl"
        self.options_path = folder / "options.json"
        self.engines_path = folder / "engines.json"
        self.rows: dict[RowKey, Row] = {}
        self.engines: dict[str, dict[str, Any]] = {}

    def open(self, options: Options, *, resume: bool) -> None:
        """Make the folder, or with `resume` read its rows.

        Raises ConfigError if there are rows already, or rows of another workload.
        """
        if self.path.exists() and not resume:
            raise ConfigError(
                f"{self.path} has rows already: expected --resume to go on with them, or another "
                "--output"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume and self.options_path.exists():
            self._check_same(options)
        self.options_path.write_text(options.model_dump_json(indent=2) + "\n")
        if self.path.exists():
            self._read()
        if resume and self.engines_path.exists():
            self.engines = json.loads(self.engines_path.read_text())

    def _check_same(self, options: Options) -> None:
        before = json.loads(self.options_path.read_text())
        for name, value in options.workload().items():
            if before.get(name) != value:
                raise ConfigError(
                    f"--resume: {flag(name)} is {value!r} now and was {before.get(name)!r} for the "
                    "rows there; expected the same, or another --output"
                )

    def _read(self) -> None:
        """Read what is whole; a line that a kill cut short is dropped."""
        good = []
        for line in self.path.read_text().splitlines():
            try:
                row = Row.model_validate_json(line)
            except ValidationError:
                continue
            self.rows[row.key] = row
            good.append(line + "\n")
        self.path.write_text("".join(good))

    def finished(self, key: RowKey) -> bool:
        """True if the row is there and no failure; failed rows are tried again."""
        return key in self.rows and self.rows[key].status == "ok"

    def add_engine(self, label: str, report: dict[str, Any]) -> None:
        """Keep an engine's report for a later `--resume`."""
        self.engines[label] = report
        self.engines_path.write_text(json.dumps(self.engines, indent=2) + "\n")

    def add(self, row: Row) -> None:
        """Append a row; it replaces a former one of its key."""
        self.rows[row.key] = row
        with self.path.open("a") as file:
            file.write(row.model_dump_json() + "\n")
