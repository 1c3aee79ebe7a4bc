"""The plot of `nwor bench engine`: speed, acceptance by position, and rows written, by engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nwor_compile.bench.engine_result import METRICS, EngineResult, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(result: EngineResult, path: Path) -> None:
    """Write the figure to `path`; its suffix chooses the format."""
    # Imported here: it takes a second.
    from matplotlib.figure import Figure

    summaries = [s for s in result.summaries if s.repeats]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    step, speed, positions, rows = figure.subplots(1, 4)
    _bars(step, summaries, "step_ms")
    _bars(speed, summaries, "tokens_per_second")
    _positions(positions, summaries)
    _rows(rows, summaries)
    figure.suptitle(f"{result.target}; {result.drafter}; {result.options['scenario']}")
    figure.savefig(path, dpi=120)


def _bars(axes: Axes, summaries: list[Summary], name: str) -> None:
    """Medians, with a line from the smallest to the largest repeat."""
    for index, summary in enumerate(summaries):
        spread = summary.metrics.get(name)
        if spread is None:
            continue
        error = [[spread.median - spread.smallest], [spread.largest - spread.median]]
        axes.bar(index, spread.median, yerr=error, capsize=4)
    _names(axes, summaries, METRICS[name].title)


def _positions(axes: Axes, summaries: list[Summary]) -> None:
    """Lines lie on each other where acceptance is equal, so each has a marker of another size."""
    for index, summary in enumerate(summaries):
        values = summary.acceptance_per_position
        places = range(1, len(values) + 1)
        axes.plot(places, values, "o-", markersize=11 - 2 * min(index, 4), label=summary.label)
        axes.set_xticks(list(places))
    axes.set_title("accepted by position")
    axes.set_ylim(0, 1)
    if summaries:
        axes.legend(fontsize="small")


def _rows(axes: Axes, summaries: list[Summary]) -> None:
    for index, summary in enumerate(summaries):
        for name, width, alpha in (("rows_direct", 0.8, 0.3), ("rows_written", 0.5, 1.0)):
            if name in summary.metrics:
                axes.bar(
                    index, summary.metrics[name].median, width=width, alpha=alpha, color=f"C{index}"
                )
    _names(axes, summaries, "cache rows written (pale: direct)")


def _names(axes: Axes, summaries: list[Summary], title: str) -> None:
    axes.set_xticks(range(len(summaries)), [s.label for s in summaries], rotation=30, ha="right")
    axes.set_title(title)
