"""The pass before vLLM cuts the graph.

By default vLLM cuts the graph that Dynamo traced at its cache-write and attention ops, and gives
Inductor the pieces between them (`VllmBackend.__call__`, `split_graph`). No pass of Inductor's then
sees the two ops. So the same pass runs on the whole graph before the cut. The pieces stay those of
an engine without NWOR: the same code, the same rounding, the same time to compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.compilation import backends

from nwor_compile.vllm_adapter import patches
from nwor_compile.vllm_adapter.graph_pass import VllmNworPass

_pass: VllmNworPass | None = None


def use(found: VllmNworPass) -> None:
    """From now on, run `found` on every graph that vLLM compiles in this process."""
    # A graph that comes out of vLLM's cache names the twins before any pass runs.
    from nwor_compile.vllm_adapter import rope_ops  # noqa: F401

    global _pass
    _pass = found
    patches.wrap(backends, "backends.split_graph", _split)


def forget() -> None:
    """A later engine of this process may run without NWOR."""
    global _pass
    _pass = None


def _split(original: Callable[..., Any], graph: Any, splitting_ops: list[str]) -> Any:
    if _pass is not None:
        _pass(graph.graph)
        graph.recompile()
    return original(graph, splitting_ops)
