"""`reshape_and_cache` (the direct paged write) and `stage_kv` (its staged twin)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nwor_compile.ops.layout import (
    check_cache,
    check_dtype,
    check_index,
    check_same_device,
    check_scale,
    encode,
    logical_key,
    logical_value,
    scatter_rows,
)
from nwor_compile.ops.library import Launcher, define

OVERFLOW = 1  # value of stage_state[1] once a row had no staging row


def check_write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    if key.dim() != 3 or key.shape != value.shape:
        raise ValueError(
            "key, value: expected equal shapes [tokens, kv_heads, head_size], got "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    if key.dtype != value.dtype:
        raise TypeError(f"key is {key.dtype}, value is {value.dtype}")
    check_index("slot_mapping", slot_mapping)
    if slot_mapping.shape[0] > key.shape[0]:
        raise ValueError(
            f"slot_mapping: {slot_mapping.shape[0]} entries for {key.shape[0]} rows of key; "
            "expected at most one a row"
        )
    heads, size = key.shape[1], key.shape[2]
    check_cache(key_cache, value_cache, heads, size)
    check_dtype("key_cache", key_cache, kv_cache_dtype, key.dtype)
    check_scale("k_scale", k_scale, heads)
    check_scale("v_scale", v_scale, heads)
    check_same_device(
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def _write_certain(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, keep: Tensor
) -> None:
    """Encoded rows to the slots of the cache, where `keep`; slots outside the cache are skipped."""
    key_rows, value_rows = logical_key(key_cache), logical_value(key_cache, value_cache)
    block_size = key_rows.shape[1]
    valid = keep & (slots >= 0) & (slots < key_rows.shape[0] * block_size)
    index = (slots // block_size, slots % block_size)
    scatter_rows(key_rows, index, key, valid)
    scatter_rows(value_rows, index, value, valid)


def reshape_and_cache_reference(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """The specification of `reshape_and_cache`."""
    slots = slot_mapping.long()
    tokens = slots.shape[0]
    everything = torch.ones_like(slots, dtype=torch.bool)
    _write_certain(
        encode(key[:tokens], kv_cache_dtype, k_scale),
        encode(value[:tokens], kv_cache_dtype, v_scale),
        key_cache,
        value_cache,
        slots,
        everything,
    )


def check_stage(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor,
    staged_value: Tensor,
    stage_state: Tensor,
    slot_mapping: Tensor,
    row_map: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError unless `stage_kv` can take these arguments."""
    check_write(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale)
    check_staged(staged_key, staged_value, key.shape[1], key.shape[2])
    check_dtype("staged_key", staged_key, kv_cache_dtype, key.dtype)
    check_index("row_map", row_map)
    if row_map.shape[0] < slot_mapping.shape[0]:
        raise ValueError(
            f"row_map: expected at least {slot_mapping.shape[0]} entries (one a token), got "
            f"{row_map.shape[0]}; raise max_tokens"
        )
    if stage_state.dtype != torch.int32 or list(stage_state.shape) != [2]:
        raise ValueError(
            f"stage_state: expected int32 [2] (staged rows, error), got {stage_state.dtype} "
            f"{list(stage_state.shape)}"
        )
    check_same_device(
        key=key,
        staged_key=staged_key,
        staged_value=staged_value,
        row_map=row_map,
        state=stage_state,
    )


def check_staged(staged_key: Tensor, staged_value: Tensor, heads: int, size: int) -> None:
    """Raise unless the staging buffers are `[rows >= 1, heads, size]`, equal in shape and dtype."""
    shape = list(staged_key.shape)
    if staged_key.dim() != 3 or shape[1:] != [heads, size] or staged_key.shape[0] < 1:
        raise ValueError(f"staged_key: expected [rows >= 1, {heads}, {size}], got {shape}")
    if staged_key.shape != staged_value.shape or staged_key.dtype != staged_value.dtype:
        raise ValueError(
            f"staged_key {staged_key.dtype} {shape} and staged_value {staged_value.dtype} "
            f"{list(staged_value.shape)} differ"
        )


def staging_rows(codes: Tensor) -> Tensor:
    """The staging row that each int64 code of a `row_map` names; -1 for none."""
    return torch.where(codes >= 0, codes, -(codes + 2))


def stage_kv_reference(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor,
    staged_value: Tensor,
    stage_state: Tensor,
    slot_mapping: Tensor,
    row_map: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """The specification of `stage_kv`."""
    slots = slot_mapping.long()
    tokens = slots.shape[0]
    codes = row_map[:tokens].long()
    key_rows = encode(key[:tokens], kv_cache_dtype, k_scale)
    value_rows = encode(value[:tokens], kv_cache_dtype, v_scale)
    draft = codes >= 0
    rows = staging_rows(codes)
    fits = (rows >= 0) & (rows < staged_key.shape[0])
    _write_certain(key_rows, value_rows, key_cache, value_cache, slots, ~draft)
    scatter_rows(staged_key, (rows,), key_rows, fits)
    scatter_rows(staged_value, (rows,), value_rows, fits)
    stage_state[0] += (draft & fits).sum(dtype=torch.int32)
    stage_state[1] |= ((rows >= 0) & ~fits).any().to(torch.int32) * OVERFLOW


def _no_output(*args: object, **kwargs: object) -> None:
    return None


_WRITE = (
    "Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    'str kv_cache_dtype="auto", Tensor? k_scale=None, Tensor? v_scale=None'
)
WRITE_SCHEMA = f"({_WRITE}) -> ()"

_reshape_and_cache = define(
    f"reshape_and_cache{WRITE_SCHEMA}",
    reference=reshape_and_cache_reference,
    fake=_no_output,
    check=check_write,
    kernel="cache_write:reshape_and_cache",
)
# `stage_kv` without its checks, for callers that made them once.


def stage_write_reference(
    key_cache: Tensor,
    value_cache: Tensor,
    staging: tuple[Tensor, Tensor, Tensor, Tensor],
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """`stage_kv` of one layer, as a function of key, value and slot_mapping.

    staging: (staged_key, staged_value, stage_state, row_map) as for `stage_kv`.
    """
    staged_key, staged_value, state, row_map = staging

    def write(key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        stage_kv_reference(
            key, value, key_cache, value_cache, staged_key, staged_value, state, slot_mapping,
            row_map, kv_cache_dtype, k_scale, v_scale,
        )  # fmt: skip

    return write


STAGE_WRITE = Launcher(stage_write_reference, "cache_write:StageWrite")
_stage_kv = define(
    "stage_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor(c!) staged_key, Tensor(d!) staged_value, Tensor(e!) stage_state, Tensor slot_mapping, "
    'Tensor row_map, str kv_cache_dtype="auto", Tensor? k_scale=None, Tensor? v_scale=None) -> ()',
    reference=stage_kv_reference,
    fake=_no_output,
    check=check_stage,
    kernel="cache_write:stage_kv",
)


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write every row of K and V to its slot of the paged cache.

    Args:
        key, value: `[>= T, kv_heads, head_size]`, float32, float16 or bfloat16.
        key_cache, value_cache: mutated; one of the forms in `nwor_compile.ops.layout`, in the
            dtype of `key` for `auto`, else fp8 or uint8 holding fp8.
        slot_mapping: `[T]` int32 or int64. A slot outside the cache (-1) is skipped. Slots of one
            call must differ.
        kv_cache_dtype: `auto`, `fp8_e4m3` (also `fp8`) or `fp8_e5m2`.
        k_scale, v_scale: float32, 1 value or one a KV head; rows are divided by it for fp8.
    Raises:
        ValueError, TypeError: before any device work; the caches are unchanged.
    The argument order is that of vLLM's `reshape_and_cache_flash`.
    """
    _reshape_and_cache(
        key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
    )


def stage_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor,
    staged_value: Tensor,
    stage_state: Tensor,
    slot_mapping: Tensor,
    row_map: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Write certain rows to the cache and draft rows to the layer's staging rows, in one launch.

    A draft row never touches the cache, whatever its slot. A mirrored row is a certain row that is
    copied to a staging row as well: a later reader finds it beside the drafts. Tokens may come in
    any order.

    Args (beyond those of `reshape_and_cache`):
        staged_key, staged_value: mutated; `[S, kv_heads, head_size]` in the cache's dtype, any
            strides. They may be views of blocks of the caches that no slot of the call is in.
        stage_state: mutated; int32 `[2]`: draft rows staged since it was last zeroed (mirrored
            rows are not counted), and an error that is set (sticky) when a row is to go to a
            staging row >= S. A draft row then goes nowhere, a mirrored one to the cache alone, and
            the window must accept nothing.
        row_map: `[>= T]` int32 or int64: -1 for a certain row; r >= 0 for a draft row that goes to
            staging row r; -(r + 2) for a mirrored row, written to its slot (none: nowhere) and to
            staging row r. Staging rows of one call must differ.
    """
    _stage_kv(
        key,
        value,
        key_cache,
        value_cache,
        staged_key,
        staged_value,
        stage_state,
        slot_mapping,
        row_map,
        kv_cache_dtype,
        k_scale,
        v_scale,
    )
