"""Graphs for short contexts and for long ones, and those without a schedule of FlashAttention's,
replayed by one engine; and what is compiled before they are captured. Needs a GPU and vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]
LIMIT = 400  # tokens of four requests, which the tiny model soon reaches


@pytest.mark.timeout(300)
def test_requests_grow_from_one_set_of_graphs_into_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_process import Engine
    from matrix_cases import CASES
    from matrix_engine import text_prompts

    from nwor_compile import attention_choice
    from nwor_compile.vllm_adapter import context_graphs

    for module in (attention_choice, context_graphs):
        monkeypatch.setattr(module, "FUSED_TOKENS", LIMIT)
    options = CASES["tiny.eagle.auto"].options("auto", tmp_path)
    engine = Engine(options, tmp_path)
    contexts = engine.llm.collective_rpc(_contexts)[0]
    manager = engine.llm.collective_rpc(lambda worker: worker.model_runner.cudagraph_manager)[0]
    captured = {(desc.num_reqs, desc.num_tokens) for desc in contexts._long.graphs}
    assert (4, 20) in captured
    replays = {"short": 0, "long": 0}
    for name, graphs in (("short", manager.graphs), ("long", contexts._long.graphs)):
        for desc in contexts._long.graphs:
            graphs[desc] = Counted(graphs[desc], replays, name)
    made = _count_schedules(monkeypatch)
    prompts = [ids[:40] for ids in text_prompts(4)]
    found = engine.generate({"prompts": prompts, "max_tokens": 200, "audit": True})
    assert replays["short"] > 3
    assert replays["long"] > 3
    # Some for uneven steps, which no graph is for.
    assert replays["long"] <= made.count((4, _span(engine))) < replays["long"] + replays["short"]
    assert found["nwor"]["nwor_windows"] > 10
    assert found["rows"]["accepted"] > 100
    assert not found["rows"].get("rejected_present")
    assert not found["rows"].get("missing")
    print(f"captured again: {sorted(captured)}; replays {replays}; rows {found['rows']}")


@pytest.mark.timeout(300)
def test_no_schedule_is_made_for_graphs_that_hold_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_process import Engine
    from matrix_cases import CASES
    from matrix_engine import text_prompts

    captured = _captured(monkeypatch)
    options = CASES["tiny.eagle.auto"].options("auto", tmp_path)
    options["llm"]["max_num_seqs"] = 8
    engine = Engine(options, tmp_path)
    span = _span(engine)
    # This model's contexts are too short to decide.
    for requests in (1, 2, 4, 8):
        assert captured[requests, requests * span, span] == {requests > 4}
        assert captured[requests, requests, 1] == {False}  # the drafter's passes after its first

    made = _count_schedules(monkeypatch)
    prompts = [ids[:40] for ids in text_prompts(6)]
    for requests in (1, 2, 4, 6):
        made.clear()
        given = {"prompts": prompts[:requests], "max_tokens": 100, "audit": True}
        found = engine.generate(given)
        windows = found["nwor"]["nwor_windows"]
        assert windows > 10
        assert not found["rows"].get("rejected_present")
        assert not found["rows"].get("missing")
        # Uneven steps, which no graph is for, have one too: the last ones of a request.
        scheduled = sum(longest == span for _, longest in made)
        assert scheduled > windows / 2 if requests > 4 else scheduled < windows / 4
        # Nor has the drafter, in three passes a step after its first.
        assert sum(longest == 1 for _, longest in made) < windows / 4


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rotation", ["fused", "separate"])
def test_the_layers_kernels_are_compiled_in_warm_up(
    rotation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine_process import Engine
    from matrix_cases import CASES
    from matrix_engine import text_prompts

    from nwor_compile.ops.kernels import attention, cache_write, merge, rope
    from nwor_compile.vllm_adapter.runner import RunnerHooks

    write = rope._rope_kernel if rotation == "fused" else cache_write._write_kernel
    kernels = attention._attention_kernel, merge.merge_kernel, write
    for kernel in kernels:
        kernel.device_caches.clear()  # of another test's engine

    def compiled() -> list[int]:
        return [len(kernel.device_caches[0][0]) for kernel in kernels]

    after: list[list[int]] = []
    warm_up = RunnerHooks.warm_up

    def noted(hooks: RunnerHooks, *given: Any) -> None:
        warm_up(hooks, *given)
        after.append(compiled())

    monkeypatch.setattr(RunnerHooks, "warm_up", noted)
    options = CASES["tiny.eagle.auto"].options("auto", tmp_path)
    options["nwor"] = {**options["nwor"], "rope": rotation}
    engine = Engine(options, tmp_path)
    (counts,) = after
    print(f"{rotation}: compiled in warm-up: {counts}")
    assert min(counts) > 0
    assert compiled() == counts
    prompts = [ids[:40] for ids in text_prompts(4)]
    for requests in (1, 2, 3, 4):
        engine.generate({"prompts": prompts[:requests], "max_tokens": 50, "audit": True})
    assert compiled() == counts


def _captured(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int, int], set[bool]]:
    """Requests, tokens and longest span of the graphs that are captured from now on, and whether
    their metadata has a schedule."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder

    from nwor_compile.vllm_adapter.cuda_backend import NworFlashMetadataBuilder

    found: dict[tuple[int, int, int], set[bool]] = {}
    capture = NworFlashMetadataBuilder.build_for_cudagraph_capture

    def noted(builder: FlashAttentionMetadataBuilder, step: Any) -> Any:
        metadata = capture(builder, step)
        shape = step.num_reqs, step.num_actual_tokens, step.max_query_len
        found.setdefault(shape, set()).add(metadata.scheduler_metadata is not None)
        return metadata

    monkeypatch.setattr(NworFlashMetadataBuilder, "build_for_cudagraph_capture", noted)
    return found


def _span(engine: Any) -> int:
    """Tokens of a request in a verify step."""
    return 1 + int(engine.llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens)


def _count_schedules(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Requests and longest span of each schedule that is made from now on."""
    from vllm.v1.attention.backends import flash_attn

    made: list[tuple[int, int]] = []
    schedule = flash_attn.get_scheduler_metadata

    def counted(**given: Any) -> Any:
        made.append((given["batch_size"], given["max_seqlen_q"]))
        return schedule(**given)

    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", counted)
    return made


def _contexts(worker: Any) -> Any:
    """What the attention of the worker's layers goes by."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    impls: list[Any] = [getattr(layer, "impl", None) for layer in layers]
    return next(i._contexts for i in impls if getattr(i, "goes_by_contexts", False))


class Counted:
    """A graph whose replays are counted."""

    def __init__(self, graph: Any, replays: dict[str, int], name: str) -> None:
        self.graph, self.replays, self.name = graph, replays, name

    def replay(self) -> None:
        self.replays[self.name] += 1
        self.graph.replay()
