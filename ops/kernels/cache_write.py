"""Launchers of `reshape_and_cache` and `stage_kv`: one kernel, one program a token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.kernels.fp8 import encode_fp8
from nwor_compile.ops.kernels.launch import (
    FP8_CODE,
    bits,
    cache_strides,
    element_offset,
    on_device,
    scale_stride,
)


@triton.jit
def _store_row(
    source, target, scale, s_head, s_d, c_head, c_outer, c_inner, s_scale,
    H: tl.constexpr, D: tl.constexpr, X: tl.constexpr, FP8: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's `[H, D]` row from `source` to `target`, encoded; both already point at it."""
    for start in tl.static_range(0, H * D, BLOCK):
        element = start + tl.arange(0, BLOCK)
        head = (element // D).to(tl.int64)
        d = element % D
        inside = element < H * D
        row = tl.load(source + head * s_head + d.to(tl.int64) * s_d, mask=inside)
        if FP8 > 0:
            wide = row.to(tl.float32)
            if SCALED:
                # div_rn: `/` is an approximation on GPUs, and a last bit can flip a rounding.
                wide = tl.div_rn(wide, tl.load(scale + head * s_scale, mask=inside, other=1.0))
            row = encode_fp8(wide, FP8)
        tl.store(
            target + head * c_head + element_offset(d, c_outer, c_inner, D, X), row, mask=inside
        )


@triton.jit
def _write_kernel(
    key, value, key_cache, value_cache, staged_key, staged_value, state, slot_mapping, row_map,
    k_scale, v_scale,
    slots_in_cache, staging_rows,
    k_token, k_head, k_d, v_token, v_head, v_d,
    kc_block, kc_offset, kc_head, kc_outer, kc_inner,
    vc_block, vc_offset, vc_head, vc_inner,
    sk_row, sk_head, sk_d, sv_row, sv_head, sv_d,
    s_slot, s_map, s_k_scale, s_v_scale,
    H: tl.constexpr, D: tl.constexpr, X: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STAGE: tl.constexpr, FP8: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program t moves row t of K and V to the cache, or to staging, or nowhere."""
    token = tl.program_id(0).to(tl.int64)
    key_row = key + token * k_token
    value_row = value + token * v_token
    draft = -1
    if STAGE:
        draft = tl.load(row_map + token * s_map).to(tl.int64)
    if draft < 0:
        slot = tl.load(slot_mapping + token * s_slot).to(tl.int64)
        if (slot >= 0) & (slot < slots_in_cache):
            block = slot // BLOCK_SIZE
            offset = slot % BLOCK_SIZE
            _store_row(
                key_row, key_cache + block * kc_block + offset * kc_offset, k_scale,
                k_head, k_d, kc_head, kc_outer, kc_inner, s_k_scale,
                H, D, X, FP8, K_SCALED, BLOCK,
            )  # fmt: skip
            _store_row(
                value_row, value_cache + block * vc_block + offset * vc_offset, v_scale,
                v_head, v_d, vc_head, 0, vc_inner, s_v_scale,
                H, D, D, FP8, V_SCALED, BLOCK,
            )  # fmt: skip
    if STAGE:
        if draft >= staging_rows:
            tl.atomic_or(state + 1, 1)
        if (draft >= 0) & (draft < staging_rows):
            # One program a row, so a row counts once whatever its heads.
            tl.atomic_add(state, 1)
            _store_row(
                key_row, staged_key + draft * sk_row, k_scale,
                k_head, k_d, sk_head, 0, sk_d, s_k_scale,
                H, D, D, FP8, K_SCALED, BLOCK,
            )  # fmt: skip
            _store_row(
                value_row, staged_value + draft * sv_row, v_scale,
                v_head, v_d, sv_head, 0, sv_d, s_v_scale,
                H, D, D, FP8, V_SCALED, BLOCK,
            )  # fmt: skip


def _launch(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    staging: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    kv_cache_dtype: str,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    tokens, (heads, size) = slot_mapping.shape[0], key.shape[1:]
    if tokens == 0 or heads * size == 0:
        return
    fp8 = FP8_CODE[kv_cache_dtype]
    k_strides, v_strides = cache_strides(key_cache, value_cache)
    block_size = key_cache.shape[3] if key_cache.dim() == 5 else key_cache.shape[1]
    key_bits, value_bits = bits(key_cache), bits(value_cache)
    staged_strides: tuple[int, ...]
    if staging is None:
        staged_key, staged_value, state, row_map = key_bits, value_bits, None, None
        staged_strides = (0,) * 6
    else:
        staged_key, staged_value, state, row_map = staging
        staged_strides = (*staged_key.stride(), *staged_value.stride())
        staged_key, staged_value = bits(staged_key), bits(staged_value)
    if fp8 == 0:
        key, value = bits(key), bits(value)
    with on_device(key):
        _write_kernel[(tokens,)](
            key, value, key_bits, value_bits, staged_key, staged_value, state, slot_mapping,
            row_map, k_scale, v_scale,
            key_cache.shape[0] * block_size, staged_key.shape[0],
            *key.stride(), *value.stride(),
            *k_strides[:5],
            *v_strides[:3], v_strides.inner,
            *staged_strides,
            slot_mapping.stride(0), 0 if row_map is None else row_map.stride(0),
            scale_stride(k_scale), scale_stride(v_scale),
            H=heads, D=size, X=k_strides.x, BLOCK_SIZE=block_size,
            STAGE=staging is not None, FP8=fp8,
            K_SCALED=k_scale is not None, V_SCALED=v_scale is not None,
            BLOCK=min(1024, triton.next_power_of_2(heads * size)),
        )  # fmt: skip


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
    """`reshape_and_cache_reference` in one launch."""
    _launch(
        key, value, key_cache, value_cache, slot_mapping, None, kv_cache_dtype, k_scale, v_scale
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
    """`stage_kv_reference` in one launch, the update of `stage_state` included."""
    staging = (staged_key, staged_value, stage_state, row_map)
    _launch(
        key, value, key_cache, value_cache, slot_mapping, staging, kv_cache_dtype, k_scale, v_scale
    )
