"""Staging rows in spare blocks of the caches, so that stock attention kernels read them.

A paged cache is allocated with more blocks than the engine's allocator hands out. These *tail
blocks* hold the staged rows of a step: request r owns `blocks_per_request` of them, and a draft is
staged at the place in its block that it will have in the cache. A block table whose entries from
the first draft's block on point to the tail blocks then shows any attention kernel the prefix and
the tail, as if the rows had been written:

    block table of the engine      7  3  9  4        4 is partly filled: 11 rows of 16
    redirected                     7  3  9  T  T+1   T: the 11 rows of block 4, then the drafts

The rows of the partly filled block are copied to the tail block when the window opens (`redirect`),
those of the step's own certain tokens by the staged write. Nothing else is copied, and no block of
the engine's is written before the commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nwor_compile.errors import WindowInputError
from nwor_compile.ops.layout import logical_key
from nwor_compile.ops.library import Launcher, pick
from nwor_compile.routing import TailRows

if TYPE_CHECKING:
    from nwor_compile.groups import LayerBatch


@dataclass(frozen=True)
class TailBlocks:
    """What an engine says of the spare blocks that it allocated.

    first: by slot group, the first block of the group's caches that the allocator does not hand
        out. Groups that share memory need blocks of their own.
    columns: widest block table of a step.
    """

    first: Mapping[str, int]
    columns: int


def blocks_per_request(max_drafts: int, block_size: int) -> int:
    """Tail blocks of one request: its drafts may begin at any row of a block."""
    return -(-(block_size - 1 + max_drafts) // block_size)


def tail_blocks_needed(max_requests: int, max_drafts: int, block_size: int) -> int:
    """Tail blocks that a window needs in every layer."""
    return max_requests * blocks_per_request(max_drafts, block_size)


def layout_of(layers: Mapping[str, tuple[Tensor, Tensor]], max_drafts: int) -> TailRows:
    """The rows of a request, for caches of one block size. Raises WindowInputError otherwise."""
    sizes = {logical_key(key).shape[1] for key, _ in layers.values()}
    if len(sizes) > 1:
        raise WindowInputError(
            f"tail blocks: all layers of a window must have one block size, got {sorted(sizes)}"
        )
    (size,) = sizes
    return TailRows(block_size=size, rows=size * blocks_per_request(max_drafts, size))


def tail_rows(cache: Tensor, first: int, blocks: int) -> Tensor:
    """The tail blocks of one cache as `[blocks * block_size, kv_heads, head_size]`, a view.

    Raises WindowInputError if the cache ends before them, or if its rows do not follow each other
    by one stride (HND memory, vLLM's 5-D key).
    """
    if cache.dim() != 4:
        raise WindowInputError(
            f"tail blocks: expected a 4-D cache [blocks, block_size, kv_heads, head_size], got "
            f"{list(cache.shape)}"
        )
    if cache.shape[0] < first + blocks:
        raise WindowInputError(
            f"tail blocks: expected at least {first + blocks} blocks ({first} of the engine and "
            f"{blocks} for staging), got a cache of {cache.shape[0]}"
        )
    if cache.stride(0) != cache.shape[1] * cache.stride(1):
        raise WindowInputError(
            f"tail blocks: rows must follow each other by one stride, as in NHD memory; got shape "
            f"{list(cache.shape)} with strides {cache.stride()}"
        )
    return cache[first : first + blocks].flatten(0, 1)


def redirect_reference(
    key_caches: list[Tensor],
    value_caches: list[Tensor],
    cache_table: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    num_drafts: Tensor,
    redirected: Tensor,
    *,
    tail: TailRows,
    first_block: int,
    write_table: bool,
    aligned: bool = False,
) -> None:
    """The specification of `redirect`, the kernel.

    Args:
        key_caches, value_caches: one a layer, of equal geometry; their tail blocks are written.
        cache_table: addresses of the caches; the kernel's.
        block_table: `[>= R, columns]` int32, the engine's.
        seq_lens: `[R]`, tokens of each request, this step's among them. query_start_loc: `[R + 1]`.
        num_drafts: int32 `[>= R]`, the routing's: zero where nothing is redirected.
        redirected: int32 `[>= R, >= columns]`, overwritten as far as `block_table` goes.
        tail, first_block: the layout, and where the group's tail blocks begin.
        write_table: False for a further batch of the same slot group.
        aligned: every head of every cache begins at a multiple of 16 bytes; the kernel's.
    """
    del cache_table, aligned
    requests, rows = seq_lens.shape[0], block_table.shape[0]
    if write_table:
        redirected[:rows, : block_table.shape[1]].copy_(block_table)
    starts = query_start_loc.tolist()
    for r in range(requests):
        drafts, length = int(num_drafts[r]), int(seq_lens[r])
        if drafts == 0:
            continue
        size = tail.block_size
        block, place = divmod(length - drafts, size)
        own = first_block + r * (tail.rows // size)
        columns = range(block, (length - 1) // size + 1)
        if write_table:
            for column in columns:
                redirected[r, column] = own + column - block
        committed = length - (starts[r + 1] - starts[r])
        kept = min(place, max(0, committed - block * size))
        source = int(block_table[r, block])
        for cache in (*key_caches, *value_caches):
            cache[own, :kept] = cache[source, :kept]


REDIRECT = Launcher(redirect_reference, "redirect:redirect")


class Redirection:
    """The redirected block tables of a window: one a slot group, persistent.

    Attention of the window's layers reads `tables[group][:R]` in the place of the engine's block
    table, in every step: outside windows it holds the engine's own entries.
    """

    def __init__(
        self,
        where: TailBlocks,
        groups: Iterable[str],
        layout: TailRows,
        max_requests: int,
        device: torch.device,
    ) -> None:
        missing = [group for group in groups if group not in where.first]
        if missing:
            raise WindowInputError(f"tail blocks: expected a first block for slot groups {missing}")
        self.where, self.layout = where, layout
        self.tables = {
            group: torch.zeros(max_requests, where.columns, dtype=torch.int32, device=device)
            for group in groups
        }

    def check(self, block_tables: Mapping[str, Tensor] | None, requests: int = 0) -> None:
        """Raise WindowInputError unless each slot group has a block table that fits, of at least
        `requests` rows."""
        if block_tables is None or set(block_tables) != set(self.tables):
            raise WindowInputError(
                f"block_table: a window with tail blocks needs one for each of "
                f"{list(self.tables)}, got {None if block_tables is None else list(block_tables)}"
            )
        for group, table in block_tables.items():
            own = self.tables[group]
            most, columns = own.shape
            fits = table.dim() == 2 and requests <= table.shape[0] <= most
            if not fits or table.shape[1] > columns or table.dtype != torch.int32:
                raise WindowInputError(
                    f"block_table[{group}]: expected int32 [{requests} to {most}, at most "
                    f"{columns}], got {table.dtype} {list(table.shape)}"
                )
            if table.device != own.device:
                raise WindowInputError(
                    f"block_table[{group}]: expected on {own.device}, got {table.device}"
                )

    def pass_through(self, block_tables: Mapping[str, Tensor]) -> None:
        """A step without a window: the engine's own entries. Raises as `check`."""
        self.check(block_tables)
        for group, table in block_tables.items():
            self.tables[group][: table.shape[0], : table.shape[1]].copy_(table)

    def redirect(
        self,
        batches: Iterable[LayerBatch],
        block_tables: Mapping[str, Tensor],
        seq_lens: Tensor,
        query_start_loc: Tensor,
        num_drafts: Tensor,
    ) -> None:
        """Fill the tables for an open window, and the tail blocks with the rows they share with
        the cache; see `redirect_reference`."""
        written: set[str] = set()
        for batch in batches:
            group = batch.group
            pick(REDIRECT, num_drafts.device)(
                batch.key_caches, batch.value_caches, batch.table, block_tables[group], seq_lens,
                query_start_loc, num_drafts, self.tables[group], tail=self.layout,
                first_block=self.where.first[group], write_table=group not in written,
                aligned=batch.aligned,
            )  # fmt: skip
            written.add(group)
