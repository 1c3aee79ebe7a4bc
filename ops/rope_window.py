"""The `window` overloads of RoPE and staging: what a rewritten graph calls.

Two forms, since models rotate in two ways: plain torch code makes new tensors, and
`rope_stage_kv.window` returns them; vLLM's `rotary_embedding` changes q and k in place, and so does
`rope_stage_kv.window_`. Both find their layer's staging as `stage_kv.window` does; a layer that no
window knows is written directly, still in one launch.
"""

from __future__ import annotations

from torch import Tensor

from nwor_compile.ops.cache_write import check_write
from nwor_compile.ops.library import Launcher, define_composite, pick
from nwor_compile.ops.rope import (
    as_heads,
    check_rope,
    check_table,
    fake_rotated,
    rope_write_reference,
    split_table,
)
from nwor_compile.ops.staging import executed, lookup

_rope_write = Launcher(rope_write_reference, "rope:rope_write")


def _staging(
    key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    layer = lookup(key_cache, value_cache)
    if layer is None:
        return None
    row_map = layer.routing.row_map
    if row_map.shape[0] < slot_mapping.shape[0]:
        raise ValueError(
            f"layer {layer.name!r}: {slot_mapping.shape[0]} tokens, and its window takes at most "
            f"{row_map.shape[0]}; raise max_tokens"
        )
    executed()
    return layer.key, layer.value, layer.state, row_map


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    is_neox: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    check_rope(query, key, cos, sin, rotary_dim)
    check_write(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    is_neox: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(
        query, key, value, cos, sin, rotary_dim, is_neox, key_cache, value_cache, slot_mapping,
        kv_cache_dtype, k_scale, v_scale,
    )  # fmt: skip
    staging = _staging(key_cache, value_cache, slot_mapping)
    result: tuple[Tensor, Tensor] = pick(_rope_write, query.device)(
        query, key, value, cos, sin, None, rotary_dim, is_neox, key_cache, value_cache,
        slot_mapping, staging, kv_cache_dtype, k_scale, v_scale,
    )  # fmt: skip
    return result


def _fake(query: Tensor, key: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
    _check(query, key, *args, **kwargs)  # type: ignore[arg-type]
    return fake_rotated(query, key)


def _check_in_place(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    check_table(cos_sin_cache)
    query, key = as_heads("query", query, head_size), as_heads("key", key, head_size)
    check_rope(query, key, *split_table(cos_sin_cache), cos_sin_cache.shape[1], positions)
    value = as_heads("value", value, head_size)
    check_write(key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale)


def _run_in_place(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    _check_in_place(
        positions, query, key, value, head_size, cos_sin_cache, is_neox, key_cache, value_cache,
        slot_mapping, kv_cache_dtype, k_scale, v_scale,
    )  # fmt: skip
    staging = _staging(key_cache, value_cache, slot_mapping)
    pick(_rope_write, query.device)(
        as_heads("query", query, head_size), as_heads("key", key, head_size),
        as_heads("value", value, head_size), *split_table(cos_sin_cache), positions,
        cos_sin_cache.shape[1], is_neox, key_cache, value_cache, slot_mapping, staging,
        kv_cache_dtype, k_scale, v_scale, in_place=True,
    )  # fmt: skip


_WRITE = (
    'Tensor slot_mapping, str kv_cache_dtype="auto", Tensor? k_scale=None, Tensor? v_scale=None'
)
rope_stage_kv_window = define_composite(
    "rope_stage_kv.window(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, "
    "int rotary_dim, bool is_neox, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    f"{_WRITE}) -> (Tensor, Tensor)",
    run=_run,
    fake=_fake,
    name="rope_stage_kv.window",
)
rope_stage_kv_window_in_place = define_composite(
    "rope_stage_kv.window_(Tensor positions, Tensor(a!) query, Tensor(b!) key, Tensor value, "
    "int head_size, Tensor cos_sin_cache, bool is_neox, Tensor(c!) key_cache, "
    f"Tensor(d!) value_cache, {_WRITE}) -> ()",
    run=_run_in_place,
    fake=_check_in_place,
    name="rope_stage_kv.window_",
)
