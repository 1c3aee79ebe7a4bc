"""What a layer's staged write costs the host in Python: worked out at every call, or prepared once.

    python benchmarks/write_host.py --json FILE

Outside CUDA graphs this runs once a layer and step. Compiled kernels and the driver are fakes that
do nothing, so that no GPU is needed: what is timed is the Python up to the launch. The call that is
not prepared lacks Triton's own launcher as well, which takes longer than a kept launch.
24/8 heads of 128 in bfloat16, 576 tokens, views of one packed product, vLLM's packed cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from pydantic import BaseModel
from triton.runtime import driver

from nwor_compile.bench.record import Machine, Spread, this_machine
from nwor_compile.ops.kernels import cache_write, rope
from nwor_compile.ops.rope import split_table
from nwor_compile.vllm_adapter.packed_cache import split_cache

TOKENS, HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 576, 24, 8, 128, 16, 64
CALLS, REPEATS = 1000, 15


class Record(BaseModel):
    """Microseconds a call, by what is called."""

    command: str
    machine: Machine
    microseconds: dict[str, Spread]


class _Compiled:
    """A compiled kernel that does nothing."""

    function, packed_metadata = 0, ()

    def run(self, *arguments: Any) -> None:
        """As a launch of Triton's."""


class _Kernel:
    """A kernel that is compiled at once."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **options: _Compiled()


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None) -> int:
        return 0


def _no_device() -> None:
    """The current device's index, as that of CPU tensors."""


def _hopper(index: int | None) -> tuple[int, int]:
    return 9, 0


def calls() -> dict[str, Callable[[], object]]:
    """Both writes, both ways."""
    widths = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
    packed = torch.randn(TOKENS, sum(widths)).bfloat16()
    q, k, v = (part.unflatten(1, (-1, SIZE)) for part in packed.split(widths, 1))
    cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * SIZE, dtype=torch.bfloat16)
    staged = torch.zeros(2, 64, KV_HEADS, SIZE, dtype=torch.bfloat16)
    row_map = torch.zeros(TOKENS, dtype=torch.int32)
    staging = (staged[0], staged[1], torch.zeros(2, dtype=torch.int32), row_map)
    table = torch.zeros(4096, SIZE, dtype=torch.bfloat16)
    positions, slots = torch.arange(TOKENS), torch.arange(TOKENS)
    with_rope = rope.RopeWrite(*split_table(table), SIZE, True, *split_cache(cache), staging)
    without = cache_write.StageWrite(*split_cache(cache), staging)
    return {
        "RoPE and stage, at every call": lambda: rope.rope_write(
            q, k, v, *split_table(table), positions, SIZE, True, *split_cache(cache), slots,
            staging, in_place=True,
        ),
        "RoPE and stage, prepared": lambda: with_rope(q, k, v, positions, slots),
        "stage, at every call": lambda: cache_write.stage_kv(
            k, v, *split_cache(cache), *staging[:3], slots, staging[3]
        ),
        "stage, prepared": lambda: without(k, v, slots),
    }  # fmt: skip


def main(json: Annotated[Path | None, typer.Option(help="write the record here")] = None) -> None:
    """Time them in turns."""
    torch.set_num_threads(1)
    driver.set_active(_Driver())
    with (
        mock.patch.object(torch.cuda, "current_device", _no_device),
        mock.patch.object(torch.cuda, "get_device_capability", _hopper),
        mock.patch.object(rope, "_rope_kernel", _Kernel()),
        mock.patch.object(cache_write, "_write_kernel", _Kernel()),
    ):
        times: dict[str, list[float]] = {}
        timed = calls()
        for repeat in range(REPEATS + 1):
            for name, call in timed.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                if repeat:  # the first prepares
                    spent = (time.perf_counter() - start) / CALLS * 1e6
                    times.setdefault(name, []).append(spent)
    record = Record(
        command="python benchmarks/write_host.py --json FILE", machine=this_machine(),
        microseconds={name: Spread.of(spent) for name, spent in times.items()},
    )  # fmt: skip
    for name, spread in record.microseconds.items():
        print(f"{name}: {spread:.2f} us")
    if json is not None:
        json.write_text(record.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
