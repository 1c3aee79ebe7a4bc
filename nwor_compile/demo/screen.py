"""What the demo prints: progress, text with its tokens told apart, the final table, the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer

from nwor_compile.demo.engine import Decision, Observer
from nwor_compile.demo.result import DemoResult, RunResult

STYLES = {
    "prompt": "dim",
    "accepted": "green",
    "corrected": "bold yellow",
    "rejected": "red strike",
}
# Where there is no colour (a pipe, CI) these tell tokens apart.
MARKS = {"prompt": "{} »", "accepted": "{}", "corrected": "<{}>", "rejected": "[-{}-]"}
LEGEND = {
    "accepted": "accepted draft",
    "rejected": "rejected draft",
    "corrected": "the target's own token",
}
FIGURES: list[tuple[str, Callable[[RunResult], str]]] = [
    ("draft tokens", lambda run: f"{run.drafted}"),
    ("acceptance", lambda run: f"{run.acceptance:.1%}"),
    ("rows: prompts", lambda run: f"{run.audit.prompt_rows}"),
    ("rows: generated", lambda run: f"{run.audit.generated_rows}"),
    ("rows: rejected", lambda run: f"{run.audit.rejected_rows}"),
    ("found/counted", lambda r: f"{r.audit.rows_written}/{r.counted_rows}"),
    ("rows per token", lambda run: f"{run.rows_per_token:.2f}"),
    ("wrong/audited", lambda r: f"{r.audit.wrong_rows}/{r.audit.checked_rows}"),
    ("KiB to the cache", lambda run: f"{run.cache_bytes / 1024:.0f}"),
    ("KiB via staging", lambda run: f"{run.staging_bytes / 1024:.0f}"),
    ("KiB moved in all", lambda r: f"{(r.cache_bytes + r.staging_bytes) / 1024:.0f}"),
    ("fallbacks", lambda run: f"{run.fallbacks}"),
]


class Screen:
    """Prints to `console`; nothing flickers where it is not a terminal."""

    def __init__(self, console: Console, tokenizer: Tokenizer) -> None:
        self.console, self.tokenizer = console, tokenizer

    @property
    def live(self) -> bool:
        """Somebody watches, in colour."""
        return self.console.is_terminal and not self.console.no_color

    @contextmanager
    def compiling(self) -> Iterator[Callable[[str], None]]:
        """A progress bar; the value yielded says what comes next."""
        if not self.live:
            yield lambda text: self.console.print(f"{text} ...", highlight=False)
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24))
        with Progress(
            *columns, TimeElapsedColumn(), console=self.console, transient=True
        ) as progress:
            task = progress.add_task("", total=2, completed=-1)

            def show(text: str) -> None:
                progress.update(task, description=text, advance=1)

            yield show

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, highlight=False, markup=False)

    def token(self, ids: list[int], kind: str) -> Text:
        """Tokens as text of a kind."""
        text = self.tokenizer.decode(ids).replace("\n", " ") if ids else ""
        if not text:
            return Text()
        # A mark goes inside the space that begins a word, so that words stay apart.
        body = text if self.live else _mark(text, MARKS[kind])
        return Text(body, style=STYLES[kind] if self.live else "")

    @contextmanager
    def transcript(self, title: str, prompts: list[list[int]]) -> Iterator[Observer]:
        """Show the first requests as they are generated; the value yielded watches an engine."""
        # Assembled, so that the prompt's style is a span and not the base of what follows.
        texts = [Text.assemble(self.token(prompt, "prompt")) for prompt in prompts]

        def observe(decisions: list[Decision]) -> None:
            for decision in decisions:
                if decision.request.id < len(texts):
                    self._append(texts[decision.request.id], decision)
            if live is not None:
                live.update(self._panels(title, texts))

        live = None
        if self.live:
            with Live(console=self.console, refresh_per_second=8) as live:
                yield observe
        else:
            yield observe
            self.console.print(self._panels(title, texts))

    def _append(self, text: Text, decision: Decision) -> None:
        text.append_text(self.token(decision.accepted, "accepted"))
        text.append_text(self.token(decision.rejected, "rejected"))
        if decision.token is not None:
            text.append_text(self.token([decision.token], "corrected"))

    def _panels(self, title: str, texts: list[Text]) -> Group:
        legend = Text()
        for kind, meaning in LEGEND.items():
            text = meaning if self.live else MARKS[kind].format(meaning)
            legend.append(text, STYLES[kind] if self.live else "").append("   ", "")
        legend.rstrip()
        panels = [Panel(text, title=f"{title}, request {i}") for i, text in enumerate(texts)]
        return Group(*panels, legend)

    def stale(self, result: DemoResult, requests: int = 2) -> None:
        """Side by side: without speculation, and with staged rows that attention cannot see."""
        if result.stale is None:
            return
        for index, (good, bad) in enumerate(
            zip(result.plain.tokens[:requests], result.stale.tokens[:requests], strict=True)
        ):
            same = next((i for i, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), -1)
            table = Table(title=f"--show-stale, request {index}: first difference at token {same}")
            table.add_column("decoding without speculation")
            table.add_column("draft rows staged, attention reads the cache alone")
            table.add_row(self.tokenizer.decode(good), self.tokenizer.decode(bad))
            self.console.print(table)
        diverged = sum(
            a != b for a, b in zip(result.plain.tokens, result.stale.tokens, strict=True)
        )
        self.say(
            f"naive staging: {diverged} of {len(result.plain.tokens)} greedy requests diverged, "
            f"acceptance {result.stale.acceptance:.1%}, {result.stale.audit.wrong_rows} of "
            f"{result.stale.audit.checked_rows} cache rows are wrong"
        )

    def table(self, result: DemoResult) -> None:
        """The figures, direct beside staged for each drafter and temperature."""
        table = Table(title="direct against staged; rows are rows of the KV cache")
        table.add_column("")
        for scenario in result.scenarios:
            heading = scenario.name.replace(", ", "\n")
            table.add_column(f"{heading}\ndirect", justify="right")
            table.add_column("\n\nstaged", justify="right")
        runs = [run for s in result.scenarios for run in (s.direct, s.staged)]
        table.add_row("new tokens", *(f"{run.emitted}" for run in runs))
        equal = ["yes" if s.direct.tokens == s.staged.tokens else "NO" for s in result.scenarios]
        table.add_row("token ids equal", *(cell for mark in equal for cell in ("", mark)))
        for label, figure in FIGURES:
            table.add_row(label, *(figure(run) for run in runs))
            if label == "acceptance":
                for position in range(min(8, result.options.draft_tokens)):
                    table.add_row(
                        f"  draft {position + 1}",
                        *(f"{run.acceptance_per_position[position]:.1%}" for run in runs),
                    )
        self.console.print(table)

    def verdict(self, result: DemoResult) -> None:
        """Compiled graphs, time, memory; what failed, if anything; one line at the end."""
        compiled = result.compiled
        if not compiled.eager:
            self.say(
                f"compiled graphs: {compiled.target_graphs} target, {compiled.draft_graphs} draft, "
                f"{compiled.recompiles} recompiles"
            )
        self.say(
            f"{result.seconds:.1f} s, peak memory {result.peak_rss_bytes / 2**20:.0f} MiB, "
            f"torch {result.environment['torch']}"
        )
        for check in result.checks:
            if not check.ok:
                self.console.print(f"[bold red]FAILED[/] {check.name}: {check.detail}")
        offered = sum(s.staged.audit.rejected_offered for s in result.scenarios)
        staged = sum(s.staged.audit.rejected_rows for s in result.scenarios)
        direct = sum(s.direct.audit.rejected_rows for s in result.scenarios)
        word, style = ("PASS", "bold green") if result.ok else ("FAIL", "bold red")
        line = Text(word, style)
        line.append(
            f": {sum(c.ok for c in result.checks)} of {len(result.checks)} checks; of {offered} "
            f"rejected draft rows {staged} reached the cache staged, {direct} direct",
            "default",
        )
        self.console.print(line, soft_wrap=True)


def _mark(text: str, mark: str) -> str:
    body = text.lstrip(" ")
    return text[: len(text) - len(body)] + (mark.format(body) if body else "")
