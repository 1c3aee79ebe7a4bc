"""Layers of equal geometry: their caches and staging, as every launch over them takes them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerBatch:
    """Layers of equal geometry that share one slot mapping.

    staged_keys, staged_values: one `[rows, kv_heads, head_size]` a layer, of equal strides; views
    of the caches' own tail blocks where there are such. state: int32 `[layers, 2]`, a view of the
    window's. slots: int64 `[capacity + 1]`, shared by the slot group, in the order of the drafts.
    table: addresses of caches and staging, see `nwor_compile.ops.cache_table`.
    """

    group: str
    names: tuple[str, ...]
    key_caches: list[Tensor]
    value_caches: list[Tensor]
    staged_keys: list[Tensor]
    staged_values: list[Tensor]
    state: Tensor
    slots: Tensor
    table: Tensor

    @functools.cached_property
    def aligned(self) -> bool:
        """Whether every head of every cache begins at a multiple of 16 bytes."""
        caches = (*self.key_caches, *self.value_caches)
        bytes_ = [
            step * cache.element_size() for cache in caches[:: len(self.key_caches)]
            for step in cache.stride() if step != 1
        ]  # fmt: skip
        return all(n % 16 == 0 for n in (*bytes_, *(cache.data_ptr() for cache in caches)))

    @property
    def row_bytes(self) -> int:
        """Bytes of one token row, K and V, over the layers of this batch."""
        per_layer = self.staged_keys[0][0].numel() * self.staged_keys[0].element_size()
        return 2 * per_layer * len(self.names)
