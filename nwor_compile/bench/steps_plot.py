"""The plot of `nwor bench steps`: step time of the first mode over the others', by batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from nwor_compile.bench.steps_record import Record, Row


def draw(record: Record, path: Path) -> None:
    """Write the figure to `path`; its suffix chooses the format. A panel a configuration and mode.

    Void rows have hollow markers.
    """
    # Imported here: it takes a second.
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], list[Row]] = {}
    for row in record.rows:
        for mode in row.ratios:
            panels.setdefault((row.configuration, mode), []).append(row)
    columns = min(3, max(1, len(panels)))
    lines = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, ((configuration, mode), rows) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, mode, rows)
        axes.set_title(f"{configuration}: {record.workload['modes'][0]} / {mode}", fontsize=9)
    figure.suptitle(f"Time of a decode step, ratio and 95 % interval; {record.device}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, mode: str, rows: list[Row]) -> None:
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    for index, context in enumerate(sorted({row.context for row in rows})):
        mine = sorted((row for row in rows if row.context == context), key=lambda row: row.batch)
        ratios = [row.ratios[mode]["step_ms"] for row in mine]
        batches = [row.batch for row in mine]
        error = [[r.ratio - r.low for r in ratios], [r.high - r.ratio for r in ratios]]
        axes.errorbar(
            batches, [r.ratio for r in ratios], yerr=error, capsize=3, color=f"C{index}",
            label=f"context {context}",
        )  # fmt: skip
        for row, ratio in zip(mine, ratios, strict=True):
            filled = f"C{index}" if row.status == "ok" else "white"
            axes.plot(row.batch, ratio.ratio, "o", color=f"C{index}", markerfacecolor=filled)
    axes.set_xscale("log", base=2)
    ticks = sorted({row.batch for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("requests")
    axes.set_ylabel("above 1: faster")
    axes.legend(fontsize="small")
