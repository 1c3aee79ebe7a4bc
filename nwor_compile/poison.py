"""Poison mode: open draft slots hold a marker from begin to commit.

If outputs or acceptance change, something read the cache where it should have read staging. If a
marker is gone at the commit, something wrote a draft row early. NaN is the sharper marker; kernels
that multiply masked values by zero need the finite one (0 x NaN is NaN).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nwor_compile.layer_batch import LayerBatch
from nwor_compile.ops import reshape_and_cache
from nwor_compile.ops.error_bits import EARLY_WRITE
from nwor_compile.ops.layout import FLOAT_DTYPES, decode, logical_key, logical_value

LARGE = 3.0e4  # finite in every cache dtype but fp8 e4m3, where it saturates to 448


def _marker(batch: LayerBatch, poison: str) -> Tensor:
    """One poison row for each staging row, in a dtype that `reshape_and_cache` takes."""
    staged = batch.staged_keys[0]
    stored = staged.dtype
    dtype = stored if stored in FLOAT_DTYPES else torch.float32
    fill = float("nan") if poison == "nan" else LARGE
    shape = (batch.slots.shape[0] - 1, *staged.shape[1:])
    return torch.full((1, *shape[1:]), fill, dtype=dtype, device=staged.device).expand(shape)


def poison_open_slots(batches: Sequence[LayerBatch], poison: str, kv_cache_dtype: str) -> None:
    """Fill the slots of the window's draft rows, in every layer."""
    for batch in batches:
        marker = _marker(batch, poison)
        slots = batch.slots[:-1]
        for key_cache, value_cache in zip(batch.key_caches, batch.value_caches, strict=True):
            reshape_and_cache(marker, marker, key_cache, value_cache, slots, kv_cache_dtype)


def touched_early(batches: Sequence[LayerBatch], poison: str, kv_cache_dtype: str) -> Tensor:
    """int32 `[1]`: EARLY_WRITE if some open slot no longer holds the marker, else 0."""
    touched = torch.zeros(1, dtype=torch.bool, device=batches[0].slots.device)
    for batch in batches:
        slots = batch.slots[:-1]
        for key_cache, value_cache in zip(batch.key_caches, batch.value_caches, strict=True):
            for cache in (logical_key(key_cache), logical_value(key_cache, value_cache)):
                blocks, block_size = cache.shape[:2]
                inside = (slots >= 0) & (slots < blocks * block_size)
                place = torch.where(inside, slots, 0)
                rows = cache[place // block_size, place % block_size].flatten(1)
                wide = decode(rows, kv_cache_dtype, None)
                # fp8 saturates the large marker, so compare with the smallest it can become.
                intact = wide.isnan() if poison == "nan" else wide >= 448.0
                touched |= (inside & ~intact.all(1)).any()
    return touched.to(torch.int32) * EARLY_WRITE
