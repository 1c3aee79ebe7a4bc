"""Attention points: the staged path of a layer against vLLM's FlashAttention 3 and direct write."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nwor_compile import ops
from nwor_compile.bench import kernels_vllm as vllm
from nwor_compile.bench.kernels_points import BLOCK_SIZE, Point
from nwor_compile.bench.kernels_timing import Run, compare
from nwor_compile.bench.record import Spread
from nwor_compile.ops.layout import cache_dtype

LAYERS = 32
# More than this and caches of one layer share blocks, which are still far more than the L2 holds.
POOL_BYTES = 32 * 2**30
ACCEPTANCE = 0.3
# bf16 weights of the softmax and bf16 output, in two kernels that sum in another order.
LARGEST_ERROR = 2e-2


@functools.cache
def _storage(dtype: torch.dtype) -> Tensor:
    """Random values that every point takes its caches from."""
    elements = POOL_BYTES // (2 if dtype.itemsize == 2 else 4)
    if dtype.itemsize == 2:
        return torch.empty(elements, dtype=dtype, device="cuda").normal_()
    part = torch.randn(elements // 8, device="cuda").to(dtype)
    return part.repeat(8)


class Batch:
    """The tensors of one point, with as many layer caches as there is room for."""

    def __init__(self, point: Point) -> None:
        self.point = point
        lengths, span = point.lengths, point.span
        columns = -(-max(lengths) // BLOCK_SIZE)
        room = max(columns, -(-point.room // BLOCK_SIZE))
        used = [-(-n // BLOCK_SIZE) for n in lengths]
        dtype = cache_dtype(point.kv_cache_dtype, torch.bfloat16)
        storage = _storage(dtype)
        block = BLOCK_SIZE * point.kv_heads * point.size
        available = storage.numel() // (2 * block)
        self.layers = max(2, min(LAYERS, available // sum(used)))
        blocks = min(sum(used), available // self.layers)
        self.aliased = blocks < sum(used)
        shape = (blocks, BLOCK_SIZE, point.kv_heads, point.size)
        size = blocks * block
        self.caches = [
            (
                storage[2 * i * size : (2 * i + 1) * size].view(shape),
                storage[(2 * i + 1) * size : (2 * i + 2) * size].view(shape),
            )
            for i in range(self.layers)
        ]
        order = torch.randperm(blocks, device="cuda", dtype=torch.int32)
        if self.aliased:
            order = order.repeat(-(-sum(used) // blocks))
        self.table = torch.zeros(point.batch, room, dtype=torch.int32, device="cuda")
        for r, (first, n) in enumerate(zip(itertools.accumulate([0, *used]), used, strict=False)):
            self.table[r, :n] = order[first : first + n]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        self.tokens = point.batch * span
        ints = functools.partial(torch.arange, device="cuda", dtype=torch.int32)
        self.starts = ints(point.batch + 1) * span
        drafts = span - 1
        self.num_drafts = torch.full_like(self.lengths, drafts)
        self.tails = ints(point.batch) * drafts
        token = torch.arange(self.tokens, device="cuda")
        request, place = token // span, token % span
        self.row_map = torch.where(place > 0, request * drafts + place - 1, -1).to(torch.int32)
        position = self.lengths.long()[request] - span + place
        block_of = self.table[request, position // BLOCK_SIZE].long()
        self.slots = block_of * BLOCK_SIZE + position % BLOCK_SIZE
        self.draft_slots = self.slots[place > 0].contiguous()
        rows = (self.layers, point.batch * drafts, point.kv_heads, point.size)
        self.staged_key, self.staged_value = (
            torch.empty(rows, dtype=dtype, device="cuda") for _ in "kv"
        )
        for i, caches in enumerate(self.caches):
            for staged, cache in zip((self.staged_key, self.staged_value), caches, strict=True):
                flat = _bits(cache).view(-1, point.kv_heads, point.size)
                _bits(staged[i]).copy_(flat[self.draft_slots])
        self.query, self.key, self.value = (
            torch.randn(self.tokens, heads, point.size, device="cuda").to(torch.bfloat16)
            for heads in (point.heads, point.kv_heads, point.kv_heads)
        )
        self.state = torch.zeros(self.layers, 2, dtype=torch.int32, device="cuda")
        keys, values = map(list, zip(*self.caches, strict=True))
        self.committed = (keys, values, list(self.staged_key), list(self.staged_value))
        self.cache_table = ops.cache_table(*self.committed)
        self.mask = torch.rand(rows[1], device="cuda") < ACCEPTANCE
        self.counters = torch.zeros(ops.counter_size(drafts), dtype=torch.int64, device="cuda")
        self.error = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.one = torch.ones(1, device="cuda")
        self.scale = point.size**-0.5

    @property
    def fp8(self) -> tuple[Any, ...]:
        """The cache dtype arguments of our ops: name, scale of K, scale of V."""
        name = self.point.kv_cache_dtype
        return (name, None, None) if name == "auto" else (name, self.one, self.one)

    def verify(self, layer: int) -> Tensor:
        """Our attention of one layer."""
        return ops.verify_attention(
            self.query, *self.caches[layer], self.staged_key[layer], self.staged_value[layer],
            self.table, self.lengths, self.starts, self.num_drafts, self.tails, self.scale, 0, 0.0,
            *self.fp8,
        )  # fmt: skip

    def stage(self, layer: int) -> None:
        """Our write of one layer."""
        ops.stage_kv(
            self.key, self.value, *self.caches[layer], self.staged_key[layer],
            self.staged_value[layer], self.state[layer], self.slots, self.row_map, *self.fp8,
        )  # fmt: skip

    def commit(self) -> None:
        """Our commit of all layers."""
        ops.commit_kv(
            *self.committed, self.draft_slots, self.mask, self.error, self.num_drafts,
            self.num_drafts, self.counters, self.cache_table, self.layers,
        )  # fmt: skip

    def staged_path(self) -> None:
        """All that a step does for the layers: stage and attend, then commit."""
        self.each(self.stage, self.verify)
        self.commit()

    def each(self, *parts: Any) -> None:
        """Every part for every layer."""
        for layer in range(self.layers):
            for part in parts:
                part(layer)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


class Flash:
    """vLLM's FlashAttention 3 over a batch, as vLLM calls it inside a full graph."""

    def __init__(self, batch: Batch) -> None:
        self.batch, point = batch, batch.point
        self.out = torch.empty_like(batch.query)
        self.max_length = batch.table.shape[1] * BLOCK_SIZE
        self.query, self.descale = batch.query, {}
        self.dtype = torch.bfloat16
        if point.kv_cache_dtype != "auto":
            self.dtype = torch.float8_e4m3fn
            self.query = batch.query.to(self.dtype)
            scale = batch.one.expand(point.batch, point.kv_heads)
            self.descale = {"q_descale": scale, "k_descale": scale, "v_descale": scale}

    def schedule(self, splits: int, lengths: Tensor, *, causal: bool = True) -> Tensor:
        """What vLLM computes once a step."""
        point = self.batch.point
        return vllm.schedule(
            lengths, self.batch.starts, max_query=point.span, max_length=self.max_length,
            heads=point.heads, kv_heads=point.kv_heads, size=point.size, block_size=BLOCK_SIZE,
            splits=splits, causal=causal, dtype=self.dtype,
        )  # fmt: skip

    def attend(self, layer: int, splits: int, metadata: Tensor) -> None:
        """One layer."""
        batch = self.batch
        vllm.flash(
            self.query, batch.caches[layer], self.out, cu_seqlens_q=batch.starts,
            max_seqlen_q=batch.point.span, seqused_k=batch.lengths, max_seqlen_k=self.max_length,
            softmax_scale=batch.scale, causal=True, block_table=batch.table,
            scheduler_metadata=metadata, num_splits=splits, **self.descale,
        )  # fmt: skip

    def write(self, layer: int) -> None:
        """vLLM's direct write of one layer."""
        b = self.batch
        vllm.write(b.key, b.value, b.caches[layer], b.slots, b.one, b.point.kv_cache_dtype)

    def run(self, splits: int, *, write: bool = False) -> None:
        """A step: metadata, then every layer."""
        metadata = self.schedule(splits, self.batch.lengths)
        for layer in range(self.batch.layers):
            if write:
                self.write(layer)
            self.attend(layer, splits, metadata)

    def unified(self) -> None:
        """vLLM's Triton attention, every layer."""
        b = self.batch
        for caches in b.caches:
            vllm.unified(
                self.query, caches, self.out, table=b.table, lengths=b.lengths, starts=b.starts,
                max_query=b.point.span, max_length=self.max_length, scale=b.scale,
            )  # fmt: skip

    def merged(self, splits: int) -> None:
        """FA3 on what lies in the cache before the span, FA3 on the span, `merge_attn_states`."""
        b, span = self.batch, self.batch.point.span
        prefix = b.lengths - span
        metadata = self.schedule(splits, prefix, causal=False)
        common = {"cu_seqlens_q": b.starts, "max_seqlen_q": span, "softmax_scale": b.scale}
        for caches in b.caches:
            before = vllm.flash(
                b.query, caches, None, seqused_k=prefix, max_seqlen_k=self.max_length,
                causal=False, block_table=b.table, scheduler_metadata=metadata, num_splits=splits,
                return_softmax_lse=True, **common,
            )  # fmt: skip
            tail = vllm.flash(
                b.query, (b.key, b.value), None, cu_seqlens_k=b.starts, max_seqlen_k=span,
                causal=True, num_splits=1, return_softmax_lse=True, **common,
            )  # fmt: skip
            vllm.merge(self.out, before, tail)


@dataclass(frozen=True)
class Measured:
    """A point's figures in microseconds a layer."""

    layers: int
    aliased: bool
    bytes: int
    runs: dict[str, Spread]
    sweep: dict[int, float]  # FA3's medians by split count
    best_splits: int | None
    error: float | None  # relative difference from FA3's output


def measure(point: Point, *, seconds: float, replays: int, alternatives: bool) -> Measured:
    """Time one point. `alternatives`: also vLLM's Triton attention and FA3 with a merged tail."""
    batch = Batch(point)
    runs: dict[str, Run] = {
        "verify": lambda: batch.each(batch.verify),
        "stage": lambda: batch.each(batch.stage),
        "staged path": batch.staged_path,
    }
    sweep: dict[int, float] = {}
    best = error = None
    comparable = point.kv_cache_dtype in ("auto", "fp8_e4m3")
    if not vllm.missing() and comparable:
        flash = Flash(batch)
        error = _difference(batch, flash)
        tried = {f"{s}": functools.partial(flash.run, s) for s in vllm.SPLITS}
        short = compare(
            dict(tried), dict.fromkeys(tried, batch.layers), seconds=seconds / 3, replays=7
        )
        sweep = {int(name): spread.median for name, spread in short.items()}
        best = min(sweep, key=lambda s: sweep[s])
        runs["FA3"] = functools.partial(flash.run, best)
        runs["FA3 path"] = functools.partial(flash.run, best, write=True)
        runs["vLLM's write"] = lambda: batch.each(flash.write)
        if best != vllm.DEFAULT_SPLITS:
            runs["FA3 path, vLLM's splits"] = functools.partial(
                flash.run, vllm.DEFAULT_SPLITS, write=True
            )
        if alternatives and point.kv_cache_dtype == "auto":
            runs["Triton unified"] = flash.unified
            runs["FA3 + tail + merge"] = functools.partial(flash.merged, best)
    times = compare(runs, dict.fromkeys(runs, batch.layers), seconds=seconds, replays=replays)
    moved = sum(point.lengths) * point.row_bytes + 2 * batch.query.numel() * 2
    return Measured(batch.layers, batch.aliased, moved, times, sweep, best, error)


def _difference(batch: Batch, flash: Flash) -> float:
    """How far our output is from FA3's over the same rows; raises if too far to be rounding."""
    ours = batch.verify(0).float()
    flash.attend(0, 1, flash.schedule(1, batch.lengths))
    theirs = flash.out.float()
    error = float((ours - theirs).norm() / theirs.norm())
    limit = LARGEST_ERROR if batch.point.kv_cache_dtype == "auto" else 10 * LARGEST_ERROR
    if not error < limit:
        raise RuntimeError(
            f"{batch.point.label}: our attention and FlashAttention 3 differ by {error:.3g}, more "
            f"than {limit}: not the same function, so not worth timing"
        )
    return error
