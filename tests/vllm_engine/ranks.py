"""Phases of a model that is split over tensor-parallel ranks, each a process.

The functions at the end run in the workers, through collective_rpc.
"""

from __future__ import annotations

from typing import Any


class Ranks:
    """Mixed into `Phases`, whose members it uses."""

    llm: Any
    generate: Any

    def inside(self) -> list[dict[str, Any]]:
        """What each worker is made of, and its counters."""
        return list(self.llm.collective_rpc(_describe))

    def phase_split(self) -> dict[str, Any]:
        before = self.inside()
        result = self.generate()
        served = [
            [each.name, each.value if hasattr(each, "value") else each.values]
            for each in self.llm.get_metrics()
            if each.name.startswith("vllm:nwor_")
        ]
        return {**result, "workers": self.inside(), "workers_before": before, "served": served}

    def phase_split_direct(self) -> dict[str, Any]:
        """The rewritten graph without a window."""
        self.llm.collective_rpc(_take_window)
        try:
            return self.generate()
        finally:
            self.llm.collective_rpc(_give_window)

    def phase_split_error(self) -> dict[str, Any]:
        """The error flag goes up on the last rank alone, in every second window."""
        self.llm.collective_rpc(_flag_on_one_rank)
        try:
            return self.phase_split()
        finally:
            self.llm.collective_rpc(_flag_on_none)

    def phase_split_error_alone(self) -> dict[str, Any]:
        """The same, and the ranks do not tell each other."""
        self.llm.collective_rpc(_stop_sharing)
        try:
            return self.phase_split_error()
        finally:
            self.llm.collective_rpc(_share_again)


def _describe(worker: Any) -> dict[str, Any]:
    from nwor_compile.vllm_adapter import ops

    context = worker.model_runner.compilation_config.static_forward_context
    hooks = worker.nwor
    return {
        "rank": worker.rank,
        "twins": ops.executions(),
        "backends": sorted({type(layer.impl).__name__ for layer in context.values()}),
        "scv": None if hooks is None else hooks.window.config.scv,
        "counters": worker.nwor_metrics(),
    }


def no_window(window: Any, metadata: Any) -> None:
    """In the place of `RunnerHooks._begin`: a step with drafts writes as one without."""
    from nwor_compile.vllm_adapter.runner import _block_tables

    window.pass_through(_block_tables(window))


def _take_window(worker: Any) -> None:
    worker.nwor._begin = no_window


def _give_window(worker: Any) -> None:
    del worker.nwor._begin


def _flag_on_one_rank(worker: Any) -> None:
    window = worker.nwor.window
    if worker.rank != worker.vllm_config.parallel_config.tensor_parallel_size - 1:
        return
    commit, calls = window.commit, [0]

    def faulty(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] % 2:
            window.tensors.error.fill_(1)
        return commit(*args)

    window.commit = faulty


def _flag_on_none(worker: Any) -> None:
    worker.nwor.window.__dict__.pop("commit", None)


def _stop_sharing(worker: Any) -> None:
    tensors = worker.nwor.window.tensors
    worker.nwor.sharing = tensors.share_error
    object.__setattr__(tensors, "share_error", None)


def _share_again(worker: Any) -> None:
    object.__setattr__(worker.nwor.window.tensors, "share_error", worker.nwor.sharing)
