"""The tables that `nwor bench kernels` prints: medians in microseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from nwor_compile.bench import kernels_attention as names

if TYPE_CHECKING:
    from nwor_compile.bench.kernels_record import AttentionRow, KernelsRecord


def show(record: KernelsRecord, console: Console) -> None:
    """Print a record."""
    console.print(
        f"{record.device}, torch {record.machine.torch}, Triton {record.triton}, vLLM "
        f"{record.vllm}, {record.machine.date}; copy {record.copy_bytes_per_us.median / 1e6:.2f} "
        f"TB/s, empty kernel {record.launch_floor_us.median:.2f} us"
    )
    if record.baselines_missing:
        console.print(f"baselines are missing: {record.baselines_missing}")
    for part in (_writes, _scv, _rope, _moves, _attention, _choice):
        part(record, console)
    for case, failure in record.failures.items():
        console.print(f"failed: {case}: {failure}")


def _writes(record: KernelsRecord, console: Console) -> None:
    if not record.writes:
        return
    columns = list(record.writes[0].runs)
    table = Table("rows", *columns, "ratios", title="KV writes of 32 layers, us a step")
    for row in record.writes:
        ratios = ", ".join(f"{k} {v:.1f}" for k, v in row.ratios.items())
        medians = (f"{row.runs[name].median:.1f}" for name in columns)
        table.add_row(str(row.rows), *medians, ratios)
    console.print(table)


def _scv(record: KernelsRecord, console: Console) -> None:
    if not record.scv:
        return
    device, host = list(record.scv[0].device), list(record.scv[0].host)
    table = Table("requests", *device, *(f"host: {n}" for n in host), title="SCV and commit, us")
    for row in record.scv:
        parts = [row.device.get(name) for name in device] + [row.host[name] for name in host]
        cells = ("" if part is None else f"{part.median:.1f}" for part in parts)
        table.add_row(str(row.requests), *cells)
    console.print(table)


def _rope(record: KernelsRecord, console: Console) -> None:
    if not record.rope:
        return
    columns = list(record.rope[0].runs)
    table = Table(
        "rows", *columns, "apart / alone", "tail / alone", title="RoPE and staging, us a layer"
    )
    for row in record.rope:
        medians = (f"{row.runs[name].median:.2f}" for name in columns)
        table.add_row(str(row.rows), *medians, f"{row.ratio:.2f}", f"{row.tail_ratio:.2f}")
    console.print(table)


def _moves(record: KernelsRecord, console: Console) -> None:
    if not record.moves:
        return
    columns = list(record.moves[0].parts)
    table = Table(
        "drafts", "accepted", "direct", "staged", *columns, "ratio", "in RoPE", "first window",
        title="rows read and written, a request and layer (counted)",
    )  # fmt: skip
    for row in record.moves:
        table.add_row(
            str(row.drafts), f"{row.accepted:.0%}", f"{row.direct:.1f}", f"{row.staged:.1f}",
            *(f"{row.parts[name]:.1f}" for name in columns), f"{row.ratio:.2f}",
            f"{row.in_rope_ratio:.2f}", f"{row.first:.1f}",
        )  # fmt: skip
    console.print(table)


# What is shown of the runs, under a shorter name; all of them are in the record.
_SHOWN = {
    "FA3": names.FA3, "FA3 tail": names.FA3_TAIL, "fused": names.FUSED_TAIL,
    "verify": names.FUSED_APART, "write": names.WRITE, "stage": names.STAGE_TAIL,
    "open": names.OPEN, "open first": names.OPEN_FIRST, "commit": names.COMMIT,
    "RoPE": names.ROPE, "RoPE+stage": names.ROPE_STAGE, "FA3 path": names.DIRECT_PATH,
}  # fmt: skip
_PATHS = {"FA3": names.PATH_FA3, "fused": names.PATH_FUSED}


def _attention(record: KernelsRecord, console: Console) -> None:
    if not record.attention:
        return
    table = Table(title="Attention, us a layer; ratios: direct path over staged path")
    table.add_column("case", no_wrap=True)
    for title in ("floor", *_SHOWN, "staged", "auto", "ratio", "in RoPE", "with RoPE"):
        table.add_column(title)
    for row in record.attention:
        ran = [*_SHOWN.values(), _PATHS[row.chosen]]
        cells = [f"{row.runs[n].median:.1f}" if n in row.runs else "" for n in ran]
        ratios = (row.ratio, row.ratio_in_rope, row.ratio_with_rope)
        table.add_row(
            row.case + (" (aliased)" if row.aliased else ""), f"{row.floor_us:.1f}", *cells,
            row.chosen, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        )  # fmt: skip
    console.print(table)


def _choice(record: KernelsRecord, console: Console) -> None:
    """Where `auto` takes the slower kernel, by the whole path with staging in RoPE."""
    known = [row for row in record.attention if row.fused_over_fa3 is not None]
    if not known:
        return
    ahead = [row for row in known if (row.fused_over_fa3 or 1) < 1]
    cases = ", ".join(f"{row.case} {row.fused_over_fa3:.2f}" for row in ahead)
    console.print(f"attention alone, fused over FA3, where fused is ahead: {cases or 'nowhere'}")
    missed = [(row, lost) for row in known if (lost := _lost(row)) > 0]
    cases = ", ".join(f"{row.case} ({row.chosen}) {lost:.1%}" for row, lost in missed)
    console.print(f"auto takes the slower path, and loses: {cases or 'nowhere'}")


def _lost(row: AttentionRow) -> float:
    """How much slower than the other the chosen path is; 0 if it is not."""
    both = {"FA3": names.ROPE_FA3, "fused": names.ROPE_FUSED}
    mine = row.runs[both.pop(row.chosen)].median
    other = row.runs[both.popitem()[1]].median
    return max(0.0, mine / other - 1)
