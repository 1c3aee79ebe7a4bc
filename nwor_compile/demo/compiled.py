"""A model as one compiled graph, and how many graphs that took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from nwor_compile.demo.model import Llama
from nwor_compile.demo.paged import PagedCache
from nwor_compile.demo.schedule import Batch, Request, Span, build_batch


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Runner:
    """Calls a model on a batch, compiled with a dynamic number of tokens, or eagerly.

    Args:
        model: called with the plain cache ops, which the options' pass rewrites.
        nwor: compile with our backend, whose pass stages the cache writes; else with Inductor
            alone, which leaves them direct.
        eager: do not compile.
    """

    def __init__(self, model: Llama, *, nwor: bool, eager: bool = False) -> None:
        self.model = model
        self.eager = eager
        self.graphs = 0
        self.compile_seconds = 0.0
        self._call: Callable[..., Tensor] = model
        if not eager and nwor:
            # The backend rather than `compile_options()`: its pass runs, and reports, even where
            # Inductor then finds the rewritten graph in its cache on disk.
            options: dict[str, str | int | bool | Callable[..., Any]]
            options = {"mode": "stage", "strict": True}
            self._call = torch.compile(model, backend="nwor", fullgraph=True, options=options)
        elif not eager:
            self._call = torch.compile(model, fullgraph=True)

    def __call__(self, batch: Batch, cache: PagedCache) -> Tensor:
        """Logits `[T, V]`; the cache is mutated."""
        token_ids, positions, slots, table, lengths, starts = batch.forward_args
        if not self.eager:
            for tensor in (token_ids, positions, slots):
                torch._dynamo.mark_dynamic(tensor, 0)
        before = _graphs()
        with torch.no_grad():
            logits = self._call(
                token_ids, positions, cache.key_caches, cache.value_caches, slots, table, lengths,
                starts,
            )  # fmt: skip
        self.graphs += _graphs() - before
        return logits

    def warm_up(self, cache: PagedCache, rows: int, max_drafts: int) -> None:
        """Compile on a small batch. Its row goes to `cache`, which should not be one in use."""
        start = time.perf_counter()
        request = Request(id=-1, prompt=[1, 2, 3, 4, 5], max_new_tokens=1)
        spans: list[Span | None] = [None] * rows
        spans[0] = Span(request, 0, request.prompt, 0, samples=False)
        self(build_batch(spans, cache, max_drafts), cache)
        cache.release(request.id)
        self.compile_seconds = time.perf_counter() - start
