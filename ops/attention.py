"""`paged_attention`, and `verify_attention` that reads the tail of each request from staging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nwor_compile.ops.cache_write import check_staged
from nwor_compile.ops.layout import (
    check_cache,
    check_dtype,
    check_index,
    check_same_device,
    check_scale,
    decode,
    logical_key,
    logical_value,
)
from nwor_compile.ops.library import define

# The reference attends for some tokens at a time, which bounds its memory. No sum goes over tokens;
# but how many there are may change the order in which torch sums a row, and so its last bits. The
# number follows from shapes alone, so that it is the same with and without staging.
# Elements are those of one gathered K or V, over all positions of the block table.
_CHUNK_ELEMENTS = 2**24
_CHUNK_TOKENS = 32


def check_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    if query.dim() != 3:
        raise ValueError(f"query: expected [tokens, heads, head_size], got {list(query.shape)}")
    heads = logical_key(key_cache).shape[2] if key_cache.dim() in (4, 5) else 0
    check_cache(key_cache, value_cache, heads, query.shape[2])
    if query.shape[1] % heads:
        raise ValueError(
            f"query: {query.shape[1]} heads are no multiple of the cache's {heads} KV heads"
        )
    check_dtype("key_cache", key_cache, kv_cache_dtype, query.dtype)
    check_scale("k_scale", k_scale, heads)
    check_scale("v_scale", v_scale, heads)
    check_index("seq_lens", seq_lens)
    requests = seq_lens.shape[0]
    check_index("query_start_loc", query_start_loc, requests + 1)
    if block_table.dim() != 2 or block_table.shape[0] != requests:
        raise ValueError(
            f"block_table: expected [{requests}, max_blocks], got {list(block_table.shape)}"
        )
    if block_table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"block_table: expected int32 or int64, got {block_table.dtype}")
    if sliding_window < 0 or softcap < 0:
        raise ValueError(
            f"sliding_window and softcap: expected >= 0 (0 is off), got {sliding_window}, {softcap}"
        )
    check_same_device(
        query=query, key_cache=key_cache, value_cache=value_cache, block_table=block_table,
        seq_lens=seq_lens, query_start_loc=query_start_loc, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip


def _check_verify(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor,
    staged_value: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    tail_start: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    check_paged(
        query, key_cache, value_cache, block_table, seq_lens, query_start_loc, scale,
        sliding_window, softcap, kv_cache_dtype, k_scale, v_scale,
    )  # fmt: skip
    check_staged(staged_key, staged_value, logical_key(key_cache).shape[2], query.shape[2])
    check_dtype("staged_key", staged_key, kv_cache_dtype, query.dtype)
    for name, tensor in (("num_drafts", num_drafts), ("tail_start", tail_start)):
        check_index(name, tensor)
        if tensor.shape[0] < seq_lens.shape[0]:
            raise ValueError(
                f"{name}: expected at least {seq_lens.shape[0]} entries (one a request), got "
                f"{tensor.shape[0]}; raise max_requests"
            )
    check_same_device(query=query, staged_key=staged_key, num_drafts=num_drafts, tail=tail_start)


def verify_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor | None,
    staged_value: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor | None,
    tail_start: Tensor | None,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The specification of `verify_attention`; without staging, of `paged_attention`.

    One row of K and V per (token, position) is gathered, from the cache or from staging; what
    follows does not know which, so the two agree bit for bit. Positions are all that the block
    table has room for, whatever the lengths are, so memory grows with its width: for a few tokens
    at a time, see `_chunk`.
    """
    tokens, requests = query.shape[0], seq_lens.shape[0]
    if tokens == 0 or requests == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    starts = query_start_loc.long()
    token = torch.arange(tokens, device=query.device)
    request = torch.searchsorted(starts[1:], token, right=True).clamp(max=requests - 1)
    owned = token < starts[requests]
    position = seq_lens.long()[request] - starts[request + 1] + token
    chunks, size = [], _chunk(key_cache, value_cache, block_table)
    for t in range(0, tokens, size):
        part = slice(t, t + size)
        rows = _gather(
            key_cache, value_cache, staged_key, staged_value, block_table, seq_lens, num_drafts,
            tail_start, request[part],
        )  # fmt: skip
        key = decode(rows[0], kv_cache_dtype, k_scale)
        value = decode(rows[1], kv_cache_dtype, v_scale)
        chunks.append(
            _attend(query[part], key, value, position[part], scale, sliding_window, softcap)
        )
    out = torch.cat(chunks) if len(chunks) > 1 else chunks[0]
    return torch.where(owned.view(-1, 1, 1), out, 0).to(query.dtype)


def _chunk(key_cache: Tensor, value_cache: Tensor, block_table: Tensor) -> int:
    """Tokens to gather for at a time: at most `_CHUNK_TOKENS`, and as many as keep K (and V) within
    `_CHUNK_ELEMENTS`, but at least one. From shapes alone."""
    _, block_size, heads, head_size = logical_value(key_cache, value_cache).shape
    token = block_table.shape[1] * block_size * heads * head_size
    return max(1, min(_CHUNK_TOKENS, _CHUNK_ELEMENTS // max(1, token)))


def _gather(
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor | None,
    staged_value: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    num_drafts: Tensor | None,
    tail_start: Tensor | None,
    request: Tensor,
) -> tuple[Tensor, Tensor]:
    """K and V rows `[len(request), positions, kv_heads, D]` over all positions of the block table.

    Block-table entries past a request's length may be garbage: they are clamped here and masked
    by position later.
    """
    key_rows, value_rows = logical_key(key_cache), logical_value(key_cache, value_cache)
    blocks, block_size = key_rows.shape[:2]
    position = torch.arange(block_table.shape[1] * block_size, device=request.device)
    block = block_table[request].long()[:, position // block_size].clamp(0, blocks - 1)
    offset = position % block_size
    key, value = key_rows[block, offset].flatten(3), value_rows[block, offset]
    if staged_key is None or staged_value is None or num_drafts is None or tail_start is None:
        return key, value
    drafts = num_drafts.long()[request].unsqueeze(1)
    prefix = seq_lens.long()[request].unsqueeze(1) - drafts
    draft = position - prefix
    is_tail = ((draft >= 0) & (draft < drafts)).unsqueeze(-1).unsqueeze(-1)
    row = (tail_start.long()[request].unsqueeze(1) + draft).clamp(0, staged_key.shape[0] - 1)
    bits = torch.uint8 if key.element_size() == 1 else key.dtype
    return (
        torch.where(is_tail, staged_key[row].view(bits), key.view(bits)),
        torch.where(is_tail, staged_value[row].view(bits), value.view(bits)),
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    scale: float,
    sliding_window: int,
    softcap: float,
) -> Tensor:
    """Softmax attention of `query [n, H, D]` over float32 `key, value [n, L, H_kv, D]`."""
    n, heads, size = query.shape
    kv_heads, length = key.shape[2], key.shape[1]
    grouped = query.float().view(n, kv_heads, heads // kv_heads, size)
    where = torch.arange(length, device=query.device)
    seen = where <= position.unsqueeze(1)
    if sliding_window:
        seen &= where > position.unsqueeze(1) - sliding_window
    scores = torch.einsum("nhgd,nlhd->nhgl", grouped, key) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen.view(n, 1, 1, length), float("-inf"))
    # A token that sees nothing (padding) gets zeros rather than 0 / 0; a NaN that is seen stays.
    blind = ~seen.any(dim=1).view(n, 1, 1, 1)
    weights = torch.softmax(scores, dim=-1).masked_fill(blind, 0.0)
    # Rows that are masked may hold NaN (poison), and 0 x NaN is NaN: zero them first.
    value = value.masked_fill(~seen.view(n, length, 1, 1), 0.0)
    return torch.einsum("nhgl,nlhd->nhgd", weights, value).reshape(n, heads, size)


def paged_attention_reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The specification of `paged_attention`."""
    return verify_attention_reference(
        query, key_cache, value_cache, None, None, block_table, seq_lens, query_start_loc, None,
        None, scale, sliding_window, softcap, kv_cache_dtype, k_scale, v_scale,
    )  # fmt: skip


def paged_attention_out_reference(out: Tensor, *args: Any, **kwargs: Any) -> None:
    """The specification of `paged_attention_out`."""
    out.copy_(paged_attention_reference(*args, **kwargs))


def _check_paged_out(out: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> None:
    check_paged(query, *args, **kwargs)
    if out.shape != query.shape or out.dtype != query.dtype or not out.is_contiguous():
        raise ValueError(
            f"out: expected contiguous {query.dtype} {list(query.shape)} like query, got "
            f"{out.dtype} {list(out.shape)} with strides {out.stride()}"
        )
    check_same_device(query=query, out=out)


def _like_query(query: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_OPTIONS = (
    'float scale, int sliding_window=0, float softcap=0.0, str kv_cache_dtype="auto", '
    "Tensor? k_scale=None, Tensor? v_scale=None) -> Tensor"
)
PAGED_SCHEMA = (
    "(Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor seq_lens, "
    f"Tensor query_start_loc, {_OPTIONS}"
)

_paged_attention = define(
    f"paged_attention{PAGED_SCHEMA}",
    reference=paged_attention_reference,
    fake=_like_query,
    check=check_paged,
    kernel="attention:paged_attention",
)
_paged_attention_out = define(
    f"paged_attention_out(Tensor(a!) out, {PAGED_SCHEMA[1:].replace('-> Tensor', '-> ()')}",
    reference=paged_attention_out_reference,
    fake=lambda *args, **kwargs: None,
    check=_check_paged_out,
    kernel="attention:paged_attention_out",
)
_verify_attention = define(
    "verify_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor staged_key, "
    "Tensor staged_value, Tensor block_table, Tensor seq_lens, Tensor query_start_loc, "
    f"Tensor num_drafts, Tensor tail_start, {_OPTIONS}",
    reference=verify_attention_reference,
    fake=_like_query,
    check=_check_verify,
    kernel="attention:verify_attention",
)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention of a ragged batch over a paged cache.

    Args:
        query: `[T, heads, D]`, requests one after the other; prefill chunks, single decode tokens
            and verify spans in any mix.
        key_cache, value_cache: see `nwor_compile.ops.layout`; heads a multiple of their KV heads.
        block_table: `[R, max_blocks]` integer; entries past a request's length are not used.
        seq_lens: `[R]`, rows of each request including its tokens in `query`.
        query_start_loc: `[R + 1]`, first token of each request; the last entry is the number of
            tokens in use, and rows of `query` past it (padding) come back zero.
        scale: multiplies q.k.
        sliding_window: a token at position p sees (p - sliding_window, p]; 0 is off.
        softcap: scores become softcap * tanh(scores / softcap); 0 is off.
        kv_cache_dtype, k_scale, v_scale: as for `reshape_and_cache`; rows are multiplied back.
        out: mutated; contiguous, of the shape and dtype of `query`; None makes one.
    Returns:
        `out`: `[T, heads, D]`, contiguous, in the dtype of `query`, accumulated in float32.
    Raises:
        ValueError, TypeError: before any device work.
    """
    options = (scale, sliding_window, softcap, kv_cache_dtype, k_scale, v_scale)
    paged = (query, key_cache, value_cache, block_table, seq_lens, query_start_loc, *options)
    if out is not None:
        _paged_attention_out(out, *paged)
        return out
    made: Tensor = _paged_attention(*paged)
    return made


def verify_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    staged_key: Tensor,
    staged_value: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    tail_start: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`paged_attention` whose last `num_drafts[r]` positions of request r come from staging.

    Bit-identical to `paged_attention` over a cache that holds the same rows.

    Args (beyond those of `paged_attention`):
        staged_key, staged_value: `[S, kv_heads, D]` in the cache's dtype.
        num_drafts: `[>= R]` integer on the device, draft rows of each request (0: none).
        tail_start: `[>= R]` integer on the device; position `seq_len - num_drafts + j` of request
            r is staging row `tail_start[r] + j`.
    """
    out: Tensor = _verify_attention(
        query, key_cache, value_cache, staged_key, staged_value, block_table, seq_lens,
        query_start_loc, num_drafts, tail_start, scale, sliding_window, softcap, kv_cache_dtype,
        k_scale, v_scale,
    )  # fmt: skip
    return out
