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
from nwor_compile.passes.table import resolve, rows

log = logging.getLogger("nwor_compile")


class NworPass(CustomGraphPass):
    """`rewrite` as an Inductor pass: for `post_grad_custom_pre_pass` and pipelines like vLLM's.

    Args:
        strict: raise where a write must stay direct.
        dump_dir: write each graph before and after, and the report, into this folder.
    """

    def __init__(self, *, strict: bool = False, dump_dir: Path | None = None) -> None:
        self.strict = strict
        self.dump_dir = dump_dir
        self.reports: list[Report] = []

    def __call__(self, graph: Graph) -> None:
        name = f"graph {len(self.reports)}"
        before = str(graph) if self.dump_dir else ""
        report = rewrite(graph, strict=self.strict, name=name)
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
        """Changes with the pass's sources, the op table, the staged ops' schemas and `strict`."""
        table = [
            (row, str(op._schema) if (op := resolve(row.staged)) is not None else None)
            for row in rows()
        ]
        text = f"{sources_hash()}|{table}|strict={self.strict}"
        return hashlib.sha256(text.encode()).hexdigest()

    # A pass is pickled into cache keys and to compile workers: what it reported stays here.
    def __getstate__(self) -> dict[str, Any]:
        return {"strict": self.strict, "dump_dir": self.dump_dir, "reports": []}
