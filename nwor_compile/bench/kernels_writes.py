"""The write path of a step: 32 layers' writes and stages, and the commit of all layers.

Rows that all are drafts measure the kernels; a step with tail blocks has what an engine's has:
verify spans of one certain row and four drafts, opened, staged and committed. It is opened as
behind another window: see `Batch.open` for how many requests have rows to copy. Opening with
everything to copy, as in a request's first window, is a run of its own.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from nwor_compile import ops
from nwor_compile.bench import kernels_vllm as vllm
from nwor_compile.bench.kernels_batch import Batch
from nwor_compile.bench.kernels_points import Point
from nwor_compile.bench.kernels_timing import Run, compare
from nwor_compile.bench.record import Spread

LAYERS, KV_HEADS, SIZE, BLOCK_SIZE = 32, 8, 128, 16
ROWS = (5, 20, 80, 320, 640, 1280)
ACCEPTANCE = (0.0, 0.3, 1.0)
ROW_BYTES = 2 * KV_HEADS * SIZE * 2
# Steps in a graph: one launch alone would mostly measure the start of a graph.
STEPS = 8
DRAFTS = 4
SPAN = DRAFTS + 1
CONTEXT = 512
BASELINE = f"{LAYERS} x vLLM's reshape_and_cache_flash"
OPEN, OPEN_FIRST = "open tail blocks", "open tail blocks, all rows to copy"
STAGE, COMMIT = f"{LAYERS} x stage_kv to tail blocks", "commit_kv of them"
STEP = "step with tail blocks: open, stage, commit"


class Writes:
    """Caches of 32 layers, and the rows of `STEPS` steps that go to other slots each."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        blocks = 4096
        cache = (LAYERS, blocks, BLOCK_SIZE, KV_HEADS, SIZE)
        self.keys, self.values = (list(_random(*cache)) for _ in "kv")
        self.key, self.value = (_random(LAYERS, rows, KV_HEADS, SIZE) for _ in "kv")
        self.staged_key, self.staged_value = (
            _random(STEPS, LAYERS, rows, KV_HEADS, SIZE) for _ in "kv"
        )
        order = torch.randperm(blocks * BLOCK_SIZE, device="cuda")[: STEPS * rows]
        self.slots = order.view(STEPS, rows)
        self.row_map = torch.arange(rows, device="cuda", dtype=torch.int32)
        self.state = torch.zeros(LAYERS, 2, device="cuda", dtype=torch.int32)
        self.staged = [
            (list(key), list(value))
            for key, value in zip(self.staged_key, self.staged_value, strict=True)
        ]
        self.tables = [ops.cache_table(self.keys, self.values, *rows) for rows in self.staged]
        requests = max(1, rows // DRAFTS)
        self.drafts = torch.full((requests,), DRAFTS, device="cuda", dtype=torch.int32)
        self.accepted = torch.ones(requests, device="cuda", dtype=torch.int32)
        self.counters = torch.zeros(ops.counter_size(DRAFTS), device="cuda", dtype=torch.int64)
        self.error = torch.zeros(1, device="cuda", dtype=torch.int32)
        self.one = torch.ones(1, device="cuda")

    def direct(self) -> None:
        """Our direct write."""
        for slots in self.slots:
            for i in range(LAYERS):
                ops.reshape_and_cache(
                    self.key[i], self.value[i], self.keys[i], self.values[i], slots
                )

    def theirs(self) -> None:
        """vLLM's direct write."""
        for slots in self.slots:
            for i in range(LAYERS):
                vllm.write(
                    self.key[i], self.value[i], (self.keys[i], self.values[i]), slots, self.one
                )

    def stage(self) -> None:
        """All rows to staging."""
        for key, value, slots in zip(self.staged_key, self.staged_value, self.slots, strict=True):
            for i in range(LAYERS):
                ops.stage_kv(
                    self.key[i], self.value[i], self.keys[i], self.values[i], key[i], value[i],
                    self.state[i], slots, self.row_map,
                )  # fmt: skip

    def commit(self, mask: Tensor) -> None:
        """The rows in `mask`, all layers."""
        for rows, table, slots in zip(self.staged, self.tables, self.slots, strict=True):
            ops.commit_kv(
                self.keys, self.values, *rows, slots, mask, self.error, self.drafts,
                self.accepted, self.counters, table, LAYERS,
            )  # fmt: skip


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def accepted_rows(rows: int, rate: float) -> int:
    """How many rows a commit at this acceptance moves."""
    return round(rate * rows)


def measure(rows: int, *, seconds: float, replays: int) -> dict[str, Spread]:
    """Microseconds of a step of `rows` token rows, by every way there is."""
    writes = Writes(rows)
    runs: dict[str, Run] = {
        f"{LAYERS} x reshape_and_cache": writes.direct,
        f"{LAYERS} x stage_kv": writes.stage,
    }
    for rate in ACCEPTANCE:
        mask = torch.zeros(rows, device="cuda", dtype=torch.bool)
        mask[torch.randperm(rows, device="cuda")[: accepted_rows(rows, rate)]] = True
        runs[f"commit_kv, {rate:.0%} accepted"] = functools.partial(writes.commit, mask)
    if not vllm.missing():
        runs[BASELINE] = writes.theirs
    with contextlib.closing(Batch(Point(rows // SPAN, CONTEXT, span=SPAN))) as batch:
        parts: dict[str, Run] = {
            OPEN: batch.open,
            OPEN_FIRST: batch.open_first,
            STAGE: functools.partial(batch.each, batch.stage),
            COMMIT: batch.commit,
            STEP: functools.partial(_step, batch),
        }
        runs |= {name: functools.partial(_repeated, part) for name, part in parts.items()}
        return compare(runs, dict.fromkeys(runs, STEPS), seconds=seconds, replays=replays)


def _step(batch: Batch) -> None:
    batch.open()
    batch.each(batch.stage)
    batch.commit()


def _repeated(part: Run) -> None:
    for _ in range(STEPS):
        part()
