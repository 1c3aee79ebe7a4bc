"""What each scheme writes and moves, against acceptance: closed forms, and this run's points.

A window has 1 certain row and k drafts, of which a = acceptance * k are accepted; it emits a + 1
tokens. Rows written to the cache, and rows moved in all (a read and a write count one each):

| scheme | rows to the cache | rows moved |
|---|---|---|
| direct | 1 + k | 1 + k |
| write and restore | 1 + k, then k - a old rows | save 2k, write 1 + k, restore 2(k - a) |
| staged | 1 + a | write 1 + k, move 2a |
| staged, fused into RoPE | 1 + a | write 1, move 2a |

Fused, the k staged rows are RoPE's own output, which is written in every scheme and so counted in
none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nwor_compile.demo.result import DemoResult, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Callable[[float, float], float]

CACHE_ROWS: dict[str, Rows] = {
    "direct": lambda k, a: 1 + k,
    "write and restore": lambda k, a: 1 + k + (k - a),
    "staged": lambda k, a: 1 + a,
    "staged, fused into RoPE": lambda k, a: 1 + a,
}
MOVED_ROWS: dict[str, Rows] = {
    "direct": lambda k, a: 1 + k,
    "write and restore": lambda k, a: 2 * k + 1 + k + 2 * (k - a),
    "staged": lambda k, a: 1 + k + 2 * a,
    "staged, fused into RoPE": lambda k, a: 1 + 2 * a,
}
COLOURS = {
    "direct": "tab:red",
    "write and restore": "tab:orange",
    "staged": "tab:blue",
    "staged, fused into RoPE": "tab:green",
}
STYLES = {"staged, fused into RoPE": "--"}


def per_token(rows: Rows, drafts: float, acceptance: float) -> float:
    """Rows a window costs for each token that it emits."""
    accepted = acceptance * drafts
    return rows(drafts, accepted) / (1 + accepted)


def draw(result: DemoResult, path: Path) -> None:
    """Write the figure to `path`; its suffix chooses the format."""
    # Imported here: it takes a second, and most runs draw nothing.
    from matplotlib.figure import Figure

    drafts = result.options.draft_tokens
    row_bytes = result.scenarios[0].staged.row_bytes
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = [i / 100 for i in range(101)]
    for name, colour in COLOURS.items():
        style = STYLES.get(name, "-")
        left.plot(
            grid, [per_token(CACHE_ROWS[name], drafts, x) for x in grid], style, color=colour,
            label=name,
        )  # fmt: skip
        moved = [per_token(MOVED_ROWS[name], drafts, x) * row_bytes / 1024 for x in grid]
        right.plot(grid, moved, style, color=colour, label=name)
    for scenario in result.scenarios:
        for run, name in ((scenario.direct, "direct"), (scenario.staged, "staged")):
            for axes, value in ((left, run.rows_per_token), (right, run.bytes_per_token / 1024)):
                _point(axes, scenario.drafter, run, value, COLOURS[name])
    left.set_title("Cache rows written per emitted token")
    right.set_title("KiB moved in all per emitted token (cache and staging)")
    for axes in (left, right):
        axes.set_xlabel(f"acceptance (curves: {drafts} drafts in every window)")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    handles, labels = left.get_legend_handles_labels()
    seen = dict(zip(labels, handles, strict=True))
    left.legend(seen.values(), seen.keys(), fontsize="small")
    figure.savefig(path, dpi=120)


def _point(axes: Axes, drafter: str, run: RunResult, value: float, colour: str) -> None:
    mean = run.drafted / run.windows if run.windows else 0.0
    label = f"this run, {drafter} drafter (mean {mean:.1f} drafts)"
    axes.plot(
        run.acceptance, value, "o" if drafter == "model" else "^", color=colour,
        markeredgecolor="black", linestyle="none",
        label=label if run.mode == "staged" else None,
    )  # fmt: skip
