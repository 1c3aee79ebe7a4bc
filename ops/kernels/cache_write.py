"""Launchers of `reshape_and_cache` and `stage_kv`: one kernel, one program a token."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from nwor_compile.ops.kernels.fp8 import encode_fp8
from nwor_compile.ops.kernels.launch import (
    FP8_CODE,
    bits,
    cache_strides,
    element_offset,
    on_device,
    overlaps,
    scale_stride,
)


@triton.jit
def staging_row(code):
    """The staging row that a code of a row map names; -1 for none."""
    return tl.where(code >= 0, code, -2 - code)


@triton.jit
def _encoded(row, scale, head, inside, s_scale, FP8: tl.constexpr, SCALED: tl.constexpr):
    """Elements of a row as the cache stores them."""
    if FP8 > 0:
        row = row.to(tl.float32)
        if SCALED:
            # div_rn: `/` is an approximation on GPUs, and a last bit can flip a rounding.
            row = tl.div_rn(row, tl.load(scale + head * s_scale, mask=inside, other=1.0))
        row = encode_fp8(row, FP8)
    return row


# Counts change from step to step: specialising on them would compile again in the middle of one.
@triton.jit(do_not_specialize=["slots_in_cache", "staging_rows"])
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
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program t moves row t of K and V to the cache, to staging, to both or nowhere."""
    if (
        OVERLAP
    ):  # the attention that follows waits for the end of this; see NOTE [overlap] in `merge`
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token * s_slot).to(tl.int64)
    code = tl.full([], -1, tl.int64)
    if STAGE:
        code = tl.load(row_map + token * s_map).to(tl.int64)
    row = staging_row(code)
    to_cache = (code < 0) & (slot >= 0) & (slot < slots_in_cache)
    to_staging = (row >= 0) & (row < staging_rows)
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    for start in tl.static_range(0, H * D, BLOCK):
        element = start + tl.arange(0, BLOCK)
        head = (element // D).to(tl.int64)
        d = element % D
        inside = element < H * D
        # Loaded before it is known where to: neither waits for the other.
        k = tl.load(key + token * k_token + head * k_head + d.to(tl.int64) * k_d, mask=inside)
        v = tl.load(value + token * v_token + head * v_head + d.to(tl.int64) * v_d, mask=inside)
        k = _encoded(k, k_scale, head, inside, s_k_scale, FP8, K_SCALED)
        v = _encoded(v, v_scale, head, inside, s_v_scale, FP8, V_SCALED)
        if to_cache:
            key_row = key_cache + block * kc_block + offset * kc_offset
            to_key = head * kc_head + element_offset(d, kc_outer, kc_inner, D, X)
            tl.store(key_row + to_key, k, mask=inside)
            value_row = value_cache + block * vc_block + offset * vc_offset
            to_value = head * vc_head + element_offset(d, 0, vc_inner, D, D)
            tl.store(value_row + to_value, v, mask=inside)
        if STAGE:  # noqa: SIM102 (decided at compile time, and before the other is looked at)
            if to_staging:
                to_key = row * sk_row + head * sk_head + d.to(tl.int64) * sk_d
                tl.store(staged_key + to_key, k, mask=inside)
                to_value = row * sv_row + head * sv_head + d.to(tl.int64) * sv_d
                tl.store(staged_value + to_value, v, mask=inside)
    if STAGE:
        # Relaxed: who reads the state comes after this kernel, and a fence here would wait for
        # all the stores.
        one = tl.zeros([1], tl.int32)
        draft = one + code
        staged = (draft >= 0) & (draft < staging_rows)
        lost = one + row >= staging_rows
        tl.atomic_add(state + one, one + 1, mask=staged, sem="relaxed")
        tl.atomic_or(state + 1 + one, one + 1, mask=lost, sem="relaxed")


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
        block = min(4096, triton.next_power_of_2(heads * size))
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
            BLOCK=block, OVERLAP=overlaps(key.device.index), num_warps=max(1, min(8, block // 256)),
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
