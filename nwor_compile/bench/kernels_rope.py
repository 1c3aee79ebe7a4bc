"""RoPE with staging beside RoPE alone, on a GPU.

`python -m nwor_compile.bench.kernels_rope --json FILE`; `measure` gives the same numbers to other
benchmarks. Llama-3-8B's dimensions in bfloat16, verify spans of 1 + 4 rows, q, k and v as slices of
one product, rotated in place; replays walk the caches of 32 layers.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from nwor_compile import NworConfig, Window
from nwor_compile.bench import kernels_timing, kernels_vllm
from nwor_compile.bench.kernels_timing import Run
from nwor_compile.bench.record import Machine, Spread, this_machine
from nwor_compile.ops import (
    reshape_and_cache,
    rope_stage_kv_window_in_place,
    rotary_embedding,
    stage_kv_window,
)
from nwor_compile.tail_blocks import TailBlocks, tail_blocks_needed

LAYERS, HEADS, KV_HEADS, SIZE, BLOCK = 32, 32, 8, 128, 16
DRAFTS, SPAN = 4, 5
ROWS = (5, 20, 80, 320, 1280)
POSITIONS = 8192
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
# What RoPE reads and writes a row, and what the staged write adds: k again, v in and out.
ROPE_BYTES = 2 * 2 * (HEADS + KV_HEADS) * SIZE
FUSED_BYTES = ROPE_BYTES + 2 * 3 * KV_HEADS * SIZE

ALONE, FUSED, APART = "RoPE alone", "RoPE with staging", "RoPE, then stage_kv"
FUSED_TAIL = "RoPE with staging into tail blocks"
DIRECT, VLLM = "RoPE, then reshape_and_cache", "vLLM's RoPE alone"


class RopeRow(BaseModel):
    """One number of token rows: microseconds a layer."""

    rows: int
    runs: dict[str, Spread]
    ratio: float  # with staging (in memory apart) over RoPE alone
    tail_ratio: float  # with staging into tail blocks over RoPE alone
    bytes_ratio: float


class RopeRecord(BaseModel):
    """What one run measured."""

    benchmark: str = "rope-gpu"
    command: str
    machine: Machine
    device: str
    triton: str
    vllm: str | None
    clocks: list[str]
    rows: list[RopeRow] = []


class _Layers:
    """Caches of 32 layers with an open window: staging in tail blocks, or in memory apart."""

    def __init__(self, rows: int, *, tail: bool) -> None:
        requests, device = rows // SPAN, "cuda"
        needed = tail_blocks_needed(requests, DRAFTS, BLOCK)
        first = max(64, rows // BLOCK + 1)
        shape = (LAYERS, 2, first + needed, BLOCK, KV_HEADS, SIZE)
        self.caches = [
            (key, value) for key, value in torch.zeros(shape, dtype=torch.bfloat16, device=device)
        ]
        self.slots = torch.randperm(first * BLOCK, device=device)[:rows]
        self.window = Window(
            {f"{tail} {i}": pair for i, pair in enumerate(self.caches)},
            max_requests=requests, max_drafts=DRAFTS, max_tokens=rows, config=NworConfig(),
            tail_blocks=TailBlocks({"kv": first}, 1) if tail else None,
        )  # fmt: skip
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        given: dict[str, Any] = {}
        if tail:
            # All in their first block, whose rows of the step are mirrored: the certain one.
            given = {
                "block_table": torch.zeros(requests, 1, **ints),
                "seq_lens": torch.randint(SPAN, BLOCK + 1, (requests,), **ints),
            }
        self.window.begin(
            torch.full((requests,), DRAFTS, **ints), torch.arange(0, rows + 1, SPAN, **ints),
            self.slots, **given,
        )  # fmt: skip


def measure(rows: int, *, seconds: float, replays: int) -> dict[str, Spread]:
    """Microseconds a layer by what is done; `rows` is a multiple of the span, 5."""
    packed = [
        torch.randn(rows, sum(WIDTHS), device="cuda").to(torch.bfloat16) for _ in range(LAYERS)
    ]
    angle = torch.rand(POSITIONS, SIZE // 2, device="cuda") * 6
    table = torch.cat([angle.cos(), angle.sin()], dim=1).to(torch.bfloat16)
    positions = torch.randint(0, POSITIONS, (rows,), device="cuda")

    def parts(layer: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = packed[layer].split(WIDTHS, dim=1)
        return q, k, v.unflatten(1, (-1, SIZE))

    def alone() -> None:
        for layer in range(LAYERS):
            q, k, _ = parts(layer)
            rotary_embedding(positions, q, k, SIZE, table, True)

    def vllm_alone() -> None:
        for layer in range(LAYERS):
            q, k, _ = parts(layer)
            kernels_vllm.rope(positions, q, k, SIZE, table)

    def fused(layers: _Layers) -> None:
        for layer, pair in enumerate(layers.caches):
            q, k, v = parts(layer)
            rope_stage_kv_window_in_place(
                positions, q, k, v, SIZE, table, True, *pair, layers.slots
            )

    def apart() -> None:
        for layer, pair in enumerate(away.caches):
            q, k, v = parts(layer)
            rotary_embedding(positions, q, k, SIZE, table, True)
            stage_kv_window(k.unflatten(1, (-1, SIZE)), v, *pair, away.slots)

    def direct() -> None:
        for layer, pair in enumerate(away.caches):
            q, k, v = parts(layer)
            rotary_embedding(positions, q, k, SIZE, table, True)
            reshape_and_cache(k.unflatten(1, (-1, SIZE)), v, *pair, away.slots)

    with contextlib.ExitStack() as stack:
        away, tail = (_Layers(rows, tail=tail) for tail in (False, True))
        stack.callback(away.window.close)
        stack.callback(tail.window.close)
        runs: dict[str, Run] = {
            ALONE: alone, FUSED: functools.partial(fused, away),
            FUSED_TAIL: functools.partial(fused, tail), APART: apart, DIRECT: direct,
        }  # fmt: skip
        if kernels_vllm.missing() is None:
            runs[VLLM] = vllm_alone
        return kernels_timing.compare(
            runs, dict.fromkeys(runs, LAYERS), seconds=seconds, replays=replays
        )


def measured_row(rows: int, *, seconds: float, replays: int) -> RopeRow:
    """One number of token rows, with its ratios."""
    runs = measure(rows, seconds=seconds, replays=replays)
    alone = runs[ALONE].median
    return RopeRow(
        rows=rows, runs=runs, ratio=runs[FUSED].median / alone,
        tail_ratio=runs[FUSED_TAIL].median / alone, bytes_ratio=FUSED_BYTES / ROPE_BYTES,
    )  # fmt: skip


def run(*, seconds: float, replays: int, command: str) -> RopeRecord:
    """Measure all of ROWS. Raises RuntimeError without a CUDA device."""
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs a CUDA GPU: it times kernels, and torch sees none")
    import triton

    record = RopeRecord(
        command=command, machine=this_machine(), device=torch.cuda.get_device_name(),
        triton=triton.__version__, vllm=kernels_vllm.version(), clocks=[kernels_timing.clocks()],
    )  # fmt: skip
    for rows in ROWS:
        record.rows.append(measured_row(rows, seconds=seconds, replays=replays))
    record.clocks.append(kernels_timing.clocks())
    return record


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = "python -m nwor_compile.bench.kernels_rope " + " ".join(words)
    seconds, replays = (0.2, 20) if given.quick else (1.0, 60)
    record = run(seconds=seconds, replays=replays, command=command.strip())
    if given.json:
        given.json.write_text(record.model_dump_json(indent=1) + "\n")
    for row in record.rows:
        medians = ", ".join(f"{name} {spread.median:.2f}" for name, spread in row.runs.items())
        ratios = f"ratio {row.ratio:.2f}, into tail blocks {row.tail_ratio:.2f}"
        print(f"{row.rows} rows, us a layer: {medians}; {ratios}")


if __name__ == "__main__":
    main()
