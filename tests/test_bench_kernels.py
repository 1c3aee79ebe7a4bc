"""`nwor bench kernels` where there is no GPU: its points, its records, its refusal."""

from __future__ import annotations

import contextlib
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from nwor_compile.bench import kernels_attention as names
from nwor_compile.bench import kernels_bytes
from nwor_compile.bench.kernels import attention_row
from nwor_compile.bench.kernels_batch import Batch
from nwor_compile.bench.kernels_plot import draw
from nwor_compile.bench.kernels_points import Point, points
from nwor_compile.bench.kernels_record import AttentionRow, KernelsRecord, ScvRow, WriteRow
from nwor_compile.bench.kernels_rope import RopeRow
from nwor_compile.bench.kernels_screen import show
from nwor_compile.bench.record import Spread, this_machine
from nwor_compile.cli import app

ROOT = Path(__file__).resolve().parent.parent
SPREAD = Spread.of([10.0, 12.0, 20.0])
OURS = (
    names.FUSED_APART, names.STAGE_APART, names.FUSED_TAIL, names.STAGE_TAIL, names.ROPE,
    names.ROPE_STAGE, names.OPEN, names.OPEN_FIRST, names.COMMIT, names.PATH_APART,
    names.PATH_FUSED, names.ROPE_FUSED,
)  # fmt: skip
SMALL = Point(3, 40, heads=4, kv_heads=2, size=16)


def record() -> KernelsRecord:
    empty = KernelsRecord(
        command="nwor bench kernels", machine=this_machine(), device="some GPU", triton="3",
        vllm=None, baselines_missing="vLLM cannot be imported", clocks=[],
        copy_bytes_per_us=SPREAD, launch_floor_us=SPREAD,
    )  # fmt: skip
    return empty.model_copy(
        update={
            "attention": [row(empty, Point(1, 512), dict.fromkeys(OURS, 1.0), aliased=True)],
            "writes": [
                WriteRow(
                    rows=5, runs={"a": SPREAD}, commit_floor_us={"30%": 1.0}, ratios={"30%": 7.0}
                )
            ],
            "scv": [ScvRow(requests=1, device={"mask": SPREAD}, host={"commit_kv": SPREAD})],
            "rope": [
                RopeRow(rows=5, runs={"RoPE alone": SPREAD}, ratio=1, tail_ratio=2, bytes_ratio=1.3)
            ],
            "moves": kernels_bytes.rows(16),
        }
    )


def row(
    record: KernelsRecord, point: Point, took: dict[str, float], *, chosen: str = "fused",
    aliased: bool = False, group: str = "spans",
) -> AttentionRow:  # fmt: skip
    runs = {name: Spread.of([value]) for name, value in took.items()}
    measured = names.Measured(2, aliased, 1000, runs, {}, None, None, chosen, {})
    return attention_row(group, point, measured, record)


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
    assert Point(4, 8000, ragged=True).lengths == [8000, 80 - 7, 8000 - 14, 80 - 5]


def test_requests_of_a_point_end_at_every_row_of_a_block() -> None:
    lengths = Point(16, 512).lengths
    assert {n % 16 for n in lengths} == set(range(16))
    assert (min(lengths), max(lengths)) == (512 - 15, 512)
    assert Point(2, 3, span=5).lengths == [6, 6]


@pytest.mark.parametrize(
    "point",
    [
        SMALL,  # first draft behind four rows of its block
        replace(SMALL, context=33, span=2),  # first draft at the start of a block
        replace(SMALL, context=300, span=9, ragged=True),
        replace(SMALL, context=40, span=20, room=100),  # drafts in two blocks
        replace(SMALL, kv_cache_dtype="fp8_e4m3"),
        replace(SMALL, kv_cache_dtype="fp8_e5m2"),
        replace(SMALL, batch=8, context=1600),  # requests share blocks
    ],
    ids=lambda point: point.label,
)
def test_runs_of_a_point_do_what_they_are_timed_for(point: Point) -> None:
    with contextlib.closing(Batch(point, device="cpu", pool_bytes=2**20, max_requests=8)) as batch:
        done = names.check(batch, None, None)
        assert done.equal == {names.FUSED_TAIL: True, names.FUSED_APART: True}
        batch.take_rows_from_cache(0)
        batch.key.neg_()  # other rows than the cache has
        batch.stage(0)
        written = batch.paged(0, batch.table)
        assert not torch.equal(written, batch.fused(0))  # drafts come from tail blocks
        keys = batch.caches[0][0]
        drafts = batch.draft_slots.unique()
        before = keys.flatten(0, 1)[drafts].clone()
        batch.mask.fill_(True)
        batch.commit()
        assert not torch.equal(keys.flatten(0, 1)[drafts], before)  # and get to the cache
        if not batch.aliased:
            assert torch.equal(batch.paged(0, batch.table), batch.fused(0))
        batch.path(batch.rope_stage, batch.fused)
        tensors = batch.window.tensors
        assert tensors.state[:, 0].tolist() == [batch.drafts] * batch.layers
        assert int(tensors.error) == 0


def test_opening_behind_a_window_copies_where_requests_crossed_into_a_block() -> None:
    point = replace(SMALL, batch=8, context=60)
    with contextlib.closing(Batch(point, device="cpu", pool_bytes=2**22, max_requests=8)) as batch:
        place = [n - 4 - (n - 4) // 16 * 16 for n in batch.lengths.tolist()]
        assert len(batch.crossing) == round(8 * 0.138)
        tail = batch.redirected.gather(1, (batch.lengths[:, None] - 4) // 16)[:, 0]
        key = batch.caches[-1][0]
        for opening in (batch.open, batch.open, batch.open_first, batch.open, batch.open_first):
            key[batch.first_tail :] = 7
            opening()
            for r, block in enumerate(tail.tolist()):
                copied = opening == batch.open_first or r in batch.crossing
                rows = max(0, place[r] - 1) if copied else 0
                assert (key[block] != 7).flatten(1).all(1).tolist() == [
                    row < rows for row in range(16)
                ]


def test_attention_that_differs_is_not_timed() -> None:
    with contextlib.closing(Batch(SMALL, device="cpu", pool_bytes=2**20, max_requests=8)) as batch:
        batch.redirected = batch.table.roll(1, 0)
        with pytest.raises(RuntimeError, match=r"fused over tail blocks differs"):
            names.check(batch, None, None)


def test_tail_blocks_are_nobody_elses() -> None:
    point = replace(SMALL, batch=8, context=1600)
    with contextlib.closing(Batch(point, device="cpu", pool_bytes=2**20, max_requests=8)) as batch:
        assert batch.aliased
        assert int(batch.table.max()) < batch.first_tail
        last = [
            int(batch.redirected[r, (n - 1) // 16]) for r, n in enumerate(batch.lengths.tolist())
        ]
        assert len(set(last)) == point.batch
        assert min(last) >= batch.first_tail


def test_ratios_are_of_the_path_that_auto_takes() -> None:
    took = dict.fromkeys(OURS, 2.0) | {
        names.FA3: 10.0, names.FA3_TAIL: 10.0, names.WRITE: 2.0, names.DIRECT_PATH: 12.0,
        names.PATH_FA3: 16.0, names.PATH_FUSED: 8.0, names.ROPE: 4.0, names.ROPE_VLLM: 3.0,
        names.ROPE_STAGE: 4.5, names.DIRECT_ROPE: 15.0, names.ROPE_FA3: 18.0,
        names.ROPE_FUSED: 9.0, names.FUSED_TAIL: 5.0, names.STAGE_TAIL: 1.0,
    }  # fmt: skip
    fused = row(record(), Point(1, 512), took)
    assert (fused.ratio, fused.ratio_in_rope) == (12 / 8, 12 / (9 - 3))
    assert fused.ratio_with_rope == 15 / 9
    assert fused.sums == {"staged path": 10.0, "staged path, in RoPE": 9.5}
    stock = row(record(), Point(1, 512), took, chosen="FA3")
    assert (stock.ratio, stock.ratio_in_rope) == (12 / 16, 12 / (18 - 3))
    assert stock.fused_over_fa3 == 0.5
    alone = row(record(), Point(1, 512), dict.fromkeys(OURS, 2.0), chosen="FA3")
    assert alone.ratio is None
    assert alone.sums == {}


def test_a_choice_that_loses_is_printed() -> None:
    took = dict.fromkeys([*OURS, names.FA3_TAIL, names.DIRECT_PATH, names.PATH_FA3], 2.0)
    took |= {names.DIRECT_ROPE: 9.0, names.ROPE_FA3: 4.0, names.ROPE_FUSED: 3.0}
    found = record()
    found.attention.append(row(found, Point(16, 512), took, chosen="FA3"))
    console = Console(record=True, width=200)
    show(found, console)
    assert "loses: 16 x 512 (FA3) 33.3%" in console.export_text()


def test_the_readme_quotes_the_path_that_auto_takes_and_leaves_out_what_was_not_measured() -> None:
    took = dict.fromkeys([*OURS, names.FA3, names.FA3_TAIL, names.DIRECT_PATH], 2.0)
    took |= {names.PATH_FA3: 5.0, names.DIRECT_ROPE: 9.0, names.ROPE_FA3: 6.0}
    found = record()
    found = found.model_copy(
        update={
            "attention": [
                row(found, Point(16, 512), took, chosen="FA3", group="first"),
                row(found, Point(16, 512, span=17), took, chosen="FA3", group="spans"),
            ]
        }
    )
    readme = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))
    text = readme["_attention_table"](json.loads(found.model_dump_json()))
    lines = text.splitlines()
    assert "| `auto` | staged path | ratio | in RoPE |" in text
    assert any(line.endswith("| FA3 | 5.0 | 0.40 | 0.50 |") for line in lines)
    assert "| spans (1) | 0.40 (16 x 512, span 17) |" in text
    assert "older than staging" not in text
    assert "vLLM's RoPE" not in readme["_rope_table"](json.loads(found.model_dump_json()))


def test_moves_of_a_step_are_those_of_its_rows() -> None:
    moved = kernels_bytes.counted(4, 0.25, 4)
    # First drafts at rows 0 to 3 of their block: 3 of 4 mirror, and before those are 0, 0, 1, 2
    # older rows. Three passed or more: all of them may be new to the block; two: those of row 2.
    passed = kernels_bytes.chances(4, 0.25)
    copied = 2 * (passed[2] * 1 + (passed[3] + passed[4]) * 3) / 4
    assert (moved.parts["mirrored"], moved.parts["copied in"]) == (3 / 4, pytest.approx(copied))
    assert moved.direct == 10
    assert moved.staged == pytest.approx(5 + 1 + 4 + 3 / 4 + copied + 2)
    assert moved.first == pytest.approx(5 + 1 + 4 + 3 / 4 + 2 * 3 / 4 + 2)
    assert moved.in_rope == moved.staged - 2.5
    assert (moved.cache_rows_direct, moved.cache_rows_staged) == (5, 2)
    none, every = (kernels_bytes.counted(4, rate, 4) for rate in (0.0, 1.0))
    assert (none.parts["copied in"], none.crossing) == pytest.approx((0, 1 / 4))
    assert every.staged == pytest.approx(every.first)
    assert every.crossing == pytest.approx(1)


def test_as_many_drafts_pass_as_was_said() -> None:
    for drafts, rate in kernels_bytes.CASES:
        found = kernels_bytes.chances(drafts, rate)
        assert len(found) == drafts + 1
        assert sum(found) == pytest.approx(1)
        assert sum(n * chance for n, chance in enumerate(found)) == pytest.approx(rate * drafts)


def test_a_record_is_shown_and_drawn_without_baselines(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    show(record(), console)
    text = console.export_text()
    assert "baselines are missing: vLLM cannot be imported" in text
    assert "1 x 512 (aliased)" in text
    draw(record(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
