"""The baselines of `nwor bench kernels`: vLLM's own kernels, where vLLM for CUDA is installed."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

# vLLM's default for graphs (`flash_attn_max_num_splits_for_cuda_graph`), 0 for FA3's own choice on
# the host, which vLLM takes outside of graphs, and others for good measure.
DEFAULT_SPLITS = 32
SPLITS = (0, 1, 2, 4, 8, 16, 32, 64)


@functools.cache
def missing() -> str | None:
    """Why there are no baselines; None if there are."""
    try:
        importlib.import_module("vllm._custom_ops")
        flash = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
        importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    except ImportError as error:
        return f"vLLM cannot be imported: {error}"
    if not hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        return "this vLLM has no CUDA kernels"
    if not flash.FA3_AVAILABLE:
        return f"FlashAttention 3 is missing: {flash.FA3_UNAVAILABLE_REASON}"
    return None


def version() -> str | None:
    """vLLM's version; None where the baselines are missing."""
    return None if missing() else str(importlib.import_module("vllm").__version__)


def write(
    key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor], slots: Tensor, one: Tensor,
    kv_cache_dtype: str = "auto",
) -> None:  # fmt: skip
    """`reshape_and_cache_flash`."""
    torch.ops._C_cache_ops.reshape_and_cache_flash(
        key, value, *caches, slots, kv_cache_dtype, one, one
    )


def rope(
    positions: Tensor, query: Tensor, key: Tensor, head_size: int, cos_sin_cache: Tensor
) -> None:
    """`rotary_embedding`, in place, in GPT-NeoX's order."""
    torch.ops._C.rotary_embedding(positions, query, key, head_size, cos_sin_cache, True)


def schedule(
    lengths: Tensor, starts: Tensor, *, max_query: int, max_length: int, heads: int, kv_heads: int,
    size: int, block_size: int, splits: int, causal: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:  # fmt: skip
    """FA3's scheduler metadata, which vLLM makes once a step."""
    flash = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    metadata: Tensor = flash.get_scheduler_metadata(
        batch_size=lengths.shape[0], max_seqlen_q=max_query, max_seqlen_k=max_length,
        num_heads_q=heads, num_heads_kv=kv_heads, headdim=size, cache_seqlens=lengths,
        qkv_dtype=dtype, cu_seqlens_q=starts, page_size=block_size, causal=causal,
        num_splits=splits,
    )  # fmt: skip
    return metadata


def flash(query: Tensor, caches: tuple[Tensor, Tensor], out: Tensor | None, **options: Any) -> Any:
    """`flash_attn_varlen_func` by FlashAttention 3."""
    interface = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    return interface.flash_attn_varlen_func(
        q=query, k=caches[0], v=caches[1], out=out, fa_version=3, **options
    )


def unified(
    query: Tensor, caches: tuple[Tensor, Tensor], out: Tensor, *, table: Tensor, lengths: Tensor,
    starts: Tensor, max_query: int, max_length: int, scale: float,
) -> None:  # fmt: skip
    """vLLM's Triton attention."""
    module = importlib.import_module("vllm.v1.attention.ops.triton_unified_attention")
    module.unified_attention(
        q=query, k=caches[0], v=caches[1], out=out, cu_seqlens_q=starts, max_seqlen_q=max_query,
        seqused_k=lengths, max_seqlen_k=max_length, softmax_scale=scale, causal=True,
        window_size=(-1, -1), block_table=table, softcap=0.0, q_descale=None, k_descale=None,
        v_descale=None,
    )  # fmt: skip


def merge(out: Tensor, prefix: tuple[Tensor, Tensor], tail: tuple[Tensor, Tensor]) -> None:
    """`merge_attn_states` of (output, LSE) pairs."""
    torch.ops._C.merge_attn_states(out, None, *prefix, *tail, None, None)
