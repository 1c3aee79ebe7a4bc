"""Paged caches by strides, the cache dtypes, and the checks that all ops share.

A cache is used through one logical shape, `[blocks, block_size, kv_heads, head_size]`:
- NHD: stored so;
- HND: `stored.permute(0, 2, 1, 3)`;
- K and V packed in the last dimension: `packed[..., :head_size]` and `packed[..., head_size:]`;
- vLLM's 5-D form, key `[blocks, kv_heads, head_size/x, block_size, x]` with value
  `[blocks, kv_heads, head_size, block_size]`, recognised by its rank.
Only strides differ, so no op copies a cache to use it. Slot s is row (s // block_size,
s % block_size).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

FP8_DTYPES: Final = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
FLOAT_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)


def cache_dtype(kv_cache_dtype: str, model_dtype: torch.dtype) -> torch.dtype:
    """The element dtype of a cache. Raises ValueError for an unknown name."""
    if kv_cache_dtype == "auto":
        return model_dtype
    if kv_cache_dtype not in FP8_DTYPES:
        raise ValueError(
            f"kv_cache_dtype: expected one of auto, {', '.join(FP8_DTYPES)}, got {kv_cache_dtype!r}"
        )
    return FP8_DTYPES[kv_cache_dtype]


def logical_key(cache: Tensor) -> Tensor:
    """A key cache as `[blocks, block_size, kv_heads, *row]`: row is `[D]`; `[D/x, x]` for 5-D."""
    return cache.permute(0, 3, 1, 2, 4) if cache.dim() == 5 else cache


def logical_value(key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """A value cache as `[blocks, block_size, kv_heads, D]`, by the form of its key cache."""
    return value_cache.permute(0, 3, 1, 2) if key_cache.dim() == 5 else value_cache


def check_cache(key_cache: Tensor, value_cache: Tensor, heads: int, size: int) -> None:
    """Raise ValueError unless both caches have a form named above, with `heads` x `size` rows."""
    if key_cache.dim() not in (4, 5) or value_cache.dim() != 4:
        raise ValueError(
            "caches: expected 4-D [blocks, block_size, kv_heads, head_size] by strides (or vLLM's "
            f"5-D key with 4-D value), got key {list(key_cache.shape)}, value "
            f"{list(value_cache.shape)}"
        )
    key = logical_key(key_cache)
    value = logical_value(key_cache, value_cache)
    row = key.shape[3] if key.dim() == 4 else key.shape[3] * key.shape[4]
    if key.shape[:3] != value.shape[:3] or row != value.shape[3]:
        raise ValueError(
            f"caches: key {list(key_cache.shape)} and value {list(value_cache.shape)} differ in "
            "blocks, block size, heads or head size"
        )
    if key.shape[2] != heads or row != size:
        raise ValueError(
            f"caches: expected rows of {heads} heads x {size}, got {key.shape[2]} x {row} "
            f"(key cache {list(key_cache.shape)})"
        )
    if key_cache.dtype != value_cache.dtype:
        raise TypeError(f"caches: key is {key_cache.dtype}, value is {value_cache.dtype}")


def check_dtype(name: str, tensor: Tensor, kv_cache_dtype: str, model_dtype: torch.dtype) -> None:
    """Raise TypeError unless `tensor` stores `kv_cache_dtype` (fp8 may be kept as uint8)."""
    want = cache_dtype(kv_cache_dtype, model_dtype)
    allowed = (want, torch.uint8) if kv_cache_dtype != "auto" else (want,)
    if tensor.dtype not in allowed:
        raise TypeError(
            f"{name}: kv_cache_dtype={kv_cache_dtype!r} with {model_dtype} rows needs "
            f"{' or '.join(str(d) for d in allowed)}, got {tensor.dtype}"
        )


def check_scale(name: str, scale: Tensor | None, heads: int) -> None:
    """Raise ValueError unless `scale` is None, one float32 value, or one a KV head."""
    if scale is None:
        return
    if scale.dtype != torch.float32 or scale.numel() not in (1, heads) or scale.dim() > 1:
        raise ValueError(
            f"{name}: expected float32 with 1 value (per tensor) or {heads} (per KV head), got "
            f"{scale.dtype} {list(scale.shape)}"
        )


def check_index(name: str, tensor: Tensor, length: int | None = None) -> None:
    """Raise unless `tensor` is a 1-D int32 or int64 tensor (of `length` entries, if given)."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {tensor.dtype}")
    if tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        want = "[n]" if length is None else f"[{length}]"
        raise ValueError(f"{name}: expected shape {want}, got {list(tensor.shape)}")


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError if the given tensors are not all on one device."""
    devices = {name: t.device for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, got {listing}")


def head_scale(scale: Tensor) -> Tensor:
    """A scale shaped to multiply `[..., heads, size]` rows."""
    return scale.reshape(-1, 1)


def encode(rows: Tensor, kv_cache_dtype: str, scale: Tensor | None) -> Tensor:
    """Rows `[..., heads, size]` in the cache's dtype: `saturate(rows / scale)` for fp8.

    Saturating (to the largest finite value) and rounding to nearest even is what vLLM's
    `reshape_and_cache_flash` does; NaN stays NaN.
    """
    if kv_cache_dtype == "auto":
        return rows
    dtype = FP8_DTYPES[kv_cache_dtype]
    wide = rows.float()
    if scale is not None:
        wide = wide / head_scale(scale)
    limit = torch.finfo(dtype).max
    return wide.clamp(-limit, limit).to(dtype)


def decode(rows: Tensor, kv_cache_dtype: str, scale: Tensor | None) -> Tensor:
    """Rows in the cache's dtype as float32: `rows * scale` for fp8."""
    if kv_cache_dtype == "auto":
        return rows.float()
    wide = rows.view(FP8_DTYPES[kv_cache_dtype]).float()
    return wide if scale is None else wide * head_scale(scale)


def scatter_rows(target: Tensor, index: tuple[Tensor, ...], rows: Tensor, valid: Tensor) -> None:
    """`target[index] = rows` where `valid`, without a data-dependent shape.

    Boolean indexing would synchronise with the device. Rows that are not valid repeat the first
    valid row's write instead (the same value to the same place); with none valid, one row is
    rewritten with what it holds.

    Args:
        target: any tensor; `index` addresses its leading dimensions, one int64 `[n]` each, within
            bounds wherever `valid`.
        rows: `[n, ...]`, cast and reshaped to the row shape of `target`.
        valid: bool `[n]`.
    """
    if rows.shape[0] == 0:
        return
    first = valid.to(torch.int32).argmax().view(1)
    any_valid = valid.any()
    place = tuple(torch.where(valid, i, i[first]) for i in index)
    place = tuple(torch.where(any_valid, i, 0) for i in place)
    rows = rows.reshape(rows.shape[0], *target.shape[len(index) :])
    shape = (-1,) + (1,) * (rows.dim() - 1)
    # As bits: fp8 has no where() on every device, and CUDA's changes the NaN of 16-bit floats.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(target.element_size(), target.dtype)
    target, rows = target.view(bits), rows.contiguous().view(bits)
    rows = torch.where(valid.view(shape), rows, rows[first])
    target[place] = torch.where(any_valid, rows, target[place])
