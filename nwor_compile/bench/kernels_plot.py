"""The plot of `nwor bench kernels`: staged path against FlashAttention 3, and commit ratios."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nwor_compile.bench import kernels_attention as names

if TYPE_CHECKING:
    from nwor_compile.bench.kernels_record import KernelsRecord


def draw(record: KernelsRecord, path: Path) -> None:
    """Write the figure to `path`; its suffix chooses the format."""
    # Imported here: it takes a second.
    from matplotlib.figure import Figure

    rows = record.attention
    figure = Figure(figsize=(12, 3 + 0.2 * len(rows)), layout="constrained")
    floors, commits = figure.subplots(1, 2, width_ratios=(3, 1))
    places = range(len(rows))
    paths = (
        (names.PATH_FA3, "o"), (names.PATH_FUSED, "."), (names.DIRECT_PATH, "x"), (names.FA3, "+"),
    )  # fmt: skip
    for name, marker in paths:
        known = [(i, r) for i, r in enumerate(rows) if name in r.runs]
        floors.plot(
            [r.runs[name].median / r.floor_us for _, r in known], [i for i, _ in known], marker,
            label=name,
        )  # fmt: skip
    floors.set_yticks(list(places), [f"{row.group}: {row.case}" for row in rows], fontsize=7)
    floors.set_xscale("log")
    floors.set_xlabel("times the floor (bytes over copy bandwidth, and a launch)")
    floors.invert_yaxis()
    if rows:
        floors.legend(fontsize="small")
    for rate in record.writes[0].ratios if record.writes else ():
        sizes = [row.rows for row in record.writes]
        commits.plot(sizes, [row.ratios[rate] for row in record.writes], "o-", label=rate)
        commits.set_xscale("log")
        commits.set_xlabel("draft rows")
        commits.set_title("vLLM's 32 writes over one commit or a step", fontsize=8)
        commits.legend(fontsize="small")
    figure.suptitle(f"{record.device}, {record.command}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
