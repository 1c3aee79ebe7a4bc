"""What `nwor bench engine` concludes from its rows: totals a repeat, spread, ratios to off."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from nwor_compile.bench.engine_options import EngineKey, Options
from nwor_compile.bench.engine_rows import Figures, Row
from nwor_compile.bench.record import Machine, Spread

BASELINE = EngineKey("off", None)
Batches = Sequence[Figures]


class Metric(NamedTuple):
    """One figure of a repeat: its title, how numbers are written, how it comes from the batches."""

    title: str
    form: str
    of: Callable[[Batches], float | None]


def _total(batches: Batches, name: str) -> float:
    return sum(getattr(figures, name) for figures in batches)


def _median(spreads: Iterable[Spread | None]) -> float | None:
    medians = [spread.median for spread in spreads if spread is not None]
    return statistics.median(medians) if medians else None


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# Latencies: the median within a batch, then over the batches. The rest: sums over the batches.
METRICS: dict[str, Metric] = {
    "step_ms": Metric("ms per step", ".2f", lambda b: _median(f.step_ms for f in b)),
    "token_ms": Metric("ms per token", ".2f", lambda b: _median(f.token_ms for f in b)),
    "first_token_ms": Metric(
        "ms to first token", ".1f", lambda b: _median(f.first_token_ms for f in b)
    ),
    "tokens_per_second": Metric(
        "tokens/s", ".1f", lambda b: _share(_total(b, "tokens"), _total(b, "seconds"))
    ),
    "tokens_per_step": Metric(
        "tokens per step", ".2f", lambda b: _share(_total(b, "tokens"), _total(b, "steps"))
    ),
    "acceptance": Metric(
        "acceptance", ".1%",
        lambda b: _share(_total(b, "accepted_tokens"), _total(b, "draft_tokens")),
    ),
    "rows_written": Metric("cache rows", ".0f", lambda b: _total(b, "rows_written")),
    "rows_direct": Metric("direct: rows", ".0f", lambda b: _total(b, "rows_direct")),
}  # fmt: skip


class EngineReport(BaseModel):
    """One engine: how it started, or why it did not, and what it ran on."""

    mode: str
    scv: str | None
    label: str
    status: str  # ok, failed, or resumed (all rows were there)
    error: str | None = None
    interleaved_with: list[str] = []
    vllm: str | None = None
    device: str | None = None
    runner: str | None = None
    startup_seconds: float | None = None
    warm_up_seconds: float | None = None
    resident_bytes: int | None = None
    staging_memory_bytes: int | None = None
    notes: list[str] = []
    machine: Machine | None = None


class Summary(BaseModel):
    """One engine over its repeats. `ratios`: to NWOR off, repeat by repeat."""

    label: str
    repeats: int
    failed_rows: int
    metrics: dict[str, Spread]
    ratios: dict[str, Spread]
    acceptance_per_position: list[float]
    counters: dict[str, int]
    same_tokens_as_off: str | None


class BatchSummary(BaseModel):
    """One batch of one engine over its repeats."""

    label: str
    seed: int
    batch: int
    metrics: dict[str, Spread]
    ratios: dict[str, Spread]


class EngineResult(BaseModel):
    """Everything that one command measured."""

    benchmark: str = "engine"
    command: str
    target: str
    drafter: str
    options: dict[str, Any]
    combinations: dict[str, str]
    engines: list[EngineReport]
    summaries: list[Summary]
    batches: list[BatchSummary]
    rows: list[Row]
    notes: list[str]

    @property
    def failures(self) -> list[str]:
        """What failed: engines, then rows."""
        found = [f"{e.label}: {e.error}" for e in self.engines if e.status == "failed"]
        return found + [
            f"{r.engine.label}, seed {r.seed}, repeat {r.repeat}, batch {r.batch}: {r.error}"
            for r in self.rows
            if r.status == "failed"
        ]


def conclude(
    options: Options,
    command: str,
    reports: list[EngineReport],
    rows: list[Row],
    notes: list[str],
) -> EngineResult:
    """Put the result together."""
    engines = options.engines()
    rows = [row for row in rows if row.engine in engines]
    notes = notes + list(dict.fromkeys(note for report in reports for note in report.notes))
    notes = notes + _session_notes(rows) + _count_notes(rows) + _token_notes(rows)
    target, drafter = options.names()
    return EngineResult(
        command=command,
        target=target,
        drafter=drafter,
        options=options.public(),
        combinations=options.combinations(),
        engines=reports,
        summaries=[_summary(options, engine, rows) for engine in engines],
        batches=_batches(options, rows),
        rows=rows,
        notes=notes,
    )


def _repeats(options: Options, engine: EngineKey, rows: list[Row]) -> dict[Any, dict[int, Figures]]:
    """(seed, repeat) to its batches, where every batch of the repeat is there."""
    found: dict[Any, dict[int, Figures]] = defaultdict(dict)
    for row in rows:
        if row.engine == engine and row.figures is not None and row.status == "ok":
            found[row.seed, row.repeat][row.batch] = row.figures
    wanted = set(range(options.batches))
    return {key: batches for key, batches in sorted(found.items()) if wanted <= set(batches)}


def _spreads(
    repeats: dict[Any, Batches], baseline: dict[Any, Batches]
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Each metric over the repeats, and over its ratios to the baseline's repeat of that key."""
    metrics, ratios = {}, {}
    for name, metric in METRICS.items():
        values = {key: metric.of(batches) for key, batches in repeats.items()}
        known = [value for value in values.values() if value is not None]
        if known:
            metrics[name] = Spread.of(known)
        pairs = [
            value / base
            for key, value in values.items()
            if value is not None and key in baseline and (base := metric.of(baseline[key]))
        ]
        if pairs:
            ratios[name] = Spread.of(pairs)
    return metrics, ratios


def _summary(options: Options, engine: EngineKey, rows: list[Row]) -> Summary:
    mine = _repeats(options, engine, rows)
    base = {} if engine == BASELINE else _repeats(options, BASELINE, rows)
    metrics, ratios = _spreads(_listed(mine), _listed(base))
    figures = [f for batches in mine.values() for f in batches.values()]
    return Summary(
        label=engine.label,
        repeats=len(mine),
        failed_rows=sum(row.engine == engine and row.status == "failed" for row in rows),
        metrics=metrics,
        ratios=ratios,
        acceptance_per_position=_per_position(figures),
        counters=_counters(figures),
        same_tokens_as_off=_same_tokens(mine, base),
    )


def _listed(repeats: dict[Any, dict[int, Figures]]) -> dict[Any, Batches]:
    return {key: list(batches.values()) for key, batches in repeats.items()}


def _per_position(figures: Batches) -> list[float]:
    """Drafts accepted at a position, of all draft sequences (vLLM's own definition)."""
    drafts = sum(f.drafts for f in figures)
    columns = zip(*(f.accepted_per_position for f in figures), strict=True)
    return [sum(column) / drafts for column in columns] if drafts else []


def _counters(figures: Batches) -> dict[str, int]:
    """NWOR's counters, summed over all repeats; empty for engines without NWOR."""
    total: dict[str, int] = {}
    for f in figures:
        for name, value in (f.nwor.model_dump() if f.nwor else {}).items():
            total[name] = total.get(name, 0) + value
    return total


def _same_tokens(
    mine: dict[Any, dict[int, Figures]], base: dict[Any, dict[int, Figures]]
) -> str | None:
    pairs = [
        (f.tokens_hash, base[key][batch].tokens_hash)
        for key, batches in mine.items()
        for batch, f in batches.items()
        if key in base
    ]
    return f"{sum(a == b for a, b in pairs)} of {len(pairs)} batches" if pairs else None


def _batches(options: Options, rows: list[Row]) -> list[BatchSummary]:
    found = []
    for seed in options.seeds:
        for batch in range(options.batches):
            of: dict[EngineKey, dict[Any, Batches]] = {
                engine: {
                    row.repeat: [row.figures]
                    for row in rows
                    if (row.engine, row.seed, row.batch) == (engine, seed, batch)
                    and row.status == "ok"
                    and row.figures is not None
                }
                for engine in [*options.engines(), BASELINE]
            }
            for engine in options.engines():
                base = {} if engine == BASELINE else of[BASELINE]
                metrics, ratios = _spreads(of[engine], base)
                found.append(
                    BatchSummary(
                        label=engine.label, seed=seed, batch=batch, metrics=metrics, ratios=ratios
                    )
                )
    return found


def _session_notes(rows: list[Row]) -> list[str]:
    sessions = sorted({row.session for row in rows})
    if len(sessions) < 2:
        return []
    return [
        f"rows of {len(sessions)} sessions ({', '.join(sessions)}): a ratio may compare rows that "
        "were not measured in turns"
    ]


def _token_notes(rows: list[Row]) -> list[str]:
    """Engines whose repeats of the same requests and seed gave different tokens."""
    hashes: dict[Any, set[str]] = defaultdict(set)
    for row in rows:
        if row.figures is not None:
            hashes[row.engine, row.seed, row.batch].add(row.figures.tokens_hash)
    unsteady = dict.fromkeys(key[0].label for key, found in hashes.items() if len(found) > 1)
    if not unsteady:
        return []
    return [
        f"{', '.join(unsteady)}: repeats of the same requests with the same seeds gave different "
        "tokens, so engines compare over many rows only (at --temperature 0 token for token)"
    ]


def _count_notes(rows: list[Row]) -> list[str]:
    """NWOR and vLLM count the same drafts and rows; say where they disagree."""
    found = []
    for row in rows:
        f = row.figures
        if f is None or f.nwor is None:
            continue
        theirs, ours = (f.draft_tokens, f.accepted_tokens), (f.nwor.staged, f.nwor.committed)
        place = f"{row.engine.label}, seed {row.seed}, repeat {row.repeat}, batch {row.batch}"
        if theirs != ours:
            found.append(
                f"{place}: vLLM counts {theirs[0]} drafts and {theirs[1]} accepted, NWOR staged "
                f"{ours[0]} and committed {ours[1]}"
            )
        if f.scheduled_rows not in (None, f.rows_direct):
            found.append(
                f"{place}: vLLM scheduled {f.scheduled_rows} rows, NWOR counted {f.rows_direct}: "
                "its windows do not cover every step"
            )
    return found
