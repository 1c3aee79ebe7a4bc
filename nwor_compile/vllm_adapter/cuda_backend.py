"""FLASH_ATTN with a second kernel for small decode batches: this package's verify attention.

vLLM's own kernel reads staged rows through the redirected block table, as every other backend
does, and is what runs in all other cases. Which one runs follows from the step's shape, and for
some shapes from its contexts: those are captured for both, see `context_graphs.py`. Cache, metadata
and CUDA-graph support are FlashAttention's: K and V lie packed in the last dimension of vLLM's
`[blocks, kv_heads, block, 2 * D]`, in any order of strides.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from nwor_compile.attention_choice import ever_depends_on_tokens, prefers_fused
from nwor_compile.ops import paged_attention
from nwor_compile.vllm_adapter.context_graphs import ContextGraphs
from nwor_compile.vllm_adapter.packed_cache import split_cache


def use() -> None:
    """Make vLLM's FLASH_ATTN mean this backend, in this process."""
    path = f"{__name__}.{NworFlashBackend.__qualname__}"
    register_backend(AttentionBackendEnum.FLASH_ATTN, path)
    # The selector keeps the class that it chose for an earlier engine.
    _cached_get_attn_backend.cache_clear()


def forget() -> None:
    """Give FLASH_ATTN back: a later engine in this process may run without NWOR."""
    if AttentionBackendEnum.FLASH_ATTN.get_path().startswith(__name__):
        AttentionBackendEnum.FLASH_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()


MASKS = ("mm_prefix_range_tensor", "rswa_prefix_lens")


class NworFlashImpl(FlashAttentionImpl):
    """FlashAttention, or where `fused` says so this package's kernel, on the target's layers.

    attention: the setting of this name; `stock` until `choose` is called, which is done for the
        target's layers alone.
    """

    attention: Literal["auto", "stock", "fused"] = "stock"
    _longest = 0
    _contexts: ContextGraphs | None = None

    def choose(
        self,
        attention: Literal["auto", "stock", "fused"],
        longest: int,
        contexts: ContextGraphs | None = None,
    ) -> str:
        """Set which kernel runs; return why `fused` cannot, or an empty string.

        longest: tokens that a request may reach. contexts: knows them step by step.
        """
        problem = self._fused_refusal()
        self._longest, self._contexts = longest, contexts
        self.attention = "stock" if problem and attention == "auto" else attention
        return problem if attention == "fused" else ""

    @property
    def goes_by_contexts(self) -> bool:
        """Whether contexts can decide which kernel runs."""
        return self.attention == "auto" and ever_depends_on_tokens(
            self._longest, grouped=self.num_heads > self.num_kv_heads
        )

    def _fused_refusal(self) -> str:
        for present, what in (
            (self.alibi_slopes is not None, "ALiBi"),
            (self.sinks is not None, "attention sinks"),
            (self.attn_type != AttentionType.DECODER, f"attention of type {self.attn_type}"),
            (self.kv_cache_dtype.startswith("fp8"), f"a {self.kv_cache_dtype} cache"),
            (self.sliding_window != (-1, -1), "sliding windows"),
            (self.logits_soft_cap > 0, "soft caps"),
            (self.dcp_world_size > 1, "decode context parallelism"),
        ):
            if present:
                return f'attention "fused" does not support {what} in vLLM; use "auto" or "stock"'
        return ""

    def _fused(self, metadata: Any) -> bool:
        if self.attention == "stock":
            return False
        if self.attention == "fused":
            if not _is_plain(metadata):
                raise NotImplementedError(
                    'attention "fused" knows causal masks alone, and this model asks for another; '
                    'use "auto" or "stock"'
                )
            return True
        requests = metadata.seq_lens.shape[0]
        tokens = None if self._contexts is None else self._contexts.tokens
        preferred = prefers_fused(
            requests,
            metadata.max_query_len,
            requests * self._longest if tokens is None else tokens,
            grouped=self.num_heads > self.num_kv_heads,
        )
        return preferred and _is_plain(metadata)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query `[tokens, heads, D]` to output `[tokens, heads, D]`. In a window the block table of
        `attn_metadata` shows prefix and tail, to either kernel."""
        if attn_metadata is None or not self._fused(attn_metadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("NWOR's attention does not quantise its output")
        key_cache, value_cache = split_cache(kv_cache)
        metadata = attn_metadata
        return paged_attention(
            query, key_cache, value_cache, metadata.block_table, metadata.seq_lens,
            metadata.query_start_loc, self.scale, out=output,
        )  # fmt: skip


def _is_plain(metadata: Any) -> bool:
    """Whether attention is causal and nothing else."""
    # Masks that FlashAttention 4 knows, of models with images or with windows by position; and
    # `causal` may be a tensor, one value a request.
    masked = any(getattr(metadata, name, None) is not None for name in MASKS)
    return metadata.causal is True and not masked


class NworFlashBackend(FlashAttentionBackend):
    """FLASH_ATTN's contract with the implementation above."""

    @staticmethod
    def get_impl_cls() -> type[NworFlashImpl]:
        """The implementation."""
        return NworFlashImpl
