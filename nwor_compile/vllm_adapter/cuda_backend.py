"""FLASH_ATTN that can read staged rows: this package's attention kernel for the target's layers,
vLLM's own for a drafter's.

Shapes, cache layout, metadata and CUDA-graph support are FlashAttention's, so everything around the
layer stays as it is. K and V lie packed in the last dimension of vLLM's
`[blocks, kv_heads, block, 2 * D]`, in any order of strides.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from nwor_compile.ops import paged_attention, stage_kv, verify_attention
from nwor_compile.ops.staging import LayerStaging
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


class NworFlashImpl(FlashAttentionImpl):
    """With staging, or where `direct` is set, this package's attention; else FlashAttention.

    direct: on the target's layers in mode `off`, which writes the cache as vLLM does and reads it
        with the kernel of mode `stage`, so that the two can be compared bit for bit.
    """

    direct = False

    def stage_refusal(self) -> str:
        """Why this layer cannot be staged, or was never seen to be; empty if it can."""
        for present, what in (
            (self.alibi_slopes is not None, "ALiBi"),
            (self.sinks is not None, "attention sinks"),
            (self.attn_type != AttentionType.DECODER, f"attention of type {self.attn_type}"),
            (self.dcp_world_size > 1, "decode context parallelism"),
            (self.kv_cache_dtype.startswith("fp8"), f"a {self.kv_cache_dtype} cache"),
            (self.sliding_window != (-1, -1), "sliding windows"),
            (self.logits_soft_cap > 0, "soft caps"),
        ):
            if present:
                return f"NWOR on CUDA does not support {what}; unset the nwor flag for this model"
        return ""

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
        staging: LayerStaging | None = None,
    ) -> Tensor:
        """query `[tokens, heads, D]` to output `[tokens, heads, D]`, padding included (zeros)."""
        if attn_metadata is None or (staging is None and not self.direct):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
                output_block_scale,
            )  # fmt: skip
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("NWOR's attention does not quantise its output")
        key_cache, value_cache = split_cache(kv_cache)
        block_table, seq_lens = attn_metadata.block_table, attn_metadata.seq_lens
        starts = attn_metadata.query_start_loc
        if staging is None:
            out = paged_attention(
                query, key_cache, value_cache, block_table, seq_lens, starts, self.scale
            )
        else:
            routing = staging.routing
            out = verify_attention(
                query, key_cache, value_cache, staging.key, staging.value, block_table, seq_lens,
                starts, routing.num_drafts, routing.tail_start, self.scale,
            )  # fmt: skip
        output.copy_(out)
        return output

    def stage_kv(
        self,
        layer: Any,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        staging: LayerStaging,
    ) -> None:
        """The staged write: certain rows to the cache, draft rows to staging."""
        del layer
        key_cache, value_cache = split_cache(kv_cache)
        stage_kv(
            key, value, key_cache, value_cache, staging.key, staging.value, staging.state,
            slot_mapping, staging.routing.row_map,
        )  # fmt: skip


class NworFlashBackend(FlashAttentionBackend):
    """FLASH_ATTN's contract with the implementation above."""

    @staticmethod
    def get_impl_cls() -> type[NworFlashImpl]:
        """The implementation."""
        return NworFlashImpl
