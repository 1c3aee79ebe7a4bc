"""What the flag changes in a CUDA engine's configuration, and what it refuses there. No engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
        ({"cache_config__cache_dtype": "fp8"}, RAN, "fp8"),
        ({"model_config__dtype": "torch.float16"}, RAN, "float16"),
        ({"lora_config": object()}, RAN, "LoRA"),
        ({"parallel_config__tensor_parallel_size": 2}, RAN, "tensor parallelism"),
        ({"parallel_config__data_parallel_size": 2}, RAN, "data parallelism"),
        ({"speculative_config__method": "ngram"}, RAN, "ngram"),
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


def test_inductor_cuts_at_the_attention_and_keeps_the_write() -> None:
    from vllm.config import CompilationConfig

    from nwor_compile.vllm_adapter.cuda_configure import VERIFY_OP, partition_by_inductor

    compilation = CompilationConfig()
    partition_by_inductor(compilation)
    assert compilation.use_inductor_graph_partition
    assert compilation.splitting_ops_contain_attention()
    assert compilation.splitting_ops is not None
    assert VERIFY_OP in compilation.splitting_ops
    assert not any("kv_cache_update" in op or "stage" in op for op in compilation.splitting_ops)


def test_each_layer_says_why_it_cannot_be_staged() -> None:
    from vllm.v1.attention.backend import AttentionType

    from nwor_compile.vllm_adapter.cuda_backend import NworFlashImpl
    from nwor_compile.vllm_adapter.refusals import layer_refusal

    fine: dict[str, Any] = {
        "alibi_slopes": None, "sinks": None, "attn_type": AttentionType.DECODER,
        "kv_cache_dtype": "auto", "sliding_window": (-1, -1), "logits_soft_cap": 0,
        "dcp_world_size": 1,
    }  # fmt: skip
    for change, named in (
        ({}, ""), ({"alibi_slopes": 1}, "ALiBi"), ({"sinks": 1}, "sinks"),
        ({"attn_type": AttentionType.ENCODER}, "of type"), ({"kv_cache_dtype": "fp8"}, "fp8"),
        ({"sliding_window": (127, 0)}, "sliding"), ({"logits_soft_cap": 30.0}, "soft caps"),
    ):  # fmt: skip
        impl = object.__new__(NworFlashImpl)
        impl.__dict__.update(fine, **change)
        reason = layer_refusal("layer", SimpleNamespace(impl=impl))
        assert (named in reason) if named else not reason
