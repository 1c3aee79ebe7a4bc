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

from nwor_compile.bench import (
    kernels_attention,
    kernels_bytes,
    kernels_rope,
    kernels_scv,
    kernels_timing,
    kernels_vllm,
    kernels_writes,
)
from nwor_compile.bench.kernels_points import BLOCK_SIZE, Point, points
from nwor_compile.bench.kernels_record import AttentionRow, KernelsRecord, ScvRow, WriteRow
from nwor_compile.bench.record import this_machine


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
    record.moves = kernels_bytes.rows(BLOCK_SIZE)
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
    if only in (None, "rope"):
        for rows in kernels_rope.ROWS:
            progress(f"rope: {rows} rows")
            record.rope.append(kernels_rope.measured_row(rows, seconds=seconds, replays=replays))
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
                record.attention.append(attention_row(group, point, measured, record))
            save(record)
            _free()
    record.clocks.append(kernels_timing.clocks())
    save(record)
    return record


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def attention_row(
    group: str, point: Point, measured: kernels_attention.Measured, record: KernelsRecord
) -> AttentionRow:
    """A measured point with its floor, sums and ratios."""
    floor = measured.bytes / record.copy_bytes_per_us.median + record.launch_floor_us.median
    row = AttentionRow(
        group=group, case=point.label, requests=point.batch, span=point.span, heads=point.heads,
        kv_heads=point.kv_heads, head_size=point.size, layers=measured.layers,
        aliased=measured.aliased, floor_us=floor, runs=measured.runs, split_sweep=measured.sweep,
        best_splits=measured.best_splits, error=measured.error, chosen=measured.chosen,
        equal=measured.equal,
    )  # fmt: skip
    return row.model_copy(update=_compared(row))


def _compared(row: AttentionRow) -> dict[str, object]:
    """Sums and ratios of a point, as far as the baselines are known."""
    a = kernels_attention
    took = {name: spread.median for name, spread in row.runs.items()}
    paths = {"FA3": (a.FA3_TAIL, a.PATH_FA3, a.ROPE_FA3)}
    attention, path, rope_path = paths.get(row.chosen, (a.FUSED_TAIL, a.PATH_FUSED, a.ROPE_FUSED))
    if not {attention, path, rope_path} <= took.keys():
        return {}
    rope = min(took.get(a.ROPE_VLLM, took[a.ROPE]), took[a.ROPE])
    others = took[attention] + took[a.OPEN] + took[a.COMMIT]
    in_rope = max(0.0, took[a.ROPE_STAGE] - took[a.ROPE])
    new: dict[str, object] = {
        "sums": {
            "staged path": others + took[a.STAGE_TAIL],
            "staged path, in RoPE": others + in_rope,
        }
    }
    if a.DIRECT_PATH in took:
        new["ratio"] = took[a.DIRECT_PATH] / took[path]
        new["ratio_in_rope"] = took[a.DIRECT_PATH] / (took[rope_path] - rope)
        new["ratio_with_rope"] = took[a.DIRECT_ROPE] / took[rope_path]
        new["fused_over_fa3"] = took[a.FUSED_TAIL] / took[a.FA3_TAIL]
    return new


def _write_row(rows: int, record: KernelsRecord, seconds: float, replays: int) -> WriteRow:
    runs = kernels_writes.measure(rows, seconds=seconds, replays=replays)
    floors, ratios = {}, {}
    baseline = runs.get(kernels_writes.BASELINE)
    for rate in kernels_writes.ACCEPTANCE:
        name = f"{rate:.0%}"
        moved = 2 * kernels_writes.accepted_rows(rows, rate) * kernels_writes.ROW_BYTES
        moved *= kernels_writes.LAYERS
        floors[name] = moved / record.copy_bytes_per_us.median + record.launch_floor_us.median
        if baseline is not None:
            ratios[name] = baseline.median / runs[f"commit_kv, {name} accepted"].median
    if baseline is not None:
        ratios["step"] = baseline.median / runs[kernels_writes.STEP].median
    return WriteRow(rows=rows, runs=runs, commit_floor_us=floors, ratios=ratios)


def write(record: KernelsRecord, path: Path) -> None:
    """The record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(record.model_dump_json(indent=1) + "\n")
