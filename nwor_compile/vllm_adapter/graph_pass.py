"""The pass as vLLM and Inductor take it: with a uuid, picklable into worker processes."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from nwor_compile.passes.layer_ops import LayerOps, rewrite_layers
from nwor_compile.passes.nwor_pass import sources_hash
from nwor_compile.passes.report import Report

log = logging.getLogger("nwor_compile")


class VllmNworPass(CustomGraphPass):
    """Redirects vLLM's cache-update and attention ops to their staged twins.

    rope: let a staged write do the rotation before it as well.
    """

    def __init__(self, ops: LayerOps, *, strict: bool, rope: bool = False) -> None:
        self.ops = ops
        self.strict = strict
        self.rope = rope
        self.reports: list[Report] = []

    def __call__(self, graph: Graph) -> None:
        import nwor_compile.vllm_adapter.rope_ops  # noqa: F401  registers the twins

        report = rewrite_layers(
            graph, self.ops, strict=self.strict, rope=self.rope,
            name=f"vLLM graph {len(self.reports)}",
        )  # fmt: skip
        if not report.decisions:
            return  # a piece between the layer ops, or a graph that was rewritten before the cut
        self.reports.append(report)
        log.info(
            "NWOR pass: %d writes staged (%d with RoPE), %d direct, %.1f ms",
            len(report.rewritten), sum(d.fused for d in report.rewritten), len(report.refused),
            report.seconds * 1e3,
        )  # fmt: skip
        for decision in report.refused:
            log.warning("NWOR: %s stays direct: %s", decision.node, decision.reason)
        for why, count in Counter(d.rope for d in report.rewritten if d.rope).items():
            log.info("NWOR: RoPE of %d layers stays apart: %s", count, why)

    def is_applicable_for_range(self, compile_range: Any) -> bool:
        """For every range of sizes that vLLM compiles."""
        del compile_range
        return True

    def uuid(self) -> str:
        """Changes with the sources of the passes, the op names, `strict` and `rope`."""
        text = f"{sources_hash()}|{self.ops}|strict={self.strict}|rope={self.rope}"
        return hashlib.sha256(text.encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {"ops": self.ops, "strict": self.strict, "rope": self.rope, "reports": []}


def register_with_vllm() -> None:
    """Let vLLM take `VllmNworPass` for one of its own passes, which its compile mode asks for.

    Both derive from torch's abstract CustomGraphPass; this module must load without vLLM.
    """
    from vllm.compilation.passes.inductor_pass import InductorPass

    InductorPass.register(VllmNworPass)
