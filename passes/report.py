"""What the pass did to a graph, and why not more."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


class VisibilityError(RuntimeError):
    """Strict mode: a cache write could not be staged; some reader would not see its rows."""


@dataclass(frozen=True)
class Decision:
    """One cache write: its node, its op, the readers redirected, or why it stays direct.

    fused: the staged write rotates q and k as well. rope: if not, why not.
    """

    node: str
    op: str
    readers: tuple[str, ...] = ()
    reason: str = ""
    fused: bool = False
    rope: str = ""

    @property
    def staged(self) -> bool:
        """True if the write was rewritten."""
        return not self.reason


@dataclass
class Report:
    """The cache writes of one graph. `print(report)` shows a table."""

    graph: str = "graph"
    decisions: list[Decision] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rewritten(self) -> list[Decision]:
        """Writes that are staged now."""
        return [d for d in self.decisions if d.staged]

    @property
    def refused(self) -> list[Decision]:
        """Writes that stay direct."""
        return [d for d in self.decisions if not d.staged]

    def __str__(self) -> str:
        table = Table(title=f"NWOR pass on {self.graph}: {len(self.rewritten)} staged, "
                            f"{len(self.refused)} direct, {self.seconds * 1e3:.1f} ms")  # fmt: skip
        for heading in ("write", "op", "becomes", "readers, or why it stays direct"):
            table.add_column(heading, overflow="fold")
        for decision in self.decisions:
            outcome = "staged" if decision.staged else "direct"
            detail = ", ".join(decision.readers) if decision.staged else decision.reason
            if decision.fused:
                outcome += " with RoPE"
            elif decision.staged and decision.rope:
                detail += f"; RoPE apart: {decision.rope}"
            table.add_row(decision.node, decision.op, outcome, detail)
        console = Console(width=110, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


_recent: collections.deque[Report] = collections.deque(maxlen=64)


def keep(report: Report) -> None:
    """Remember a report for `last_reports`."""
    _recent.append(report)


def last_reports() -> list[Report]:
    """Reports of the passes that ran in this process, oldest first, the last 64.

    A graph that Inductor takes from its cache is not rewritten again, so it has no new report here.
    """
    return list(_recent)
