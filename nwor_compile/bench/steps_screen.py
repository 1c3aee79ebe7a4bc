"""What `nwor bench steps` shows: tables for the terminal and for Markdown."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from nwor_compile.bench.steps_record import Record, Row

GIB = 2**30
# Kernels of a profile that are shown: those whose time differs most between two modes.
SHOWN_KERNELS = 12


class TextTable(NamedTuple):
    """A table before it is drawn."""

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(record: Record) -> list[TextTable]:
    """Points of each configuration, engines, then profiles."""
    found = [_points(record, name) for name in dict.fromkeys(r.configuration for r in record.rows)]
    found.append(_engines(record))
    for row in record.rows:
        found += _profiles(row, record.workload["modes"][0])
    return found


def _points(record: Record, configuration: str) -> TextTable:
    baseline, *others = record.workload["modes"]
    head = ["batch", "context", f"{baseline} ms"]
    for mode in others:
        head += [f"{mode} ms", f"{baseline} / {mode}", "spread", "wall", "tokens/s"]
    rows = []
    for row in record.rows:
        if row.configuration == configuration:
            rows.append([str(row.batch), str(row.context), *_figures(row, baseline, others)])
    title = f"{configuration}: ms a decode step, ratios with their 95 % interval; above 1: faster"
    return TextTable(title, [*head, "note"], rows)


def _figures(row: Row, baseline: str, others: list[str]) -> list[str]:
    cells = [_median(row, baseline)]
    for mode in others:
        ratios = row.ratios.get(mode)
        cells.append(_median(row, mode))
        if ratios is None:
            cells += [""] * 4
            continue
        step, wall, tokens = (ratios[name] for name in ("step_ms", "wall_ms", "tokens_per_second"))
        cells += [str(step), f"{step.spread:.1%}", f"{wall.ratio:.3f}", f"{tokens.ratio:.3f}"]
    notes = [] if row.status == "ok" else [f"{row.status}: {row.reason}"]
    if row.status == "void":
        middles = ((mode, row.middle(mode)) for mode in others)
        notes += [f"middle of {m.pairs} pairs: {mode} {m}" for mode, m in middles if m]
    if row.windows and not row.interleaved:
        notes.append("one engine at a time")
    if row.attempts > 1:
        notes.append(f"attempt {row.attempts}")
    graphs = {name for windows in row.windows.values() for w in windows for name in w.graphs}
    if graphs - {"FULL"}:
        notes.append(f"graphs: {', '.join(sorted(graphs))}")
    return [*cells, "; ".join(notes)]


def _median(row: Row, mode: str) -> str:
    windows = row.windows.get(mode)
    return f"{statistics.median(w.step_ms for w in windows):.3f}" if windows else ""


def _engines(record: Record) -> TextTable:
    rows = []
    for engine in record.engines:
        seconds = "failed" if engine.start_seconds is None else f"{engine.start_seconds:.1f}"
        rows.append([
            engine.configuration, engine.mode, seconds,
            "cold" if engine.cold else "warm", ", ".join(engine.beside) or "alone",
            str(engine.blocks or ""), _gib(engine.kv_bytes) or "what is free",
            _gib(engine.staging_bytes), (engine.runner or "").rpartition(".worker.")[2],
            ", ".join(engine.attention),
        ])  # fmt: skip
    head = ["configuration", "mode", "start s", "compiled", "beside", "KV blocks", "KV memory",
            "staging", "runner", "attention"]  # fmt: skip
    return TextTable("Engines", head, rows)


def _gib(amount: int | None) -> str:
    return "" if not amount else f"{amount / GIB:.2f} GiB"


def _profiles(row: Row, baseline: str) -> list[TextTable]:
    """Kernels of a step, mode beside mode, where traced windows are there."""
    if baseline not in row.profiles:
        return []
    found = []
    base = row.profiles[baseline].profile
    for mode, window in row.profiles.items():
        if mode == baseline or window.profile is None or base is None:
            continue
        other = window.profile
        rows = [
            ["all", _cell(base.launches, base.busy_us), _cell(other.launches, other.busy_us),
             f"{other.busy_us - base.busy_us:+.1f}"]
        ]  # fmt: skip
        names = {*base.kernels, *other.kernels}
        pairs = [
            (name, base.kernels.get(name, (0, 0)), other.kernels.get(name, (0, 0)))
            for name in names
        ]
        pairs.sort(key=lambda pair: -abs(pair[2][1] - pair[1][1]))
        for name, one, two in pairs[:SHOWN_KERNELS]:
            rows.append([name[:70], _cell(*one), _cell(*two), f"{two[1] - one[1]:+.1f}"])
        title = f"{row.configuration} {row.batch}x{row.context}: kernels a step, launches and us"
        found.append(TextTable(title, ["kernel", baseline, mode, "difference"], rows))
    return found


def _cell(launches: float, microseconds: float) -> str:
    return f"{launches:g}: {microseconds:.1f}" if launches else ""


def show(record: Record, console: Console) -> None:
    """Print the tables and notes."""
    for table in tables(record):
        drawn = Table(*table.head, title=table.title)
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for note in record.notes:
        console.print(f"note: {note}")


def markdown(record: Record) -> str:
    """The same as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lines = [f"{record.device}, {versions}, {record.machine.date}", ""]
    lines += [f"`{command}`" for command in record.commands]
    for table in tables(record):
        lines += ["", f"**{table.title}**", "", _line(table.head), _line(["---"] * len(table.head))]
        lines += [_line(row) for row in table.rows]
    lines += ["", *(f"- {note}" for note in record.notes)]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
