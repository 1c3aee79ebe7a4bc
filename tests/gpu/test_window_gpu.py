"""Windows on a GPU: captured SCV graphs, no synchronisation, a whole step in one CUDA graph."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Geometry, Span, make_batch, same_bits, write_arguments
from torch import Tensor
from window_support import ALL, MIXED, NONE, SOME, Rig, rig

from nwor_compile import Committed
from nwor_compile.ops import stage_kv_window
from nwor_compile.ops.error_bits import COUNT_MISMATCH
from nwor_compile.vllm_adapter.metrics_file import SnapshotWriter, read

pytestmark = pytest.mark.gpu

GEOMETRY = Geometry(
    model_dtype=torch.bfloat16, head_size=64, kv_heads=2, heads=8, block_size=16, device="cuda"
)
OTHER = Geometry(
    model_dtype=torch.bfloat16, head_size=128, kv_heads=2, heads=8, block_size=16, device="cuda"
)


def stage(r: Rig) -> None:
    for layer in r.layers:
        stage_kv_window(**write_arguments(layer, r.batch))


def run(r: Rig, accepted: list[int], **options: Any) -> Committed:
    r.begin()
    stage(r)
    return r.commit(accepted, **options)


def outcome(r: Rig, result: Committed) -> tuple[Any, ...]:
    metrics = r.window.metrics().model_copy(update={"nwor_scv_vectorised": 0})
    rows = [part for layer in r.layers for part in layer.cache.dump()]
    return result.accepted.tolist(), result.mask.tolist(), result.error.tolist(), metrics, rows


def assert_same(left: tuple[Any, ...], right: tuple[Any, ...]) -> None:
    assert left[:4] == right[:4]
    assert all(same_bits(a, b) for a, b in zip(left[4], right[4], strict=True))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# Captured graphs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("accepted", [NONE, SOME, ALL])
def test_one_launch_decides_what_the_host_loop_does(accepted: list[int], counted: bool) -> None:
    outcomes = []
    for scv in ("off", "graph"):
        with rig(geometries=(GEOMETRY,), scv=scv) as r:
            before = r.rows()
            result = run(r, accepted, counted=counted)
            assert r.holds(r.expected(before, accepted))
            assert result.accepted.tolist() == accepted
            assert r.window.validator.vectorised == {}
            outcomes.append(outcome(r, result))
    assert_same(*outcomes)


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("accepted", [NONE, SOME, ALL])
def test_a_captured_graph_decides_what_plain_launches_and_the_host_loop_do(
    accepted: list[int], counted: bool
) -> None:
    outcomes = []
    for scv, warm in (("off", False), ("graph", False), ("graph", True), ("adaptive", True)):
        with rig(geometries=(GEOMETRY, OTHER), scv=scv) as r:
            if warm:
                r.window.warm_up()
                assert sorted(r.window.validator.graphs) == [1, 2, 4, 6]
            before = r.rows()
            result = run(r, accepted, counted=counted)
            assert r.holds(r.expected(before, accepted))
            assert result.accepted.tolist() == accepted
            missed = {"no graph was captured for this size": 1}
            plain = scv == "graph" and not warm
            assert r.window.validator.vectorised == (missed if plain else {})
            outcomes.append(outcome(r, result))
    for other in outcomes[1:]:
        assert_same(outcomes[0], other)


def test_warm_up_changes_no_cache_counter_or_flag() -> None:
    with rig(geometries=(GEOMETRY,)) as r:
        run(r, SOME)
        rows, metrics = r.rows(), r.window.metrics()
        r.window.warm_up()
        assert r.holds(rows)
        assert r.window.metrics() == metrics
        assert r.window.tensors.error.item() == 0


@pytest.mark.usefixtures("deciding")
def test_a_graph_replays_for_later_windows_with_other_counts() -> None:
    """More requests first: nothing of them may show in a window of fewer."""
    with rig(geometries=(GEOMETRY,)) as r:
        r.window.warm_up([6])
        for accepted in (ALL, SOME, NONE, ALL):
            r.new_rows(seed=sum(accepted))
            before = r.rows()
            result = run(r, accepted)
            assert (result.accepted.tolist(), result.error.item()) == (accepted, 0)
            assert r.holds(r.expected(before, accepted))
        r.change_batch(make_batch(MIXED[:4], GEOMETRY, padding=11), seed=1)
        for layer in r.layers:
            assert layer.cache.slots > int(r.batch.slot_mapping.max())
        before = r.rows()
        result = run(r, [2, 0, 0, 3])
        assert (result.accepted.tolist(), result.error.item()) == ([2, 0, 0, 3], 0)
        assert r.holds(r.expected(before, [2, 0, 0, 3]))
        assert r.window.validator.vectorised == {}


@pytest.mark.usefixtures("deciding")
def test_padded_draft_ids_take_a_larger_graph_rather_than_none() -> None:
    spans = [Span(5, 1, 3), Span(2, 1, 5)]
    with rig(spans, geometries=(GEOMETRY,)) as r:
        r.window.warm_up()
        before, sampling = r.rows(), r.sampling([3, 2])
        padded = torch.full((30,), -1, dtype=torch.int32, device="cuda")
        padded[:8] = r.batch.draft_ids
        r.begin()
        stage(r)
        result = r.window.commit(sampling.sampled_ids, padded, sampling.num_sampled)
        assert result.accepted.tolist() == [3, 2]
        assert result.mask.shape == (30,)
        assert r.holds(r.expected(before, [3, 2]))
        assert r.window.validator.vectorised == {}


@pytest.mark.usefixtures("deciding")
def test_too_few_draft_ids_are_found_by_a_graph_too() -> None:
    with rig(geometries=(GEOMETRY,)) as r:
        r.window.warm_up()
        before, sampling = r.rows(), r.sampling(ALL)
        r.begin()
        stage(r)
        result = r.window.commit(sampling.sampled_ids, r.batch.draft_ids[:8], sampling.num_sampled)
        assert result.error.item() != 0
        assert result.accepted.tolist() == NONE
        assert r.holds(r.expected(before, NONE))


@pytest.mark.usefixtures("deciding")
@pytest.mark.parametrize("columns", [6, 9, 40])
def test_ids_of_any_width_and_strides_take_a_graph(columns: int) -> None:
    with rig(geometries=(GEOMETRY,)) as r:
        r.window.warm_up()
        for accepted in (SOME, ALL):
            sampling = r.sampling(accepted, columns=columns)
            apart = sampling.sampled_ids.T.contiguous().T
            before = r.rows()
            r.begin()
            stage(r)
            result = r.window.commit(apart, r.batch.draft_ids, sampling.num_sampled)
            assert result.accepted.tolist() == accepted
            assert r.holds(r.expected(before, accepted))
        assert r.window.validator.vectorised == {}


@pytest.mark.usefixtures("deciding")
@pytest.mark.parametrize("fault", [False, True])
@pytest.mark.parametrize("tail", [False, True])
def test_counts_and_kept_ids_through_graph_plain_launches_and_host_loop(
    tail: bool, fault: bool
) -> None:
    """Draft ids from begin, and the engine's counts clamped to what was committed."""
    outcomes, earlier = [], []
    for scv, warm in (("off", False), ("graph", False), ("graph", True)):
        with rig(geometries=(GEOMETRY,), scv=scv, tail=tail) as r:
            if warm:
                r.window.warm_up()
            found: list[tuple[Any, ...]] = []
            for accepted in (ALL, SOME, NONE):
                sampling = r.sampling(accepted)
                assert sampling.num_sampled is not None
                tokens = torch.full_like(r.batch.row_map, -5)
                drafts = r.batch.row_map >= 0
                tokens[drafts] = r.batch.draft_ids[r.batch.row_map[drafts]]
                rejected = torch.arange(6, device="cuda", dtype=torch.int32)
                r.begin(token_ids=tokens[: r.batch.slot_mapping.shape[0]])
                for layer in r.layers[fault:]:
                    stage_kv_window(**write_arguments(layer, r.batch))
                result = r.window.commit(sampling.sampled_ids, None, sampling.num_sampled, rejected)
                assert result.num_sampled is not None
                assert result.num_rejected is not None
                said = sampling.num_sampled
                kept = said.clamp(max=1) if fault else said
                assert result.accepted.tolist() == (NONE if fault else accepted)
                assert result.num_sampled.tolist() == kept.tolist()
                earlier.append((result.num_sampled, kept.tolist()))
                assert result.num_rejected.tolist() == (rejected + said - kept).tolist()
                assert r.window.tensors.routing.row_map.eq(-1).all()
                assert not r.window.tensors.routing.num_drafts.any()
                mask = result.mask.tolist()
                assert not any(mask[9:])
                rows = [part for layer in r.layers for part in layer.cache.dump()]
                metrics = r.window.metrics().model_copy(update={"nwor_scv_vectorised": 0})
                found.append((mask[:9], result.error.tolist(), metrics, rows))
            outcomes.append(found)
    assert all(counts.tolist() == kept for counts, kept in earlier)  # the caller's from then on
    for other in outcomes[1:]:
        for mine, theirs in zip(outcomes[0], other, strict=True):
            assert mine[:3] == theirs[:3]
            assert all(same_bits(a, b) for a, b in zip(mine[3], theirs[3], strict=True))


def test_an_error_commits_nothing_in_a_graph() -> None:
    with rig(geometries=(GEOMETRY, OTHER)) as r:
        r.window.warm_up()
        before = r.rows()
        r.begin()
        for layer in r.layers[1:]:
            stage_kv_window(**write_arguments(layer, r.batch))
        result = r.commit(ALL)
        assert result.error.item() == COUNT_MISMATCH
        assert result.accepted.tolist() == NONE
        assert r.holds(r.expected(before, NONE, skip=[0]))
        before = r.rows()
        assert run(r, SOME).error.item() == 0
        assert r.holds(r.expected(before, SOME))


@pytest.mark.usefixtures("graphs_alone")
def test_adaptive_logs_both_times_for_each_size(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nwor_compile")
    with rig(geometries=(GEOMETRY,), scv="adaptive") as r:
        r.window.warm_up()
        lines = [x.getMessage() for x in caplog.records if "SCV adaptive" in x.getMessage()]
        assert [line.split(":")[0] for line in lines] == [
            f"SCV adaptive, {size} requests" for size in (1, 2, 4, 6)
        ]
        assert r.window.metrics().nwor_windows == 0


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("faster", [True, False])
def test_adaptive_takes_the_faster_path_and_both_are_right(faster: bool) -> None:
    with rig(geometries=(GEOMETRY,), scv="adaptive") as r:
        r.window.warm_up()
        graphs = r.window.validator.graphs
        for size, captured in graphs.items():
            graphs[size] = captured._replace(faster=faster)
        before = r.rows()
        assert run(r, SOME).accepted.tolist() == SOME
        assert r.holds(r.expected(before, SOME))
        assert r.window.validator.vectorised == {}  # chosen, so no fallback


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("scv", ["graph", "adaptive"])
def test_a_failed_capture_degrades_with_one_line_and_a_counter(
    scv: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> object:
        raise RuntimeError("injected")

    with rig(geometries=(GEOMETRY,), scv=scv) as r:
        metrics = r.window.metrics()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "graph", fail)
            r.window.warm_up()
        assert warnings_of(caplog) == ["SCV graph mode runs vectorised: capture failed: injected"]
        assert r.window.metrics() == metrics.model_copy(update={"nwor_scv_vectorised": 4})
        before = r.rows()
        result = run(r, SOME)
        assert (result.accepted.tolist(), result.error.item()) == (SOME, 0)
        assert r.holds(r.expected(before, SOME))
        assert r.window.metrics().nwor_scv_vectorised == 5


# Invariant 7 -------------------------------------------------------------------------------------


@pytest.fixture
def no_sync() -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Call a function while torch raises for every operation that waits for the device."""

    def call(function: Callable[[], Any]) -> Any:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    yield call
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("poison", ["off", "large"])
@pytest.mark.parametrize("scv", ["graph", "adaptive"])
def test_invariant_7_nothing_waits_between_begin_and_commit(
    scv: str, poison: str, counted: bool, warm: bool, no_sync: Callable[[Callable[[], Any]], Any]
) -> None:
    with rig(geometries=(GEOMETRY, OTHER), scv=scv, poison=poison) as r:
        if warm:
            r.window.warm_up()
        run(r, SOME, counted=counted)  # compiles the kernels
        before = r.rows()
        sampling = r.sampling(ALL, counted=counted)

        def window() -> Committed:
            r.begin()
            stage(r)
            return r.window.commit(sampling.sampled_ids, r.batch.draft_ids, sampling.num_sampled)

        result = no_sync(window)
        assert (result.accepted.tolist(), result.error.item()) == (ALL, 0)
        assert r.holds(r.expected(before, ALL))


@pytest.mark.parametrize("warm", [True, False])
def test_the_counters_reach_a_file_in_memory_without_a_wait(
    warm: bool, deciding: str, no_sync: Callable[[Callable[[], Any]], Any]
) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, rig(geometries=(GEOMETRY,)) as r:
        file = SnapshotWriter(Path(folder, "engine"), r.window, engine=0, model="tiny")
        if warm:
            r.window.warm_up()
        file.show()
        run(r, SOME)  # compiles the kernels
        sampling = r.sampling(ALL)

        def window() -> None:
            r.begin()
            stage(r)
            r.window.commit(sampling.sampled_ids, r.batch.draft_ids, sampling.num_sampled)
            file.publish_host()

        no_sync(window)
        torch.cuda.synchronize()
        assert read(file.path).metrics() == r.window.metrics()
        assert read(file.path).metrics().nwor_windows == 2
        file.close(keep=True)
        assert read(file.path).metrics() == r.window.metrics()
        assert bool(r.window.validator.vectorised) is (deciding == "graph" and not warm)


def test_invariant_7_scv_off_waits(no_sync: Callable[[Callable[[], Any]], Any]) -> None:
    with rig(geometries=(GEOMETRY,), scv="off") as r:
        run(r, SOME)
        sampling = r.sampling(SOME)
        r.begin()
        stage(r)
        with pytest.raises(RuntimeError, match="synchroniz"):
            no_sync(
                lambda: r.window.commit(
                    sampling.sampled_ids, r.batch.draft_ids, sampling.num_sampled
                )
            )
        assert r.window.metrics().nwor_unique_tokens == 0


# Invariant 8: a whole step in one CUDA graph -----------------------------------------------------

# Six tokens a request in each variant, split otherwise into certain tokens and drafts.
VARIANTS: list[tuple[list[Span], list[int]]] = [
    ([Span(7, 1, 5), Span(3, 1, 5), Span(20, 1, 5)], [5, 2, 0]),
    ([Span(7, 6, 0), Span(3, 3, 3), Span(20, 1, 5)], [0, 1, 5]),
    ([Span(7, 6, 0), Span(3, 6, 0), Span(20, 6, 0)], [0, 0, 0]),
    ([Span(7, 2, 4), Span(3, 1, 5), Span(20, 5, 1)], [0, 0, 1]),
]


class Inputs:
    """Static inputs of the captured step; draft ids padded to the staging rows."""

    def __init__(self, rows: int) -> None:
        self.num_drafts = torch.zeros(3, dtype=torch.int32, device="cuda")
        self.draft_ids = torch.zeros(rows, dtype=torch.int32, device="cuda")
        self.sampled_ids = torch.full((3, 6), -1, dtype=torch.int32, device="cuda")
        self.num_sampled = torch.zeros(3, dtype=torch.int32, device="cuda")

    def load(self, r: Rig, accepted: list[int]) -> None:
        sampling = r.sampling(accepted)
        assert sampling.num_sampled is not None
        self.num_drafts.copy_(r.batch.num_drafts)
        self.draft_ids.fill_(-1)
        self.draft_ids[: r.batch.drafts] = r.batch.draft_ids
        self.sampled_ids.copy_(sampling.sampled_ids)
        self.num_sampled.copy_(sampling.num_sampled)


@pytest.mark.parametrize("warm", [True, False])
def test_invariant_8_a_captured_step_replays_for_other_drafts_and_acceptances(warm: bool) -> None:
    spans, accepted = VARIANTS[0]
    with rig(spans, geometries=(GEOMETRY,), max_requests=3) as r:
        if warm:  # SCV graphs exist; they must not be replayed inside this capture
            r.window.warm_up()
        inputs = Inputs(r.window.capacity)
        first_rows = [[t.clone() for t in layer.cache.stored] for layer in r.layers]

        def restore() -> None:
            for layer, stored in zip(r.layers, first_rows, strict=True):
                for tensor, rows in zip(layer.cache.stored, stored, strict=True):
                    tensor.copy_(rows)

        def step() -> tuple[list[Tensor], Committed]:
            r.begin(num_drafts=inputs.num_drafts)
            outputs = r.forward()
            done = r.window.commit(inputs.sampled_ids, inputs.draft_ids, inputs.num_sampled)
            return outputs, done

        inputs.load(r, accepted)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()  # compiles the kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs, done = step()
        assert r.window.state.value == "idle"
        for variant, taken in [*VARIANTS, VARIANTS[0]]:
            restore()
            r.batch = make_batch(variant, GEOMETRY, 0, padding=2)
            inputs.load(r, taken)
            before, counted = r.rows(), r.window.metrics()
            graph.replay()
            assert (done.accepted.tolist(), done.error.item()) == (taken, 0)
            assert r.holds(r.expected(before, taken))
            replayed = [out.clone() for out in outputs]
            metrics = r.window.metrics()
            drafts = sum(span.drafts for span in variant)
            assert metrics.nwor_total_staged - counted.nwor_total_staged == drafts
            assert metrics.nwor_total_committed - counted.nwor_total_committed == sum(taken)
            with rig(variant, geometries=(GEOMETRY,), max_requests=3, seed=0) as eager:
                eager.begin()
                wanted = eager.forward()
                result = eager.commit(taken)
                assert result.accepted.tolist() == taken
                for mine, theirs in zip(r.layers, eager.layers, strict=True):
                    for a, b in zip(mine.cache.dump(), theirs.cache.dump(), strict=True):
                        assert same_bits(a, b)
                assert all(same_bits(a, b) for a, b in zip(replayed, wanted, strict=True))
