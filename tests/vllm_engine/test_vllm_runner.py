"""The runner's hooks on a fake V1 runner, and the pass in vLLM's own cache key. No engine."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nwor_compile.config import NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.window import State

pytestmark = pytest.mark.vllm

BLOCKS, HEADS, BLOCK, SIZE = 4, 2, 32, 8

_open_hooks: list[Any] = []


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    while _open_hooks:
        _open_hooks.pop().close()


def layer(shared: str | None = None, backend: str = "CPU_ATTN") -> Any:
    return SimpleNamespace(
        impl=SimpleNamespace(),
        attn_backend=SimpleNamespace(get_name=lambda: backend),
        kv_sharing_target_layer_name=shared,
    )


class Runner:
    """What of a V1 runner the hooks touch."""

    def __init__(self, config: Any, drafter: Any = None) -> None:
        self.config = config
        if drafter is not None:
            self.drafter = drafter
        self.query_start_loc = SimpleNamespace(gpu=torch.tensor([0, 3, 5]))
        self._kernel_block_sizes = [BLOCK]
        table = SimpleNamespace(get_device_tensor=lambda rows: torch.zeros(rows, 3))
        self.input_batch = SimpleNamespace(block_table=[table])
        self.fail = ""
        self.sampled = torch.tensor([[7, 8, 9], [5, -1, -1]])

    def initialize_kv_cache(self, kv_cache_config: Any, is_profiling: bool = False) -> None:
        """As vLLM does: caches as large as their tensors, a row with all its heads together."""
        (tensor,) = kv_cache_config.kv_cache_tensors
        blocks = tensor.size // (BLOCK * HEADS * 2 * SIZE)
        for made in self.config.compilation_config.static_forward_context.values():
            made.kv_cache = torch.zeros(blocks, BLOCK, HEADS, 2 * SIZE).permute(0, 2, 1, 3)

    def _calc_spec_decode_metadata(
        self, num_draft_tokens: Any, cu_num_scheduled_tokens: Any
    ) -> Any:
        return SimpleNamespace(
            cu_num_draft_tokens=torch.tensor(num_draft_tokens).cumsum(0),
            draft_token_ids=torch.tensor([7, 8, 6]),
        )

    def _model_forward(self, input_ids: Any = None, positions: Any = None) -> str:
        if self.fail == "forward":
            raise RuntimeError("forward")
        return "hidden"

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        if self.fail == "sample":
            raise RuntimeError("sample")
        return SimpleNamespace(sampled_token_ids=self.sampled.clone())


def config_of(context: dict[str, Any], ranks: int = 1) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        compilation_config=SimpleNamespace(static_forward_context=context),
        scheduler_config=SimpleNamespace(max_num_seqs=4, max_num_batched_tokens=32),
        speculative_config=SimpleNamespace(num_speculative_tokens=2),
        cache_config=SimpleNamespace(cache_dtype="auto"),
    )


class Drafter:
    """Adds its layers when it is loaded, as vLLM's drafters do."""

    def __init__(self, context: dict[str, Any], layers: dict[str, Any]) -> None:
        self.context, self.layers = context, layers

    def load_model(self, target: Any) -> None:
        self.context.update(self.layers)


def hooked(
    drafter_layers: dict[str, Any] | None = None,
    target: dict[str, Any] | None = None,
    strict: bool = True,
    ranks: int = 1,
) -> tuple[Runner, Any]:
    from nwor_compile.vllm_adapter.runner import RunnerHooks

    context = target or {f"model.layers.{i}.attn": layer() for i in range(2)}
    config = config_of(context, ranks)
    runner = Runner(config, Drafter(context, drafter_layers or {}))
    hooks = RunnerHooks(runner, config, NworConfig(mode="stage", strict=strict))
    _open_hooks.append(hooks)
    runner.drafter.load_model(None)
    return runner, hooks


def groups(context: dict[str, Any]) -> Any:
    group = SimpleNamespace(
        layer_names=list(context), kv_cache_spec=SimpleNamespace(block_size=BLOCK)
    )
    tensor = SimpleNamespace(size=BLOCKS * BLOCK * HEADS * 2 * SIZE)
    return SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[group], kv_cache_tensors=[tensor])


TABLE = torch.tensor([[1, 0, 0], [1, 0, 0]], dtype=torch.int32)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begin a step of 1 + 2 drafts and 1 + 1 drafts."""
    from nwor_compile.vllm_adapter import runner as module

    def begin(runner: Runner) -> Any:
        names = list(runner.config.compilation_config.static_forward_context)
        metadata = SimpleNamespace(block_table=TABLE, seq_lens=torch.tensor([3, 5]))
        context = SimpleNamespace(
            slot_mapping=dict.fromkeys(names, torch.arange(32, 37)),
            attn_metadata=dict.fromkeys(names, metadata),
        )
        monkeypatch.setattr(module, "get_forward_context", lambda: context)
        metadata = runner._calc_spec_decode_metadata([2, 1], [3, 5])
        runner._model_forward()
        return metadata

    return begin


def test_more_drafter_layers_than_the_target_has_numbered_after_it() -> None:
    """The old failure: "staged tokens 0 < accepted 6 for layer 32"."""
    extra = {f"model.layers.{i}.attn": layer() for i in range(2, 7)}
    runner, hooks = hooked(extra)
    runner.initialize_kv_cache(groups(runner.config.compilation_config.static_forward_context))
    assert hooks.window.layer_names == ("model.layers.0.attn", "model.layers.1.attn")


def test_layers_that_share_the_targets_cache_have_no_staging_of_their_own() -> None:
    target = {"a.0": layer(), "a.1": layer(shared="a.0")}
    runner, hooks = hooked(target=target)
    runner.initialize_kv_cache(groups(target))
    assert hooks.window.layer_names == ("a.0",)


def test_a_drafter_that_reads_the_targets_cache_is_refused() -> None:
    runner, _ = hooked({"draft.0": layer(shared="model.layers.1.attn")})
    with pytest.raises(ConfigError, match=r"draft\.0 reads the target's cache"):
        runner.initialize_kv_cache(groups(runner.config.compilation_config.static_forward_context))


class DraftModelProposer(Drafter):
    """Known by vLLM's name for it."""


@pytest.mark.parametrize(
    ("drafter", "group", "refused"),
    [(DraftModelProposer, 1, True), (DraftModelProposer, 0, False), (Drafter, 1, False)],
)
def test_a_draft_model_whose_rows_would_go_to_another_group_is_refused(
    drafter: type[Drafter], group: int, refused: bool
) -> None:
    from nwor_compile.vllm_adapter.runner import RunnerHooks

    context = {"a.0": layer(), "a.1": layer()}
    config = config_of(context)
    runner = Runner(config, drafter(context, {"draft.0": layer()}))
    hooks: Any = RunnerHooks(runner, config, NworConfig(mode="stage", strict=True))
    _open_hooks.append(hooks)
    runner.drafter.load_model(None)
    runner._kernel_block_sizes *= 2
    runner.input_batch.block_table *= 2
    made = groups(context)
    names = [["a.0"], ["a.1"]]
    names[group].append("draft.0")
    spec = made.kv_cache_groups[0].kv_cache_spec
    made.kv_cache_groups = [SimpleNamespace(layer_names=n, kv_cache_spec=spec) for n in names]
    if refused:
        with pytest.raises(ConfigError, match=r"draft\.0 is in KV-cache group 1"):
            runner.initialize_kv_cache(made)
    else:
        runner.initialize_kv_cache(made)
        assert hooks.window.layer_names == ("a.0", "a.1")


def test_a_backend_that_cannot_stage_is_refused_or_runs_direct() -> None:
    target = {"a.0": layer(backend="FLEX_ATTENTION")}
    runner, _ = hooked(target=target)
    with pytest.raises(ConfigError, match=r"layer a\.0: attention backend FLEX_ATTENTION"):
        runner.initialize_kv_cache(groups(target))
    runner, hooks = hooked(target=target, strict=False)
    runner.initialize_kv_cache(groups(target))
    assert hooks.window is None
    assert runner._model_forward() == "hidden"


def test_a_runner_of_another_shape_is_refused() -> None:
    from nwor_compile.vllm_adapter.runner import RunnerHooks

    with pytest.raises(ConfigError, match="does not know this model runner"):
        RunnerHooks(SimpleNamespace(), config_of({}), NworConfig())


def test_profiling_caches_get_no_window() -> None:
    runner, hooks = hooked()
    context = runner.config.compilation_config.static_forward_context
    runner.initialize_kv_cache(groups(context), is_profiling=True)
    assert hooks.window is None


def test_a_model_that_ran_without_a_staged_write_is_refused() -> None:
    runner, hooks = hooked()
    runner.initialize_kv_cache(groups(runner.config.compilation_config.static_forward_context))
    with pytest.raises(ConfigError, match="no staged write ran"):
        hooks.warmed_up()


def test_each_layer_must_have_run_a_staged_write() -> None:
    """Where a fusion swallowed the write of one of them, the others ran."""
    from nwor_compile.vllm_adapter import ops

    runner, hooks = hooked()
    runner.initialize_kv_cache(groups(runner.config.compilation_config.static_forward_context))
    first, second = hooks.window.layer_names
    ops._called.add(first)
    with pytest.raises(ConfigError, match=f"in warm-up for {second}: a fusion"):
        hooks.warmed_up()
    ops._called.update((first, second))
    hooks.warmed_up()
    assert ops.take_called() == set()


def test_caches_made_past_the_hooks_are_refused() -> None:
    _, hooks = hooked()
    with pytest.raises(ConfigError, match="never initialised its caches"):
        hooks.warmed_up()


def opened(runner: Runner, hooks: Any) -> Any:
    runner.initialize_kv_cache(groups(runner.config.compilation_config.static_forward_context))
    return hooks.window


def stage_all(window: Any) -> None:
    """As if every layer had staged its three draft rows."""
    window.tensors.state[:, 0] = 3


def test_warm_up_opens_windows_of_every_size_and_leaves_no_trace() -> None:
    runner, hooks = hooked()
    runner.initialize_kv_cache(groups(hooks.config.compilation_config.static_forward_context))
    window, sizes = hooks.window, []
    window.tensors.counters.fill_(3)
    begin = window.begin

    def noted(**step: Any) -> None:
        sizes.append(step["query_start_loc"].shape[0] - 1)
        begin(**step)

    window.begin = noted
    given: list[Any] = []
    warm_up = window.warm_up

    def warmed(**more: Any) -> None:
        more["others"]()
        warm_up(**more)

    window.warm_up = warmed
    hooks.warm_up(given.append)
    assert given == [window]
    assert set(sizes) == {1, 2, 4}
    assert window.state is State.IDLE
    assert set(window.tensors.counters.tolist()) == {3}
    assert not any(cache.any() for cache in window.tensors.batches[0].key_caches)
    assert (window.tensors.routing.row_map < 0).all()


def test_a_step_commits_what_was_sampled(step: Any) -> None:
    runner, hooks = hooked()
    window = opened(runner, hooks)
    metadata = step(runner)
    assert window.state is State.OPEN
    stage_all(window)
    output = runner._sample(None, metadata)
    assert window.state is State.IDLE
    assert output.sampled_token_ids.tolist() == runner.sampled.tolist()
    counters = window.metrics()
    assert (counters.nwor_total_staged, counters.nwor_total_committed) == (3, 2)
    assert counters.nwor_error_windows == 0


def test_an_error_leaves_the_first_sampled_tokens_alone(step: Any) -> None:
    runner, hooks = hooked()
    window = opened(runner, hooks)
    metadata = step(runner)
    stage_all(window)
    window.tensors.error.fill_(1)
    output = runner._sample(None, metadata)
    assert output.sampled_token_ids.tolist() == [[7, -1, -1], [5, -1, -1]]
    assert window.metrics().nwor_total_committed == 0


def test_ids_that_do_not_fit_emit_no_more_than_was_committed(step: Any) -> None:
    """The window falls back and commits nothing: drafts handed on would have no rows."""
    runner, hooks = hooked()
    window = opened(runner, hooks)
    metadata = step(runner)
    stage_all(window)
    metadata.draft_token_ids = metadata.draft_token_ids.float()
    output = runner._sample(None, metadata)
    assert output.sampled_token_ids.tolist() == [[7, -1, -1], [5, -1, -1]]
    counters = window.metrics()
    assert (counters.nwor_total_committed, counters.nwor_fallback_count) == (0, 1)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_share_their_error_flag(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    from nwor_compile.vllm_adapter import runner as module

    reduced: list[Any] = []
    group = SimpleNamespace(device_group="group", device_communicator=None)
    monkeypatch.setattr(module, "get_tp_group", lambda: group)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, op, group: reduced.append((op, group))
    )
    runner, hooks = hooked(ranks=ranks)
    share = opened(runner, hooks).tensors.share_error
    assert (share is None) == (ranks == 1)
    if share is not None:
        share(torch.zeros(1, dtype=torch.int32))
        assert reduced == [(torch.distributed.ReduceOp.MAX, "group")]


@pytest.mark.parametrize("disabled", [False, True])
def test_ranks_share_it_by_the_communicator_that_vllm_captures(
    monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    """In place, and on the stream that is current when the commit runs, not when it was set up."""
    from nwor_compile.vllm_adapter import runner as module

    reduced: list[Any] = []

    def all_reduce(source: Any, target: Any, *, op: Any, stream: Any) -> None:
        reduced.append((source is target, op, stream))

    nccl = SimpleNamespace(disabled=disabled, all_reduce=all_reduce)
    group = SimpleNamespace(
        device_group="group", device_communicator=SimpleNamespace(pynccl_comm=nccl)
    )
    monkeypatch.setattr(module, "get_tp_group", lambda: group)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda tensor, op, group: reduced.append((op, group))
    )
    runner, hooks = hooked(ranks=2)
    share = opened(runner, hooks).tensors.share_error
    assert share is not None
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "now")
    share(torch.zeros(1, dtype=torch.int32))
    largest = torch.distributed.ReduceOp.MAX
    assert reduced == [(largest, "group") if disabled else (True, largest, "now")]


@pytest.mark.parametrize("place", ["forward", "sample"])
def test_a_step_that_raises_leaves_no_window_open(step: Any, place: str) -> None:
    runner, hooks = hooked()
    window = opened(runner, hooks)
    runner.fail = place
    with pytest.raises(RuntimeError, match=place):
        runner._sample(None, step(runner))
    assert window.state is State.IDLE
    assert (window.tensors.routing.row_map == -1).all()


def test_a_step_that_never_sampled_is_aborted_by_the_next(step: Any) -> None:
    runner, hooks = hooked()
    window = opened(runner, hooks)
    step(runner)
    stage_all(window)
    metadata = step(runner)
    stage_all(window)
    runner._sample(None, metadata)
    assert window.metrics().nwor_windows == 1


def test_staged_rows_lie_in_tail_blocks_and_the_redirected_table_leads_there(step: Any) -> None:
    runner, hooks = hooked()
    window = opened(runner, hooks)
    step(runner)
    # Two requests of two tail blocks each, behind the scheduler's four blocks.
    assert window.block_tables["0"][:2].tolist() == [[BLOCKS, 0, 0], [BLOCKS + 2, 0, 0]]
    assert TABLE.tolist() == [[1, 0, 0], [1, 0, 0]]  # the engine's is untouched


def test_a_step_without_drafts_after_one_that_never_sampled_stages_nothing(step: Any) -> None:
    runner, hooks = hooked()
    window = opened(runner, hooks)
    step(runner)
    runner._model_forward()
    assert window.state is State.IDLE
    assert (window.tensors.routing.row_map == -1).all()
    assert window.block_tables["0"][:2].tolist() == TABLE.tolist()


@pytest.mark.parametrize("warm_up", [False, True])
def test_a_forward_without_drafts_opens_no_window_and_reads_the_engines_table(
    monkeypatch: pytest.MonkeyPatch, step: Any, warm_up: bool
) -> None:
    from nwor_compile.vllm_adapter import runner as module

    runner, hooks = hooked()
    window = opened(runner, hooks)
    runner._sample(None, step(runner))
    redirected = window.block_tables["0"][:2].tolist()
    if warm_up:  # no attention, so nothing reads a table
        context = SimpleNamespace(attn_metadata=None)
        monkeypatch.setattr(module, "get_forward_context", lambda: context)
    runner._model_forward()
    assert window.state is State.IDLE
    assert window.block_tables["0"][:2].tolist() == (redirected if warm_up else TABLE.tolist())


def test_the_pass_and_its_sources_are_in_vllms_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import CompilationConfig

    from nwor_compile.passes.layer_ops import LayerOps
    from nwor_compile.vllm_adapter import graph_pass
    from nwor_compile.vllm_adapter.configure import PASS_SLOT

    def key(options: dict[str, Any]) -> str:
        return CompilationConfig(inductor_compile_config=options).compute_hash()

    def with_pass() -> dict[str, Any]:
        return {PASS_SLOT: graph_pass.VllmNworPass(LayerOps(), strict=True)}

    plain, one, two = key({}), key(with_pass()), key(with_pass())
    assert plain != one
    assert one == two
    monkeypatch.setattr(graph_pass, "sources_hash", lambda: "edited")
    assert key(with_pass()) != one


def test_run_time_variables_are_known_to_vllm_and_not_in_its_cache_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm import envs
    from vllm.config.utils import hash_factors

    from nwor_compile.vllm_adapter.plugin import register

    register()
    before = hash_factors(envs.compile_factors())
    for variable in ("VLLM_SCV_MODE", "VLLM_NWOR_DEBUG"):
        assert variable in envs.environment_variables
        monkeypatch.setenv(variable, "off" if "SCV" in variable else "1")
    assert hash_factors(envs.compile_factors()) == before
