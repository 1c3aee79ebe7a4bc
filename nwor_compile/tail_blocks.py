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
the engine's is written before the commit. What the tail block holds from the step before is not
copied again.

NOTE [kept tails]: when nothing need be copied.
Let a window stage request row r, b be the block of its first draft and X that block's number in
the engine's table. Before the commit, r's first tail block holds rows of b: those before the span,
which were copied or already there; the span's certain ones, which were mirrored; and drafts. The
commit copies the accepted drafts to X. So every row of b below the length that the engine goes on
with is in X and in the tail block with the same bits, and is in both until one of them is written.
`redirect` notes the epoch, X, b and the step's length in the row's record. At the next window the
rows before the span are in the tail block if
- the epoch says that this window comes directly after that one. `begin` adds 1 to it, and 1 more if
  the window before ended with the error flag up (a layer may have staged nothing); an abort, a
  begin that failed and a step without a window add 1. A record is stamped with the epoch that the
  next window has if nothing comes between, and epochs never come again. So the row was staged in
  the step before, and since then its tail block was written by no other step;
- block b of row r is X again, and the span begins no further on than the noted length.
That it is the same request need not be known. Rows of b before the span were computed in earlier
steps. If there are any, the request had X in the step before already: a block that is allocated
for this step has no such rows, as a prefix hit gives whole blocks, all in front of b. In that step
X was not full of certain tokens, since a draft was to go there; an engine shares full blocks only,
so X was the block of one request, and of the one in row r. This holds for requests that leave,
return or change rows. What it asks of an engine: committed rows of partly filled blocks are written
by this window's steps alone, in each of which the window begins or passes through. One that fills a
part of a new block otherwise (a copy on write, a transfer) and gives the request drafts in the same
step must say so by `Window.caches_changed`.
Programs of a launch run in any order. So a record has two halves, by the epoch's parity: a window
reads one and writes the other, and all launches of its batches read the same. The epoch is changed
by other launches only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nwor_compile.errors import WindowInputError
from nwor_compile.layer_batch import LayerBatch
from nwor_compile.ops.layout import logical_key
from nwor_compile.ops.library import Launcher, pick
from nwor_compile.routing import TailRows

if TYPE_CHECKING:
    from nwor_compile.ops.kernels.redirect import RedirectConstants


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


@dataclass(frozen=True, eq=False)
class RedirectPlan:
    """What all redirections of a batch of layers have in common.

    key_caches, value_caches: one a layer, of equal geometry; their tail blocks are written.
    cache_table: addresses of the caches; the kernel's.
    num_drafts: int32 `[>= R]`, the routing's: zero where nothing is redirected.
    redirected: int32 `[>= R, >= columns]`, overwritten as far as the step's block table goes.
    records: int64 `[>= R, 2, 4]`, contiguous, the slot group's: by row and parity of the epoch, the
        epoch in which it counts, the engine's block of the first draft, which block of the request
        that is, and the request's length; see NOTE [kept tails].
    epoch: int64 `[1]`, which `begin` has counted up.
    tail, first_block: the layout, and where the group's tail blocks begin.
    write_table: False for a further batch of the same slot group; records are left alone too.
    aligned: every head of every cache begins at a multiple of 16 bytes; the kernel's.
    """

    key_caches: list[Tensor]
    value_caches: list[Tensor]
    cache_table: Tensor
    num_drafts: Tensor
    redirected: Tensor
    records: Tensor
    epoch: Tensor
    tail: TailRows
    first_block: int
    write_table: bool
    aligned: bool = False

    @cached_property
    def constants(self) -> RedirectConstants:
        """What the kernel is launched with every time; made at the first launch."""
        from nwor_compile.ops.kernels.redirect import redirect_constants  # needs Triton

        return redirect_constants(self)


def redirect_reference(
    plan: RedirectPlan, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor
) -> None:
    """The specification of `redirect`, the kernel.

    Args:
        block_table: `[>= R, columns]` int32, the engine's.
        seq_lens: `[R]`, tokens of each request, this step's among them. query_start_loc: `[R + 1]`.
    """
    tail, redirected, records = plan.tail, plan.redirected, plan.records
    requests, rows = seq_lens.shape[0], block_table.shape[0]
    if plan.write_table:
        redirected[:rows, : block_table.shape[1]].copy_(block_table)
    starts, now = query_start_loc.tolist(), int(plan.epoch)
    for r in range(requests):
        drafts, length = int(plan.num_drafts[r]), int(seq_lens[r])
        if drafts == 0:
            continue
        size = tail.block_size
        block, place = divmod(length - drafts, size)
        own = plan.first_block + r * (tail.rows // size)
        columns = range(block, (length - 1) // size + 1)
        source = int(block_table[r, block])
        if plan.write_table:
            for column in columns:
                redirected[r, column] = own + column - block
            records[r, now % 2] = records.new_tensor([now + 1, source, block, length])
        committed = length - (starts[r + 1] - starts[r])
        before = records[r, (now + 1) % 2].tolist()
        if before[:3] == [now, source, block] and committed <= before[3]:
            continue
        kept = min(place, max(0, committed - block * size))
        for cache in (*plan.key_caches, *plan.value_caches):
            cache[own, :kept] = cache[source, :kept]


REDIRECT = Launcher(redirect_reference, "redirect:redirect")


def pass_reference(plan: RedirectPlan, block_table: Tensor) -> None:
    """The specification of `pass_table`, the kernel: the engine's entries to `plan.redirected`, and
    the epoch counted up, since no window uses the tail blocks in this step."""
    plan.redirected[: block_table.shape[0], : block_table.shape[1]].copy_(block_table)
    plan.epoch.add_(1)


PASS = Launcher(pass_reference, "redirect:pass_table")


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
        # No epoch is negative.
        self.records = {
            group: torch.full((max_requests, 2, 4), -1, dtype=torch.int64, device=device)
            for group in groups
        }
        self.epoch = torch.zeros(1, dtype=torch.int64, device=device)
        self.plans: list[tuple[str, RedirectPlan]] = []

    def over(self, batches: Iterable[LayerBatch], num_drafts: Tensor) -> None:
        """Say which layers' tail blocks are filled, and by which draft counts; once."""
        for batch in batches:
            group = batch.group
            plan = RedirectPlan(
                batch.key_caches, batch.value_caches, batch.table, num_drafts, self.tables[group],
                self.records[group], self.epoch, self.layout, self.where.first[group],
                write_table=group not in dict(self.plans), aligned=batch.aligned,
            )  # fmt: skip
            self.plans.append((group, plan))

    def forget(self) -> None:
        """Let the next window copy whatever its tail blocks share with the cache."""
        self.epoch.add_(1)

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
        """A step without a window: the engine's own entries, of tables that fit (`check`)."""
        for group, plan in self.plans:
            if plan.write_table:
                pick(PASS, plan.epoch.device)(plan, block_tables[group])

    def redirect(
        self, block_tables: Mapping[str, Tensor], seq_lens: Tensor, query_start_loc: Tensor
    ) -> None:
        """Fill the tables for an open window, and the tail blocks with the rows they share with
        the cache; see `redirect_reference`."""
        for group, plan in self.plans:
            pick(REDIRECT, plan.epoch.device)(plan, block_tables[group], seq_lens, query_start_loc)
