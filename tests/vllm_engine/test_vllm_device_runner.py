"""The V2 runner's hooks on a fake runner, with a real window on the CPU. No engine."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nwor_compile.config import NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.ops import stage_kv
from nwor_compile.window import State

pytestmark = pytest.mark.vllm

BLOCKS, HEADS, BLOCK, SIZE = 4, 2, 16, 8
MODEL = ("model.layers.0.attn", "model.layers.1.attn")
DRAFTER = "model.layers.2.attn"


def layer(backend: str = "FLASH_ATTN") -> Any:
    return SimpleNamespace(
        impl=SimpleNamespace(),
        attn_backend=SimpleNamespace(get_name=lambda: backend),
        kv_sharing_target_layer_name=None,
    )


def allocate(context: dict[str, Any], kv_cache_config: Any) -> None:
    """As vLLM does: caches are as large as their tensors, NHD in memory."""
    (tensor,) = kv_cache_config.kv_cache_tensors
    blocks = tensor.size // (BLOCK * HEADS * 2 * SIZE)
    for made in context.values():
        made.kv_cache = torch.zeros(blocks, BLOCK, HEADS, 2 * SIZE).permute(0, 2, 1, 3)


class Speculator:
    """Adds its layer when it is loaded."""

    def __init__(self, context: dict[str, Any]) -> None:
        self.context = context

    def load_model(self, target_model: Any) -> None:
        self.context[DRAFTER] = layer()


TABLE = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.int32)


class Runner:
    """What of a V2 runner the hooks touch. Two requests: 1 + 2 drafts at slots 3 to 5, and a
    prefill of 3 that goes on at slots 16 to 18."""

    def __init__(self, context: dict[str, Any]) -> None:
        self.context = context
        self.speculator = Speculator(context)
        self.kernel_block_sizes = [BLOCK]
        self.block_tables = SimpleNamespace(
            input_block_tables=[torch.zeros(4, 3, dtype=torch.int32)],
            slot_mappings=torch.full((1, 32), -1),
        )
        self.input_buffers = SimpleNamespace(
            query_start_loc=torch.zeros(5, dtype=torch.int32),
            seq_lens=torch.zeros(4, dtype=torch.int32),
            input_ids=torch.zeros(32, dtype=torch.int32),
        )
        self.fail = ""
        self.prepared: Any = None
        # 7 is accepted, 9 is the correction of 8; the prefill samples nothing. What lies past the
        # counts is garbage in V2.
        self.sampled = torch.tensor([[7, 9, 1234], [55, 66, 77]])
        self.num_sampled = torch.tensor([2, 0], dtype=torch.int32)
        self.num_rejected = torch.tensor([1, 0], dtype=torch.int32)

    def initialize_kv_cache(self, kv_cache_config: Any) -> None:
        allocate(self.context, kv_cache_config)

    def prepare_attn(self, input_batch: Any) -> Any:
        return self.prepared or ((TABLE,), torch.tensor([[3, 4, 5, 16, 17, 18, -1, -1]]))

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> Any:
        self.prepare_attn(scheduler_output)
        if self.fail == "forward":
            raise RuntimeError("forward")

    def sample(self, hidden_states: Any, input_batch: Any, grammar_output: Any) -> Any:
        if self.fail == "sample":
            raise RuntimeError("sample")
        output = SimpleNamespace(
            sampled_token_ids=self.sampled,
            num_sampled=self.num_sampled,
            num_rejected=self.num_rejected,
        )
        return output, self.num_sampled, self.num_rejected


def batch(drafts: int = 2) -> Any:
    ends = [0, 1 + drafts, 2 + drafts]
    return SimpleNamespace(
        num_reqs=2,
        num_reqs_after_padding=3,
        num_tokens=6,
        num_tokens_after_padding=8,
        num_draft_tokens=drafts,
        cu_num_logits=torch.tensor(ends, dtype=torch.int32),
        query_start_loc=torch.tensor([0, 3, 6, 6], dtype=torch.int32),
        seq_lens=torch.tensor([6, 3, 0], dtype=torch.int32),
        input_ids=torch.tensor([5, 7, 8, 20, 21, 22, 0, 0], dtype=torch.int32),
    )


@pytest.fixture
def rig() -> Iterator[Any]:
    """Runner and hooks with an idle window over the two layers of the target."""
    from nwor_compile.vllm_adapter.device_runner import DeviceRunnerHooks

    made = make(DeviceRunnerHooks)
    yield made
    made.hooks.close()


def make(kind: Any, backend: str = "FLASH_ATTN") -> Any:
    context = {name: layer(backend) for name in MODEL}
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=context),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=32),
        speculative_config=SimpleNamespace(num_speculative_tokens=2),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    runner = Runner(context)
    hooks = kind(runner, config, NworConfig(mode="stage", strict=True))
    runner.speculator.load_model(None)
    runner.initialize_kv_cache(cache_config())
    return SimpleNamespace(runner=runner, hooks=hooks, context=context)


def cache_config() -> Any:
    group = SimpleNamespace(
        layer_names=[*MODEL, DRAFTER], kv_cache_spec=SimpleNamespace(block_size=BLOCK)
    )
    tensor = SimpleNamespace(size=BLOCKS * BLOCK * HEADS * 2 * SIZE)
    return SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[group], kv_cache_tensors=[tensor])


def write(rig: Any, slots: Sequence[int] = (3, 4, 5, 16, 17, 18, -1, -1)) -> None:
    """The target's staged writes, rows of value token + 1."""
    rows = torch.arange(1.0, len(slots) + 1)[:, None, None].expand(-1, HEADS, SIZE)
    for name in MODEL:
        packed = rig.context[name].kv_cache.permute(0, 2, 1, 3)
        staging = rig.hooks.window.layers[name]
        stage_kv(
            rows, rows, packed[..., :SIZE], packed[..., SIZE:], staging.key, staging.value,
            staging.state, torch.tensor(slots), staging.routing.row_map,
        )  # fmt: skip


def held(rig: Any) -> list[list[float]]:
    """What each layer of the target has at slots 3, 4, 5, 16, 17, 18."""
    return [
        rig.context[name].kv_cache.permute(0, 2, 1, 3).flatten(0, 1)[[3, 4, 5, 16, 17, 18], 0, 0]
        .tolist()
        for name in MODEL
    ]  # fmt: skip


def test_a_step_after_warm_up_is_as_without(rig: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    warm_up = rig.hooks.window.warm_up

    def noted(**more: Any) -> None:
        more["others"]()
        warm_up(**more)

    monkeypatch.setattr(rig.hooks.window, "warm_up", noted)
    rig.hooks.warm_up(given.append)
    assert given == [rig.hooks.window]
    counters = rig.hooks.window.tensors.counters
    assert not counters.any()
    test_a_step_commits_what_was_accepted_and_hands_the_counts_on(rig)


def test_a_step_commits_what_was_accepted_and_hands_the_counts_on(rig: Any) -> None:
    rig.runner.execute_model(batch())
    assert rig.hooks.window.state is State.OPEN
    write(rig)
    assert held(rig) == [[1, 0, 0, 4, 5, 6]] * 2
    output, sampled, rejected = rig.runner.sample("hidden", batch(), None)
    assert held(rig) == [[1, 2, 0, 4, 5, 6]] * 2
    assert rig.hooks.window.state is State.IDLE
    assert (sampled.tolist(), rejected.tolist()) == ([2, 0], [1, 0])
    assert output.num_sampled is sampled
    assert output.num_rejected is rejected
    assert rig.hooks.metrics()["nwor_error_windows"] == 0


def test_the_counts_stay_when_the_next_step_commits(rig: Any) -> None:
    """The engine copies them on a stream that the next step does not wait for."""
    rig.runner.execute_model(batch())
    write(rig)
    _, sampled, rejected = rig.runner.sample("hidden", batch(), None)
    rig.runner.sampled = torch.tensor([[6, 9, 1], [0, 0, 0]])
    rig.runner.execute_model(batch())
    write(rig)
    _, later, _ = rig.runner.sample("hidden", batch(), None)
    assert (sampled.tolist(), rejected.tolist()) == ([2, 0], [1, 0])
    assert later.tolist() == [1, 0]


def at_home(runner: Runner, *, full: bool = True) -> Any:
    """Two requests, as a step of vLLM's: views of the runner's buffers. 1 + 2 drafts at slots 3 to
    5, and 1 + 1 at 16 and 17; unless `full`, the second has two tokens and no draft."""
    buffers, tables = runner.input_buffers, runner.block_tables
    buffers.query_start_loc[:] = torch.tensor([0, 3, 5, 5, 5])
    buffers.seq_lens[:] = torch.tensor([6, 2, 0, 0])
    buffers.input_ids[:5] = torch.tensor([5, 7, 8, 20, 21])
    tables.input_block_tables[0][:3] = TABLE
    tables.slot_mappings[0, :5] = torch.tensor([3, 4, 5, 16, 17])
    runner.prepared = (tables.input_block_tables[0][:3],), tables.slot_mappings[:, :8]
    runner.sampled = torch.tensor([[7, 9, 1234], [21, 66, 77] if full else [66, 77, 88]])
    runner.num_sampled = torch.tensor([2, 2 if full else 1], dtype=torch.int32)
    runner.num_rejected = torch.tensor([1, 0], dtype=torch.int32)
    return SimpleNamespace(
        num_reqs=2,
        num_reqs_after_padding=3,
        num_tokens=5,
        num_tokens_after_padding=8,
        num_draft_tokens=3 if full else 2,
        cu_num_logits=torch.tensor([0, 3, 5 if full else 4], dtype=torch.int32),
        query_start_loc=buffers.query_start_loc[:4],
        seq_lens=buffers.seq_lens[:3],
        input_ids=buffers.input_ids[:8],
    )


def run_at_home(rig: Any, made: Any) -> Any:
    rig.runner.execute_model(made)
    write(rig, (3, 4, 5, 16, 17))
    return rig.runner.sample("hidden", made, None)


def test_a_step_of_decodes_opens_as_recorded_over_the_runners_buffers(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.hooks.warm_up()
    window = rig.hooks.window
    opened: list[Any] = []
    assert not window.tensors.counters.any()
    recorded, anew = window.begin_recorded, window.begin

    def repeat(name: int, requests: int) -> None:
        opened.append((name, requests))
        recorded(name, requests)

    def begin(*given: Any, **more: Any) -> None:
        opened.append("anew")
        anew(*given, **more)

    monkeypatch.setattr(window, "begin_recorded", repeat)
    monkeypatch.setattr(window, "begin", begin)
    full = at_home(rig.runner)
    _, sampled, rejected = run_at_home(rig, full)
    assert opened == [(4, 2)]  # three padded requests: the graph of four
    assert held(rig) == [[1, 2, 0, 4, 5, 0]] * 2
    assert (sampled.tolist(), rejected.tolist()) == ([2, 2], [1, 0])
    assert rig.hooks.metrics()["nwor_error_windows"] == 0

    # A second token without a draft, and tensors elsewhere: as ever.
    _, sampled, _ = run_at_home(rig, at_home(rig.runner, full=False))
    assert opened.pop() == "anew"
    assert sampled.tolist() == [2, 1]
    moved = at_home(rig.runner)
    moved.seq_lens = moved.seq_lens.clone()
    _, sampled, _ = run_at_home(rig, moved)
    assert opened == [(4, 2), "anew"]
    assert sampled.tolist() == [2, 2]
    assert rig.hooks.metrics()["nwor_total_committed"] == 2 + 1 + 2
    assert rig.hooks.metrics()["nwor_error_windows"] == 0


def test_a_step_before_warm_up_opens_anew(rig: Any) -> None:
    _, sampled, _ = run_at_home(rig, at_home(rig.runner))
    assert sampled.tolist() == [2, 2]
    assert held(rig) == [[1, 2, 0, 4, 5, 0]] * 2


def test_staged_rows_lie_in_tail_blocks_and_the_redirected_table_leads_there(rig: Any) -> None:
    for name in MODEL:  # what an earlier step committed at slots 0 to 2
        rig.context[name].kv_cache.permute(0, 2, 1, 3)[0, :3] = 9.0
    rig.runner.execute_model(batch())
    write(rig)
    first = BLOCKS  # two blocks a request: drafts may begin at the end of one
    assert rig.hooks.window.block_tables["0"][:3].tolist() == [[first, 0, 0], [1, 0, 0], [0, 0, 0]]
    for name in MODEL:
        cache = rig.context[name].kv_cache.permute(0, 2, 1, 3)
        assert cache.shape[0] == BLOCKS + 4 * 2
        # Committed rows, the certain row of the step, its drafts.
        assert cache[first, :6, 0, 0].tolist() == [9, 9, 9, 1, 2, 3]
    assert torch.equal(TABLE[0], torch.zeros(3, dtype=torch.int32))  # the engine's is untouched


def test_drafters_layer_is_not_in_the_window(rig: Any) -> None:
    assert set(rig.hooks.window.layers) == set(MODEL)


def test_a_raised_flag_leaves_each_request_its_first_token(rig: Any) -> None:
    rig.runner.sampled = torch.tensor([[6, 9, 1], [0, 0, 0]])  # says accepted, but is no draft
    rig.runner.execute_model(batch())
    write(rig)
    _, sampled, rejected = rig.runner.sample("hidden", batch(), None)
    assert held(rig) == [[1, 0, 0, 4, 5, 6]] * 2
    assert (sampled.tolist(), rejected.tolist()) == ([1, 0], [2, 0])
    assert rig.hooks.metrics()["nwor_error_windows"] == 1


def test_a_layer_that_did_not_stage_raises_the_flag(rig: Any) -> None:
    rig.runner.execute_model(batch())
    _, sampled, rejected = rig.runner.sample("hidden", batch(), None)
    assert (sampled.tolist(), rejected.tolist()) == ([1, 0], [2, 0])


def test_a_step_without_drafts_opens_no_window(rig: Any) -> None:
    rig.runner.execute_model(batch(drafts=0))
    assert rig.hooks.window.state is State.IDLE
    write(rig)
    assert held(rig) == [[1, 2, 3, 4, 5, 6]] * 2
    assert torch.equal(rig.hooks.window.block_tables["0"][:3], TABLE)
    _, sampled, _ = rig.runner.sample("hidden", batch(drafts=0), None)
    assert sampled is rig.runner.num_sampled


@pytest.mark.parametrize("where", ["forward", "sample"])
def test_a_step_that_raises_aborts_its_window(rig: Any, where: str) -> None:
    rig.runner.fail = where
    if where == "forward":
        with pytest.raises(RuntimeError, match=where):
            rig.runner.execute_model(batch())
    else:
        rig.runner.execute_model(batch())
        with pytest.raises(RuntimeError, match=where):
            rig.runner.sample("hidden", batch(), None)
    assert rig.hooks.window.state is State.IDLE


def test_a_step_that_never_sampled_is_aborted_by_the_next(
    rig: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rig.runner.execute_model(batch())
    rig.runner.execute_model(batch())
    assert "never committed" in caplog.text
    write(rig)
    rig.runner.sample("hidden", batch(), None)
    assert held(rig) == [[1, 2, 0, 4, 5, 6]] * 2


def test_a_layer_that_refuses_is_refused() -> None:
    from nwor_compile.vllm_adapter.device_runner import DeviceRunnerHooks

    with pytest.raises(ConfigError, match="FLEX_ATTENTION"):
        make(DeviceRunnerHooks, backend="FLEX_ATTENTION")


def test_a_layout_without_tail_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nwor_compile.vllm_adapter.device_runner import DeviceRunnerHooks

    def heads_first(context: dict[str, Any], kv_cache_config: Any) -> None:
        for made in context.values():
            made.kv_cache = torch.zeros(20, HEADS, BLOCK, 2 * SIZE)

    monkeypatch.setattr(sys.modules[__name__], "allocate", heads_first)
    with pytest.raises(ConfigError, match="NHD"):
        make(DeviceRunnerHooks)


def test_another_runner_is_refused() -> None:
    from nwor_compile.vllm_adapter.device_runner import DeviceRunnerHooks

    with pytest.raises(ConfigError, match="prepare_attn"):
        DeviceRunnerHooks(SimpleNamespace(), SimpleNamespace(), NworConfig())
