"""Inputs and an exact oracle for tests and benchmarks of the kernels.

Everything that must not be read is NaN: block-table entries past a request, cache rows that belong
to nobody, cache rows under a staged tail, staging rows of nobody, padded queries.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nwor_compile.ops.layout import (
    cache_dtype,
    decode,
    encode,
    logical_key,
    logical_value,
)

# The tensors that `paged_attention` and `verify_attention` take, in order.
PagedArgs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
VerifyArgs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]  # fmt: skip

LAYOUTS = ("NHD", "HND", "packed", "5d")
GARBAGE = 1_000_000_007  # a block number far outside of every cache


def raw(tensor: Tensor) -> Tensor:
    """The bits of a tensor, so that NaN equals NaN and -0 differs from 0."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """True if shape, dtype and bits agree."""
    return left.dtype == right.dtype and torch.equal(raw(left), raw(right))


def empty_cache(
    layout: str, blocks: int, block_size: int, heads: int, size: int, dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Key and value cache of one layout, all bits set (NaN in every float dtype)."""

    def ones(*shape: int) -> Tensor:
        size_of = torch.empty((), dtype=dtype).element_size()
        wide = torch.full((*shape[:-1], shape[-1] * size_of), 255, dtype=torch.uint8, device=device)
        return wide.view(dtype)

    if layout == "packed":
        both = ones(blocks, heads, block_size, 2 * size).permute(0, 2, 1, 3)
        return both[..., :size], both[..., size:]
    if layout == "HND":
        shape = (blocks, heads, block_size, size)
        return ones(*shape).permute(0, 2, 1, 3), ones(*shape).permute(0, 2, 1, 3)
    if layout == "5d":
        x = 8
        return ones(blocks, heads, size // x, block_size, x), ones(blocks, heads, size, block_size)
    return ones(blocks, block_size, heads, size), ones(blocks, block_size, heads, size)


def put_rows(
    key_cache: Tensor, value_cache: Tensor, slots: Tensor, key: Tensor, value: Tensor
) -> None:
    """Rows `[n, heads, size]` in the cache's dtype to their slots, by plain indexing."""
    for cache, rows in (
        (logical_key(key_cache), key),
        (logical_value(key_cache, value_cache), value),
    ):
        block_size = cache.shape[1]
        shape = (rows.shape[0], *cache.shape[2:])
        raw(cache)[slots // block_size, slots % block_size] = raw(rows.contiguous()).view(shape)


class Batch(NamedTuple):
    """A ragged batch for `verify_attention`; `written` caches hold the tails as well."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    staged_key: Tensor
    staged_value: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    num_drafts: Tensor
    tail_start: Tensor
    written_key: Tensor
    written_value: Tensor
    rows: list[tuple[Tensor, Tensor]]  # K and V of each request, as stored

    def verify_args(self) -> VerifyArgs:
        return self[:10]

    def paged_args(self) -> PagedArgs:
        caches = (self.written_key, self.written_value)
        return (self.query, *caches, self.block_table, self.seq_lens, self.query_start_loc)


def make_batch(
    lengths: Sequence[int],
    spans: Sequence[int],
    drafts: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    size: int = 32,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_cache_dtype: str = "auto",
    scales: tuple[Tensor | None, Tensor | None] = (None, None),
    layout: str = "NHD",
    padding: int = 2,
    index_dtype: torch.dtype = torch.int32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Batch:
    """Requests of `lengths` rows whose last `spans` tokens are queried and last `drafts` staged."""
    rng = torch.Generator(device=device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device).to(dtype)

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=index_dtype, device=device)

    stored = cache_dtype(kv_cache_dtype, dtype)
    requests, tokens = len(lengths), sum(spans)
    columns = max((-(-n // block_size) for n in lengths), default=0) + 1
    blocks = requests * columns + 3
    order = torch.randperm(blocks, generator=rng, device=device)[: requests * columns]
    table = order.view(requests, columns).to(index_dtype)
    caches = empty_cache(layout, blocks, block_size, kv_heads, size, stored, device)
    written = empty_cache(layout, blocks, block_size, kv_heads, size, stored, device)
    # Tails lie in staging in reverse order of requests, with rows of nobody between them.
    staging = empty_cache("NHD", 1, sum(drafts) + requests + 1, kv_heads, size, stored, device)
    staged_key, staged_value = staging[0][0], staging[1][0]
    starts, row = [0] * requests, 1
    for r in reversed(range(requests)):
        starts[r], row = row, row + drafts[r] + 1
    rows = []
    for r, length in enumerate(lengths):
        key = encode(randn(length, kv_heads, size), kv_cache_dtype, scales[0])
        value = encode(randn(length, kv_heads, size), kv_cache_dtype, scales[1])
        rows.append((key, value))
        position = torch.arange(length, device=device)
        slots = table[r].long()[position // block_size] * block_size + position % block_size
        prefix = length - drafts[r]
        put_rows(*caches, slots[:prefix], key[:prefix], value[:prefix])
        put_rows(*written, slots, key, value)
        tail = slice(starts[r], starts[r] + drafts[r])
        raw(staged_key)[tail], raw(staged_value)[tail] = raw(key[prefix:]), raw(value[prefix:])
        table[r, -(-length // block_size) :] = GARBAGE
    query = randn(tokens + padding, heads, size)
    query[tokens:] = float("nan")
    return Batch(
        query, *caches, staged_key, staged_value, table, index(lengths),
        index([0, *itertools.accumulate(spans)]), index(drafts), index(starts), *written, rows,
    )  # fmt: skip


def exact_attention(
    batch: Batch,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """The attention of a batch in float64, request by request; not rounded to the query's dtype."""
    out = torch.zeros(batch.query.shape, dtype=torch.float64, device=batch.query.device)
    starts = batch.query_start_loc.tolist()
    for r, (key, value) in enumerate(batch.rows):
        query = batch.query[starts[r] : starts[r + 1]].double()
        n, length = query.shape[0], key.shape[0]
        group = query.shape[1] // key.shape[1]
        k = decode(key, kv_cache_dtype, k_scale).double().repeat_interleave(group, 1)
        v = decode(value, kv_cache_dtype, v_scale).double().repeat_interleave(group, 1)
        scores = torch.einsum("nhd,lhd->hnl", query, k) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(length - n, length).view(n, 1) - torch.arange(length)
        seen = behind >= 0
        if sliding_window:
            seen &= behind < sliding_window
        scores = scores.masked_fill(~seen.to(scores.device), float("-inf"))
        out[starts[r] : starts[r + 1]] = torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v)
    return out


def largest_error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute difference from the float64 result (NaN counts as infinite)."""
    if result.numel() == 0:
        return 0.0
    return float((result.double() - exact).abs().nan_to_num(float("inf")).max())
