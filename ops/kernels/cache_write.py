"""Launchers of `reshape_and_cache` and `stage_kv`: one kernel, one program a token."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from nwor_compile.ops.kernels.fp8 import encode_fp8
from nwor_compile.ops.kernels.launch import (
    FP8_CODE,
    MOST_FORMS,
    KeptLaunch,
    bits,
    cache_strides,
    element_offset,
    launch,
    on_device,
    overlaps,
    scale_stride,
)


@triton.jit
def staging_row(code):
    """The staging row that a code of a row map names; -1 for none."""
    return tl.where(code >= 0, code, -2 - code)


@triton.jit
def load_routing(slot_mapping, row_map, token, mapped, s_slot, s_map, STAGE: tl.constexpr):
    """Slot and code of a token, -1 each if it is not `mapped`."""
    slot = tl.load(slot_mapping + token * s_slot, mask=mapped, other=-1).to(tl.int64)
    code = tl.full((), -1, tl.int64)
    if STAGE:
        code = tl.load(row_map + token * s_map, mask=mapped, other=-1).to(tl.int64)
    return slot, code


@triton.jit
def store_row(
    row, scale, head, d, width, cache, staged, slot, code, slots_in_cache, staging_rows,
    c_block, c_offset, c_head, c_outer, c_inner, s_row, s_head, s_d, s_scale,
    H: tl.constexpr, D: tl.constexpr, X: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STAGE: tl.constexpr, FP8: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Elements (head < H, d < width) of a token to its slot, its staging row, both or nowhere.

    One store for a row that goes to one place: its address is chosen, so that the code between the
    last value and its store is short. Strides are constants.
    """
    if FP8 > 0:
        row = row.to(tl.float32)
        if SCALED:
            by = tl.load(scale + head * s_scale, mask=head < H, other=1.0)
            # div_rn: `/` is an approximation on GPUs, and a last bit can flip a rounding.
            row = tl.div_rn(row, tl.broadcast_to(by, row.shape))
        row = encode_fp8(row, FP8)
    at = slot.to(tl.uint32)  # enough for a slot of the cache; unsigned, so that divisions are short
    place = cache + (at // BLOCK_SIZE).to(tl.int64) * c_block
    place += (at % BLOCK_SIZE).to(tl.int64) * c_offset
    heads = tl.where((code < 0) & (slot >= 0) & (slot < slots_in_cache), H, 0)
    by_head = tl.full((), c_head, tl.int64)
    element = element_offset(d, c_outer, c_inner, D, X)
    if STAGE:
        copy = staging_row(code)
        copied = staged + copy * s_row
        copies = tl.where((copy >= 0) & (copy < staging_rows), H, 0)
        place = tl.where(code >= 0, copied, place)
        heads = tl.where(code >= 0, copies, heads)
        by_head = tl.where(code >= 0, tl.full((), s_head, tl.int64), by_head)
        if (X != D) or (s_d != c_inner):
            element = tl.where(code >= 0, d.to(tl.int64) * s_d, element)
    tl.store(place + head * by_head + element, row, mask=(head < heads) & (d < width))
    if STAGE:  # noqa: SIM102 (decided at compile time, and before the other is looked at)
        if code < -1:
            target = copied + head * tl.full((), s_head, tl.int64) + d.to(tl.int64) * s_d
            tl.store(target, row, mask=(head < copies) & (d < width))


@triton.jit
def count_row(state, code, staging_rows):
    """Count a draft row that has its staging row; flag any row that has not."""
    # Relaxed: who reads the state comes after the kernel, and a fence would wait for all stores.
    one = tl.zeros([1], tl.int32)
    draft = one + code
    staged = (draft >= 0) & (draft < staging_rows)
    tl.atomic_add(state + one, one + 1, mask=staged, sem="relaxed")
    lost = one + staging_row(code) >= staging_rows
    tl.atomic_or(state + 1 + one, one + 1, mask=lost, sem="relaxed")


@triton.jit
def _write_kernel(
    key_cache, value_cache, staged_key, staged_value, state, row_map, k_scale, v_scale,
    key, value, slot_mapping,
    # Constants, so that addresses take few instructions and few arguments have to be fetched: all
    # calls of a layer have the same strides.
    k_token: tl.constexpr, k_head: tl.constexpr, k_d: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, v_d: tl.constexpr, s_slot: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    slots_in_cache: tl.constexpr, staging_rows: tl.constexpr,
    kc_block: tl.constexpr, kc_offset: tl.constexpr, kc_head: tl.constexpr,
    kc_outer: tl.constexpr, kc_inner: tl.constexpr,
    vc_block: tl.constexpr, vc_offset: tl.constexpr, vc_head: tl.constexpr,
    vc_inner: tl.constexpr,
    sk_row: tl.constexpr, sk_head: tl.constexpr, sk_d: tl.constexpr,
    sv_row: tl.constexpr, sv_head: tl.constexpr, sv_d: tl.constexpr,
    s_map: tl.constexpr, s_k_scale: tl.constexpr, s_v_scale: tl.constexpr,
    X: tl.constexpr, BLOCK_SIZE: tl.constexpr, STAGE: tl.constexpr, FP8: tl.constexpr,
    K_SCALED: tl.constexpr, V_SCALED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program t moves row t of K and V to the cache, to staging, to both or nowhere."""
    if (
        OVERLAP
    ):  # the attention that follows waits for the end of this; see NOTE [overlap] in `merge`
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    for start in tl.static_range(0, H * D, BLOCK):
        element = start + tl.arange(0, BLOCK)
        head = (element // D).to(tl.int64)
        d = element % D
        inside = head < H
        k = tl.load(key + token * k_token + head * k_head + d.to(tl.int64) * k_d, mask=inside)
        v = tl.load(value + token * v_token + head * v_head + d.to(tl.int64) * v_d, mask=inside)
        if start == 0:
            # Rows are on their way before it is known where to. Without the barrier ptxas moves
            # the loads above behind the ones below, and behind the wait for them.
            tl.debug_barrier()
            slot, code = load_routing(slot_mapping, row_map, token, True, s_slot, s_map, STAGE)
        store_row(
            k, k_scale, head, d, D, key_cache, staged_key, slot, code,
            slots_in_cache, staging_rows,
            kc_block, kc_offset, kc_head, kc_outer, kc_inner, sk_row, sk_head, sk_d, s_k_scale,
            H, D, X, BLOCK_SIZE, STAGE, FP8, K_SCALED,
        )  # fmt: skip
        store_row(
            v, v_scale, head, d, D, value_cache, staged_value, slot, code,
            slots_in_cache, staging_rows,
            vc_block, vc_offset, vc_head, 0, vc_inner, sv_row, sv_head, sv_d, s_v_scale,
            H, D, D, BLOCK_SIZE, STAGE, FP8, V_SCALED,
        )  # fmt: skip
    if STAGE:
        count_row(state, code, staging_rows)


class _Target(NamedTuple):
    """Where rows go: what is the same in all calls of a layer.

    fixed, constants: the kernel's first arguments and its last. as_bits: rows are moved as they
    are, so that a NaN stays what it is.
    """

    fixed: tuple[Tensor | None, ...]
    constants: tuple[int, ...]
    as_bits: bool


def _target(
    key_cache: Tensor,
    value_cache: Tensor,
    staging: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    kv_cache_dtype: str,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> _Target:
    fp8 = FP8_CODE[kv_cache_dtype]
    k_strides, v_strides = cache_strides(key_cache, value_cache)
    block_size = key_cache.shape[3] if key_cache.dim() == 5 else key_cache.shape[1]
    key_bits, value_bits = bits(key_cache), bits(value_cache)
    staged_strides: tuple[int, ...] = (0,) * 6
    staged_key, staged_value, state, row_map = key_bits, value_bits, None, None
    if staging is not None:
        staged_key, staged_value, state, row_map = staging
        staged_strides = (*staged_key.stride(), *staged_value.stride())
        staged_key, staged_value = bits(staged_key), bits(staged_value)
    return _Target(
        (key_bits, value_bits, staged_key, staged_value, state, row_map, k_scale, v_scale),
        (
            key_cache.shape[0] * block_size, staged_key.shape[0], *k_strides[:5], *v_strides[:3],
            v_strides.inner, *staged_strides, 0 if row_map is None else row_map.stride(0),
            scale_stride(k_scale), scale_stride(v_scale), k_strides.x, block_size,
            staging is not None, fp8, k_scale is not None, v_scale is not None,
            overlaps(key_cache.device.index),
        ),
        as_bits=fp8 == 0,
    )  # fmt: skip


def _call(
    target: _Target, key: Tensor, value: Tensor, slot_mapping: Tensor
) -> tuple[tuple[int, ...], int]:
    """The kernel's constants, and its warps."""
    heads, size = key.shape[1:]
    block = min(4096, triton.next_power_of_2(heads * size))
    constants = (
        *key.stride(), *value.stride(), slot_mapping.stride(0), heads, size, block,
        *target.constants,
    )  # fmt: skip
    return constants, max(1, min(8, block // 256))


def _launch(target: _Target, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
    tokens = slot_mapping.shape[0]
    if tokens == 0 or key.shape[1] * key.shape[2] == 0:
        return
    constants, warps = _call(target, key, value, slot_mapping)
    if target.as_bits:
        key, value = bits(key), bits(value)
    with on_device(key):
        launch(
            _write_kernel, (tokens,), *target.fixed, key, value, slot_mapping, *constants,
            num_warps=warps,
        )  # fmt: skip


class StageWrite:
    """`stage_kv` for one layer, again and again; arguments as for it.

    Outside CUDA graphs a layer's launch costs the host more than the device, so all that is the
    same in every call is worked out once; see NOTE [kept kernels] in `launch`.
    """

    def __init__(
        self,
        key_cache: Tensor,
        value_cache: Tensor,
        staging: tuple[Tensor, Tensor, Tensor, Tensor],
        kv_cache_dtype: str = "auto",
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        self._target = _target(key_cache, value_cache, staging, kv_cache_dtype, k_scale, v_scale)
        self._device = key_cache.device
        self._calls: dict[tuple[object, ...], tuple[KeptLaunch, tuple[int, ...]]] = {}

    def __call__(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Stage the drafts of `[tokens, heads, D]` rows, and write the certain rows."""
        tokens = slot_mapping.shape[0]
        if tokens == 0 or key.shape[1] * key.shape[2] == 0:
            return
        form = (key.stride(), value.stride(), slot_mapping.stride(), key.shape[1:])
        call = self._calls.get(form)
        if call is None:
            if len(self._calls) >= MOST_FORMS:
                self._calls.clear()
            constants, warps = _call(self._target, key, value, slot_mapping)
            launch = KeptLaunch(_write_kernel, self._device, self._target.fixed, num_warps=warps)
            call = self._calls[form] = launch, constants
        launch, constants = call
        if self._target.as_bits:
            key, value = bits(key), bits(value)
        launch(tokens, (key, value, slot_mapping), constants=constants)


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
    target = _target(key_cache, value_cache, None, kv_cache_dtype, k_scale, v_scale)
    _launch(target, key, value, slot_mapping)


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
    target = _target(key_cache, value_cache, staging, kv_cache_dtype, k_scale, v_scale)
    _launch(target, key, value, slot_mapping)
