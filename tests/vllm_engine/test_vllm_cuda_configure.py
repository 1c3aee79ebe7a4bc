"""What the flag changes in a CUDA engine's configuration, and what it refuses there. No engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graph_manager import CudaGraphManager

pytestmark = pytest.mark.vllm

RAN = "0.26.0"


def config(**changes: Any) -> Any:
    """A configuration that ran; `changes` by `section__field`."""
    made = SimpleNamespace(
        attention_config=SimpleNamespace(backend=None),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(dtype="torch.bfloat16"),
        lora_config=None,
        parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_size=1),
        speculative_config=SimpleNamespace(method="eagle"),
    )
    for name, value in changes.items():
        section, _, field = name.rpartition("__")
        setattr(getattr(made, section) if section else made, field, value)
    return made


def test_what_ran_is_not_refused() -> None:
    from nwor_compile.vllm_adapter.cuda_configure import cuda_refusals

    assert cuda_refusals(config(), RAN) == []
    flash = SimpleNamespace(name="FLASH_ATTN")
    assert cuda_refusals(config(attention_config__backend=flash), RAN) == []


@pytest.mark.parametrize(
    ("changes", "version", "named"),
    [
        ({}, "0.32.0", "0.32.0"),
        ({"attention_config__backend": SimpleNamespace(name="FLASHINFER")}, RAN, "FLASHINFER"),
        ({"cache_config__cache_dtype": "nvfp4"}, RAN, "nvfp4"),
        ({"model_config__dtype": "torch.float32"}, RAN, "float32"),
        ({"lora_config": object()}, RAN, "LoRA"),
        ({"cache_config__cache_dtype": "fp8_e5m2"}, RAN, "fp8_e5m2"),
        ({"attention_config__backend": SimpleNamespace(name="CPU_ATTN")}, RAN, "CPU_ATTN"),
        ({"parallel_config__data_parallel_size": 2}, RAN, "data parallelism"),
        ({"speculative_config__method": "medusa"}, RAN, "medusa"),
    ],
)
def test_what_never_ran_is_refused_by_name(
    changes: dict[str, Any], version: str, named: str
) -> None:
    from nwor_compile.vllm_adapter.cuda_configure import cuda_refusals

    (problem,) = cuda_refusals(config(**changes), version)
    assert named in problem


def test_batch_invariance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nwor_compile.vllm_adapter.cuda_configure import cuda_refusals

    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    (problem,) = cuda_refusals(config(), RAN)
    assert "VLLM_BATCH_INVARIANT" in problem


def test_drafters_layers_are_known_on_both_runners() -> None:
    from nwor_compile.vllm_adapter.cuda_worker import drafters_layers

    v2 = SimpleNamespace(speculator=SimpleNamespace(draft_attn_layer_names={"a"}))
    v1 = SimpleNamespace(drafter=SimpleNamespace(_draft_attn_layer_names={"b"}))
    assert drafters_layers(v2) == {"a"}
    assert drafters_layers(v1) == {"b"}
    assert drafters_layers(SimpleNamespace(speculator=None)) == set()


@pytest.mark.parametrize("by_inductor", [False, True])
def test_the_graph_is_cut_at_the_twins_as_at_vllms_own_ops(by_inductor: bool) -> None:
    from vllm.config import CompilationConfig

    from nwor_compile.vllm_adapter.cuda_configure import (
        ROPE_STAGE_OP,
        STAGE_OP,
        VERIFY_OP,
        cut_at_twins,
        fuses_rope,
    )

    compilation = CompilationConfig(use_inductor_graph_partition=by_inductor)
    compilation.splitting_ops = ["vllm::unified_attention_with_output"]
    cut_at_twins(compilation)
    cut_at_twins(compilation)
    twins = [VERIFY_OP] if by_inductor else [STAGE_OP, ROPE_STAGE_OP, VERIFY_OP]
    assert compilation.splitting_ops == ["vllm::unified_attention_with_output", *twins]
    assert compilation.use_inductor_graph_partition == by_inductor
    for device in ("cuda", "cpu"):
        engine = SimpleNamespace(
            compilation_config=compilation, device_config=SimpleNamespace(device_type=device)
        )
        assert fuses_rope(engine, "fused") is (device == "cuda" and not by_inductor)
        assert not fuses_rope(engine, "separate")


def test_the_pass_runs_before_the_cut_and_not_after_it_was_forgotten() -> None:
    import torch
    from vllm.compilation import backends

    from nwor_compile.passes.layer_ops import LayerOps
    from nwor_compile.vllm_adapter import graph_split
    from nwor_compile.vllm_adapter.graph_pass import VllmNworPass

    def traced() -> torch.fx.GraphModule:
        graph = torch.fx.Graph()
        q, k, v, out = (graph.placeholder(name) for name in ("q", "k", "v", "out"))
        double = graph.call_function(torch.add, (k, k))
        dep = graph.call_function(
            torch.ops.vllm.unified_kv_cache_update.default, (double, v, "layer")
        )
        graph.call_function(
            torch.ops.vllm.unified_attention_with_output.default, (q, double, v, out, "layer"),
            {"kv_cache_dummy_dep": dep},
        )  # fmt: skip
        graph.output((graph.call_function(torch.add, (out, out)),))
        return torch.fx.GraphModule(torch.nn.Module(), graph)

    cut_at = [
        "vllm::unified_kv_cache_update", "vllm::unified_attention_with_output",
        "nwor::vllm_stage", "nwor::vllm_verify",
    ]  # fmt: skip

    def pieces() -> list[str]:
        _, items = backends.split_graph(traced(), cut_at)
        return [
            str(node.target)
            for item in items
            for node in item.graph.graph.nodes
            if node.op == "call_function"
        ]

    original, before = backends.split_graph, pieces()
    try:
        graph_split.use(VllmNworPass(LayerOps(), strict=True))
        assert [name.replace("nwor.vllm_", "") for name in pieces()] == [
            name.replace(
                "vllm.unified_kv_cache_update", "stage.default".removesuffix(".default")
            ).replace("vllm.unified_attention_with_output", "verify")
            for name in before
        ]
        graph_split.forget()
        assert pieces() == before
    finally:
        graph_split.forget()
        backends.split_graph = original


def test_a_layer_says_why_it_cannot_be_staged() -> None:
    from nwor_compile.vllm_adapter.refusals import layer_refusal

    def layer(backend: str = "FLASH_ATTN", **impl: Any) -> Any:
        named = SimpleNamespace(get_name=lambda: backend)
        return SimpleNamespace(impl=SimpleNamespace(**impl), attn_backend=named)

    for made, named in (
        (layer(), ""), (layer("TRITON_ATTN", kv_cache_dtype="fp8_e5m2"), ""),
        (layer("FLASHINFER"), "FLASHINFER"), (layer(kv_cache_dtype="nvfp4"), "nvfp4"),
        (layer(attn_type="encoder_only"), "encoder_only"),
        (layer(alibi_slopes=[1.0]), "ALiBi"), (layer(sinks=object()), ""),
    ):  # fmt: skip
        reason = layer_refusal("layer", made)
        assert (named in reason) if named else not reason


def test_the_fused_kernel_says_where_it_cannot_run_and_auto_does_without() -> None:
    from vllm.v1.attention.backend import AttentionType

    from nwor_compile.vllm_adapter.cuda_backend import NworFlashImpl

    fine: dict[str, Any] = {
        "alibi_slopes": None, "sinks": None, "attn_type": AttentionType.DECODER,
        "kv_cache_dtype": "auto", "sliding_window": (-1, -1), "logits_soft_cap": 0,
        "dcp_world_size": 1,
    }  # fmt: skip
    for change, named in (
        ({}, ""), ({"alibi_slopes": 1}, "ALiBi"), ({"sinks": 1}, "sinks"),
        ({"attn_type": AttentionType.ENCODER}, "of type"), ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"dcp_world_size": 2}, "context parallelism"),
        ({"sliding_window": (127, 0)}, "sliding"), ({"logits_soft_cap": 30.0}, "soft caps"),
    ):  # fmt: skip
        impl = object.__new__(NworFlashImpl)
        impl.__dict__.update(fine, **change)
        assert impl.attention == "stock"
        reason = impl.choose("fused", 4096)
        assert (named in reason) if named else not reason
        assert not impl.choose("auto", 4096)
        assert impl.attention == ("stock" if named else "auto")


@pytest.mark.parametrize(
    ("requests", "span", "tokens", "fused"),
    [
        (1, 5, 1 << 20, True), (2, 5, 1 << 20, True), (4, 5, 32768, True), (4, 5, 32769, False),
        (5, 5, 5, False), (1, 1, 9, False), (1, 17, 9, False), (64, 5, 64, False),
    ],
)  # fmt: skip
def test_auto_takes_the_fused_kernel_for_small_decode_batches(
    requests: int, span: int, tokens: int, fused: bool
) -> None:
    from nwor_compile.vllm_adapter.context_graphs import ContextGraphs
    from nwor_compile.vllm_adapter.cuda_backend import NworFlashImpl

    impl = object.__new__(NworFlashImpl)
    impl.num_heads, impl.num_kv_heads, impl._longest = 8, 4, 1 << 20
    impl._contexts = contexts = ContextGraphs()
    contexts.tokens = tokens
    metadata = step_of(requests, span)
    for attention, wanted in (("auto", fused), ("stock", False), ("fused", True)):
        impl.attention = attention  # type: ignore[assignment]
        assert impl._fused(metadata) is wanted


def test_auto_without_shared_kv_heads_or_known_contexts() -> None:
    from nwor_compile.vllm_adapter.cuda_backend import NworFlashImpl

    impl = object.__new__(NworFlashImpl)
    impl.attention, impl.num_heads, impl.num_kv_heads = "auto", 8, 4
    metadata = step_of(4, 5)
    impl._longest = 8192
    assert impl._fused(metadata)
    assert not impl.goes_by_contexts
    impl._longest = 8193
    assert not impl._fused(metadata)
    assert impl.goes_by_contexts
    impl._longest, impl.num_kv_heads = 8192, 8
    assert not impl._fused(metadata)
    impl._longest = 1 << 20
    assert not impl.goes_by_contexts


def test_masks_that_the_fused_kernel_does_not_know_go_to_the_engines_own() -> None:
    from nwor_compile.vllm_adapter.cuda_backend import NworFlashImpl

    impl = object.__new__(NworFlashImpl)
    impl.num_heads, impl.num_kv_heads = 8, 4
    others = (step_of(1, 5, causal=False), step_of(1, 5, rswa_prefix_lens=[3]))
    for attention in ("auto", "fused"):
        impl.attention = attention
        assert impl._fused(step_of(1, 5))
    for other in others:
        impl.attention = "auto"
        assert not impl._fused(other)
        impl.attention = "fused"
        with pytest.raises(NotImplementedError, match="causal masks alone"):
            impl._fused(other)


@pytest.mark.parametrize(
    ("attention", "requests", "drafts", "kv_heads", "wanted"),
    [
        ("auto", 6, 2, 4, [(r, r * span) for r in (1, 2, 3, 4) for span in range(2, 17)]),
        ("auto", 6, 2, 8, [(r, r * span) for r in (1, 2) for span in range(2, 17)]),
        ("auto", 1, 48, 4, [(1, span) for span in range(2, 17)]),
        ("fused", 9, 18, 4, [(r, r * s) for r in (1, 2, 3, 4, 8, 9) for s in range(2, 20)]),
        ("stock", 6, 2, 4, []),
    ],
)
def test_kernels_are_called_for_each_form_of_step_that_they_attend_in(
    attention: str,
    requests: int,
    drafts: int,
    kv_heads: int,
    wanted: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nwor_compile.vllm_adapter import cuda_backend

    found: list[tuple[int, int]] = []

    def called(
        query: Any, key: Any, value: Any, table: Any, lengths: Any, starts: Any, scale: float,
        *, out: Any,
    ) -> None:  # fmt: skip
        count = lengths.shape[0]
        assert query.shape == out.shape == (query.shape[0], 8, 16)
        assert query.dtype == out.dtype == torch.bfloat16
        assert key.shape == value.shape == (3, 4, kv_heads, 16)
        assert (table.shape, table.stride()) == ((count, 5), (5, 1))
        assert table.data_ptr() == tables.data_ptr()
        assert starts.shape == (count + 1,)
        assert {tensor.dtype for tensor in (table, lengths, starts)} == {torch.int32}
        assert scale == 0.25
        found.append((count, query.shape[0]))

    monkeypatch.setattr(cuda_backend, "paged_attention", called)
    impl = object.__new__(cuda_backend.NworFlashImpl)
    impl.attention, impl.scale = attention, 0.25  # type: ignore[assignment]
    impl.num_heads, impl.num_kv_heads, impl.head_size = 8, kv_heads, 16
    cache = torch.zeros(3, kv_heads, 4, 32, dtype=torch.bfloat16)
    tables = torch.zeros(requests, 5, dtype=torch.int32)
    sizes = [size for size in (1, 2, 4, 8) if size < requests]
    impl.call_kernels(cache, tables, [*sizes, requests], drafts)
    assert found == wanted


def test_a_worker_calls_its_layers_kernels_for_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from nwor_compile.vllm_adapter import layer_calls
    from nwor_compile.vllm_adapter.cuda_backend import NworFlashImpl
    from nwor_compile.vllm_adapter.cuda_worker import NworGPUWorker

    calls: list[tuple[Any, ...]] = []

    def layer(heads: int, cache: Any, attention: Any = "auto") -> SimpleNamespace:
        impl = object.__new__(NworFlashImpl)
        impl.num_heads, impl.head_size, impl.attention = heads, 16, attention
        impl.call_kernels = lambda *given: calls.append(given)  # type: ignore[method-assign]
        return SimpleNamespace(impl=impl, kv_cache=cache)

    cache, longer = torch.zeros(3, 2, 4, 32), torch.zeros(5, 2, 4, 32)
    turned = torch.zeros(3, 4, 2, 32).transpose(1, 2)
    layers = {
        "first": layer(8, cache),
        "triton": SimpleNamespace(impl=object(), kv_cache=cache),
        "like the first": layer(8, torch.zeros(3, 2, 4, 32)),
        "wider": layer(16, cache),
        "of another group": layer(8, longer),
        "of other strides": layer(8, turned),
        "with a window": layer(8, cache, "stock"),
    }
    staging = {name: SimpleNamespace(block_table=f"table of {name}") for name in layers}
    monkeypatch.setattr(layer_calls, "call_writes", lambda *given: calls.append(given))
    worker = object.__new__(NworGPUWorker)
    compilation = SimpleNamespace(static_forward_context=layers)
    worker.vllm_config = SimpleNamespace(compilation_config=compilation)
    window = SimpleNamespace(layers=staging, sizes=[1, 6], max_drafts=4)
    worker._call_kernels(window)  # type: ignore[arg-type]
    assert calls.pop(0) == (layers, staging)
    found = [(id(cache), *rest) for cache, *rest in calls]
    assert found == [
        (id(cache), "table of first", [1, 6], 4),
        (id(cache), "table of wider", [1, 6], 4),
        (id(longer), "table of of another group", [1, 6], 4),
        (id(turned), "table of of other strides", [1, 6], 4),
        (id(cache), "table of with a window", [1, 6], 4),
    ]


class TestSchedules:
    """NOTE [no schedule] of `cuda_backend`: which steps get none of FlashAttention's."""

    @pytest.fixture
    def built(self, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
        """Of each build by vLLM's own builder, whether it was to make no schedule."""
        from vllm.v1.attention.backends import flash_attn

        built: list[bool] = []

        def build(builder: Any, common_prefix_len: int, step: Any, fast_build: bool = False) -> Any:
            assert common_prefix_len == getattr(step, "prefix", 0)
            built.append(fast_build)
            builder.aot_sliding_window = (-1, -1)
            return step

        def init(builder: Any, **given: Any) -> None:
            builder.__dict__.update(given)

        monkeypatch.setattr(flash_attn.FlashAttentionMetadataBuilder, "build", build)
        monkeypatch.setattr(flash_attn.FlashAttentionMetadataBuilder, "__init__", init)
        return built

    @staticmethod
    def builder(*layers: Any) -> Any:
        """A builder for these layers' implementations that has built once."""
        from nwor_compile.vllm_adapter.cuda_backend import NworFlashMetadataBuilder

        context = {str(i): SimpleNamespace(impl=impl) for i, impl in enumerate(layers)}
        return NworFlashMetadataBuilder(
            layer_names=list(context), rswa_window=None, aot_sliding_window=(-1, -1),
            compilation_config=SimpleNamespace(static_forward_context=context),
            num_heads_q=8, num_heads_kv=4, headdim=64,
        )  # fmt: skip

    @staticmethod
    def layer(attention: str | None, contexts: Any = None, kv_heads: int = 4) -> Any:
        """A target's layer of 8 heads; None: a drafter's."""
        from nwor_compile.vllm_adapter.cuda_backend import NworFlashImpl

        impl = object.__new__(NworFlashImpl)
        impl.num_heads, impl.num_kv_heads, impl.head_size, impl._longest = 8, kv_heads, 64, 1 << 20
        if attention is not None:
            impl.chosen, impl.attention, impl._contexts = True, attention, contexts  # type: ignore[assignment]
        return impl

    @staticmethod
    def step(requests: int, span: int, **more: Any) -> Any:
        plain: dict[str, Any] = {"causal": True, "mm_req_doc_ranges": None}
        return SimpleNamespace(
            num_reqs=requests, num_actual_tokens=requests * span, max_query_len=span,
            **{**plain, **more},
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("requests", "span", "attention", "none"),
        [
            (1, 5, "auto", True), (2, 5, "auto", True), (3, 5, "auto", False),
            (2, 1, "auto", False), (1, 17, "auto", False), (64, 5, "fused", True),
            (1, 5, "stock", False),
        ],
    )  # fmt: skip
    def test_steps_of_a_graph_without_one_get_none(
        self, requests: int, span: int, attention: str, none: bool, built: list[bool]
    ) -> None:
        builder = self.builder(self.layer(attention), self.layer(attention), self.layer(None))
        builder.build(0, self.step(requests, span))  # no graph was captured yet
        builder.build_for_cudagraph_capture(self.step(requests, span))
        builder.build(0, self.step(requests, span))
        assert built == [False, none, none]

    @pytest.mark.parametrize(
        "other",
        [
            {"num_reqs": 3}, {"num_reqs": 1}, {"num_actual_tokens": 9}, {"max_query_len": 6},
            {"max_query_len": 4},
        ],
    )  # fmt: skip
    def test_other_steps_get_theirs(self, other: dict[str, int], built: list[bool]) -> None:
        builder = self.builder(self.layer("auto"), self.layer(None))
        builder.build_for_cudagraph_capture(self.step(2, 5))
        step = self.step(2, 5, prefix=7)
        builder.build(7, SimpleNamespace(**{**vars(step), **other}))
        builder.build(7, step)
        assert built == [True, False, True]

    def test_other_builders_make_theirs(self, built: list[bool]) -> None:
        layers = self.layer("auto"), self.layer(None)
        self.builder(*layers).build_for_cudagraph_capture(self.step(2, 5))
        self.builder(*layers).build(0, self.step(2, 5))
        assert built == [True, False]

    def test_a_drafter_that_wants_none_gets_none(self, built: list[bool]) -> None:
        self.builder(self.layer(None)).build(0, self.step(9, 5), fast_build=True)
        assert built == [True]

    def test_a_model_without_ranges_in_this_step_is_plain(self, built: list[bool]) -> None:
        builder = self.builder(self.layer("auto"))
        builder.build_for_cudagraph_capture(self.step(1, 5, mm_req_doc_ranges={}))
        assert built == [True]

    @pytest.mark.parametrize(
        "change", [{"causal": False}, {"causal": object()}, {"mm_req_doc_ranges": {0: [(1, 2)]}}]
    )
    def test_other_masks_need_one(self, change: dict[str, Any], built: list[bool]) -> None:
        builder = self.builder(self.layer("fused"))
        builder.build_for_cudagraph_capture(self.step(1, 5, **change))
        builder.rswa_window = 128
        builder.build_for_cudagraph_capture(self.step(1, 5))
        assert built == [False, False]

    def test_layers_that_need_one(self, built: list[bool]) -> None:
        drafter, stock, fused = self.layer(None), self.layer("stock"), self.layer("auto")
        mixed = [fused, stock, drafter], [fused, object(), drafter]
        for layers in ([stock], [object()], [drafter, drafter], *mixed):
            self.builder(*layers).build_for_cudagraph_capture(self.step(1, 5))
        assert built == [False] * 5

    def test_a_drafter_of_one_layer_never_has_one(self, built: list[bool]) -> None:
        builder = self.builder(self.layer(None))
        builder.aot_sliding_window = None
        builder.build_for_cudagraph_capture(self.step(9, 1))
        builder.build(0, self.step(9, 1))
        builder.build_for_cudagraph_capture(self.step(300, 5))
        builder.build(0, self.step(7, 33, causal=False))
        assert built == [True] * 4

    @pytest.mark.parametrize("other", [{"num_heads": 4}, {"num_kv_heads": 8}, {"head_size": 32}])
    def test_a_drafter_of_other_heads_keeps_the_one_that_vllm_makes_for_the_targets(
        self, other: dict[str, int], built: list[bool]
    ) -> None:
        drafter = self.layer(None)
        vars(drafter).update(other)
        self.builder(drafter).build(0, self.step(9, 1))
        assert built == [False]

    @pytest.mark.parametrize("drafter_first", [False, True])
    def test_where_contexts_decide_long_ones_have_one(
        self, drafter_first: bool, built: list[bool]
    ) -> None:
        from nwor_compile.vllm_adapter.context_graphs import ContextGraphs

        contexts = ContextGraphs()
        builder = self.builder(self.layer("auto", contexts), self.layer(None))
        short, long = 0, 1 << 40  # as `ContextGraphs` captures them; a drafter's knows of none
        captures = [short, long, None]
        for contexts.tokens in reversed(captures) if drafter_first else captures:
            built.clear()
            builder.build_for_cudagraph_capture(self.step(4, 5))
            assert built == [contexts.tokens != long]
        for tokens, none in ((32768, True), (32769, False), (None, False), (1, True)):
            contexts.tokens = tokens
            built.clear()
            builder.build(0, self.step(4, 5))
            assert built == [none]
        contexts.tokens = None
        builder.build_for_cudagraph_capture(self.step(5, 5))
        assert not built[-1]  # no kernel but FlashAttention's, whatever the contexts

    def test_without_known_contexts_or_shared_kv_heads_they_decide_nothing(
        self, built: list[bool]
    ) -> None:
        from nwor_compile.vllm_adapter.context_graphs import ContextGraphs

        contexts = ContextGraphs()
        alike = self.layer("auto", contexts, kv_heads=8)
        known = self.layer("auto", contexts)
        for layers in ((self.layer("auto"),), (alike,), (known, alike), (alike, known)):
            for contexts.tokens in (0, None):
                builder = self.builder(*layers, self.layer(None))
                builder.build_for_cudagraph_capture(self.step(4, 5))
                builder.build(0, self.step(4, 5))
        assert built == [False] * 16

    def test_where_contexts_are_not_known_the_schedule_is_for_the_graph_that_is_replayed(
        self, built: list[bool]
    ) -> None:
        """In a dummy run of three requests, which all could not exceed the limit together."""
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

        from nwor_compile.vllm_adapter.context_graphs import ContextGraphs

        contexts = ContextGraphs()
        target = self.layer("auto", contexts)
        target._longest = 10000
        builder = self.builder(target, self.layer(None))
        desc = BatchExecutionDescriptor(cg_mode=CUDAGraphMode.FULL, num_tokens=15, num_reqs=3)
        manager = CudaGraphManager({CUDAGraphMode.FULL: [desc]})
        contexts.attach(manager)
        manager.capture(lambda: self.captured(builder, built))
        self.captured(builder, built)  # the drafter's
        for tokens in (None, 30000, 32769):
            contexts.tokens = tokens
            builder.build(0, self.step(3, 5))
            assert built[-1] is manager.run_fullgraph(desc) is (tokens == 30000)

    def captured(self, builder: Any, built: list[bool]) -> bool:
        """Capture a graph; whether it has no schedule."""
        builder.build_for_cudagraph_capture(self.step(3, 5))
        return built[-1]

    def test_the_first_build_settles_the_window_and_so_makes_one(self, built: list[bool]) -> None:
        builder = self.builder(self.layer("auto"))
        builder.aot_sliding_window = None
        builder.build_for_cudagraph_capture(self.step(1, 5))
        builder.build(0, self.step(1, 5))  # no graph is without one yet
        builder.build_for_cudagraph_capture(self.step(1, 5))
        builder.build(0, self.step(1, 5))
        assert built == [False, False, True, True]

    def test_the_backend_has_this_builder(self) -> None:
        from nwor_compile.vllm_adapter import cuda_backend

        builder = cuda_backend.NworFlashBackend.get_builder_cls()
        assert builder is cuda_backend.NworFlashMetadataBuilder


def step_of(requests: int, span: int, causal: bool = True, **masks: Any) -> Any:
    return SimpleNamespace(
        seq_lens=SimpleNamespace(shape=(requests,)), max_query_len=span, causal=causal, **masks
    )


def test_caches_get_tail_blocks_of_each_group_at_their_ends() -> None:
    from nwor_compile.vllm_adapter.spare_blocks import bytes_needed, enlarged

    def spec(block_size: int) -> Any:
        return SimpleNamespace(block_size=block_size, page_size_bytes=100 * block_size)

    tensors = [SimpleNamespace(size=160_000, shared_by=["a", "b"])]
    groups = [SimpleNamespace(kv_cache_spec=spec(16)), SimpleNamespace(kv_cache_spec=spec(16))]
    given = SimpleNamespace(num_blocks=100, kv_cache_tensors=tensors, kv_cache_groups=groups)
    made, first = enlarged(given, max_requests=4, max_drafts=5)
    assert first == [100, 108]  # two blocks a request
    assert made.kv_cache_tensors[0].size == 116 * 1600
    assert made.num_blocks == 100
    assert given.kv_cache_tensors[0].size == 160_000
    assert bytes_needed({"a": spec(16), "b": spec(16)}, 4, 5) == 16 * 1600
