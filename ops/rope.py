"""RoPE alone, and RoPE that also writes K and V to the cache or to staging, in one launch.

NOTE [rounding]: `x1 * cos - x2 * sin` and `x2 * cos + x1 * sin` are computed in float32, each
product and each sum rounded (no fused multiply-add), and the result is rounded once to the dtype of
x. That is what vLLM's `rotary_embedding` and Inductor's code for the plain torch form do; eager
bfloat16 code in plain torch, which rounds every product, it is not. With x and tables in 16 bits
the products are exact in float32, so a fused multiply-add gives the same bits; with float32 tables
a compiler that contracts may differ in the last bit of float32. What goes to the cache is the
rounded row, so it has the bits of RoPE followed by `stage_kv`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nwor_compile.ops.cache_write import (
    check_stage,
    reshape_and_cache_reference,
    stage_kv_reference,
)
from nwor_compile.ops.layout import FLOAT_DTYPES, check_index, check_same_device
from nwor_compile.ops.library import Launcher, define


def as_heads(name: str, rows: Tensor, head_size: int) -> Tensor:
    """A view `[T, heads, head_size]` of rows `[T, heads, head_size]` or `[T, heads * head_size]`.

    Raises ValueError for another shape.
    """
    if rows.dim() == 2 and head_size > 0 and rows.shape[1] % head_size == 0:
        return rows.unflatten(1, (-1, head_size))
    if rows.dim() == 3 and rows.shape[2] == head_size:
        return rows
    raise ValueError(
        f"{name}: expected [tokens, heads, {head_size}] or [tokens, heads * {head_size}], got "
        f"{list(rows.shape)}"
    )


def split_table(cos_sin_cache: Tensor) -> tuple[Tensor, Tensor]:
    """The cos and sin halves `[positions, rotary_dim / 2]` of vLLM's `cos_sin_cache`."""
    half = cos_sin_cache.shape[1] // 2
    return cos_sin_cache[:, :half], cos_sin_cache[:, half:]


def check_rope(
    query: Tensor,
    key: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    positions: Tensor | None = None,
) -> None:
    """Raise ValueError or TypeError unless q and k `[T, heads, D]` can be rotated by these tables.

    cos, sin: `[T, width]`, or `[positions, width]` with `positions`; width is `rotary_dim` or half
    of it.
    """
    if query.dim() != 3 or key.dim() != 3 or query.shape[::2] != key.shape[::2]:
        raise ValueError(
            "query, key: expected [tokens, heads, head_size] with equal tokens and head size, got "
            f"{list(query.shape)} and {list(key.shape)}"
        )
    if query.dtype != key.dtype or query.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"query, key: expected one dtype of {FLOAT_DTYPES}, got {query.dtype} and {key.dtype}"
        )
    tokens, size = query.shape[0], query.shape[2]
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > size:
        raise ValueError(f"rotary_dim: expected an even number from 2 to {size}, got {rotary_dim}")
    if cos.dtype != sin.dtype or cos.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"cos, sin: expected one dtype of {FLOAT_DTYPES}, got {cos.dtype} and {sin.dtype}"
        )
    if (
        cos.dim() != 2
        or cos.shape != sin.shape
        or cos.shape[1] not in (rotary_dim, rotary_dim // 2)
    ):
        raise ValueError(
            f"cos, sin: expected equal shapes [rows, {rotary_dim} or {rotary_dim // 2}], got "
            f"{list(cos.shape)} and {list(sin.shape)}"
        )
    if positions is not None:
        check_index("positions", positions, tokens)
    elif cos.shape[0] != tokens:
        raise ValueError(
            f"cos, sin: expected a row for each of {tokens} tokens, got {cos.shape[0]}"
        )
    check_same_device(query=query, key=key, cos=cos, sin=sin, positions=positions)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
    is_neox: bool,
    positions: Tensor | None = None,
) -> Tensor:
    """RoPE of `x` `[T, heads, D]`: the specification. See NOTE [rounding].

    Pairs of the first `rotary_dim` elements are rotated, (i, i + rotary_dim / 2) if `is_neox`, else
    (2i, 2i + 1); the rest stays. Tables of full width have an angle an element, of half width one a
    pair. With `positions`, token t takes row positions[t]; outside the table, zeros.
    """
    cos, sin = cos.float(), sin.float()
    if positions is not None:
        inside = ((positions >= 0) & (positions < cos.shape[0])).unsqueeze(1)
        row = torch.where(inside.squeeze(1), positions.long(), 0)
        cos, sin = (torch.where(inside, table[row], 0) for table in (cos, sin))
    return rotate_exactly(x.float(), cos, sin, rotary_dim, is_neox).to(x.dtype)


def rotate_exactly(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, is_neox: bool) -> Tensor:
    """The formula of `rotate`, in whatever dtype its arguments have."""
    half = rotary_dim // 2
    if is_neox:
        first, second = slice(None, half), slice(half, rotary_dim)
    else:
        first, second = slice(None, rotary_dim, 2), slice(1, rotary_dim, 2)
    if cos.shape[1] == rotary_dim:
        c1, c2, s1, s2 = cos[:, first], cos[:, second], sin[:, first], sin[:, second]
    else:
        c1, c2, s1, s2 = cos, cos, sin, sin
    c1, c2, s1, s2 = (table.unsqueeze(1) for table in (c1, c2, s1, s2))
    x1, x2 = x[..., first], x[..., second]
    out = x.clone(memory_format=torch.contiguous_format)
    out[..., first] = x1 * c1 - x2 * s1
    out[..., second] = x2 * c2 + x1 * s2
    return out


# ---- RoPE alone ------------------------------------------------------------------------------


def _check_rotary(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    check_table(cos_sin_cache)
    check_rope(
        as_heads("query", query, head_size),
        as_heads("key", key, head_size),
        *split_table(cos_sin_cache),
        cos_sin_cache.shape[1],
        positions,
    )


def check_table(cos_sin_cache: Tensor) -> None:
    """Raise ValueError unless `cos_sin_cache` is `[positions, rotary_dim]`."""
    if cos_sin_cache.dim() != 2:
        raise ValueError(
            f"cos_sin_cache: expected [positions, rotary_dim], got {list(cos_sin_cache.shape)}"
        )


def rotary_embedding_reference(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    """The specification of `rotary_embedding`."""
    tables = split_table(cos_sin_cache)
    for name, rows in (("query", query), ("key", key)):
        heads = as_heads(name, rows, head_size)
        heads.copy_(rotate(heads, *tables, cos_sin_cache.shape[1], is_neox, positions))


_rotary_embedding = define(
    "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!) key, int head_size, "
    "Tensor cos_sin_cache, bool is_neox) -> ()",
    reference=rotary_embedding_reference,
    fake=lambda *args, **kwargs: None,
    check=_check_rotary,
    kernel="rope:rotary_embedding",
)


def rotary_embedding(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    head_size: int,
    cos_sin_cache: Tensor,
    is_neox: bool,
) -> None:
    """Rotate q and k in place, in one launch; the arguments are those of vLLM's op of this name.

    Args:
        positions: `[T]` int32 or int64, rows of the table; outside of it, the result is zeros.
        query, key: mutated; `[T, heads, head_size]` or `[T, heads * head_size]`, any strides.
        cos_sin_cache: `[positions, rotary_dim]`, cosines in the first half of a row; float.
        is_neox: pairs (i, i + rotary_dim / 2); else (2i, 2i + 1).
    Raises:
        ValueError, TypeError: before any device work.
    """
    _rotary_embedding(positions, query, key, head_size, cos_sin_cache, is_neox)


# ---- RoPE and staging --------------------------------------------------------------------------


def rope_write_reference(
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
    """Rotate, then write or stage: what the kernel `rope:rope_write` does in one launch.

    staging: (staged_key, staged_value, stage_state, row_map) as for `stage_kv`; None: every row is
    certain. Returns q and k, rotated: new contiguous tensors, or with `in_place` the given ones.
    """
    rotated = [rotate(x, cos, sin, rotary_dim, is_neox, positions) for x in (query, key)]
    if in_place:
        query.copy_(rotated[0])
        key.copy_(rotated[1])
        rotated = [query, key]
    if staging is None:
        reshape_and_cache_reference(
            rotated[1], value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale,
            v_scale,
        )  # fmt: skip
    else:
        staged_key, staged_value, state, row_map = staging
        stage_kv_reference(
            rotated[1], value, key_cache, value_cache, staged_key, staged_value, state,
            slot_mapping, row_map, kv_cache_dtype, k_scale, v_scale,
        )  # fmt: skip
    return rotated[0], rotated[1]


def prepared_rope_write_reference(
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
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]:
    """`rope_write_reference` in place for one layer, as a function of query, key, value, positions
    and slot_mapping."""

    def write(
        query: Tensor, key: Tensor, value: Tensor, positions: Tensor, slot_mapping: Tensor
    ) -> None:
        rope_write_reference(
            query, key, value, cos, sin, positions, rotary_dim, is_neox, key_cache, value_cache,
            slot_mapping, staging, kv_cache_dtype, k_scale, v_scale, in_place=True,
        )  # fmt: skip

    return write


ROPE_WRITE = Launcher(prepared_rope_write_reference, "rope:RopeWrite")


def _reference(
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
    return rope_write_reference(
        query, key, value, cos, sin, positions, rotary_dim, is_neox, key_cache, value_cache,
        slot_mapping, (staged_key, staged_value, stage_state, row_map), kv_cache_dtype, k_scale,
        v_scale,
    )  # fmt: skip


def _check_rope_stage(
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
) -> None:
    check_rope(query, key, cos, sin, rotary_dim, positions)
    check_stage(
        key, value, key_cache, value_cache, staged_key, staged_value, stage_state, slot_mapping,
        row_map, kv_cache_dtype, k_scale, v_scale,
    )  # fmt: skip


def fake_rotated(
    query: Tensor, key: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor]:
    """New contiguous tensors like q and k."""
    packed = torch.contiguous_format
    return torch.empty_like(query, memory_format=packed), torch.empty_like(
        key, memory_format=packed
    )


_rope_stage_kv = define(
    "rope_stage_kv(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, int rotary_dim, "
    "bool is_neox, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor(c!) staged_key, "
    "Tensor(d!) staged_value, Tensor(e!) stage_state, Tensor slot_mapping, Tensor row_map, "
    'Tensor? positions=None, str kv_cache_dtype="auto", Tensor? k_scale=None, '
    "Tensor? v_scale=None) -> (Tensor, Tensor)",
    reference=_reference,
    fake=fake_rotated,
    check=_check_rope_stage,
    kernel="rope:rope_stage_kv",
)


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
    """Rotate q and k, and write or stage the rotated k and v, in one launch.

    Bits are those of RoPE (see NOTE [rounding]) followed by `stage_kv`.

    Args (beyond those of `stage_kv`):
        query, key: `[T, heads, D]`, `[T, kv_heads, D]`, any strides; not changed.
        cos, sin: `[T, rotary_dim]` or `[T, rotary_dim / 2]`, float, any strides; with `positions`
            the first dimension is that of the table.
        rotary_dim: elements of a head that are rotated, from its first.
        is_neox: pairs (i, i + rotary_dim / 2); else (2i, 2i + 1).
        positions: None, or `[T]` int32 or int64, rows of cos and sin; outside of them, zeros.
    Returns:
        q and k, rotated, contiguous.
    Raises:
        ValueError, TypeError: before any device work.
    """
    result: tuple[Tensor, Tensor] = _rope_stage_kv(
        query, key, value, cos, sin, rotary_dim, is_neox, key_cache, value_cache, staged_key,
        staged_value, stage_state, slot_mapping, row_map, positions, kv_cache_dtype, k_scale,
        v_scale,
    )  # fmt: skip
    return result
