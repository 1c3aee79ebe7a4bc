"""Graphs for short contexts and for long ones, and those without a schedule of FlashAttention's,
replayed by one engine. Needs a GPU and vLLM."""

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
    prompts = [ids[:40] for ids in text_prompts(4)]
    found = engine.generate({"prompts": prompts, "max_tokens": 200, "audit": True})
    assert replays["short"] > 3
    assert replays["long"] > 3
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
    from vllm.v1.attention.backends import flash_attn

    engine = Engine(CASES["tiny.eagle.auto"].options("auto", tmp_path), tmp_path)
    (groups,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.attn_groups)
    builder = groups[0][0].get_metadata_builder(0)
    span = engine.llm.llm_engine.vllm_config.speculative_config.num_speculative_tokens + 1
    assert builder._unscheduled == {(1, span, span), (2, 2 * span, span)}

    made: list[tuple[int, int]] = []
    schedule = flash_attn.get_scheduler_metadata

    def counted(**given: Any) -> Any:
        made.append((given["batch_size"], given["max_seqlen_q"]))
        return schedule(**given)

    monkeypatch.setattr(flash_attn, "get_scheduler_metadata", counted)
    prompts = [ids[:40] for ids in text_prompts(4)]
    for requests in (1, 4):
        made.clear()
        given = {"prompts": prompts[:requests], "max_tokens": 100, "audit": True}
        found = engine.generate(given)
        assert found["nwor"]["nwor_windows"] > 10
        assert not found["rows"].get("rejected_present")
        assert not found["rows"].get("missing")
        verified = [size for size, longest in made if longest == span]
        assert bool(verified) == (requests > 2)
        assert any(longest == 1 for _, longest in made)  # the drafter's steps after its first


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
