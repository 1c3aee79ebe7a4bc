"""Recorded openings on a GPU: one graph replay, for whatever the tensors hold by then."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from cases import Geometry, write_arguments
from recorded import FIRST, SECOND, THIRD, Kept, commit, take
from test_capture_failures_gpu import FAILURES
from test_window_gpu import warnings_of
from window_support import Rig, rig

from nwor_compile.ops import stage_kv_window

pytestmark = pytest.mark.gpu

GEOMETRY = Geometry(
    model_dtype=torch.bfloat16, head_size=64, kv_heads=2, heads=8, block_size=16, device="cuda"
)
OTHER = Geometry(
    model_dtype=torch.bfloat16, head_size=128, kv_heads=2, heads=8, block_size=16, device="cuda"
)
STEPS = [(FIRST, [3, 0, 2, 0]), (SECOND, [0, 4]), (THIRD, [5, 1, 0, 0, 1]), (FIRST, [0, 0, 0, 1])]


def stage(r: Rig) -> None:
    for layer in r.layers:
        stage_kv_window(**write_arguments(layer, r.batch))


@pytest.mark.parametrize("tail", [False, True])
def test_a_replayed_opening_is_a_begin_and_waits_for_nothing(tail: bool) -> None:
    with rig(THIRD, geometries=(GEOMETRY, OTHER), tail=tail) as r:
        kept = Kept(r)
        r.window.warm_up()
        for size in r.window.sizes:
            r.window.record_begin(size, **kept.arguments(size))
            assert r.window._recorded[size].graph is not None
        assert not r.window.tensors.counters.any()
        assert r.window.tensors.routing.row_map.eq(-1).all()
        for turn in range(3):
            for seed, (spans, accepted) in enumerate(STEPS):
                take(r, kept, spans, seed + 10 * turn)
                size = next(s for s in r.window.sizes if s >= len(spans))
                before, sampling = r.rows(), r.sampling(accepted)
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
                try:
                    r.window.begin_recorded(size, len(spans))
                    stage(r)
                    result = r.window.commit(sampling.sampled_ids, None, sampling.num_sampled)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                assert (result.accepted.tolist(), result.error.item()) == (accepted, 0)
                assert r.holds(r.expected(before, accepted))
        drafts = sum(span.drafts for spans, _ in STEPS for span in spans)
        metrics = r.window.metrics()
        assert metrics.nwor_total_staged == 3 * drafts
        assert metrics.nwor_certain_rows == 3 * sum(len(spans) for spans, _ in STEPS)
        assert metrics.nwor_error_windows == 0


def test_a_replayed_opening_leads_attention_to_the_tails() -> None:
    """The tables, and what the tail blocks share with the cache, against launches by count."""
    found = []
    for replayed in (True, False):
        with rig(THIRD, geometries=(GEOMETRY,), tail=True) as r:
            kept = Kept(r)
            r.window.record_begin("six", **kept.arguments(6))
            for seed, (spans, accepted) in enumerate(STEPS):
                take(r, kept, spans, seed)
                if replayed:
                    r.window.begin_recorded("six", len(spans))
                else:
                    r.begin(token_ids=kept.ids)
                stage(r)
                columns = r.batch.block_table.shape[1]
                table = r.window.block_tables["kv"][: len(spans), :columns].clone()
                rows = [part for layer in r.layers for part in layer.cache.dump()]
                found.append((table, rows))
                commit(r, accepted)
    for (table, rows), (other, others) in zip(
        found[: len(STEPS)], found[len(STEPS) :], strict=True
    ):
        assert torch.equal(table, other)
        assert all(torch.equal(a, b) for a, b in zip(rows, others, strict=True))


def test_inside_a_callers_capture_it_is_launched() -> None:
    with rig(SECOND, geometries=(GEOMETRY,), tail=True) as r:
        kept = Kept(r)
        r.window.record_begin("six", **kept.arguments(6))
        take(r, kept, SECOND, seed=1)
        sampling = r.sampling([1, 3])

        def step() -> Any:
            r.window.begin_recorded("six", 2)
            stage(r)
            return r.window.commit(sampling.sampled_ids, None, sampling.num_sampled)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
        before = r.rows()
        graph.replay()
        assert (result.accepted.tolist(), result.error.item()) == ([1, 3], 0)
        assert r.holds(r.expected(before, [1, 3]))


@pytest.mark.parametrize("failure", FAILURES)
def test_a_capture_that_fails_costs_one_line_and_a_launch_a_begin(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(THIRD, geometries=(GEOMETRY,), tail=True) as r:
        kept, route = Kept(r), r.window._route

        def failing(opening: Any) -> None:
            if torch.cuda.is_current_stream_capturing():
                FAILURES[failure](r.window.tensors)
            route(opening)

        with caplog.at_level(logging.INFO, "nwor_compile"), monkeypatch.context() as patch:
            patch.setattr(r.window, "_route", failing)
            r.window.record_begin("six", **kept.arguments(6))
        assert len([w for w in warnings_of(caplog) if "capture failed" in w]) == 1
        assert r.window._recorded["six"].graph is None
        for begins in (0, 1):
            assert_right(r, kept, seed=begins)
            if not begins:  # the cause is gone
                r.window.record_begin("six", **kept.arguments(6))
                assert r.window._recorded["six"].graph is not None


def assert_right(r: Rig, kept: Kept, seed: int) -> None:
    take(r, kept, FIRST, seed)
    before = r.rows()
    r.window.begin_recorded("six", len(FIRST))
    stage(r)
    result = commit(r, [2, 0, 5, 1])
    assert (result.accepted.tolist(), result.error.item()) == ([2, 0, 5, 1], 0)
    assert r.holds(r.expected(before, [2, 0, 5, 1]))
