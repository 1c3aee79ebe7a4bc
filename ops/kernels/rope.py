"""Launchers of `rotary_embedding` and `rope_stage_kv`: one kernel, a few heads of a token each.

Program (t, g) takes a group of heads of token t: groups of k first, which take longest, then of v,
then of q. A k group rotates its heads once and stores them twice, to the result and to the cache or
to staging, so the rows that go there are read from memory once. A v group only moves its heads: in
the programs of k the two would wait for each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from nwor_compile.ops.kernels.cache_write import count_row, load_routing, store_row
from nwor_compile.ops.kernels.fp8 import round_bf16
from nwor_compile.ops.kernels.launch import (
    FP8_CODE,
    INTERPRETED,
    MOST_FORMS,
    KeptLaunch,
    bits,
    cache_strides,
    launch,
    on_device,
    overlaps,
    scale_stride,
)
from nwor_compile.ops.rope import as_heads, split_table

_GROUP = 1024  # elements of a program, in whole heads
# A fused multiply-add would round otherwise than the reference.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def _round(x, like, EXACT_BF16: tl.constexpr):
    """float32 to the element type that the pointer `like` points at."""
    if EXACT_BF16 and like.dtype.element_ty == tl.bfloat16:
        return round_bf16(x)  # see NOTE [integer casts] in `fp8`
    return x.to(like.dtype.element_ty)


@triton.jit
def _table(table, row, valid, width, s_row, s_d):
    """One angle a column; zeros for a token whose position is outside the table."""
    return tl.load(table + row * s_row + width.to(tl.int64) * s_d, mask=valid, other=0.0).to(
        tl.float32
    )


@triton.jit
def _rotate(
    source, target, cos, sin, positions, head, token, positions_in_table,
    x_d, o_d, cos_row, cos_d, sin_row, sin_d, s_position,
    H: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, NEOX: tl.constexpr,
    FULL: tl.constexpr, IN_PLACE: tl.constexpr, EXACT_BF16: tl.constexpr,
    PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Heads of a token, rotated: stored by `target` and returned in parts.

    `source` and `target` point at each head. The parts are both halves of the pairs and, where not
    all of a head is rotated, the elements that stay.
    """
    HALF: tl.constexpr = ROTARY // 2
    row = token
    angles = HALF
    # Position, then angles: the longest chain of loads begins first.
    if positions is not None:
        row = tl.load(positions + token * s_position).to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    if NEOX:
        first, second = pair, pair + HALF
    else:
        first, second = 2 * pair, 2 * pair + 1
    inside = (head < H) & (pair < HALF)
    x1 = tl.load(source + first.to(tl.int64) * x_d, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + second.to(tl.int64) * x_d, mask=inside, other=0.0).to(tl.float32)
    rest = ROTARY + tl.arange(0, REST)[None, :]
    left = (head < H) & (rest < D)
    kept = x1
    if ROTARY < D:
        kept = tl.load(source + rest.to(tl.int64) * x_d, mask=left)
    if positions is not None:
        angles = tl.where((row >= 0) & (row < positions_in_table), HALF, 0)
    known = pair < angles
    if FULL:
        c1 = _table(cos, row, known, first, cos_row, cos_d)
        c2 = _table(cos, row, known, second, cos_row, cos_d)
        s1 = _table(sin, row, known, first, sin_row, sin_d)
        s2 = _table(sin, row, known, second, sin_row, sin_d)
    else:
        c1 = _table(cos, row, known, pair, cos_row, cos_d)
        s1 = _table(sin, row, known, pair, sin_row, sin_d)
        c2, s2 = c1, s1
    o1 = _round(x1 * c1 - x2 * s1, target, EXACT_BF16)
    o2 = _round(x2 * c2 + x1 * s2, target, EXACT_BF16)
    tl.store(target + first.to(tl.int64) * o_d, o1, mask=inside)
    tl.store(target + second.to(tl.int64) * o_d, o2, mask=inside)
    if (ROTARY < D) and (not IN_PLACE):
        tl.store(target + rest.to(tl.int64) * o_d, kept, mask=left)
    return o1, o2, kept


@triton.jit(do_not_specialize=["writes", "positions_in_table"])
def _rope_kernel(
    cos, sin, key_cache, value_cache, staged_key, staged_value, state, row_map, k_scale, v_scale,
    query, key, value, out_query, out_key, positions, slot_mapping,
    writes, positions_in_table,
    # Constants, so that addresses take few instructions and few arguments have to be fetched: all
    # calls of a layer have the same strides.
    q_token: tl.constexpr, q_head: tl.constexpr, q_d: tl.constexpr,
    k_token: tl.constexpr, k_head: tl.constexpr, k_d: tl.constexpr,
    v_token: tl.constexpr, v_head: tl.constexpr, v_d: tl.constexpr,
    oq_token: tl.constexpr, oq_head: tl.constexpr, oq_d: tl.constexpr,
    ok_token: tl.constexpr, ok_head: tl.constexpr, ok_d: tl.constexpr,
    s_position: tl.constexpr, s_slot: tl.constexpr,
    HQ: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, IN_PLACE: tl.constexpr,
    HEADS: tl.constexpr, REST: tl.constexpr, ROW: tl.constexpr,
    cos_row: tl.constexpr, cos_d: tl.constexpr, sin_row: tl.constexpr, sin_d: tl.constexpr,
    slots_in_cache: tl.constexpr, staging_rows: tl.constexpr,
    kc_block: tl.constexpr, kc_offset: tl.constexpr, kc_head: tl.constexpr,
    kc_outer: tl.constexpr, kc_inner: tl.constexpr,
    vc_block: tl.constexpr, vc_offset: tl.constexpr, vc_head: tl.constexpr,
    vc_inner: tl.constexpr,
    sk_row: tl.constexpr, sk_head: tl.constexpr, sk_d: tl.constexpr,
    sv_row: tl.constexpr, sv_head: tl.constexpr, sv_d: tl.constexpr,
    s_map: tl.constexpr, s_k_scale: tl.constexpr, s_v_scale: tl.constexpr,
    ROTARY: tl.constexpr, NEOX: tl.constexpr, FULL: tl.constexpr, PAIRS: tl.constexpr,
    WRITE: tl.constexpr, STAGE: tl.constexpr, X: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr, K_SCALED: tl.constexpr, V_SCALED: tl.constexpr, EXACT_BF16: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """See the top of this file."""
    if OVERLAP:  # the attention that follows waits for the end of this; NOTE [overlap] in `merge`
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    K_GROUPS: tl.constexpr = (HK + HEADS - 1) // HEADS
    FIRST_Q: tl.constexpr = 2 * K_GROUPS if WRITE else K_GROUPS
    heads = tl.arange(0, HEADS)[:, None]
    if group >= FIRST_Q:
        head = ((group - FIRST_Q) * HEADS + heads).to(tl.int64)
        _rotate(
            query + token * q_token + head * q_head, out_query + token * oq_token + head * oq_head,
            cos, sin, positions, head, token, positions_in_table,
            q_d, oq_d, cos_row, cos_d, sin_row, sin_d, s_position,
            HQ, D, ROTARY, NEOX, FULL, IN_PLACE, EXACT_BF16, PAIRS, REST,
        )  # fmt: skip
        return
    mapped = token < writes
    if WRITE:  # noqa: SIM102 (decided at compile time, and before the other is looked at)
        if group >= K_GROUPS:
            head = ((group - K_GROUPS) * HEADS + heads).to(tl.int64)
            d = tl.arange(0, ROW)[None, :]
            place = value + token * v_token + head * v_head + d.to(tl.int64) * v_d
            v = tl.load(place, mask=(head < HK) & (d < D))
            tl.debug_barrier()  # as in `cache_write`
            slot, code = load_routing(slot_mapping, row_map, token, mapped, s_slot, s_map, STAGE)
            store_row(
                v, v_scale, head, d, D, value_cache, staged_value, slot, code,
                slots_in_cache, staging_rows,
                vc_block, vc_offset, vc_head, 0, vc_inner, sv_row, sv_head, sv_d, s_v_scale,
                HK, D, D, BLOCK_SIZE, STAGE, FP8, V_SCALED,
            )  # fmt: skip
            return
    if WRITE:
        slot, code = load_routing(slot_mapping, row_map, token, mapped, s_slot, s_map, STAGE)
    head = (group * HEADS + heads).to(tl.int64)
    o1, o2, kept = _rotate(
        key + token * k_token + head * k_head, out_key + token * ok_token + head * ok_head,
        cos, sin, positions, head, token, positions_in_table,
        k_d, ok_d, cos_row, cos_d, sin_row, sin_d, s_position,
        HK, D, ROTARY, NEOX, FULL, IN_PLACE, EXACT_BF16, PAIRS, REST,
    )  # fmt: skip
    if WRITE:
        pair = tl.arange(0, PAIRS)[None, :]
        if NEOX:
            first, second, end = pair, pair + ROTARY // 2, ROTARY // 2
        else:
            first, second, end = 2 * pair, 2 * pair + 1, ROTARY
        store_row(
            o1, k_scale, head, first, end, key_cache, staged_key, slot, code,
            slots_in_cache, staging_rows,
            kc_block, kc_offset, kc_head, kc_outer, kc_inner, sk_row, sk_head, sk_d, s_k_scale,
            HK, D, X, BLOCK_SIZE, STAGE, FP8, K_SCALED,
        )  # fmt: skip
        store_row(
            o2, k_scale, head, second, ROTARY, key_cache, staged_key, slot, code,
            slots_in_cache, staging_rows,
            kc_block, kc_offset, kc_head, kc_outer, kc_inner, sk_row, sk_head, sk_d, s_k_scale,
            HK, D, X, BLOCK_SIZE, STAGE, FP8, K_SCALED,
        )  # fmt: skip
        if ROTARY < D:
            rest = ROTARY + tl.arange(0, REST)[None, :]
            store_row(
                kept, k_scale, head, rest, D, key_cache, staged_key, slot, code,
                slots_in_cache, staging_rows,
                kc_block, kc_offset, kc_head, kc_outer, kc_inner, sk_row, sk_head, sk_d, s_k_scale,
                HK, D, X, BLOCK_SIZE, STAGE, FP8, K_SCALED,
            )  # fmt: skip
    if STAGE:  # noqa: SIM102 (decided at compile time, and before the other is looked at)
        if group == 0:  # one program a token, so a row counts once whatever its heads
            count_row(state, code, staging_rows)


class _Target(NamedTuple):
    """By which angles to rotate and where rows go: what is the same in all calls of a layer.

    fixed, constants: the kernel's first arguments and its last.
    """

    fixed: tuple[Tensor | None, ...]
    constants: tuple[int, ...]
    rotary_dim: int
    writes: bool

    @property
    def positions_in_table(self) -> int:
        """Rows of the tables."""
        return self.fixed[0].shape[0]  # type: ignore[union-attr]


def _target(
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    is_neox: bool,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    staging: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> _Target:
    """Without caches q and k are rotated alone."""
    fp8, block_size, x = FP8_CODE[kv_cache_dtype], 1, 0
    slots_in_cache = staging_rows = 0
    caches: tuple[Tensor | None, ...] = (None,) * 4
    state = row_map = None
    k_strides: tuple[int, ...] = (0,) * 5
    v_strides: tuple[int, ...] = (0,) * 4
    staged_strides: tuple[int, ...] = (0,) * 6
    writes = key_cache is not None and value_cache is not None
    if key_cache is not None and value_cache is not None:
        to_key, to_value = cache_strides(key_cache, value_cache)
        k_strides, v_strides, x = to_key[:5], (*to_value[:3], to_value.inner), to_key.x
        block_size = key_cache.shape[3] if key_cache.dim() == 5 else key_cache.shape[1]
        slots_in_cache = key_cache.shape[0] * block_size
        # fp8 is written as bits; rows of the model's dtype are stored as they are.
        caches = (_stored(key_cache, fp8), _stored(value_cache, fp8), None, None)
        if staging is not None:
            staged_key, staged_value, state, row_map = staging
            staging_rows = staged_key.shape[0]
            staged_strides = (*staged_key.stride(), *staged_value.stride())
            caches = (*caches[:2], _stored(staged_key, fp8), _stored(staged_value, fp8))
    return _Target(
        (cos, sin, *caches, state, row_map, k_scale, v_scale),
        (
            *cos.stride(), *sin.stride(), slots_in_cache, staging_rows, *k_strides, *v_strides,
            *staged_strides, 0 if row_map is None else row_map.stride(0),
            scale_stride(k_scale), scale_stride(v_scale),
            rotary_dim, is_neox, cos.shape[1] == rotary_dim,
            triton.next_power_of_2(rotary_dim // 2), writes, staging is not None, x, block_size,
            fp8, k_scale is not None, v_scale is not None, INTERPRETED,
            writes and overlaps(cos.device.index),
        ),
        rotary_dim, writes,
    )  # fmt: skip


def _call(
    target: _Target,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    out_query: Tensor,
    out_key: Tensor,
    positions: Tensor | None,
    slot_mapping: Tensor | None,
) -> tuple[int, tuple[int, ...]]:
    """Programs a token, and the kernel's constants."""
    q_heads, size = query.shape[1:]
    kv_heads = key.shape[1]
    heads = min(
        max(1, _GROUP // triton.next_power_of_2(size)),
        triton.next_power_of_2(max(q_heads, kv_heads)),
    )
    moves = 2 if target.writes else 1  # k and v, or k alone
    groups = triton.cdiv(q_heads, heads) + moves * triton.cdiv(kv_heads, heads)
    return groups if size else 0, (
        *query.stride(), *key.stride(), *((0, 0, 0) if value is None else value.stride()),
        *out_query.stride(), *out_key.stride(),
        0 if positions is None else positions.stride(0),
        0 if slot_mapping is None else slot_mapping.stride(0),
        q_heads, kv_heads, size, out_query is query, heads,
        triton.next_power_of_2(max(1, size - target.rotary_dim)), triton.next_power_of_2(size),
        *target.constants,
    )  # fmt: skip


def _launch(
    target: _Target,
    query: Tensor,
    key: Tensor,
    out_query: Tensor,
    out_key: Tensor,
    positions: Tensor | None,
    value: Tensor | None = None,
    slot_mapping: Tensor | None = None,
) -> None:
    tokens = query.shape[0]
    groups, constants = _call(
        target, query, key, value, out_query, out_key, positions, slot_mapping
    )
    if tokens == 0 or groups == 0:
        return
    with on_device(query):
        launch(
            _rope_kernel, (tokens, groups),
            *target.fixed, query, key, value, out_query, out_key, positions, slot_mapping,
            0 if slot_mapping is None else slot_mapping.shape[0], target.positions_in_table,
            *constants, **_OPTIONS,
        )  # fmt: skip


class RopeWrite:
    """`rope_write` in place for one layer, again and again; arguments as for it.

    Outside CUDA graphs a layer's launch costs the host more than the device, so all that is the
    same in every call is worked out once; see NOTE [kept kernels] in `launch`.
    """

    def __init__(
        self,
        cos: Tensor,
        sin: Tensor,
        rotary_dim: int,
        is_neox: bool,
        key_cache: Tensor,
        value_cache: Tensor,
        staging: tuple[Tensor, Tensor, Tensor, Tensor] | None,
        kv_cache_dtype: str = "auto",
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        self._target = _target(
            cos, sin, rotary_dim, is_neox, key_cache, value_cache, staging, kv_cache_dtype,
            k_scale, v_scale,
        )  # fmt: skip
        self._launch = KeptLaunch(_rope_kernel, cos.device, self._target.fixed, **_OPTIONS)
        self._calls: dict[tuple[object, ...], tuple[int, tuple[int, ...]]] = {}

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor, slot_mapping: Tensor
    ) -> None:
        """Rotate q and k in place; write or stage k and v. `positions` are rows of the tables."""
        form = (
            query.stride(), key.stride(), value.stride(), positions.stride(), slot_mapping.stride(),
            query.size(1),
        )  # fmt: skip
        call = self._calls.get(form)
        if call is None:
            if len(self._calls) >= MOST_FORMS:
                self._calls.clear()
            call = _call(self._target, query, key, value, query, key, positions, slot_mapping)
            self._calls[form] = call
        groups, constants = call
        tokens = query.shape[0]
        if tokens == 0 or groups == 0:
            return
        self._launch(
            (tokens, groups), (query, key, value, query, key, positions, slot_mapping),
            numbers=(slot_mapping.shape[0], self._target.positions_in_table), constants=constants,
        )  # fmt: skip


def _stored(cache: Tensor, fp8: int) -> Tensor:
    return bits(cache) if fp8 else cache


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    """`rotary_embedding_reference` in one launch."""
    query, key = as_heads("query", query, head_size), as_heads("key", key, head_size)
    cos, sin = split_table(cos_sin_cache)
    target = _target(cos, sin, cos_sin_cache.shape[1], is_neox)
    _launch(target, query, key, query, key, positions)


def rope_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    rotary_dim: int,
    is_neox: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    staging: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    in_place: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rope_write_reference` in one launch."""
    packed = torch.contiguous_format
    out_query = query if in_place else torch.empty_like(query, memory_format=packed)
    out_key = key if in_place else torch.empty_like(key, memory_format=packed)
    target = _target(
        cos, sin, rotary_dim, is_neox, key_cache, value_cache, staging, kv_cache_dtype, k_scale,
        v_scale,
    )  # fmt: skip
    _launch(target, query, key, out_query, out_key, positions, value, slot_mapping)
    return out_query, out_key


def rope_stage_kv(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    is_neox: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor,
    staged_value: Tensor,
    stage_state: Tensor,
    slot_mapping: Tensor,
    row_map: Tensor,
    positions: Tensor | None = None,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernel of `nwor::rope_stage_kv`."""
    return rope_write(
        query, key, value, cos, sin, positions, rotary_dim, is_neox, key_cache, value_cache,
        slot_mapping, (staged_key, staged_value, stage_state, row_map), kv_cache_dtype, k_scale,
        v_scale,
    )  # fmt: skip
