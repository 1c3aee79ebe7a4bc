"""Openings that are recorded once and repeated with whatever their tensors hold by then."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded import FIRST, SECOND, THIRD, Kept, commit, take
from window_support import NONE, Rig, open_windows, rig

from nwor_compile import window as window_module
from nwor_compile.errors import WindowInputError, WindowOrderError
from nwor_compile.opening import opening_of
from nwor_compile.ops.library import implementation
from nwor_compile.window import State


@pytest.fixture(params=[False, True], ids=["rows", "tail blocks"])
def made(request: pytest.FixtureRequest) -> Iterator[tuple[Rig, Kept]]:
    """A rig with room for six requests, and an opening of six that is recorded as `six`."""
    with rig(THIRD, tail=request.param) as r:
        kept = Kept(r)
        r.window.record_begin("six", **kept.arguments(6))
        yield r, kept


STEPS = [(FIRST, [3, 0, 2, 0]), (SECOND, [0, 4]), (THIRD, [5, 1, 0, 0, 1]), (FIRST, [0, 0, 0, 1])]


def test_a_recorded_begin_opens_by_what_its_tensors_hold_then(made: tuple[Rig, Kept]) -> None:
    r, kept = made
    for seed, (spans, accepted) in enumerate(STEPS):
        take(r, kept, spans, seed)
        before = r.rows()
        r.window.begin_recorded("six", len(spans))
        assert r.window.state is State.OPEN
        assert open_windows() == 1
        r.forward()
        result = commit(r, accepted)
        assert (result.accepted.tolist(), result.error.item()) == (accepted, 0)
        assert r.holds(r.expected(before, accepted))
    drafts = [sum(span.drafts for span in spans) for spans, _ in STEPS]
    metrics = r.window.metrics()
    assert metrics.nwor_total_staged == sum(drafts)
    assert metrics.nwor_total_committed == sum(sum(accepted) for _, accepted in STEPS)
    certain = sum(len(spans) for spans, _ in STEPS)
    assert metrics.nwor_certain_rows == certain


def test_it_leaves_what_begin_leaves(made: tuple[Rig, Kept]) -> None:
    r, kept = made
    take(r, kept, THIRD, seed=4)
    tensors, found = r.window.tensors, []
    for begin in (
        lambda: r.window.begin_recorded("six", len(THIRD)),
        lambda: r.window.begin(**kept.arguments(len(THIRD))),
        lambda: r.begin(token_ids=kept.ids),
    ):
        begin()
        tables = [table[: len(THIRD)].clone() for table in r.window.block_tables.values()]
        routing = tensors.routing
        parts = (
            routing.row_map, routing.num_drafts, routing.tail_start[: len(THIRD)], tensors.drafts,
            tensors.draft_ids, tensors.rows, tensors.error, *[b.slots for b in tensors.batches],
        )  # fmt: skip
        found.append([part.clone() for part in parts if part is not None] + tables)
        r.window.abort()
    for other in found[1:]:
        for mine, theirs in zip(found[0], other, strict=True):
            assert torch.equal(mine, theirs)


class Replayed:
    """A graph that needs no CUDA: what it does at replay is what was called for it."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.replay = run


@pytest.mark.parametrize("captured", [False, True])
def test_recording_changes_no_cache_and_no_counter(
    made: tuple[Rig, Kept], captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    r, kept = made
    take(r, kept, FIRST, seed=1)
    r.begin(token_ids=kept.ids)
    r.forward()
    commit(r, [3, 0, 0, 1])
    rows, metrics = r.rows(), r.window.metrics()
    take(r, kept, SECOND, seed=2)

    def capture(run: Callable[[], object], *, device: torch.device) -> Replayed:
        run()
        assert r.window.tensors.routing.num_drafts.any()
        return Replayed(run)

    if captured:
        monkeypatch.setattr(r.window, "_can_capture", lambda: True)
        monkeypatch.setattr("nwor_compile.window.capture", capture)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    r.window.record_begin("two", **kept.arguments(2))
    assert (r.window._recorded["two"].graph is not None) == captured
    assert r.holds(rows)
    assert r.window.metrics() == metrics
    assert r.window.state is State.IDLE
    assert not r.window.tensors.routing.num_drafts.any()
    r.forward()  # outside a window: every row goes straight to the cache
    assert r.holds(r.expected(rows, [2, 4]))
    r.window.begin_recorded("two")
    r.forward()
    assert commit(r, [1, 0]).accepted.tolist() == [1, 0]


def test_a_capture_that_fails_is_one_line_and_the_opening_is_enqueued(
    made: tuple[Rig, Kept], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    r, kept = made

    def fail(run: Callable[[], object], *, device: torch.device) -> None:
        run()
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(r.window, "_can_capture", lambda: True)
        patch.setattr("nwor_compile.window.capture", fail)
        take(r, kept, FIRST, seed=1)
        metrics = r.window.metrics()
        r.window.record_begin("six", **kept.arguments(6))
    assert len([x for x in caplog.records if "capture failed" in x.getMessage()]) == 1
    assert r.window.metrics() == metrics
    before = r.rows()
    r.window.begin_recorded("six", len(FIRST))
    r.forward()
    assert commit(r, [3, 0, 2, 0]).accepted.tolist() == [3, 0, 2, 0]
    assert r.holds(r.expected(before, [3, 0, 2, 0]))


def test_slots_of_several_groups() -> None:
    groups = {"layers.0": "full", "layers.1": "sliding"}
    with rig(THIRD, window={"groups": groups}) as r:
        kept = Kept(r)
        slots = {"full": kept.slots, "sliding": kept.slots.clone()}
        arguments = {**kept.arguments(6), "slot_mapping": slots, "block_table": None}
        r.window.record_begin("six", **arguments)
        take(r, kept, SECOND, seed=1)
        slots["sliding"].copy_(kept.slots)
        before = r.rows()
        r.window.begin_recorded("six", 2)
        r.forward()
        assert commit(r, [2, 3]).accepted.tolist() == [2, 3]
        assert r.holds(r.expected(before, [2, 3]))
        slots["sliding"].fill_(-1)  # each group goes by its own
        r.window.begin_recorded("six", 2)
        own = {batch.group: batch.slots for batch in r.window.tensors.batches}
        assert (own["full"] >= 0).sum() == 6
        assert (own["sliding"] < 0).all()
        r.window.abort()


def test_recording_again_replaces(made: tuple[Rig, Kept]) -> None:
    r, kept = made
    other = Kept(r)
    r.window.record_begin("six", **other.arguments(6))
    take(r, other, SECOND, seed=3)
    take(r, kept, FIRST, seed=3)  # no longer looked at
    take(r, other, SECOND, seed=3)
    r.window.begin_recorded("six", 2)
    r.forward()
    assert commit(r, [2, 1]).accepted.tolist() == [2, 1]


def test_settings_that_want_more_of_a_begin_have_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "nwor_compile")
    for settings in ({"poison": "nan"}, {"mode": "off"}, {"debug": True}):
        with rig(THIRD, tail=True, **settings) as r:
            kept = Kept(r)
            r.window.record_begin("six", **kept.arguments(6))
            take(r, kept, SECOND, seed=1)
            before = r.rows()
            r.window.begin_recorded("six", 2)
            r.forward()
            assert commit(r, [1, 2]).error.item() == 0
            accepted = [2, 4] if "mode" in settings else [1, 2]
            assert r.holds(r.expected(before, accepted))
            caplog.clear()
            r.window.flush_log()
    assert "6 draft tokens across 2 requests" in caplog.text


@pytest.mark.parametrize("requests", [0, 7, -1])
def test_a_number_of_requests_that_was_not_recorded(made: tuple[Rig, Kept], requests: int) -> None:
    with pytest.raises(WindowInputError, match=f"expected 1 to 6 requests.*got {requests}"):
        made[0].window.begin_recorded("six", requests)
    assert made[0].window.state is State.IDLE


def test_a_name_that_was_not_recorded(made: tuple[Rig, Kept]) -> None:
    with pytest.raises(WindowInputError, match=r"nothing is recorded as 'seven', only \['six'\]"):
        made[0].window.begin_recorded("seven")
    assert made[0].window.state is State.IDLE


def test_arguments_that_do_not_fit_are_not_recorded(made: tuple[Rig, Kept]) -> None:
    r, kept = made
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"query_start_loc": kept.starts[:1]}, r"query_start_loc: .*\[2 to 7\]"),
        ({"query_start_loc": kept.starts.float()}, "query_start_loc: expected int32 or int64"),
        ({"query_start_loc": torch.zeros(8, dtype=torch.int32)}, r"\[2 to 7\] \(max_requests and"),
        ({"one_certain": False}, "one of num_drafts, logit_starts and one_certain, got none"),
        ({"num_drafts": kept.lengths}, "got num_drafts and one_certain"),
        ({"token_ids": kept.ids[:3]}, "token_ids: expected"),
    ]
    for changed, message in wrong:
        with pytest.raises(WindowInputError, match=message):
            r.window.record_begin("other", **{**kept.arguments(6), **changed})
        with pytest.raises(WindowInputError, match="nothing is recorded as 'other'"):
            r.window.begin_recorded("other")


def test_both_calls_keep_the_order(made: tuple[Rig, Kept]) -> None:
    r, kept = made
    take(r, kept, SECOND, seed=1)
    r.window.begin_recorded("six", 2)
    with pytest.raises(WindowOrderError, match="begin_recorded: a window is open"):
        r.window.begin_recorded("six", 2)
    with pytest.raises(WindowOrderError, match="record_begin: a window is open"):
        r.window.record_begin("six", **kept.arguments(6))
    r.forward()
    assert commit(r, [1, 1]).accepted.tolist() == [1, 1]
    r.window.close()
    with pytest.raises(WindowOrderError, match="closed"):
        r.window.begin_recorded("six", 2)


def test_a_span_that_runs_backwards_raises_the_flag(made: tuple[Rig, Kept]) -> None:
    r, kept = made
    take(r, kept, SECOND, seed=1)
    kept.starts[1] = 9
    r.window.begin_recorded("six", 2)
    result = commit(r, [1, 1])
    assert result.error.item() != 0
    assert result.accepted.tolist() == NONE[:2]


def test_a_begin_that_fails_leaves_direct_mode(
    made: tuple[Rig, Kept], monkeypatch: pytest.MonkeyPatch
) -> None:
    r, kept = made
    take(r, kept, SECOND, seed=1)

    def fail(*args: object) -> None:
        raise RuntimeError("device lost")

    with monkeypatch.context() as patch:
        patch.setattr(r.window, "_route", fail)
        with pytest.raises(RuntimeError, match="device lost"):
            r.window.begin_recorded("six", 2)
    assert r.window.state is State.IDLE
    assert open_windows() == 0
    before = r.rows()
    r.forward()
    assert r.holds(r.expected(before, [2, 4]))


@pytest.mark.parametrize("poison", ["off", "nan"])
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_warm_up_over_steps_changes_nothing(compiled: bool, tail: bool, poison: str) -> None:
    """After a window, whose slots are still known; called, or only compiled."""
    launch = pytest.importorskip("nwor_compile.ops.kernels.launch")
    with rig(FIRST, tail=tail, poison=poison) as r:
        kept = Kept(r)
        steps = [kept.arguments(size) for size in (1, 4)]
        r.run([3, 0, 0, 1])
        before = (r.rows(), r.window.tensors.counters.clone(), r.window.tensors.error.clone())
        if compiled:
            openings = [opening_of(**step) for step in steps]
            with implementation("triton"):
                launch.compile_together(lambda: r.window._call_kernels([1, 4], openings))
        else:
            r.window.warm_up([1, 4], steps)
        assert r.holds(before[0])
        assert torch.equal(r.window.tensors.counters, before[1])
        assert torch.equal(r.window.tensors.error, before[2])
        assert r.window.state is State.IDLE
        assert not r.window.tensors.routing.num_drafts.any()
        r.new_rows(1)
        rows = r.rows()
        r.run([2, 0, 1, 1])
        assert r.holds(r.expected(rows, [2, 0, 1, 1]))


@pytest.mark.parametrize("compiles", [False, True])
def test_others_are_compiled_with_the_windows_kernels(
    compiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They launch nothing; and where nothing is compiled they are not called."""
    launch = pytest.importorskip("nwor_compile.ops.kernels.launch")
    monkeypatch.setattr(window_module, "_compiles", lambda device: compiles)
    calls: list[str] = []
    with rig(FIRST) as r, implementation("triton"):
        r.new_rows(1)
        together, own = launch.compile_together, r.window._call_kernels

        def noted(*given: Any) -> None:
            calls.append("own")
            own(*given)

        def compile_together(made: Callable[[], None]) -> None:
            calls.append("together")
            together(made)
            calls.append("done")

        def others() -> None:
            calls.append("others")
            r.forward()

        monkeypatch.setattr(r.window, "_call_kernels", noted)
        monkeypatch.setattr(launch, "compile_together", compile_together)
        before = r.rows()
        r.window.warm_up([1], others=others)
        assert calls == (["together", "own", "others", "done"] if compiles else [])
        assert r.holds(before)
        r.forward()
        assert not r.holds(before)


def test_warm_up_refuses_steps_before_it_takes_any() -> None:
    with rig(FIRST) as r:
        kept = Kept(r)
        good, counters = kept.arguments(2), r.window.tensors.counters.clone()
        with pytest.raises(WindowInputError, match="query_start_loc"):
            r.window.warm_up([1], [good, {**good, "query_start_loc": torch.zeros(3)}])
        assert torch.equal(r.window.tensors.counters, counters)
        assert r.window.state is State.IDLE
