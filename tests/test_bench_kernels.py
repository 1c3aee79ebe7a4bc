"""`nwor bench kernels` where there is no GPU: its points, its records, its refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nwor_compile.bench.kernels import AttentionRow, KernelsRecord, ScvRow, WriteRow, show
from nwor_compile.bench.kernels_plot import draw
from nwor_compile.bench.kernels_points import Point, points
from nwor_compile.bench.record import Spread, this_machine
from nwor_compile.cli import app

SPREAD = Spread.of([10.0, 12.0, 20.0])


def record() -> KernelsRecord:
    return KernelsRecord(
        command="nwor bench kernels", machine=this_machine(), device="some GPU", triton="3",
        vllm=None, baselines_missing="vLLM cannot be imported", clocks=[],
        copy_bytes_per_us=SPREAD, launch_floor_us=SPREAD,
        attention=[
            AttentionRow(
                group="spans", case="1 x 512", layers=2, aliased=True, floor_us=5.0,
                runs={"verify": SPREAD, "staged path": SPREAD}, split_sweep={}, best_splits=None,
                error=None, ratio=None,
            )
        ],
        writes=[
            WriteRow(rows=5, runs={"a": SPREAD}, commit_floor_us={"30%": 1.0}, ratios={"30%": 7.0})
        ],
        scv=[ScvRow(requests=1, device={"mask": SPREAD}, host={"commit_kv": SPREAD})],
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it measures")
def test_without_a_gpu_it_says_so_and_fails() -> None:
    result = CliRunner().invoke(app, ["bench", "kernels", "--quick"])
    assert result.exit_code == 1
    assert "needs a CUDA GPU" in result.output


def test_labels_are_unique_and_the_quick_points_are_some_of_all() -> None:
    every = [p for group in points(quick=False).values() for p in group]
    labels = [p.label for p in every]
    assert len(set(labels)) == len(labels)
    quick = [p for group in points(quick=True).values() for p in group]
    assert quick
    assert set(quick) < set(every)


def test_points_cover_what_is_promised() -> None:
    every = [p for group in points(quick=False).values() for p in group]
    assert {p.span for p in every} == {2, 5, 9, 17, 49}
    models = {(p.heads, p.kv_heads, p.size) for p in every}
    llama, others = (32, 8, 128), [(24, 8), (64, 8), (32, 32), (32, 1)]
    assert models == {llama, (32, 8, 64), *((*heads, 128) for heads in others)}
    assert {p.batch for p in every} >= {1, 256}
    assert {p.context for p in every} >= {512, 131072}
    assert any(p.ragged for p in every)
    assert any(p.room > p.context for p in every)


def test_a_ragged_point_has_contexts_a_hundred_times_apart() -> None:
    assert Point(4, 8000, ragged=True).lengths == [8000, 80, 8000, 80]


def test_a_record_is_shown_and_drawn_without_baselines(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    show(record(), console)
    text = console.export_text()
    assert "baselines are missing: vLLM cannot be imported" in text
    assert "1 x 512 (aliased)" in text
    draw(record(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
