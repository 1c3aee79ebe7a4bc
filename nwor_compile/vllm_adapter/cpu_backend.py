"""An attention backend for vLLM's CPU engine that can read staged rows: this package's reference.

Plain, and slower than CPU_ATTN, whose kernel packs the cache in its own way and returns no
log-sum-exp. K and V lie packed in the last dimension of vLLM's `[blocks, kv_heads, block, 2 * D]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from nwor_compile.ops import paged_attention, reshape_and_cache
from nwor_compile.vllm_adapter.packed_cache import split_cache
from nwor_compile.vllm_adapter.staged_write import stored


def use() -> None:
    """Make vLLM's CPU_ATTN mean this backend, in this process."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{NworCPUBackend.__qualname__}")


def forget() -> None:
    """Give CPU_ATTN back: a later engine in this process may run without NWOR."""
    if AttentionBackendEnum.CPU_ATTN.get_path().startswith(__name__):
        AttentionBackendEnum.CPU_ATTN.clear_override()


@dataclass
class NworCPUMetadata:
    """What the reference attention needs of a batch."""

    num_actual_tokens: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor


class NworCPUMetadataBuilder(AttentionMetadataBuilder[NworCPUMetadata]):
    """Hands the common metadata on."""

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> NworCPUMetadata:
        """Trim the block table to the longest request: the reference reads all of it."""
        common = common_attn_metadata
        block_size = self.kv_cache_spec.block_size
        blocks = max(1, -(-common.max_seq_len // block_size))
        return NworCPUMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor[:, :blocks],
            slot_mapping=common.slot_mapping,
        )


class NworCPUImpl(CPUAttentionBackendImpl):
    """Reference attention; with staging, each request's tail is read from it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.alibi_slopes is not None or self.sinks is not None:
            raise NotImplementedError(
                "NWOR's CPU attention has no ALiBi and no sinks: unset the nwor flag for this model"
            )
        if self.attn_type != AttentionType.DECODER:
            raise NotImplementedError(
                f"NWOR's CPU attention is for decoders, this layer is {self.attn_type}: unset the "
                "nwor flag for this model"
            )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: NworCPUMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query `[tokens, heads, D]` to output `[tokens, heads, D]`; see `paged_attention`."""
        if attn_metadata is None:  # warm-up
            return output
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("NWOR's CPU attention does not quantise its output")
        tokens = attn_metadata.num_actual_tokens
        key_cache, value_cache = split_cache(kv_cache)
        block_table, seq_lens = attn_metadata.block_table, attn_metadata.seq_lens
        starts = attn_metadata.query_start_loc
        window = 0 if self.sliding_window == -1 else self.sliding_window
        options = (self.scale, window, float(self.logits_soft_cap), *stored(layer))
        out = paged_attention(
            query[:tokens], key_cache, value_cache, block_table, seq_lens, starts, *options
        )
        output[:tokens].copy_(out)
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """The direct write."""
        key_cache, value_cache = split_cache(kv_cache)
        reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, *stored(layer))


class NworCPUBackend(CPUAttentionBackend):
    """CPU_ATTN's contract with the implementation above, and rows one after the other in memory."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """Each row of a block with all its heads, so that tail blocks are rows of one stride."""
        from vllm.v1.kv_cache_layout import KVCacheLayout  # versions that ask for it have it

        return (KVCacheLayout.LBNHC,)

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """The same, as earlier versions ask for it."""
        return (1, 0, 3, 2, 4) if include_num_layers_dimension else (0, 2, 1, 3)

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Only decoders."""
        return False

    @staticmethod
    def get_impl_cls() -> type[NworCPUImpl]:
        """The implementation."""
        return NworCPUImpl

    @staticmethod
    def get_builder_cls() -> type[NworCPUMetadataBuilder]:
        """The metadata builder."""
        return NworCPUMetadataBuilder
