"""`NworPass`: the rewrite as an Inductor pass.

A module of its own, because the base class takes a second to import: with it come Inductor and
Dynamo.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from nwor_compile.passes.nwor_pass import rewrite, sources_hash
from nwor_compile.passes.report import Report
from nwor_compile.passes.rope_fuse import FUSED_OPS
from nwor_compile.passes.table import ROTARY_OPS, resolve, rows

log = logging.getLogger("nwor_compile")


def _schema(name: str) -> str | None:
    op = resolve(name)
    return str(op._schema) if op is not None else None


class NworPass(CustomGraphPass):
    """`rewrite` as an Inductor pass: for `post_grad_custom_pre_pass` and pipelines like vLLM's.

    Args:
        strict: raise where a write must stay direct.
        rope: let staged writes do the rotation before them as well.
        dump_dir: write each graph before and after, and the report, into this folder.
    """

    def __init__(
        self, *, strict: bool = False, rope: bool = True, dump_dir: Path | None = None
    ) -> None:
        self.strict, self.rope = strict, rope
        self.dump_dir = dump_dir
        self.reports: list[Report] = []

    def __call__(self, graph: Graph) -> None:
        name = f"graph {len(self.reports)}"
        before = str(graph) if self.dump_dir else ""
        report = rewrite(graph, strict=self.strict, rope=self.rope, name=name)
        self.reports.append(report)
        log.debug("%s", report)
        for decision in report.refused:
            log.warning("NWOR: %s stays direct: %s", decision.node, decision.reason)
        if self.dump_dir:
            self.dump_dir.mkdir(parents=True, exist_ok=True)
            stem = self.dump_dir / name.replace(" ", "_")
            stem.with_suffix(".before.txt").write_text(before)
            stem.with_suffix(".after.txt").write_text(str(graph))
            stem.with_suffix(".report.txt").write_text(str(report))

    def uuid(self) -> str:
        """Changes with the pass's sources and arguments, the op table and the ops' schemas."""
        table: list[tuple[object, str | None]] = [(row, _schema(row.staged)) for row in rows()]
        table += [(op, _schema(op)) for op in (*ROTARY_OPS, *FUSED_OPS)]
        text = f"{sources_hash()}|{table}|strict={self.strict}|rope={self.rope}"
        return hashlib.sha256(text.encode()).hexdigest()

    # A pass is pickled into cache keys and to compile workers: what it reported stays here.
    def __getstate__(self) -> dict[str, Any]:
        return {"strict": self.strict, "rope": self.rope, "dump_dir": self.dump_dir, "reports": []}
