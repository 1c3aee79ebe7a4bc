"""The cases of the support matrix, by name: model, method, then what differs from the defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matrix_models

V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
STOCK_ATTENTION = {"attention": "stock"}

# By default vLLM has Inductor time whether to fuse kernels side by side (norms of q and k), so the
# graphs of two starts may differ, and with them the last bits. Fused without timing, starts agree.
SETTLED = {"combo_kernels": True, "benchmark_combo_kernel": False}

# What an engine of each kind gets as NWOR's settings; None: vLLM as it is.
KINDS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "stage": {"mode": "stage", **STOCK_ATTENTION},
    "separate": {"mode": "stage", **STOCK_ATTENTION, "rope": "separate"},
    "nan": {"mode": "stage", **STOCK_ATTENTION, "poison": "nan"},
    "large": {"mode": "stage", **STOCK_ATTENTION, "poison": "large"},
    "auto": {"mode": "stage", "attention": "auto"},
    "auto off": {"mode": "off", "attention": "auto"},
    # To tell what a difference comes from: all of the package but staging, and vLLM once more.
    "off": {"mode": "off", **STOCK_ATTENTION},
    "again": None,
}
CONTROLS = ("off", "again")
# Their token ids must equal the other kind's.
EQUAL_TO = {
    "stage": "stock", "separate": "stock", "nan": "stock", "large": "stock", "auto": "auto off",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One configuration, run by an engine of each kind.

    Args:
        model: `tiny`, the repository's trained one, or a name of `matrix_models.TARGETS`.
        method, k: of speculation. backend, cache, dtype, block, layout: as vLLM names them.
        runner: the one that serves it in vLLM 0.26 by default, which is asserted.
        expects: text of NWOR's refusal; empty: it must run.
        small_cache: so few blocks of 16 tokens that requests are preempted; 0: enough.
        moe: needs the kernels for mixtures of experts.
        speculative, llm, environment: further settings. drafter: what its config has otherwise
            than `matrix_models.drafter` makes it. kv_scales: of an fp8 cache. soft_cap: of the
            attention's logits. filled: in engines that leave no memory uninitialised.
    """

    name: str
    model: str = "tiny"
    method: str = "eagle"
    k: int = 4
    backend: str = "FLASH_ATTN"
    cache: str = "auto"
    dtype: str = "bfloat16"
    block: int = 16
    layout: str = "NHD"
    runner: str = "v2"
    kinds: tuple[str, ...] = ("stock", "stage")
    expects: str = ""
    small_cache: int = 0
    moe: bool = False
    speculative: Mapping[str, Any] = field(default_factory=dict)
    llm: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    drafter: Mapping[str, Any] = field(default_factory=dict)
    kv_scales: tuple[float, float] | None = None
    soft_cap: float | None = None
    filled: bool = False

    def options(self, kind: str, folder: Path) -> dict[str, Any]:
        """Options of `engine_process.py`; writes the model's folders where it needs any."""
        trained = self.model == "tiny"
        speculative = {"method": self.method, "num_speculative_tokens": self.k, **self.speculative}
        llm: dict[str, Any] = {
            "dtype": self.dtype, "attention_backend": self.backend, "block_size": self.block,
            "kv_cache_dtype": self.cache, "max_model_len": 512, "max_num_seqs": 6,
            "max_num_batched_tokens": max(128, 8 * (1 + self.k)),
            "num_gpu_blocks_override": self._blocks(), "kv_cache_memory_bytes": 1 << 30,
        }  # fmt: skip
        if not trained:
            llm["load_format"] = "scaled_random"
            if self.method != "ngram":
                speculative = {**synthetic(self.k), **speculative}
            llm["compilation_config"] = {"inductor_compile_config": dict(SETTLED)}
        llm |= self.llm
        folders = (
            "tiny"
            if trained
            else matrix_models.write(self.model, self.method, folder, **self.drafter)
        )
        return {
            "model": folders,
            "nwor": KINDS[kind],
            "speculative": speculative,
            "llm": llm,
            "kv_scales": self.kv_scales,
            "soft_cap": self.soft_cap,
            "filled": self.filled,
        }

    def _blocks(self) -> int:
        return 16 * (self.small_cache or 400) // self.block


def synthetic(k: int) -> dict[str, Any]:
    """Acceptance at every position, also of drafts that a random model would never accept."""
    return {
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [round(0.85 ** (i + 1), 4) for i in range(k)],
    }


def _named(**cases: Case) -> dict[str, Case]:
    return {
        name.replace("__", "."): dataclasses.replace(case, name=name.replace("__", "."))
        for name, case in cases.items()
    }


def _case(model: str = "tiny", **differences: Any) -> Case:
    return Case(name="", model=model, **differences)


TRITON: dict[str, Any] = {"backend": "TRITON_ATTN"}
DRAFT: dict[str, Any] = {"method": "draft_model", "runner": "v1"}
OTHER_GROUP: dict[str, Any] = {"kinds": ("stage",), "expects": "hands a draft model the slots"}
NGRAM: dict[str, Any] = {
    "method": "ngram", "runner": "v1",
    "speculative": {"prompt_lookup_max": 3, "prompt_lookup_min": 1},
}  # fmt: skip


def _graphs(mode: str) -> dict[str, Any]:
    return {"llm": {"compilation_config": {"cudagraph_mode": mode}}}


CASES: dict[str, Case] = _named(
    # The trained model and its drafters: acceptance of its own.
    tiny__eagle=_case(kinds=("stock", "stage", "nan")),
    tiny__eagle__large=_case(kinds=("stock", "large"), backend="TRITON_ATTN"),
    tiny__eagle__auto=_case(kinds=("stock", "auto", "auto off")),
    tiny__eagle__auto__v1=_case(kinds=("stock", "auto", "auto off"), runner="v1", environment=V1),
    tiny__eagle__separate=_case(kinds=("stock", "separate")),
    tiny__eagle__k1=_case(k=1),
    tiny__eagle__k8=_case(k=8),
    tiny__eagle__k17=_case(k=17),
    tiny__eagle__k17__nan=_case(k=17, kinds=("stock", "nan")),
    tiny__eagle__b32=_case(block=32),
    tiny__eagle__b64=_case(block=64, k=8),
    tiny__eagle__fp16=_case(dtype="float16"),
    tiny__eagle__fp8=_case(cache="fp8"),
    tiny__eagle__fp8__scales=_case(cache="fp8", kv_scales=(0.25, 0.5)),
    tiny__eagle__triton=_case(**TRITON),
    tiny__eagle__triton__fp16=_case(**TRITON, dtype="float16", k=8),
    tiny__eagle__triton__e4m3=_case(**TRITON, cache="fp8_e4m3", kv_scales=(0.25, 0.5)),
    tiny__eagle__triton__e5m2=_case(**TRITON, cache="fp8_e5m2"),
    tiny__eagle__preempted=_case(small_cache=40),
    tiny__eagle__v1=_case(runner="v1", environment=V1),
    tiny__eagle__v1__sync=_case(runner="v1", environment=V1, llm={"async_scheduling": False}),
    tiny__eagle__sync=_case(llm={"async_scheduling": False}),
    tiny__eagle__partition=_case(
        llm={
            "compilation_config": {
                "use_inductor_graph_partition": True,
                "pass_config": {"fuse_rope_kvcache_cat_mla": False},  # of MLA models; on with it
            }
        }
    ),
    tiny__eagle__graphs_none=_case(**_graphs("NONE")),
    tiny__eagle__graphs_piecewise=_case(**_graphs("PIECEWISE")),
    tiny__eagle__graphs_full_decode=_case(**_graphs("FULL_DECODE_ONLY")),
    tiny__eagle__hnd=_case(layout="HND", kinds=("stage",), expects="NHD memory"),
    tiny__eagle__probabilistic=_case(speculative={"draft_sample_method": "probabilistic"}),
    tiny__eagle__block_verify=_case(speculative={"rejection_sample_method": "block"}),
    tiny__eagle__synthetic=_case(speculative=synthetic(4)),
    tiny__draft=_case(**DRAFT),
    tiny__draft__k8=_case(**DRAFT, k=8),
    tiny__draft__fp8=_case(**DRAFT, cache="fp8"),
    tiny__draft__triton=_case(**DRAFT, **TRITON),
    tiny__draft__preempted=_case(**DRAFT, small_cache=40),
    tiny__ngram=_case(**NGRAM),
    tiny__ngram__k17=_case(**NGRAM, k=17),
    tiny__ngram__triton=_case(**NGRAM, **TRITON),
    # Heads.
    llama64__eagle=_case("llama64"),
    llama64__eagle3=_case("llama64", method="eagle3"),
    llama64__eagle3__triton=_case("llama64", method="eagle3", **TRITON),
    llama64__eagle__fp8=_case("llama64", cache="fp8"),
    llama64__eagle__separate=_case("llama64", kinds=("stock", "separate")),
    llama64__eagle__other_heads=_case("llama64", drafter={"num_key_value_heads": 8}, filled=True),
    llama128mqa__eagle=_case("llama128mqa"),
    llama128mqa__eagle__triton=_case("llama128mqa", **TRITON, k=8),
    llama96mha__eagle=_case("llama96mha"),
    llama96mha__eagle__triton=_case("llama96mha", **TRITON),
    llama256__eagle=_case("llama256"),
    llama256__eagle__fp8=_case("llama256", cache="fp8"),
    llama256__eagle__triton=_case("llama256", **TRITON, dtype="float16"),
    qwen3__eagle=_case("qwen3"),
    qwen3__eagle3=_case("qwen3", method="eagle3"),
    qwen3__eagle__triton=_case("qwen3", **TRITON),
    qwen3__draft=_case("qwen3", **DRAFT),
    # Windows, soft caps, several groups of caches.
    gemma2__draft=_case("gemma2", **DRAFT, **OTHER_GROUP),
    gemma2__ngram=_case("gemma2", **NGRAM),
    gemma3__eagle=_case("gemma3"),
    gemma3__eagle__soft_cap=_case("gemma3", soft_cap=5.0, filled=True),
    gemma3__eagle__triton__soft_cap=_case("gemma3", **TRITON, soft_cap=5.0),
    gemma3__eagle__fp8=_case("gemma3", cache="fp8"),
    gemma3__eagle__k17=_case("gemma3", k=17),
    gemma3__eagle__b32=_case("gemma3", block=32),
    gemma3__eagle__triton=_case("gemma3", **TRITON),
    gemma3__eagle__triton__e4m3=_case("gemma3", **TRITON, cache="fp8_e4m3"),
    gemma3__eagle__nan=_case("gemma3", kinds=("stock", "nan")),
    gemma3__eagle__preempted=_case("gemma3", small_cache=110),
    gemma3__eagle__other_heads=_case("gemma3", drafter={"num_key_value_heads": 4}, filled=True),
    gemma3__draft=_case("gemma3", **DRAFT, **OTHER_GROUP),
    gemma3__ngram=_case("gemma3", **NGRAM),
    mistral__eagle=_case("mistral"),
    mistral__eagle__fp8=_case("mistral", cache="fp8"),
    mistral__eagle__triton=_case("mistral", **TRITON, k=8),
    mistral__draft=_case("mistral", **DRAFT),
    # Other kinds of models and drafters.
    mimo__mtp=_case("mimo", method="mtp", k=3),
    mimo__mtp__triton=_case("mimo", method="mtp", k=1, **TRITON),
    qwen2moe__eagle=_case("qwen2moe", moe=True),
    mixtral__eagle=_case("mixtral", runner="v1", moe=True),
    mixtral__draft=_case("mixtral", **DRAFT, moe=True),
    gptoss__eagle=_case("gptoss", runner="v1", moe=True),
    gptoss__eagle__triton=_case("gptoss", runner="v1", moe=True, **TRITON),
    # Refused by name.
    deepseek__eagle=_case("deepseek", backend="TRITON_MLA", kinds=("stage",), expects="MLA"),
    tiny__flashinfer=_case(backend="FLASHINFER", kinds=("stage",), expects="FLASHINFER"),
    tiny__flex=_case(backend="FLEX_ATTENTION", kinds=("stage",), expects="FLEX_ATTENTION"),
    tiny__int8_per_head=_case(
        **TRITON, cache="int8_per_token_head", kinds=("stage",), expects="int8_per_token_head"
    ),
)
