"""vLLM's manager of CUDA graphs, without a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class CudaGraphManager:
    """As vLLM's in the names that are used; a graph is what `model` gave while it was captured."""

    def __init__(self, descs: dict[Any, list[Any]]) -> None:
        """descs: to capture, by mode."""
        self.graphs: dict[Any, Any] = {}
        self._capture_descs = descs
        self.hidden_states: list[int] | None = None

    def capture(self, model: Callable[[], Any], *, fails: bool = False) -> None:
        """Graphs of mode FULL."""
        for mode, descs in self._capture_descs.items():
            if mode.name == "FULL":
                self.graphs |= {desc: model() for desc in descs}
        if self.hidden_states is None:
            self.hidden_states = []
        if fails:
            raise RuntimeError("no memory")

    def run_fullgraph(self, desc: Any) -> Any:
        """The graph."""
        return self.graphs[desc]
