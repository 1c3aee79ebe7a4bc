"""Attention points: the staged path of a layer against vLLM's FlashAttention 3 and direct write."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nwor_compile.bench import kernels_vllm as vllm
from nwor_compile.bench.kernels_batch import Batch
from nwor_compile.bench.kernels_points import BLOCK_SIZE, Point
from nwor_compile.bench.kernels_timing import Run, compare
from nwor_compile.bench.record import Spread

LayerRun = Callable[[int], None]  # of one layer

# bf16 weights of the softmax and bf16 output, in two kernels that sum in another order.
LARGEST_ERROR = 2e-2
# Tokens of a batch beyond which the slow alternatives are left out.
ALTERNATIVES_TOKENS = 2**20

# What a run measures. Attention alone, over prefix and tail:
FA3 = "FA3"  # vLLM's FlashAttention 3, tail written to the cache
FA3_TAIL = "FA3 over tail blocks"
FUSED_TAIL = "fused over tail blocks"  # this package's kernel
FUSED_APART = "verify"  # the same, tail from memory apart
# Writes alone:
WRITE = "vLLM's write"
STAGE_TAIL = "stage into tail blocks"
STAGE_APART = "stage"
# Opening as in a row of windows, where few requests have rows to copy; and where all have.
OPEN, OPEN_FIRST, COMMIT = "open", "open, all rows to copy", "commit"
# Everything that a step does for its layers:
DIRECT_PATH = "FA3 path"  # direct write, then FlashAttention
PATH_FA3, PATH_FUSED = "staged path, FA3", "staged path, fused"
PATH_APART = "staged path, memory apart"
# The same with RoPE, which ours stages in:
ROPE, ROPE_VLLM, ROPE_STAGE = "RoPE", "vLLM's RoPE", "RoPE with staging into tail blocks"
DIRECT_ROPE = "RoPE, FA3 path"
ROPE_FA3, ROPE_FUSED = "RoPE, staged path, FA3", "RoPE, staged path, fused"


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

    def attend(self, layer: int, splits: int, metadata: Tensor, table: Tensor) -> None:
        """One layer."""
        batch = self.batch
        vllm.flash(
            self.query, batch.caches[layer], self.out, cu_seqlens_q=batch.starts,
            max_seqlen_q=batch.point.span, seqused_k=batch.lengths, max_seqlen_k=self.max_length,
            softmax_scale=batch.scale, causal=True, block_table=table,
            scheduler_metadata=metadata, num_splits=splits, **self.descale,
        )  # fmt: skip

    def write(self, layer: int) -> None:
        """vLLM's direct write of one layer."""
        b = self.batch
        vllm.write(b.key, b.value, b.caches[layer], b.slots, b.one, b.point.kv_cache_dtype)

    def rope(self, layer: int) -> None:
        """vLLM's RoPE of one layer, in place."""
        b = self.batch
        vllm.rope(b.positions, b.query, b.key, b.point.size, b.angles)

    def rope_write(self, layer: int) -> None:
        """vLLM's RoPE and direct write of one layer."""
        self.rope(layer)
        self.write(layer)

    def run(self, splits: int, *, write: LayerRun | None = None, tail: bool = False) -> None:
        """A step: metadata, then every layer. tail: over the redirected block table."""
        metadata = self.schedule(splits, self.batch.lengths)
        table = self.batch.redirected if tail else self.batch.table
        for layer in range(self.batch.layers):
            if write is not None:
                write(layer)
            self.attend(layer, splits, metadata, table)

    def path(self, splits: int, write: LayerRun) -> None:
        """All that a step does for the layers with tail blocks, FlashAttention over them."""
        self.batch.open()
        self.run(splits, write=write, tail=True)
        self.batch.commit()

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
    chosen: str  # the attention that `auto` takes: FA3 or fused
    equal: dict[str, bool]  # attention over tail blocks: bits as over the written cache


class _Checks(NamedTuple):
    error: float | None
    equal: dict[str, bool]


def measure(point: Point, *, seconds: float, replays: int, alternatives: bool) -> Measured:
    """Time one point. `alternatives`: also vLLM's Triton attention and FA3 with a merged tail.

    Raises RuntimeError if two kernels that should compute the same do not.
    """
    with contextlib.closing(Batch(point)) as batch:
        return _measure(batch, seconds=seconds, replays=replays, alternatives=alternatives)


def _measure(batch: Batch, *, seconds: float, replays: int, alternatives: bool) -> Measured:
    point = batch.point
    runs = _our_runs(batch)
    sweep: dict[int, float] = {}
    best: int | None = None
    comparable = point.kv_cache_dtype in ("auto", "fp8_e4m3")
    flash = Flash(batch) if comparable and not vllm.missing() else None
    if flash is not None:
        tried = {f"{s}": functools.partial(flash.run, s) for s in vllm.SPLITS}
        short = compare(
            dict(tried), dict.fromkeys(tried, batch.layers), seconds=seconds / 3, replays=7
        )
        sweep = {int(name): spread.median for name, spread in short.items()}
        best = min(sweep, key=lambda s: sweep[s])
        runs |= _their_runs(batch, flash, best)
        few = sum(point.lengths) <= ALTERNATIVES_TOKENS
        if alternatives and few and point.kv_cache_dtype == "auto":
            runs["Triton unified"] = flash.unified
            runs["FA3 + tail + merge"] = functools.partial(flash.merged, best)
    checks = check(batch, flash, best)
    times = compare(runs, dict.fromkeys(runs, batch.layers), seconds=seconds, replays=replays)
    moved = sum(point.lengths) * point.row_bytes + 2 * batch.query.numel() * 2
    # FLASH_ATTN takes no e5m2, so there this package's kernel is all there is.
    fused = batch.fused_preferred or not comparable
    return Measured(
        batch.layers, batch.aliased, moved, times, sweep, best, checks.error,
        "fused" if fused else "FA3", checks.equal,
    )  # fmt: skip


def _our_runs(batch: Batch) -> dict[str, Run]:
    alone = {
        FUSED_APART: batch.verify, STAGE_APART: batch.stage_apart, FUSED_TAIL: batch.fused,
        STAGE_TAIL: batch.stage, ROPE: batch.rope, ROPE_STAGE: batch.rope_stage,
    }  # fmt: skip
    runs: dict[str, Run] = {
        name: functools.partial(batch.each, part) for name, part in alone.items()
    }
    runs |= {
        OPEN: batch.open,
        OPEN_FIRST: batch.open_first,
        COMMIT: batch.commit,
        PATH_APART: batch.path_apart,
        PATH_FUSED: functools.partial(batch.path, batch.stage, batch.fused),
        ROPE_FUSED: functools.partial(batch.path, batch.rope_stage, batch.fused),
    }
    return runs


def _their_runs(batch: Batch, flash: Flash, best: int) -> dict[str, Run]:
    """FlashAttention over written caches and over tail blocks, `best` splits for both."""
    runs: dict[str, Run] = {
        FA3: functools.partial(flash.run, best),
        FA3_TAIL: functools.partial(flash.run, best, tail=True),
        WRITE: functools.partial(batch.each, flash.write),
        DIRECT_PATH: functools.partial(flash.run, best, write=flash.write),
        PATH_FA3: functools.partial(flash.path, best, batch.stage),
        ROPE_VLLM: functools.partial(batch.each, flash.rope),
        DIRECT_ROPE: functools.partial(flash.run, best, write=flash.rope_write),
        ROPE_FA3: functools.partial(flash.path, best, batch.rope_stage),
    }
    if best != vllm.DEFAULT_SPLITS:
        runs["FA3 path, vLLM's splits"] = functools.partial(
            flash.run, vllm.DEFAULT_SPLITS, write=flash.write
        )
    return runs


def check(batch: Batch, flash: Flash | None, splits: int | None) -> _Checks:
    """Whether attention over staged rows is what it should be, on the first layer.

    The rows of the step that the cache has are staged, so that the function stays the same: this
    package's attention and FlashAttention must give the same bits by the redirected table, and each
    other's output but for rounding. `verify_attention` reads such rows from memory apart already.
    Raises RuntimeError if something differs.
    """
    batch.open_first()
    batch.take_rows_from_cache(0)
    written = batch.paged(0, batch.table)
    batch.stage(0)
    equal = {
        FUSED_TAIL: torch.equal(written, batch.fused(0)),
        FUSED_APART: torch.equal(written, batch.verify(0)),
    }
    error = None
    if flash is not None and splits is not None:
        metadata = flash.schedule(splits, batch.lengths)
        flash.attend(0, splits, metadata, batch.table)
        theirs = flash.out.clone()
        flash.out.fill_(float("nan"))
        flash.attend(0, splits, metadata, batch.redirected)
        equal[FA3_TAIL] = torch.equal(theirs, flash.out)
        error = float((written.float() - theirs.float()).norm() / theirs.float().norm())
    label = batch.point.label
    for name, same in equal.items():
        if not same:
            raise RuntimeError(
                f"{label}: {name} differs from the same attention over the written cache: not the "
                "same function, so not worth timing"
            )
    limit = LARGEST_ERROR if batch.point.kv_cache_dtype == "auto" else 10 * LARGEST_ERROR
    if error is not None and not error < limit:
        raise RuntimeError(
            f"{label}: our attention and FlashAttention 3 differ by {error:.3g}, more than {limit}:"
            " not the same function, so not worth timing"
        )
    return _Checks(error, equal)
