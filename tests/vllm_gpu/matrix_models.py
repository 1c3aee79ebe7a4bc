"""Small models of many kinds, as configs alone: their weights are made when they are loaded.

All share the vocabulary of the repository's trained target, so that the same text prompts them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 512
WINDOW = 40  # of sliding layers; no multiple of a block, and shorter than most requests

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}


def model(architecture: str, kind: str, **differences: Any) -> dict[str, Any]:
    """A config.json. Differences from `COMMON`; None leaves a field out."""
    fields = {**COMMON, "rope_parameters": ROPE, **differences}
    return {
        "architectures": [architecture],
        "model_type": kind,
        **{name: value for name, value in fields.items() if value is not None},
    }


def llama(**differences: Any) -> dict[str, Any]:
    """Also the drafter of most targets."""
    return model("LlamaForCausalLM", "llama", **differences)


def heads(query: int, key_value: int, size: int) -> dict[str, Any]:
    """The heads of a layer."""
    return {"num_attention_heads": query, "num_key_value_heads": key_value, "head_dim": size}


MOE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}

TARGETS: dict[str, dict[str, Any]] = {
    "llama64": llama(**heads(8, 2, 64)),
    "llama128mqa": llama(**heads(4, 1, 128)),
    "llama96mha": llama(**heads(4, 4, 96)),
    "llama256": llama(**heads(4, 2, 256)),
    "qwen3": model("Qwen3ForCausalLM", "qwen3", **heads(4, 2, 128), use_sliding_window=False),
    "gemma2": model(
        "Gemma2ForCausalLM", "gemma2", **heads(4, 2, 128), num_hidden_layers=4,
        sliding_window=WINDOW, query_pre_attn_scalar=128, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0, hidden_activation="gelu_pytorch_tanh",
        layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=True,
    ),
    "gemma3": model(
        "Gemma3ForCausalLM", "gemma3_text", **heads(4, 2, 128), num_hidden_layers=6,
        sliding_window=WINDOW, query_pre_attn_scalar=128, hidden_activation="gelu_pytorch_tanh",
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        rope_parameters={
            "sliding_attention": ROPE, "full_attention": {**ROPE, "rope_theta": 1e6},
        },
    ),
    "mistral": model("MistralForCausalLM", "mistral", **heads(4, 2, 128), sliding_window=WINDOW),
    "mimo": model(
        "MiMoForCausalLM", "qwen2", **heads(4, 2, 64), num_nextn_predict_layers=1,
        use_sliding_window=False,
    ),
    "mixtral": model(
        "MixtralForCausalLM", "mixtral", **MOE, num_local_experts=4, num_experts_per_tok=2,
    ),
    "qwen2moe": model(
        "Qwen2MoeForCausalLM", "qwen2_moe", **MOE, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=256, shared_expert_intermediate_size=256, decoder_sparse_step=1,
        norm_topk_prob=False, use_sliding_window=False,
    ),
    "gptoss": model(
        "GptOssForCausalLM", "gpt_oss", **MOE, num_hidden_layers=4, num_local_experts=4,
        num_experts_per_tok=2, sliding_window=WINDOW, intermediate_size=256,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "rope_theta": 10000.0, "rope_type": "yarn", "factor": 2.0, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 1024,
        },
    ),
    "deepseek": model(
        "DeepseekV2ForCausalLM", "deepseek_v2", num_key_value_heads=4, head_dim=None,
        kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=64, qk_rope_head_dim=64,
        v_head_dim=64, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        moe_intermediate_size=256, first_k_dense_replace=1, topk_method="greedy", n_group=1,
        topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=False, moe_layer_freq=1,
    ),
}  # fmt: skip


def drafter(target: dict[str, Any], method: str) -> dict[str, Any] | None:
    """The drafter's config for a target, or None where the method needs no folder of its own.

    EAGLE's heads are Llama's, with the attention heads of the target: then one page size serves
    both, as vLLM wants it.
    """
    same = {
        name: target[name]
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        if name in target
    }
    if method in ("eagle", "eagle3"):
        return llama(**same, num_hidden_layers=1)
    if method == "draft_model":
        # vLLM wants all of a drafter's layers in one group of caches.
        kinds = {"layer_types": ["full_attention"]} if "layer_types" in target else {}
        return {**target, "num_hidden_layers": 1, **kinds}
    return None


def write(name: str, method: str, folder: Path, **differences: Any) -> dict[str, str | None]:
    """Folders of a target and its drafter, as `engine_process.py` takes them. differences: of the
    drafter's config."""
    target = TARGETS[name]
    folders: dict[str, str | None] = {"target": None, "drafter": None}
    for role, made in (("target", target), ("drafter", drafter(target, method))):
        if made is not None:
            config = {**made, **(differences if role == "drafter" else {})}
            place = folder / role
            place.mkdir(parents=True, exist_ok=True)
            (place / "config.json").write_text(json.dumps(config, indent=1))
            folders[role] = str(place)
    return folders
