"""Steps whose kernel goes by contexts are captured twice, and the right graph is replayed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_manager import CudaGraphManager

pytest.importorskip("vllm")
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from nwor_compile.vllm_adapter.context_graphs import ContextGraphs

pytestmark = pytest.mark.vllm


def desc(requests: int | None, tokens: int, mode: Any = CUDAGraphMode.FULL) -> Any:
    return BatchExecutionDescriptor(cg_mode=mode, num_tokens=tokens, num_reqs=requests)


FULL = [desc(8, 40), desc(4, 20), desc(3, 15), desc(2, 10), desc(1, 5), desc(4, 4)]
PIECEWISE = [desc(None, 20, CUDAGraphMode.PIECEWISE)]
BY_CONTEXT = {desc(4, 20), desc(3, 15)}


@pytest.fixture
def made() -> tuple[ContextGraphs, CudaGraphManager]:
    contexts = ContextGraphs()
    manager = CudaGraphManager({CUDAGraphMode.FULL: FULL, CUDAGraphMode.PIECEWISE: PIECEWISE})
    contexts.attach(manager)
    return contexts, manager


def batch(*lengths: int) -> Any:
    return SimpleNamespace(seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32))


def test_the_replayed_graph_is_the_one_for_the_contexts(
    made: tuple[ContextGraphs, CudaGraphManager],
) -> None:
    contexts, manager = made
    manager.capture(lambda: contexts.tokens)
    assert manager.graphs == dict.fromkeys(FULL, 0)
    for first, second, long in ((9, 9, False), (32768, 0, False), (32768, 1, True)):
        contexts.step(batch(first, second, 0, 0))
        for each in FULL:
            assert (manager.run_fullgraph(each) != 0) is (long and each in BY_CONTEXT)


class Runner:
    """As vLLM's V2 runner in the names that are used."""

    cudagraph_manager: CudaGraphManager

    def initialize_kv_cache(self, kv_cache_config: Any) -> str:
        self.cudagraph_manager = CudaGraphManager({CUDAGraphMode.FULL: FULL})
        return "made"

    def prepare_attn(self, input_batch: Any) -> str:
        return "prepared"


def test_a_runner_without_other_hooks_takes_the_same_kernels() -> None:
    contexts, runner = ContextGraphs(), Runner()
    contexts.hook(runner)
    assert runner.initialize_kv_cache(None) == "made"
    runner.cudagraph_manager.capture(lambda: contexts.tokens)
    assert runner.prepare_attn(batch(32768, 1, 0, 0)) == "prepared"
    assert runner.cudagraph_manager.run_fullgraph(desc(4, 20)) != 0
    assert runner.prepare_attn(batch(9, 9, 0, 0)) == "prepared"
    assert runner.cudagraph_manager.run_fullgraph(desc(4, 20)) == 0


def test_a_span_that_does_not_divide_is_captured_as_the_longest_of_them() -> None:
    contexts = ContextGraphs()
    odd = [desc(3, 4), desc(4, 7), desc(3, 47)]  # longest spans: 2, 4 and 17
    manager = CudaGraphManager({CUDAGraphMode.FULL: odd})
    contexts.attach(manager)
    manager.capture(lambda: contexts.tokens)
    assert set(contexts._long.graphs) == set(odd[:2])


def test_where_contexts_are_not_known_the_engines_own_kernel_runs(
    made: tuple[ContextGraphs, CudaGraphManager],
) -> None:
    contexts, manager = made
    manager.capture(lambda: contexts.tokens)
    assert contexts.tokens is None
    assert manager.run_fullgraph(desc(4, 20)) != 0
    for requests in (1, 2, 5):  # fewer and more than go by contexts
        contexts.step(batch(*[1] * requests))
        assert contexts.tokens is None


def test_both_captures_share_buffers_and_a_second_capture_starts_afresh(
    made: tuple[ContextGraphs, CudaGraphManager],
) -> None:
    contexts, manager = made
    manager.capture(lambda: contexts.tokens)
    assert contexts._long.hidden_states is manager.hidden_states
    assert set(contexts._long.graphs) == BY_CONTEXT
    assert manager._capture_descs[CUDAGraphMode.FULL] is FULL
    first = contexts._long
    manager.capture(lambda: contexts.tokens)
    assert contexts._long is not first


def test_a_failed_capture_is_raised_and_leaves_nothing_chosen(
    made: tuple[ContextGraphs, CudaGraphManager],
) -> None:
    contexts, manager = made
    with pytest.raises(RuntimeError, match="no memory"):
        manager.capture(lambda: contexts.tokens, fails=True)
    assert contexts.tokens is None
    assert contexts._long is None


def test_nothing_is_captured_again_where_no_step_goes_by_contexts() -> None:
    contexts = ContextGraphs()
    manager = CudaGraphManager({CUDAGraphMode.FULL: [desc(8, 40)]})
    contexts.attach(manager)
    manager.capture(lambda: contexts.tokens)
    contexts.step(batch(1 << 20))
    assert manager.run_fullgraph(desc(8, 40)) == 0
    assert contexts._long is None
