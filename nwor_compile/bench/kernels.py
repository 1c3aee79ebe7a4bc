"""`nwor bench kernels`: the staged path of a CUDA GPU beside vLLM's kernels, in one process.

Times are medians over replays of CUDA graphs that walk many layer caches. vLLM's kernels are the
baselines where a vLLM with CUDA kernels is installed; without it they are missing, and said so.
The floor of a row is its bytes over the measured copy bandwidth plus an empty kernel's time.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from nwor_compile.bench import (
    kernels_attention,
    kernels_scv,
    kernels_timing,
    kernels_vllm,
    kernels_writes,
)
from nwor_compile.bench.kernels_points import points
from nwor_compile.bench.record import Machine, Spread, this_machine


class AttentionRow(BaseModel):
    """One point: microseconds a layer."""

    group: str
    case: str
    layers: int
    aliased: bool  # requests share blocks, because the point exceeds memory
    floor_us: float
    runs: dict[str, Spread]
    split_sweep: dict[int, float]
    best_splits: int | None
    error: float | None
    ratio: float | None  # FA3 and direct write, best split count, over the staged path


class WriteRow(BaseModel):
    """One size of the write path: microseconds a step of 32 layers."""

    rows: int
    runs: dict[str, Spread]
    commit_floor_us: dict[str, float]
    ratios: dict[str, float]  # vLLM's 32 writes over a commit


class ScvRow(BaseModel):
    """One batch: microseconds of acceptance and commit over 32 layers."""

    requests: int
    device: dict[str, Spread]
    host: dict[str, Spread]


class KernelsRecord(BaseModel):
    """Everything that one run measured."""

    benchmark: str = "kernels-gpu"
    command: str
    machine: Machine
    device: str
    triton: str
    vllm: str | None
    baselines_missing: str | None
    clocks: list[str]
    copy_bytes_per_us: Spread
    launch_floor_us: Spread
    attention: list[AttentionRow] = []
    writes: list[WriteRow] = []
    scv: list[ScvRow] = []
    failures: dict[str, str] = {}


def run(
    *, quick: bool, only: str | None, command: str, progress: Callable[[str], None],
    save: Callable[[KernelsRecord], None],
) -> KernelsRecord:  # fmt: skip
    """Measure everything, or what `only` names; `save` is called after each row.

    Raises RuntimeError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "nwor bench kernels needs a CUDA GPU: it times kernels, and torch sees none"
        )
    import triton

    record = KernelsRecord(
        command=command, machine=this_machine(), device=torch.cuda.get_device_name(),
        triton=triton.__version__, vllm=kernels_vllm.version(),
        baselines_missing=kernels_vllm.missing(), clocks=[kernels_timing.clocks()],
        copy_bytes_per_us=kernels_timing.copy_bandwidth(),
        launch_floor_us=kernels_timing.launch_floor(),
    )  # fmt: skip
    seconds, replays = (0.25, 20) if quick else (0.6, 40)
    if only in (None, "writes"):
        for rows in kernels_writes.ROWS:
            progress(f"writes: {rows} rows")
            record.writes.append(_write_row(rows, record, seconds, replays))
            save(record)
            _free()
    if only in (None, "scv"):
        for requests in kernels_scv.REQUESTS:
            progress(f"scv: {requests} requests")
            part = kernels_scv.measure(requests, seconds=seconds, replays=replays)
            record.scv.append(ScvRow(requests=requests, device=part.device, host=part.host))
            save(record)
            _free()
    for group, members in points(quick=quick).items():
        if only not in (None, "attention", group):
            continue
        for point in members:
            progress(f"{group}: {point.label}")
            try:
                measured = kernels_attention.measure(
                    point, seconds=seconds, replays=replays, alternatives=group == "Llama-3-8B"
                )
            except (RuntimeError, torch.OutOfMemoryError) as error:
                record.failures[point.label] = f"{type(error).__name__}: {error}"
            else:
                record.attention.append(_attention_row(group, point.label, measured, record))
            save(record)
            _free()
    record.clocks.append(kernels_timing.clocks())
    save(record)
    return record


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _attention_row(
    group: str, label: str, measured: kernels_attention.Measured, record: KernelsRecord
) -> AttentionRow:
    runs = measured.runs
    ratio = None
    if "FA3 path" in runs:
        ratio = runs["FA3 path"].median / runs["staged path"].median
    floor = measured.bytes / record.copy_bytes_per_us.median + record.launch_floor_us.median
    return AttentionRow(
        group=group, case=label, layers=measured.layers, aliased=measured.aliased, floor_us=floor,
        runs=runs, split_sweep=measured.sweep, best_splits=measured.best_splits,
        error=measured.error, ratio=ratio,
    )  # fmt: skip


def _write_row(rows: int, record: KernelsRecord, seconds: float, replays: int) -> WriteRow:
    runs = kernels_writes.measure(rows, seconds=seconds, replays=replays)
    floors, ratios = {}, {}
    baseline = runs.get(f"{kernels_writes.LAYERS} x vLLM's reshape_and_cache_flash")
    for rate in kernels_writes.ACCEPTANCE:
        name = f"{rate:.0%}"
        moved = 2 * kernels_writes.accepted_rows(rows, rate) * kernels_writes.ROW_BYTES
        moved *= kernels_writes.LAYERS
        floors[name] = moved / record.copy_bytes_per_us.median + record.launch_floor_us.median
        if baseline is not None:
            ratios[name] = baseline.median / runs[f"commit_kv, {name} accepted"].median
    return WriteRow(rows=rows, runs=runs, commit_floor_us=floors, ratios=ratios)


def show(record: KernelsRecord, console: Console) -> None:
    """Print a record: medians in microseconds."""
    console.print(
        f"{record.device}, torch {record.machine.torch}, Triton {record.triton}, vLLM "
        f"{record.vllm}, {record.machine.date}; copy {record.copy_bytes_per_us.median / 1e6:.2f} "
        f"TB/s, empty kernel {record.launch_floor_us.median:.2f} us"
    )
    if record.baselines_missing:
        console.print(f"baselines are missing: {record.baselines_missing}")
    if record.writes:
        names = list(record.writes[0].runs)
        table = Table("rows", *names, "ratios", title="KV writes of 32 layers, us a step")
        for row in record.writes:
            ratios = ", ".join(f"{k} {v:.1f}" for k, v in row.ratios.items())
            medians = (f"{row.runs[name].median:.1f}" for name in names)
            table.add_row(str(row.rows), *medians, ratios)
        console.print(table)
    if record.scv:
        device, host = list(record.scv[0].device), list(record.scv[0].host)
        table = Table(
            "requests", *device, *(f"host: {n}" for n in host), title="SCV and commit, us"
        )
        for scv in record.scv:
            parts = [scv.device[name] for name in device] + [scv.host[name] for name in host]
            table.add_row(str(scv.requests), *(f"{part.median:.1f}" for part in parts))
        console.print(table)
    if record.attention:
        names = list(dict.fromkeys(name for row in record.attention for name in row.runs))
        table = Table("case", "floor", *names, "best", "ratio", title="Attention, us a layer")
        for attention in record.attention:
            cells = [
                f"{attention.runs[name].median:.1f}" if name in attention.runs else ""
                for name in names
            ]
            table.add_row(
                attention.case + (" (aliased)" if attention.aliased else ""),
                f"{attention.floor_us:.1f}", *cells, str(attention.best_splits),
                "" if attention.ratio is None else f"{attention.ratio:.2f}",
            )  # fmt: skip
        console.print(table)
    for case, failure in record.failures.items():
        console.print(f"failed: {case}: {failure}")


def write(record: KernelsRecord, path: Path) -> None:
    """The record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json(indent=1) + "\n")
