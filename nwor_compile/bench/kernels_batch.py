"""The tensors of one attention point: caches with tail blocks, an open window, and its runs."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nwor_compile import NworConfig, Window, ops
from nwor_compile.attention_choice import prefers_fused
from nwor_compile.bench.kernels_bytes import counted
from nwor_compile.bench.kernels_points import BLOCK_SIZE, Point
from nwor_compile.ops.layout import cache_dtype
from nwor_compile.ops.library import pick
from nwor_compile.routing import BEGIN
from nwor_compile.tail_blocks import REDIRECT, RedirectPlan, TailBlocks, tail_blocks_needed

LAYERS = 32
# More than this and requests share the blocks of a layer, which are still far more than L2 holds.
POOL_BYTES = 32 * 2**30
# Tail blocks are there for so many requests, whatever a point has: as in an engine.
MAX_REQUESTS = 256
# Staging rows apart from the caches, for `verify_attention`; one number, as kernels know it.
ROWS_APART = 4096
ACCEPTANCE = 0.3
POSITIONS = 8192


@functools.cache
def _storage(dtype: torch.dtype, device: str, pool_bytes: int) -> Tensor:
    """Random values that every point takes its caches from."""
    elements = pool_bytes // (4 if dtype.itemsize == 1 else dtype.itemsize)
    if dtype.itemsize > 1:
        return torch.empty(elements, dtype=dtype, device=device).normal_()
    return torch.randn(elements // 8, device=device).to(dtype).repeat(8)


class Batch:
    """The tensors of one point, with as many layer caches as there is room for.

    A window is open: its routing and redirected block table are those of the step. `close` it.
    Tail blocks are the last ones of each cache, and so no two layers or requests share any, also
    where `aliased` requests share blocks of the engine's.
    """

    def __init__(
        self,
        point: Point,
        *,
        device: str = "cuda",
        pool_bytes: int = POOL_BYTES,
        max_requests: int = MAX_REQUESTS,
    ) -> None:
        self.point, self.device = point, torch.device(device)
        self.dtype = cache_dtype(point.kv_cache_dtype, torch.bfloat16)
        self.drafts = point.batch * (point.span - 1)
        self.tokens = point.batch * point.span
        self.scale = point.size**-0.5
        self._allocate(_storage(self.dtype, device, pool_bytes), max_requests)
        self._route()
        self._stage_apart()
        self._rows()
        self.window = Window(
            {f"layers.{i}": pair for i, pair in enumerate(self.caches)},
            max_requests=max_requests, max_drafts=point.span - 1, max_tokens=self.tokens,
            config=NworConfig(), kv_cache_dtype=point.kv_cache_dtype,
            tail_blocks=TailBlocks({"kv": self.first_tail}, self.table.shape[1]),
        )  # fmt: skip
        self.window.begin(
            self.num_drafts, self.starts, self.slots, block_table=self.table, seq_lens=self.lengths
        )
        self.redirected = self.window.block_tables["kv"][: point.batch]
        self._first, self._behind = self._redirect_plans()

    def close(self) -> None:
        """Close the window: the caches may be another's."""
        self.window.close()

    def _allocate(self, storage: Tensor, max_requests: int) -> None:
        """The caches, the block table and the lengths."""
        point, device = self.point, self.device
        used = [-(-n // BLOCK_SIZE) for n in point.lengths]
        tail = tail_blocks_needed(max_requests, point.span - 1, BLOCK_SIZE)
        block = BLOCK_SIZE * point.kv_heads * point.size
        available = storage.numel() // (2 * block)
        # Powers of two, and all of the room: kernels that know the size of a cache meet few.
        layers = min(LAYERS, max(2, available // (sum(used) + tail)))
        self.layers = 1 << (layers.bit_length() - 1)
        blocks = available // self.layers
        self.first_tail = blocks - tail
        own = min(sum(used), self.first_tail)
        self.aliased = own < sum(used)
        shape = (blocks, BLOCK_SIZE, point.kv_heads, point.size)
        caches = storage[: 2 * self.layers * blocks * block].view(self.layers, 2, *shape)
        self.caches = [(key, value) for key, value in caches]
        order = torch.randperm(own, device=device, dtype=torch.int32)
        if self.aliased:
            order = order.repeat(-(-sum(used) // own))
        columns = max(max(used), -(-point.room // BLOCK_SIZE))
        self.table = torch.zeros(point.batch, columns, dtype=torch.int32, device=device)
        for r, (first, n) in enumerate(zip(itertools.accumulate([0, *used]), used, strict=False)):
            self.table[r, :n] = order[first : first + n]
        self.lengths = torch.tensor(point.lengths, dtype=torch.int32, device=device)

    def _route(self) -> None:
        """Spans, drafts and slots of the step."""
        point, span, device = self.point, self.point.span, self.device
        self.starts = torch.arange(point.batch + 1, device=device, dtype=torch.int32) * span
        self.num_drafts = torch.full_like(self.lengths, span - 1)
        token = torch.arange(self.tokens, device=device)
        request, place = token // span, token % span
        position = self.lengths.long()[request] - span + place
        block = self.table[request, position // BLOCK_SIZE].long()
        self.slots = block * BLOCK_SIZE + position % BLOCK_SIZE
        self.positions = position % POSITIONS
        self.draft_slots = self.slots[place > 0].contiguous()
        # Staging in memory of its own has no layout: draft after draft.
        row = request * (span - 1) + place - 1
        self.row_map = torch.where(place > 0, row, -1).to(torch.int32)
        self.tails = self.starts[:-1] // span * (span - 1)
        self.mask = torch.rand(self.drafts, device=device) < ACCEPTANCE

    def _stage_apart(self) -> None:
        """Staging apart from the caches, with the rows that the caches have for the drafts."""
        point, device = self.point, self.device
        rows = max(ROWS_APART, self.drafts)
        shape = (2, self.layers, rows, point.kv_heads, point.size)
        self.staged_key, self.staged_value = torch.empty(shape, dtype=self.dtype, device=device)
        for i, caches in enumerate(self.caches):
            for staged, cache in zip((self.staged_key, self.staged_value), caches, strict=True):
                staged[i, : self.drafts].copy_(self._gather(cache, self.draft_slots))
        keys, values = map(list, zip(*self.caches, strict=True))
        self.committed = (keys, values, list(self.staged_key), list(self.staged_value))
        self.addresses = ops.cache_table(*self.committed)
        self.state = torch.zeros(self.layers, 2, dtype=torch.int32, device=device)
        self.error = torch.zeros(1, dtype=torch.int32, device=device)
        size = ops.counter_size(point.span - 1)
        self.counters = torch.zeros(size, dtype=torch.int64, device=device)

    def _rows(self) -> None:
        """Query, key and value of the step, and RoPE's table."""
        point, device = self.point, self.device
        self.query, self.key, self.value = (
            torch.randn(self.tokens, heads, point.size, device=device).to(torch.bfloat16)
            for heads in (point.heads, point.kv_heads, point.kv_heads)
        )
        # Quarter turns: the runs rotate in place again and again, and other angles are rounded, so
        # that rows would grow beyond all bounds, in the caches too.
        angle = torch.randint(0, 4, (POSITIONS, point.size // 2), device=device) * (torch.pi / 2)
        self.angles = torch.cat([angle.cos(), angle.sin()], dim=1).round().to(torch.bfloat16)
        self.one = torch.ones(1, device=device)

    def _gather(self, cache: Tensor, slots: Tensor) -> Tensor:
        """Rows of a cache `[blocks, block_size, kv_heads, D]` as `[len(slots), kv_heads, D]`."""
        bits = cache.view(torch.uint8) if cache.element_size() == 1 else cache
        return bits.flatten(0, 1)[slots].view(cache.dtype)

    def take_rows_from_cache(self, layer: int) -> None:
        """Make key and value the rows that a layer's cache has in the step's slots, so that staging
        them changes no function."""
        for rows, cache in zip((self.key, self.value), self.caches[layer], strict=True):
            rows.copy_(self._gather(cache, self.slots))

    @property
    def fused_preferred(self) -> bool:
        """Whether `auto` in vLLM would take this package's attention."""
        point = self.point
        return point.kv_cache_dtype == "auto" and prefers_fused(
            point.batch, point.span, sum(point.lengths), grouped=point.heads > point.kv_heads
        )

    @property
    def fp8(self) -> tuple[Any, ...]:
        """The cache dtype arguments of our ops: name, scale of K, scale of V."""
        name = self.point.kv_cache_dtype
        return (name, None, None) if name == "auto" else (name, self.one, self.one)

    def verify(self, layer: int) -> Tensor:
        """Our attention of one layer, tail from memory apart."""
        return ops.verify_attention(
            self.query, *self.caches[layer], self.staged_key[layer], self.staged_value[layer],
            self.table, self.lengths, self.starts, self.num_drafts, self.tails, self.scale, 0, 0.0,
            *self.fp8,
        )  # fmt: skip

    def paged(self, layer: int, table: Tensor) -> Tensor:
        """Our attention of one layer over a block table."""
        return ops.paged_attention(
            self.query, *self.caches[layer], table, self.lengths, self.starts, self.scale, 0, 0.0,
            *self.fp8,
        )  # fmt: skip

    def fused(self, layer: int) -> Tensor:
        """Our attention of one layer, prefix and tail by the redirected table."""
        return self.paged(layer, self.redirected)

    def stage_apart(self, layer: int) -> None:
        """Our write of one layer, drafts to memory apart."""
        ops.stage_kv(
            self.key, self.value, *self.caches[layer], self.staged_key[layer],
            self.staged_value[layer], self.state[layer], self.slots, self.row_map, *self.fp8,
        )  # fmt: skip

    def stage(self, layer: int) -> None:
        """Our write of one layer, drafts and what is mirrored to tail blocks."""
        tensors = self.window.tensors
        batch = tensors.batches[0]
        ops.stage_kv(
            self.key, self.value, *self.caches[layer], batch.staged_keys[layer],
            batch.staged_values[layer], batch.state[layer], self.slots, tensors.routing.row_map,
            *self.fp8,
        )  # fmt: skip

    def rope(self, layer: int) -> None:
        """Our RoPE of one layer, in place."""
        ops.rotary_embedding(
            self.positions, self.query, self.key, self.point.size, self.angles, True
        )

    def rope_stage(self, layer: int) -> None:
        """RoPE and the write of one layer in one kernel."""
        ops.rope_stage_kv_window_in_place(
            self.positions, self.query, self.key, self.value, self.point.size, self.angles, True,
            *self.caches[layer], self.slots, *self.fp8,
        )  # fmt: skip

    def open(self) -> None:
        """The kernels that open a window right behind another one, as `Window.begin` starts them.

        As many requests as move on to another block in a step, if `ACCEPTANCE` of the drafts pass,
        have rows to copy; the others' tail blocks have them.
        """
        self._open(self._behind)

    def open_first(self) -> None:
        """The same for a first window: every request has rows to copy."""
        self._open(self._first)

    def _open(self, plan: RedirectPlan) -> None:
        pick(BEGIN, self.device)(
            self.window.opening, self.num_drafts, self.starts, [self.slots], self.lengths
        )
        pick(REDIRECT, self.device)(plan, self.table, self.lengths, self.starts)

    def _redirect_plans(self) -> tuple[RedirectPlan, RedirectPlan]:
        """How tables are redirected in a first window, and in one behind another.

        The window's own plan with records and an epoch that stay as they are: epoch 0 reads the
        second half of a record and writes the first.
        """
        redirection, requests = self.window.redirection, self.point.batch
        if redirection is None:
            raise RuntimeError("the window of a benchmark point has no tail blocks")
        ((_, plan),) = redirection.plans
        first = replace(
            plan, epoch=torch.zeros_like(plan.epoch), records=torch.full_like(plan.records, -1)
        )
        position = (self.lengths - self.num_drafts).long()
        block, place = position // BLOCK_SIZE, (position % BLOCK_SIZE).tolist()
        own = self.table.gather(1, block[:, None])[:, 0].long()
        records = first.records.clone()
        records[:requests, 1] = torch.stack(
            [torch.zeros_like(block), own, block, self.lengths.long()], 1
        )
        # The first rows of a block are where requests are that just got there; from row 2 on there
        # is something to copy.
        share = counted(self.point.span - 1, ACCEPTANCE, BLOCK_SIZE).crossing
        order = sorted(range(requests), key=lambda r: (place[r] < 2, place[r]))
        self.crossing = order[: round(share * requests)]
        records[self.crossing, 1] = -1
        return first, replace(first, records=records)

    def commit(self) -> None:
        """Our commit of all layers, from tail blocks."""
        tensors = self.window.tensors
        batch = tensors.batches[0]
        ops.commit_kv(
            batch.key_caches, batch.value_caches, batch.staged_keys, batch.staged_values,
            batch.slots, self.mask, self.error, self.num_drafts, self.num_drafts, self.counters,
            batch.table, self.layers, tensors.rows,
        )  # fmt: skip

    def commit_apart(self) -> None:
        """Our commit of all layers, from memory apart."""
        ops.commit_kv(
            *self.committed, self.draft_slots, self.mask, self.error, self.num_drafts,
            self.num_drafts, self.counters, self.addresses, self.layers,
        )  # fmt: skip

    def each(self, *parts: Any) -> None:
        """Every part for every layer."""
        for layer in range(self.layers):
            for part in parts:
                part(layer)

    def path_apart(self) -> None:
        """All that a step does for the layers with staging in memory of its own."""
        self.each(self.stage_apart, self.verify)
        self.commit_apart()

    def path(self, write: Any, attend: Any) -> None:
        """All that a step does for the layers with tail blocks."""
        self.open()
        self.each(write, attend)
        self.commit()
