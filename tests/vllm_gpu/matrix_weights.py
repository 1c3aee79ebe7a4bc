"""Random weights under which attention matters; scales for fp8 caches and soft caps by hand.

vLLM's `dummy` weights are within 1e-3: attention's output vanishes in the residual, so an engine
that read stale rows would emit the same tokens. Here every matrix keeps the size of its input, and
the values depend on the parameter's name alone.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = "scaled_random"


def fill(model: nn.Module) -> None:
    """Set all floating parameters, in place."""
    offset_norms = {
        f"{name}.weight" for name, m in model.named_modules() if "GemmaRMSNorm" in type(m).__name__
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                plus_one = "norm" in name and name not in offset_norms
                parameter.copy_(values(name, parameter, plus_one=plus_one))


def values(name: str, like: Tensor, *, plus_one: bool) -> Tensor:
    """A matrix `[..., inputs]` of variance 1 / inputs, less for embeddings, or a model whose logits
    are made with them says the same token for ever; a vector of deviation 0.1, around one or zero
    (Gemma's norms add the one themselves)."""
    generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    if like.dim() >= 2:
        size = 0.1 if "embed_tokens" in name else 1.0
        return (size * noise / like.shape[-1] ** 0.5).to(like)
    return (noise / 10 + plus_one).to(like)


def register() -> None:
    """Make `load_format="scaled_random"` known to vLLM, in this process."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(FORMAT)
    class ScaledRandomLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """Nothing to fetch."""

        def load_weights(self, model: nn.Module, model_config: Any) -> None:
            fill(model)


def cap_logits(cap: float) -> None:
    """Give every attention layer made from here on this soft cap, as Gemma 2's have it: no other
    model of vLLM's has one, and Gemma 2 serves no drafter of the V2 runner's."""
    from vllm.model_executor.layers.attention import Attention

    original = Attention.__init__

    def capped(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **{**kwargs, "logits_soft_cap": cap})

    Attention.__init__ = capped


def scale_caches(key: float, value: float) -> None:
    """Give every attention layer made from here on these fp8 scales instead of 1, as a checkpoint
    with scales does."""
    from vllm.model_executor.layers.attention import Attention

    original = Attention.process_weights_after_loading

    def scaled(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for name, scale in (("_k_scale", key), ("_v_scale", value)):
            getattr(self, name).fill_(scale)
            setattr(self, f"{name}_float", scale)
            if hasattr(self, f"{name}_cpu"):
                getattr(self, f"{name}_cpu").fill_(scale)

    Attention.process_weights_after_loading = scaled
