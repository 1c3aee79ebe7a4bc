"""vLLM's cache of one layer: `[blocks, kv_heads, block, 2 * D]` with K before V.

The strides may be in any order; so FLASH_ATTN and CPU_ATTN have it since 0.26.
"""

from __future__ import annotations

from torch import Tensor


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value as `[blocks, block, kv_heads, D]` views of vLLM's packed cache."""
    size = kv_cache.shape[-1] // 2
    rows = kv_cache.permute(0, 2, 1, 3)
    return rows[..., :size], rows[..., size:]


def is_packed(kv_cache: Tensor) -> bool:
    """True for the cache form that `split_cache` reads."""
    return isinstance(kv_cache, Tensor) and kv_cache.dim() == 4
