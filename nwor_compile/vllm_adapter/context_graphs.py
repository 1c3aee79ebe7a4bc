"""FULL graphs for short contexts and for long ones, on vLLM's V2 runner.

A graph has its kernels recorded, and vLLM picks one by the numbers of requests and tokens. Where
setting `auto` goes by the contexts as well (`attention_choice.py`), a step of that shape is
captured twice: with this package's attention, and with vLLM's own. Which of the two is replayed is
known on the host without a wait: vLLM keeps upper bounds of the contexts there.

Wrapped on the runner: `initialize_kv_cache`, which makes its graph manager, and `prepare_attn`,
where a step's requests are known. On the manager: `capture`, which then captures once more, and
`run_fullgraph`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

from vllm.config.compilation import CUDAGraphMode

from nwor_compile.attention_choice import (
    ALWAYS_REQUESTS,
    FUSED_REQUESTS,
    FUSED_TOKENS,
    depends_on_tokens,
)
from nwor_compile.vllm_adapter import patches


class ContextGraphs:
    """tokens: of all contexts of the step under way, an upper bound; None where not asked for. In
    a dummy run it is still that of the step before, for metadata and graphs alike."""

    tokens: int | None = None

    def __init__(self) -> None:
        self._long: Any = None

    def hook(self, runner: Any) -> None:
        """To a V2 runner that has no caches yet."""

        def initialize_kv_cache(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.attach(runner.cudagraph_manager)
            return result

        def prepare_attn(
            original: Callable[..., Any], input_batch: Any, *args: Any, **kwargs: Any
        ) -> Any:
            self.step(input_batch)
            return original(input_batch, *args, **kwargs)

        patches.wrap(runner, "GPUModelRunner.initialize_kv_cache", initialize_kv_cache)
        patches.wrap(runner, "GPUModelRunner.prepare_attn", prepare_attn)

    def attach(self, manager: Any) -> None:
        """To a `ModelCudaGraphManager` that has captured nothing yet."""
        patches.wrap(manager, "ModelCudaGraphManager.run_fullgraph", self._run)
        patches.wrap(
            manager,
            "ModelCudaGraphManager.capture",
            lambda original, *args, **kwargs: self._capture(manager, original, *args, **kwargs),
        )

    def step(self, input_batch: Any) -> None:
        """A step's requests are known."""
        bounds = input_batch.seq_lens_cpu_upper_bound
        # The sum takes time on the host, and only these batches need it.
        asked = ALWAYS_REQUESTS < bounds.shape[0] <= FUSED_REQUESTS
        self.tokens = sum(bounds.tolist()) if asked else None

    def _capture(
        self, manager: Any, original: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        try:
            self.tokens = 0
            original(*args, **kwargs)
            # The same manager with other graphs: buffers and memory pool are shared.
            long = copy.copy(manager)
            del long.capture, long.run_fullgraph  # the wrappers
            long.graphs = {}
            long._capture_descs = _that_depend(manager._capture_descs)
            self.tokens = sys.maxsize
            if long._capture_descs:
                long.capture(*args, **kwargs)
                self._long = long
        finally:
            self.tokens = None

    def _run(self, original: Callable[[Any], Any], desc: Any) -> Any:
        long = self._long
        short = self.tokens is not None and self.tokens <= FUSED_TOKENS
        if long is None or short or desc not in long.graphs:
            return original(desc)
        return long.run_fullgraph(desc)


def _that_depend(descs: dict[Any, list[Any]]) -> dict[Any, list[Any]]:
    """Of the graphs to capture those of steps where contexts decide."""
    found = [
        desc
        for desc in descs.get(CUDAGraphMode.FULL, [])
        if desc.num_reqs and depends_on_tokens(desc.num_reqs, _longest_span(desc))
    ]
    return {CUDAGraphMode.FULL: found} if found else {}


def _longest_span(desc: Any) -> int:
    """Of the step that a graph is captured with: what does not divide goes to the last request."""
    each, rest = divmod(desc.num_tokens, desc.num_reqs)
    return int(each + rest)
