"""A Llama model that keeps its K/V in a paged cache, in plain torch.

It calls `nwor.reshape_and_cache` and `nwor.paged_attention`, as any engine would; nothing in here
knows about staging. Under `torch.compile` with NWOR's options the pass rewrites those two calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from nwor_compile.ops import stage_kv_window, verify_attention_window


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a Hugging Face Llama `config.json` that the model needs."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    @classmethod
    def load(cls, path: Path) -> LlamaConfig:
        """Read `config.json`. Raises ValueError for a model that this class cannot run."""
        raw = json.loads(path.read_text())
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = rope.get("rope_type", "default")
        if raw.get("model_type") != "llama" or kind != "default":
            raise ValueError(
                f"{path}: expected a Llama with default RoPE, got model_type="
                f"{raw.get('model_type')!r}, rope_type={kind!r}"
            )
        if not raw.get("tie_word_embeddings") or raw.get("attention_bias") or raw.get("mlp_bias"):
            raise ValueError(f"{path}: expected tied embeddings and no biases")
        heads = raw["num_attention_heads"]
        return cls(
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            rms_norm_eps=raw["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            max_position_embeddings=raw["max_position_embeddings"],
        )


@dataclass(frozen=True)
class CacheOps:
    """The two calls that touch the cache: the write and its reader."""

    write: Callable[..., None]
    attend: Callable[..., Tensor]


PLAIN = CacheOps(torch.ops.nwor.reshape_and_cache.default, torch.ops.nwor.paged_attention.default)
# What the pass turns PLAIN into; the demo uses these by hand only when it does not compile.
STAGED = CacheOps(stage_kv_window, verify_attention_window)


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE, the half-split form. x `[T, heads, D]`; cos, sin `[T, 1, D]`."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Projections and RoPE; the attention itself is the caller's."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, size = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, hidden, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query `[T, H, D]`, key and value `[T, Hkv, D]` of hidden states `[T, hidden]`."""
        query, key, value = (
            proj(x).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(query, cos, sin), rotate(key, cos, sin), value


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One transformer layer; names follow Hugging Face, so its checkpoints load as they are."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)


class Llama(nn.Module):
    """Llama over a flat ragged batch and a paged cache.

    Args:
        config: geometry.
        ops: the cache write and its reader.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig, ops: CacheOps = PLAIN) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.layers: Sequence[Layer] = layers  # type: ignore[assignment]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        half = torch.arange(0, config.head_dim, 2).float() / config.head_dim
        angle = torch.outer(
            torch.arange(config.max_position_embeddings).float(), config.rope_theta**-half
        )
        angle = torch.cat((angle, angle), dim=-1).unsqueeze(1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.requires_grad_(False)

    @classmethod
    def load(cls, folder: Path, ops: CacheOps = PLAIN) -> Llama:
        """A Hugging Face checkpoint folder: `config.json` and `model.safetensors`.

        Weights are stored in bfloat16 and computed with in float32.
        """
        model = cls(LlamaConfig.load(folder / "config.json"), ops)
        weights = load_file(folder / "model.safetensors")
        weights.pop("lm_head.weight", None)  # tied
        model.load_state_dict({k.removeprefix("model."): w.float() for k, w in weights.items()})
        return model.eval()

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        key_caches: list[Tensor],
        value_caches: list[Tensor],
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
    ) -> Tensor:
        """Logits `[T, V]` of one step; writes K/V of its tokens to the cache.

        Args:
            token_ids, positions: `[T]` int64, requests one after the other.
            key_caches, value_caches: one a layer, `[blocks, block_size, Hkv, D]` float32, mutated.
            slot_mapping: `[T]` int64, -1 for padding.
            block_table: `[R, B]` int32. seq_lens: `[R]`. query_start_loc: `[R + 1]`.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        x = self.embed_tokens(token_ids)
        scale = self.config.head_dim**-0.5
        for layer, key_cache, value_cache in zip(
            self.layers, key_caches, value_caches, strict=True
        ):
            query, key, value = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
            self.ops.write(key, value, key_cache, value_cache, slot_mapping)
            out = self.ops.attend(
                query, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale
            )
            x = x + layer.self_attn.o_proj(out.flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return F.linear(self.norm(x), self.embed_tokens.weight)

    def dense(self, token_ids: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Logits `[T, V]` of one sequence, and K, V `[T, Hkv, D]` of every layer, with no cache.

        Uses torch's own attention and none of our ops: what the audit compares a cache with.
        """
        length = token_ids.shape[0]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.embed_tokens(token_ids)
        rows = []
        for layer in self.layers:
            query, key, value = layer.self_attn.qkv(layer.input_layernorm(x), cos, sin)
            rows.append((key, value))
            out = F.scaled_dot_product_attention(
                query.transpose(0, 1).unsqueeze(0),
                key.transpose(0, 1).unsqueeze(0),
                value.transpose(0, 1).unsqueeze(0),
                is_causal=True,
                enable_gqa=True,
            )
            x = x + layer.self_attn.o_proj(out.squeeze(0).transpose(0, 1).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return F.linear(self.norm(x), self.embed_tokens.weight), rows
