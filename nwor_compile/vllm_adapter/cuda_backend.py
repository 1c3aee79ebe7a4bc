"""FLASH_ATTN with a second kernel for small decode batches: this package's verify attention.

vLLM's own kernel reads staged rows through the redirected block table, as every other backend
does, and is what runs in all other cases. Which one runs follows from the step's shape, and for
some shapes from its contexts: those are captured for both, see `context_graphs.py`. Cache, metadata
and CUDA-graph support are FlashAttention's: K and V lie packed in the last dimension of vLLM's
`[blocks, kv_heads, block, 2 * D]`, in any order of strides.

NOTE [no schedule]: before each step vLLM's builder makes a schedule for FlashAttention 3, by three
launches, and FULL graphs read it where it lay when they were captured. Where this package's kernel
attends in all of the target's layers only a drafter would read it, in its first pass. So none is
made for such a step: many of them wait for the host. Graphs of the target with this kernel, and all
graphs of a drafter for steps that may have it, are captured without a schedule, and a drafter's
layer makes its own as it runs. Where contexts decide, the graph with FlashAttention's kernel is
captured with a schedule, and its steps get one. A step of another shape always does.

A drafter of one layer, if its heads are as the target's, gets none in its further passes either,
which have a builder of their own: a schedule serves many layers, and one layer makes its own in
less time than three launches take the host. vLLM has it so on its V1 runner (`build_for_drafting`).
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from nwor_compile.attention_choice import (
    FUSED_REQUESTS,
    FUSED_SPAN,
    depends_on_tokens,
    ever_depends_on_tokens,
    prefers_fused,
)
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
        target's layers alone. chosen: it was.
    """

    attention: Literal["auto", "stock", "fused"] = "stock"
    chosen = False
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
        self.chosen = True
        self._longest, self._contexts = longest, contexts
        self.attention = "stock" if problem and attention == "auto" else attention
        return problem if attention == "fused" else ""

    @property
    def goes_by_contexts(self) -> bool:
        """Whether contexts can decide which kernel runs."""
        return self.attention == "auto" and ever_depends_on_tokens(
            self._longest, grouped=self._grouped
        )

    def prefers_fused(self, requests: int, longest_span: int, tokens: int | None = None) -> bool:
        """Whether this package's kernel attends in a step, if its mask is plain.

        tokens: of its contexts together; None: it is the step under way. Where contexts would
            decide and are not known, this kernel does not attend, as `ContextGraphs` then replays
            the graph for long ones.
        """
        if self.attention != "auto":
            return self.attention == "fused"
        if tokens is None:
            tokens = requests * self._longest
            if self._contexts is not None and self.goes_by_contexts:
                known = self._contexts.tokens
                tokens = sys.maxsize if known is None else known
        return prefers_fused(requests, longest_span, tokens, grouped=self._grouped)

    def call_kernels(
        self, kv_cache: Tensor, block_table: Tensor, sizes: Iterable[int], most_drafts: int
    ) -> None:
        """Call this package's kernel once for each way in which steps of drafts, or with a short
        end of a prompt, will, for `compile_together`.

        block_table: int32 `[max_requests, columns]`, to be read by such steps. sizes: numbers of
            requests, beside the few for which `auto` takes this kernel. With `fused` the forms of
            some others may be missing.
        """
        few = range(1, 1 + min(block_table.shape[0], FUSED_REQUESTS))
        spans = range(2, 1 + max(FUSED_SPAN, 1 + most_drafts))
        for requests, span in itertools.product(sorted({*few, *sizes}), spans):
            if not self.prefers_fused(requests, span, tokens=0):
                continue
            query = kv_cache.new_empty(requests * span, self.num_heads, self.head_size)
            lengths = block_table.new_zeros(requests)
            paged_attention(
                query, *split_cache(kv_cache), block_table[:requests], lengths,
                block_table.new_zeros(requests + 1), self.scale, out=torch.empty_like(query),
            )  # fmt: skip

    def lacks_contexts(self, requests: int, longest_span: int) -> bool:
        """Whether contexts would decide and are not known. In a capture this tells a drafter's
        graph: the target's are captured with contexts given."""
        contexts = self._contexts
        unknown = self.goes_by_contexts and contexts is not None and contexts.tokens is None
        return unknown and depends_on_tokens(requests, longest_span)

    @property
    def _grouped(self) -> bool:
        return self.num_heads > self.num_kv_heads

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
        preferred = self.prefers_fused(metadata.seq_lens.shape[0], metadata.max_query_len)
        if preferred and self.attention == "fused" and not _is_plain(metadata):
            raise NotImplementedError(
                'attention "fused" knows causal masks alone, and this model asks for another; '
                'use "auto" or "stock"'
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


class NworFlashMetadataBuilder(FlashAttentionMetadataBuilder):
    """FlashAttention's metadata, without a schedule where nobody needs one: NOTE [no schedule]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Requests, tokens and the longest span of the steps that graphs were captured without for.
        self._unscheduled: set[tuple[int, int, int]] = set()

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> FlashAttentionMetadata:
        """The metadata that a FULL graph records, and the steps that will replay it need."""
        step = common_attn_metadata
        # vLLM's first schedule settles the window that schedules are made for. It is that of a
        # warm-up: a graph is captured with the metadata that is built after it.
        if self.aot_sliding_window is None or not self._may_go_without(step):
            return super().build_for_cudagraph_capture(step)
        self._unscheduled.add(_shape(step))
        return self.build(0, step, fast_build=True)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """A step's metadata. fast_build: vLLM's name for metadata without a schedule."""
        step = common_attn_metadata
        without = (
            fast_build
            or self._one_drafter
            or (_shape(step) in self._unscheduled and self._all_fused(step))
        )
        return super().build(common_prefix_len, step, without)

    def _may_go_without(self, step: Any) -> bool:
        # As `_is_plain` will find it when the graph is captured.
        plain = step.causal is True and self.rswa_window is None and not step.mm_req_doc_ranges
        if not plain or not self._target:
            return False
        shape = step.num_reqs, step.max_query_len
        return all(
            each.prefers_fused(*shape) or each.lacks_contexts(*shape) for each in self._target
        )

    def _all_fused(self, step: Any) -> bool:
        return all(each.prefers_fused(step.num_reqs, step.max_query_len) for each in self._target)

    @functools.cached_property
    def _one_drafter(self) -> bool:
        """Whether this builder is for one layer alone, a drafter's, with as many heads of the same
        size as the target: schedules are made for the target's. To a layer with others they are
        wrong, and without them its drafts would not be those of stock vLLM."""
        context = self.compilation_config.static_forward_context
        impls = [getattr(context[name], "impl", None) for name in self.layer_names]
        if len(impls) != 1 or not isinstance(impls[0], NworFlashImpl) or impls[0].chosen:
            return False
        heads = impls[0].num_heads, impls[0].num_kv_heads, impls[0].head_size
        return heads == (self.num_heads_q, self.num_heads_kv, self.headdim)

    @functools.cached_property
    def _target(self) -> list[NworFlashImpl]:
        """The target's layers among those of this builder, one of each kind; empty where one is not
        this package's."""
        context = self.compilation_config.static_forward_context
        kinds = {}
        for name in self.layer_names:
            impl = getattr(context[name], "impl", None)
            if not isinstance(impl, NworFlashImpl):
                return []
            if impl.chosen:
                kinds[impl.attention, impl._grouped] = impl
        return list(kinds.values())


def _shape(step: Any) -> tuple[int, int, int]:
    return step.num_reqs, step.num_actual_tokens, step.max_query_len


class NworFlashBackend(FlashAttentionBackend):
    """FLASH_ATTN's contract with the implementation and the metadata above."""

    @staticmethod
    def get_impl_cls() -> type[NworFlashImpl]:
        """The implementation."""
        return NworFlashImpl

    @staticmethod
    def get_builder_cls() -> type[NworFlashMetadataBuilder]:
        """What makes its metadata."""
        return NworFlashMetadataBuilder
