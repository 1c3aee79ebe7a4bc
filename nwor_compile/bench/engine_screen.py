"""What `nwor bench engine` prints, and its Markdown: progress, one line a row, the tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nwor_compile.bench.engine_result import METRICS, EngineResult, Summary
from nwor_compile.bench.engine_rows import Row

LATENCY = ("step_ms", "token_ms", "first_token_ms", "tokens_per_second", "tokens_per_step")
BY_BATCH = ("step_ms", "tokens_per_second", "acceptance", "rows_written", "rows_direct")
DASH = "-"


class Screen:
    """Progress of a run. Without a terminal: one plain line for each thing that happens."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("", total=None)

    @contextmanager
    def running(self, rows: int) -> Iterator[None]:
        """Show the bar meanwhile."""
        self.progress.update(self.task, total=rows)
        with self.progress:
            yield

    def doing(self, text: str) -> None:
        """What goes on now: on the bar, or as a line where there is none."""
        self.progress.update(self.task, description=escape(text))
        if not self.console.is_terminal:
            self.say(text)

    def at(self, text: str) -> None:
        """Name the row that runs, on the bar only."""
        self.progress.update(self.task, description=escape(text))

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(escape(text), soft_wrap=True)

    def row(self, row: Row) -> None:
        """A row is done."""
        self.progress.advance(self.task)
        place = f"{row.engine.label:<15} seed {row.seed} repeat {row.repeat} batch {row.batch}"
        f = row.figures
        if row.status == "failed" or f is None:
            self.say(f"{place}  FAILED: {row.error}")
            return
        accepted = f.accepted_tokens / f.draft_tokens if f.draft_tokens else 0.0
        self.say(
            f"{place}  {f.seconds:.2f} s  {f.tokens / f.seconds:.1f} tokens/s  "
            f"{f.step_ms.median:.2f} ms/step  acceptance {accepted:.1%}  "
            f"rows {f.rows_written} of {f.rows_direct}"
        )


def tables(result: EngineResult) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and cells of each table."""
    speed = [[s.label, *(_cell(s, name) for name in LATENCY)] for s in result.summaries]
    found = [
        ("Speed: median [quartiles] over repeats; x is the ratio to off, repeat by repeat",
         ["engine", *(METRICS[name].title for name in LATENCY)], speed),
        ("Acceptance, by vLLM's own metrics",
         ["engine", "overall", "by position", "same tokens as off"],
         [[s.label, _plain(s, "acceptance"),
           " ".join(f"{x:.1%}" for x in s.acceptance_per_position) or DASH,
           s.same_tokens_as_off or DASH] for s in result.summaries]),
        ("KV cache writes of one repeat (rows), and of all repeats (bytes, all layers)",
         ["engine", "rows written", "direct", "written / direct", "cache bytes", "staging bytes",
          "direct bytes"],
         [_writes(s) for s in result.summaries]),
        ("Health (counters of all repeats) and memory",
         ["engine", "repeats", "failed rows", "windows", "fallbacks", "error windows",
          "staging memory", "start, s"],
         [_health(result, s) for s in result.summaries]),
    ]  # fmt: skip
    if result.options["batches"] > 1 or len(result.options["seeds"]) > 1:
        cells = [
            [b.label, str(b.seed), str(b.batch),
             *(f"{b.metrics[n]:{METRICS[n].form}}" if n in b.metrics else DASH
               for n in BY_BATCH),
             f"{b.ratios['step_ms']:.3f}" if "step_ms" in b.ratios else DASH]
            for b in result.batches
        ]  # fmt: skip
        header = ["engine", "seed", "batch", *(METRICS[name].title for name in BY_BATCH)]
        found.append(("By batch", [*header, "ms per step / off"], cells))
    return found


def _cell(summary: Summary, name: str) -> str:
    if name not in summary.metrics:
        return DASH
    text = f"{summary.metrics[name]:{METRICS[name].form}}"
    if name in summary.ratios:
        text += f" x{summary.ratios[name].median:.3f}"
    return text


def _plain(summary: Summary, name: str) -> str:
    found = summary.metrics.get(name)
    return DASH if found is None else f"{found.median:{METRICS[name].form}}"


def _writes(summary: Summary) -> list[str]:
    written, direct = (summary.metrics.get(n) for n in ("rows_written", "rows_direct"))
    share = DASH
    if written is not None and direct is not None and direct.median:
        share = f"{written.median / direct.median:.1%}"
    names = ("cache_bytes", "staging_bytes", "direct_bytes")
    sizes = [_size(summary.counters.get(name)) for name in names]
    return [summary.label, _plain(summary, "rows_written"), _plain(summary, "rows_direct"), share,
            *sizes]  # fmt: skip


def _health(result: EngineResult, summary: Summary) -> list[str]:
    report = next((e for e in result.engines if e.label == summary.label), None)
    counters = [str(summary.counters.get(n, DASH)) for n in
                ("windows", "fallbacks", "error_windows")]  # fmt: skip
    memory = report.staging_memory_bytes if report else None
    start = report.startup_seconds if report else None
    return [summary.label, str(summary.repeats), str(summary.failed_rows), *counters,
            _size(memory), DASH if start is None else f"{start:.0f}"]  # fmt: skip


def _size(amount: int | None) -> str:
    if amount is None:
        return DASH
    size = float(amount)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


def show(result: EngineResult, console: Console) -> None:
    """Print the tables, notes and failures."""
    for title, header, cells in tables(result):
        table = Table(*header, title=escape(title))
        for line in cells:
            table.add_row(*map(escape, line))
        console.print(table)
    for note in result.notes:
        console.print(escape(f"note: {note}"), soft_wrap=True)
    for failed in result.failures:
        console.print(escape(f"FAILED: {failed}"), soft_wrap=True)


def markdown(result: EngineResult) -> str:
    """The same as `show`, with where and how it was measured."""
    lines = ["# nwor bench engine", "", f"`{result.command}`", ""]
    lines += [f"- target: {result.target}", f"- drafter: {result.drafter}"]
    machine = next((e.machine for e in result.engines if e.machine), None)
    if machine is not None:
        lines.append(
            f"- {machine.cpu}, {machine.cores} cores, {machine.torch_threads} threads, "
            f"torch {machine.torch}, nwor-compile {machine.nwor_compile}, {machine.date}, "
            f"load {machine.load_average}"
        )
    started = next((e for e in result.engines if e.vllm), None)
    if started is not None:
        lines.append(f"- vLLM {started.vllm} on {started.device}, {started.runner}")
    combined = ", ".join(f"{k}: {v}" for k, v in result.combinations.items())
    lines += [f"- combinations (NWOR x SCV) and the engine that measured each: {combined}", ""]
    for title, header, cells in tables(result):
        lines += [f"## {title}", "", _line(header), _line(["---"] * len(header))]
        lines += [*(_line(row) for row in cells), ""]
    for heading, entries in (("Notes", result.notes), ("Failures", result.failures)):
        if entries:
            lines += [f"## {heading}", "", *(f"- {entry}" for entry in entries), ""]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
