"""Tail blocks in vLLM: each layer's cache is allocated with blocks that the scheduler never sees.

The scheduler counts `num_blocks` of the KV-cache configuration that it was given. The worker's copy
of it gets larger tensors, and what lies behind block `num_blocks` is staging. The memory is taken
from what the worker reports as available, so no more is used than without NWOR.
"""

from __future__ import annotations

import copy
from typing import Any

from nwor_compile.tail_blocks import tail_blocks_needed


def _pages(spec: Any, max_requests: int, max_drafts: int) -> int:
    """Blocks of the scheduler's size that one group needs. Kernels may cut a block into smaller
    ones, which never need more rows."""
    return tail_blocks_needed(max_requests, max_drafts, spec.block_size)


def bytes_needed(specs: dict[str, Any], max_requests: int, max_drafts: int) -> int:
    """Device memory of the tail blocks of all layers (`specs`: layer name to KVCacheSpec)."""
    return sum(
        spec.page_size_bytes * _pages(spec, max_requests, max_drafts)
        for spec in specs.values()
        if hasattr(spec, "block_size")
    )


def enlarged(kv_cache_config: Any, max_requests: int, max_drafts: int) -> tuple[Any, list[int]]:
    """A copy of a KVCacheConfig whose tensors have tail blocks at their ends, and the first of each
    group's, in blocks of the scheduler's size.

    Groups may share tensors (a block is one group's at a time), so each group has tail blocks of
    its own in all of them.
    """
    config = copy.deepcopy(kv_cache_config)
    first, spare = [], 0
    for group in config.kv_cache_groups:
        first.append(config.num_blocks + spare)
        spare += _pages(group.kv_cache_spec, max_requests, max_drafts)
    blocks = config.num_blocks
    for tensor in config.kv_cache_tensors:
        _enlarge(tensor, blocks, blocks + spare)
    if hasattr(config.kv_cache_tensors[0], "layer_stride"):
        # Later versions make as many blocks as this says; 0.26 as many as the tensors hold.
        config.num_blocks = blocks + spare
    return config, first


def _enlarge(tensor: Any, blocks: int, wanted: int) -> None:
    """Make room for `wanted` blocks where there is room for `blocks`.

    0.26 has a tensor a layer. Later versions place several layers in one allocation, either layer
    after layer, or all layers of a block together; in the first case what is behind a layer moves.
    """
    tensor.size = tensor.size // blocks * wanted
    layer_stride = getattr(tensor, "layer_stride", 0)
    if layer_stride > getattr(tensor, "block_stride", 0):
        tensor.layer_stride = layer_stride // blocks * wanted
        tensor.offset = tensor.offset // blocks * wanted
