"""SCV: the host loop, the vectorised path and adaptive agree; malformed ids; the mask's graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import expecttest
import pytest
import torch
from cases import Batch, Geometry, Sampling, Span, make_batch, make_sampling, span_lists
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from window_support import ALL, MIXED, NONE, SOME, rig

from nwor_compile import Committed
from nwor_compile.ops.error_bits import ID_MISMATCH
from nwor_compile.ops.scv import accept_mask_reference, verdict_buffers
from nwor_compile.scv import WindowTensors, host_loop, settle, validate
from nwor_compile.validator import _Captured, _one_launch, _OwnCounts, _replay

MODES = ("off", "graph", "adaptive")


def decide(
    scv: str, spans: list[Span], sample: Callable[[Batch], tuple[Tensor, Tensor, Tensor | None]]
) -> tuple[Committed, list[Any], Any]:
    """What one window comes to: the result, the caches, the counters."""
    with rig(spans, scv=scv, max_drafts=6) as r:
        r.begin()
        r.forward()
        result = r.window.commit(*sample(r.batch))
        metrics = r.window.metrics().model_copy(update={"nwor_scv_vectorised": 0})
        return result, [layer.cache.dump() for layer in r.layers], metrics


def assert_modes_agree(
    spans: list[Span], sample: Callable[[Batch], tuple[Tensor, Tensor, Tensor | None]]
) -> Committed:
    oracle, rows, metrics = decide("off", spans, sample)
    for mode in MODES[1:]:
        result, other_rows, other_metrics = decide(mode, spans, sample)
        assert result.accepted.tolist() == oracle.accepted.tolist()
        assert result.mask.tolist() == oracle.mask.tolist()
        assert result.error.tolist() == oracle.error.tolist()
        assert result.accepted.dtype == oracle.accepted.dtype == torch.int32
        assert all(
            torch.equal(a, b)
            for x, y in zip(rows, other_rows, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        assert other_metrics == metrics
    return oracle


@given(st.data())
def test_modes_agree_on_samplers_that_are_right(data: st.DataObject) -> None:
    spans = data.draw(span_lists())
    accepted = [data.draw(st.integers(0, span.drafts)) for span in spans]
    counted, echo = data.draw(st.booleans()), data.draw(st.booleans())

    def sample(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        made = make_sampling(batch, accepted, counted=counted, echo=echo, columns=7)
        return made.sampled_ids, batch.draft_ids, made.num_sampled

    result = assert_modes_agree(spans, sample)
    assert result.error.item() == 0
    # A placeholder says nothing about a draft's own id: with `echo` but no counts it is accepted.
    if counted or not echo:
        assert result.accepted.tolist() == accepted


@given(st.data())
def test_modes_agree_on_anything_that_a_sampler_could_return(data: st.DataObject) -> None:
    """Garbage ids, counts out of range, too few columns, too few or too many draft ids."""
    spans = data.draw(span_lists())
    columns = data.draw(st.integers(0, 9))
    few = st.integers(-2, 3)  # small, so that ids match now and then
    sampled = [[data.draw(few) for _ in range(columns)] for _ in spans]
    counts = [data.draw(st.integers(-2, 9)) for _ in spans]
    given_counts = data.draw(st.booleans())
    drafts = sum(span.drafts for span in spans)
    length = max(0, min(36, drafts + data.draw(st.integers(-3, 3))))
    ids = [data.draw(few) for _ in range(length)]
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))

    def sample(batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        matrix = torch.tensor(sampled, dtype=dtype).view(len(spans), columns)
        said = torch.tensor(counts, dtype=dtype) if given_counts else None
        return matrix, torch.tensor(ids, dtype=dtype), said

    result = assert_modes_agree(spans, sample)
    taken = result.accepted.tolist()
    assert all(0 <= a <= span.drafts for a, span in zip(taken, spans, strict=True))
    # Every accepted draft has its row among those that moved; none is lost.
    assert sum(taken) == sum(result.mask.tolist())


@pytest.mark.parametrize("scv", MODES)
@pytest.mark.parametrize("length", [0, 1, 8])
def test_too_few_draft_ids_accept_nothing(scv: str, length: int) -> None:
    """They would count as accepted, and their rows be lost: the mask ends with the ids."""
    with rig(scv=scv) as r:
        before = r.rows()
        r.begin()
        r.forward()
        sampling = r.sampling(ALL)
        result = r.window.commit(
            sampling.sampled_ids, r.batch.draft_ids[:length], sampling.num_sampled
        )
        assert result.error.item() == ID_MISMATCH
        assert result.accepted.tolist() == NONE
        assert r.holds(r.expected(before, NONE))
        r.assert_next_window_is_clean()


@pytest.mark.parametrize("scv", MODES)
def test_draft_ids_may_be_padded_up_to_the_staging_rows(scv: str) -> None:
    with rig(scv=scv) as r:
        before, sampling = r.rows(), r.sampling(SOME)
        r.begin()
        r.forward()
        padded = torch.cat([r.batch.draft_ids, torch.full((21,), -1, dtype=torch.int32)])
        result = r.window.commit(sampling.sampled_ids, padded, sampling.num_sampled)
        assert result.error.item() == 0
        assert result.mask.shape == padded.shape
        assert r.holds(r.expected(before, SOME))


def test_ids_past_num_sampled_are_never_read() -> None:
    with rig() as r:
        before, sampling = r.rows(), r.sampling(NONE)
        assert sampling.num_sampled is not None
        r.begin()
        r.forward()
        # Past the count stand the drafts themselves: reading on would accept them all.
        full = r.sampling(ALL, counted=False).sampled_ids
        result = r.window.commit(full, r.batch.draft_ids, sampling.num_sampled)
        assert result.accepted.tolist() == NONE
        assert r.holds(r.expected(before, NONE))


# Malformed ids ---------------------------------------------------------------------------------


def _malformed() -> list[tuple[str, Callable[[Sampling, Batch], tuple[Any, Any, Any]]]]:
    return [
        ("sampled_ids: expected [6, columns], got [36]",
         lambda s, b: (s.sampled_ids.flatten(), b.draft_ids, None)),
        ("sampled_ids: expected [6, columns], got [5, 6]",
         lambda s, b: (s.sampled_ids[:5], b.draft_ids, None)),
        ("sampled_ids: expected int32 or int64 on cpu, got torch.float32 on cpu",
         lambda s, b: (s.sampled_ids.float(), b.draft_ids, None)),
        ("sampled_ids: expected int32 or int64 on cpu, got torch.int32 on meta",
         lambda s, b: (s.sampled_ids.to("meta"), b.draft_ids, None)),
        ("sampled_ids: expected a tensor, got list",
         lambda s, b: (s.sampled_ids.tolist(), b.draft_ids, None)),
        ("sampled_ids: expected a tensor, got NoneType",
         lambda s, b: (None, b.draft_ids, None)),
        ("draft_ids: expected [at most 30], got [31]",
         lambda s, b: (s.sampled_ids, b.draft_ids.new_zeros(31), None)),
        ("draft_ids: expected [at most 30], got [3, 3]",
         lambda s, b: (s.sampled_ids, b.draft_ids.view(3, 3), None)),
        ("draft_ids: expected int32 or int64 on cpu, got torch.bool on cpu",
         lambda s, b: (s.sampled_ids, b.draft_ids.bool(), None)),
        ("draft_ids: expected a tensor, got list",
         lambda s, b: (s.sampled_ids, b.draft_ids.tolist(), None)),
        ("num_sampled: expected [6], got [6, 1]",
         lambda s, b: (s.sampled_ids, b.draft_ids, s.num_sampled.unsqueeze(1))),
        ("num_sampled: expected int32 or int64 on cpu, got torch.float32 on cpu",
         lambda s, b: (s.sampled_ids, b.draft_ids, s.num_sampled.float())),
    ]  # fmt: skip


@pytest.mark.parametrize(("message", "spoil"), _malformed(), ids=[m for m, _ in _malformed()])
@pytest.mark.parametrize("scv", MODES)
def test_malformed_ids_are_logged_counted_and_accept_nothing(
    scv: str, message: str, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(scv=scv) as r:
        before = r.rows()
        r.begin()
        r.forward()
        with caplog.at_level(logging.ERROR, "nwor_compile"):
            result = r.window.commit(*spoil(r.sampling(ALL), r.batch))
        assert [record.getMessage() for record in caplog.records] == [
            f"NWOR: {message}. This window accepts nothing."
        ]
        assert result.accepted.tolist() == NONE
        assert not bool(result.mask.any())
        assert result.error.item() == 0
        assert r.holds(r.expected(before, NONE))
        metrics = r.window.metrics()
        assert metrics.nwor_fallback_count == 1
        assert (metrics.nwor_total_staged, metrics.nwor_total_rejected) == (9, 9)
        r.assert_next_window_is_clean()
        assert r.window.metrics().nwor_fallback_count == 1


@pytest.mark.parametrize(("message", "spoil"), _malformed(), ids=[m for m, _ in _malformed()])
def test_ids_that_fitted_let_no_others_through(
    message: str, spoil: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What fits is remembered and not checked again; whatever differs is, also the second time."""
    with rig() as r, caplog.at_level(logging.ERROR, "nwor_compile"):
        for window in range(2):
            before = r.rows()
            result = r.run(SOME)
            assert result.accepted.tolist() == SOME
            assert r.holds(r.expected(before, SOME))
            r.new_rows(seed=window)
            before = r.rows()
            r.begin()
            r.forward()
            result = r.window.commit(*spoil(r.sampling(ALL), r.batch))
            assert result.accepted.tolist() == NONE
            assert r.holds(r.expected(before, NONE))
        assert [record.getMessage() for record in caplog.records] == [
            f"NWOR: {message}. This window accepts nothing."
        ] * 2


def test_ids_that_the_window_knew_in_one_step_are_missing_in_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same call, but `begin` was not given the tokens."""
    with rig() as r, caplog.at_level(logging.ERROR, "nwor_compile"):
        sampling = r.sampling(NONE)
        tokens = torch.zeros_like(r.batch.slot_mapping)
        for known, fallbacks in ((tokens, 0), (None, 1), (tokens, 1)):
            r.begin(token_ids=known)
            r.forward()
            r.window.commit(sampling.sampled_ids, None, sampling.num_sampled)
            assert r.window.fallbacks == fallbacks
        assert ["expected the drafts' ids" in x.getMessage() for x in caplog.records] == [True]


def test_fewer_requests_than_before_need_fewer_ids() -> None:
    with rig() as r:
        r.run(SOME)
        r.change_batch(make_batch(MIXED[:4], Geometry(), padding=2), seed=1)
        before, old = r.rows(), r.batch.num_drafts.new_zeros(6, 6).long()
        r.begin()
        r.forward()
        result = r.window.commit(old, r.batch.draft_ids)
        assert r.window.fallbacks == 1
        assert result.accepted.tolist() == [0] * 4
        assert r.holds(r.expected(before, [0] * 4))


@pytest.mark.parametrize("scv", MODES)
def test_too_few_columns_are_clamped_with_one_warning(
    scv: str, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(scv=scv) as r, caplog.at_level(logging.WARNING, "nwor_compile"):
        for _ in range(3):
            before = r.rows()
            result = r.run([3, 0, 0, 2, 0, 0], columns=3)
            assert result.error.item() == 0
            assert result.accepted.tolist() == [2, 0, 0, 2, 0, 0]
            assert r.holds(r.expected(before, [2, 0, 0, 2, 0, 0]))
        lines = [x.getMessage() for x in caplog.records if "columns" in x.getMessage()]
        assert lines == [
            "SCV: sampled_ids has 3 columns, 5 drafts need 6; drafts past the last column, if "
            "there are any, are rejected"
        ]


@pytest.mark.parametrize("scv", MODES)
def test_zero_columns_accept_nothing_without_an_error(scv: str) -> None:
    with rig(scv=scv) as r:
        before = r.rows()
        r.begin()
        r.forward()
        result = r.window.commit(torch.zeros(6, 0, dtype=torch.int64), r.batch.draft_ids)
        assert (result.accepted.tolist(), result.error.item()) == (NONE, 0)
        assert r.holds(r.expected(before, NONE))


# Graph mode without CUDA -------------------------------------------------------------------------


@pytest.mark.parametrize("scv", ["graph", "adaptive"])
def test_without_cuda_the_vectorised_path_runs_and_says_so_once(
    scv: str, caplog: pytest.LogCaptureFixture
) -> None:
    with rig(scv=scv) as r, caplog.at_level(logging.WARNING, "nwor_compile"):
        r.window.warm_up()
        for _ in range(3):
            r.run(SOME)
        assert [x.getMessage() for x in caplog.records] == [
            "SCV graph mode runs vectorised: CUDA is missing"
        ]
        assert r.window.validator.vectorised == {"CUDA is missing": 4}
        assert r.window.metrics().nwor_scv_vectorised == 4


def test_scv_off_counts_no_vectorised_commit(caplog: pytest.LogCaptureFixture) -> None:
    with rig(scv="off") as r, caplog.at_level(logging.WARNING, "nwor_compile"):
        r.window.warm_up()
        r.run(SOME)
        assert r.window.metrics().nwor_scv_vectorised == 0
        assert not caplog.records


# The mask's graph --------------------------------------------------------------------------------


def _waits(graph: torch.fx.GraphModule) -> list[str]:
    """Nodes whose result or shape depends on data: what a CUDA graph cannot hold."""
    found = []
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
            indices = [i.meta["val"] for i in node.args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in indices):
                found.append(f"{node.target} by a mask")
            continue
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        if tags & set(node.target.tags):
            found.append(str(node.target))
    return found


def _print(graph: torch.fx.GraphModule) -> str:
    """One line a call: name, op, arguments."""
    lines = []
    for node in graph.graph.nodes:
        if node.op == "call_function":
            op = str(node.target).removeprefix("aten.")
            lines.append(f"{node.name} = {op}{tuple(node.args)}")
    returned = graph.graph.output_node().args[0]
    return "\n".join([*lines, f"return {returned}"])


def _example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.tensor([[5, 6, 7], [8, 9, 0]]),
        torch.tensor([5, 6, 8]),
        torch.tensor([2, 3], dtype=torch.int32),
        torch.tensor([3, 1], dtype=torch.int32),
    )


class MaskGraph(expecttest.TestCase):
    """Without CUDA: the mask is one straight-line graph, so a CUDA graph can capture it."""

    def test_the_mask_is_this_graph(self) -> None:
        graph = make_fx(accept_mask_reference)(*_example())
        assert not _waits(graph)
        self.assertExpectedInline(
            _print(graph),
            """\
_to_copy = _to_copy.default(cu_num_drafts_1,)
slice_1 = slice.Tensor(_to_copy, 0, 0, -1)
constant_pad_nd = constant_pad_nd.default(slice_1, [1, 0], 0.0)
sub = sub.Tensor(_to_copy, constant_pad_nd)
_to_copy_1 = _to_copy.default(num_sampled_1,)
clamp = clamp.default(_to_copy_1, 0, 3)
arange = arange.default(3,)
searchsorted = searchsorted.Tensor(_to_copy, arange)
clamp_1 = clamp.default(searchsorted, None, 1)
index = index.Tensor(constant_pad_nd, [clamp_1])
sub_1 = sub.Tensor(arange, index)
index_1 = index.Tensor(_to_copy, [clamp_1])
lt = lt.Tensor(arange, index_1)
index_2 = index.Tensor(clamp, [clamp_1])
lt_1 = lt.Tensor(sub_1, index_2)
bitwise_and = bitwise_and.Tensor(lt, lt_1)
clamp_2 = clamp.default(sub_1, 0, 2)
index_3 = index.Tensor(sampled_ids_1, [clamp_1, clamp_2])
eq = eq.Tensor(index_3, draft_ids_1)
bitwise_and_1 = bitwise_and.Tensor(bitwise_and, eq)
index_4 = index.Tensor(sub, [clamp_1])
clamp_3 = clamp.default(sub_1, 0)
where = where.self(bitwise_and_1, index_4, clamp_3)
index_5 = index.Tensor(_to_copy, [clamp_1])
lt_2 = lt.Tensor(arange, index_5)
scalar_tensor = scalar_tensor.default(3,)
where_1 = where.self(lt_2, where, scalar_tensor)
scatter_reduce = scatter_reduce.two(sub, 0, clamp_1, where_1, 'amin')
sub_2 = sub.Tensor(clamp, 1)
minimum = minimum.default(scatter_reduce, sub_2)
clamp_4 = clamp.default(minimum, 0)
index_6 = index.Tensor(clamp_4, [clamp_1])
lt_3 = lt.Tensor(sub_1, index_6)
bitwise_and_2 = bitwise_and.Tensor(lt_2, lt_3)
sub_3 = sub.Tensor(clamp, 1)
lt_4 = lt.Tensor(scatter_reduce, sub_3)
any_1 = any.default(lt_4,)
_to_copy_2 = _to_copy.default(any_1,)
view = view.default(_to_copy_2, [1])
_to_copy_3 = _to_copy.default(clamp_4,)
return (bitwise_and_2, _to_copy_3, view)""",
        )


def test_the_search_for_data_dependence_finds_some() -> None:
    graph = make_fx(lambda t: (t[t > 0], t.nonzero(), torch.masked_select(t, t > 0)))(
        torch.tensor([1, 0])
    )
    assert _waits(graph) == ["aten.index.Tensor by a mask", "aten.nonzero.default",
                             "aten.masked_select.default"]  # fmt: skip


def test_the_graph_of_the_mask_is_right_for_other_data() -> None:
    """Nothing of the example's values is baked in."""
    graph = make_fx(accept_mask_reference)(*_example())
    other = (
        torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1, 4, 5]),
        torch.tensor([1, 3], dtype=torch.int32), torch.tensor([1, 3], dtype=torch.int32),
    )  # fmt: skip
    for got, want in zip(graph(*other), accept_mask_reference(*other), strict=True):
        assert torch.equal(got, want)
    assert graph(*other)[1].tolist() == [0, 2]


def test_the_whole_validation_is_one_graph_without_data_dependence() -> None:
    """Mask, error flag, commit of every batch, counters and routing."""
    with rig() as r:
        r.begin()
        r.forward()
        sampling = r.sampling(SOME)

        def step(sampled: Tensor, drafts: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
            result = validate(r.window.tensors, sampled, drafts, counts, counts)
            assert result.num_sampled is not None
            assert result.num_rejected is not None
            return result.accepted, result.mask, result.num_sampled, result.num_rejected

        assert sampling.num_sampled is not None
        graph = make_fx(step)(sampling.sampled_ids, r.batch.draft_ids, sampling.num_sampled)
        r.window.abort()
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    # The commit of two layers: K and V of each are scattered.
    assert targets.count("aten.index_put_.default") >= 4
    assert not _waits(graph)


# The replay of a captured graph, with a graph that needs no CUDA ---------------------------------


class HostGraph:
    """What a captured CUDA graph does at replay: the same calls on the same buffers."""

    captured: _Captured

    def __init__(self, tensors: WindowTensors) -> None:
        self.tensors = tensors

    def replay(self) -> None:
        settle(self.tensors, self.captured.verdict)


def host_graph(tensors: WindowTensors, size: int, max_drafts: int) -> _Captured:
    graph = HostGraph(tensors)
    verdict = verdict_buffers(size, size * max_drafts, torch.device("cpu"))
    verdict.numbers.fill_(77)
    verdict.mask.fill_(True)
    graph.captured = _Captured(graph, verdict, size * max_drafts)  # type: ignore[arg-type]
    return graph.captured


@given(st.data())
def test_a_replay_decides_what_the_host_loop_does_whatever_was_in_its_buffers(
    data: st.DataObject,
) -> None:
    """A bucket of eight requests serves fewer, and no earlier window shows in a later one."""
    few = st.integers(-1, 2)
    with rig([Span(4, 1, 3)], max_requests=8, max_drafts=4) as r:
        tensors = r.window.tensors
        captured = host_graph(tensors, 8, 4)
        for _ in range(3):
            counts = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))
            columns = data.draw(st.integers(0, 5))
            sampled = [[data.draw(few) for _ in range(columns)] for _ in counts]
            ids = torch.tensor(
                [data.draw(few) for _ in range(max(0, sum(counts) - data.draw(st.integers(0, 1))))],
                dtype=torch.int64,
            )
            said = None
            if data.draw(st.booleans()):
                said = torch.tensor([data.draw(st.integers(-1, 6)) for _ in counts])
            matrix = torch.tensor(sampled, dtype=torch.int64).view(len(counts), columns)
            refused = None
            if said is not None and data.draw(st.booleans()):
                refused = torch.tensor([data.draw(st.integers(0, 4)) for _ in counts])
            outcomes = []

            def replay(*given: Any) -> Committed:
                return _replay(tensors, captured, *given)(*given)

            for run in (partial(host_loop, tensors), replay):
                for tensor in (tensors.error, tensors.drafts, tensors.counters):
                    tensor.zero_()
                tensors.drafts[: len(counts)] = torch.tensor(counts, dtype=torch.int32)
                tensors.routing.row_map.fill_(5)
                got = run(matrix, ids, said, refused)
                assert tensors.routing.row_map.eq(-1).all()
                assert (got.num_sampled is None) == (said is None)
                assert (got.num_rejected is None) == (refused is None)
                outcome = (got.accepted, got.mask, got.error, got.num_sampled, got.num_rejected)
                outcomes.append(
                    [None if t is None else t.tolist() for t in (*outcome, tensors.counters)]
                )
            assert outcomes[0] == outcomes[1]


@pytest.fixture(params=["graph", "one launch"])
def replaying(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Any], None]:
    """Gives a window graphs that need no CUDA, or has it decide as in one launch."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def give(window: Any) -> None:
        validator, tensors = window.validator, window.tensors
        for size in (4, window.max_requests):
            validator.graphs[size] = host_graph(tensors, size, window.max_drafts)

        def prepare(sampled: Tensor, ids: Tensor, *counts: Any) -> Any:
            if request.param == "one launch":
                return _one_launch(tensors, sampled, ids, *counts)
            captured = next(
                c for n, c in validator.graphs.items()
                if n >= sampled.shape[0] and c.room >= ids.shape[0]
            )  # fmt: skip
            return _replay(tensors, captured, sampled, ids, *counts)

        monkeypatch.setattr(validator, "_prepare", prepare)

    return give


def test_graphs_replay_for_arguments_of_one_form_after_another(
    replaying: Callable[[Any], None],
) -> None:
    """What is kept of a replay is used for its own form alone, and the counts are the caller's."""
    counts: list[tuple[Tensor, list[int]]] = []
    few = make_batch(MIXED[:4], Geometry(), padding=2)
    with rig() as r:
        replaying(r.window)
        many = r.batch
        for counted in (True, True, False, False, True):
            for dtype in (torch.int64, torch.int32, torch.int32):
                for batch, accepted in ((many, SOME), (many, ALL), (few, [2, 0, 0, 4])):
                    r.change_batch(batch, seed=len(accepted))
                    before = r.rows()
                    r.begin()
                    r.forward()
                    sampling = r.sampling(accepted, counted=counted)
                    said = sampling.num_sampled
                    result = r.window.commit(
                        sampling.sampled_ids.to(dtype), batch.draft_ids,
                        None if said is None else said.to(dtype),
                        None if said is None else torch.zeros_like(said),
                    )  # fmt: skip
                    assert (result.accepted.tolist(), result.error.tolist()) == (accepted, [0])
                    assert result.mask.shape == batch.draft_ids.shape
                    assert (result.num_sampled is None) == (not counted)
                    if said is not None:
                        assert result.num_sampled is not None
                        assert result.num_rejected is not None
                        assert result.num_rejected.tolist() == [0] * len(accepted)
                        counts.append((result.num_sampled, said.tolist()))
                    assert r.holds(r.expected(before, accepted))
        assert r.window.fallbacks == 0
        assert len(r.window.validator.prepared) == 8  # sizes, dtypes, with and without counts
        assert all(kept.tolist() == said for kept, said in counts)


def test_a_replay_of_the_same_form_takes_the_new_arguments(
    replaying: Callable[[Any], None],
) -> None:
    """Also where the validator was called for another form, or the graphs are new."""
    with rig() as r:
        replaying(r.window)
        r.run(SOME)
        (prepared,) = r.window.validator.prepared.values()
        for accepted in (ALL, NONE, SOME):
            r.new_rows(seed=sum(accepted))
            before = r.rows()
            result = r.run(accepted)
            assert result.accepted.tolist() == accepted
            assert r.holds(r.expected(before, accepted))
            assert list(r.window.validator.prepared.values()) == [prepared]
        r.begin()
        sampling = r.sampling(NONE, counted=False)
        r.window.validator(sampling.sampled_ids.int(), r.batch.draft_ids)
        r.window.abort()
        before = r.rows()
        assert r.run(ALL).accepted.tolist() == ALL
        assert r.holds(r.expected(before, ALL))


def test_a_form_means_what_the_caller_last_meant_by_it(
    replaying: Callable[[Any], None],
) -> None:
    """Forms a, b, a, and the second a is of another dtype, or without counts."""
    with rig() as r:
        replaying(r.window)
        for turn, (form, dtype, counted) in enumerate(
            (
                ("a", torch.int32, True), ("b", torch.int64, True), ("a", torch.int64, True),
                ("b", torch.int32, True), ("a", torch.int64, False), ("b", torch.int64, True),
            )
        ):  # fmt: skip
            accepted = (SOME, ALL)[turn % 2]
            r.new_rows(seed=turn)
            before, sampling = r.rows(), r.sampling(accepted, counted=counted)
            said = sampling.num_sampled
            r.begin()
            r.forward()
            result = r.window.commit(
                sampling.sampled_ids.to(dtype), r.batch.draft_ids,
                None if said is None else said.to(dtype), form=form,
            )  # fmt: skip
            assert (result.accepted.tolist(), result.error.tolist()) == (accepted, [0])
            assert (result.num_sampled is None) == (not counted)
            assert r.holds(r.expected(before, accepted))
        assert r.window.fallbacks == 0


def test_a_commit_under_capture_replays_no_graph(
    replaying: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launches become part of the caller's graph."""
    with rig() as r:
        replaying(r.window)
        r.run(SOME)
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            patch.setattr(r.window.validator, "_prepare", lambda *given: None)
            patch.setattr(HostGraph, "replay", lambda self: pytest.fail("graphs do not nest"))
            before = r.rows()
            assert r.run(ALL).accepted.tolist() == ALL
            assert r.holds(r.expected(before, ALL))
        assert r.run(SOME).accepted.tolist() == SOME


def test_counts_that_a_window_hands_out_are_aligned_and_nobody_elses() -> None:
    with torch.inference_mode():
        counts = _OwnCounts(3, torch.device("cpu"))
        taken = [count.fill_(i) for i in range(300) for count in counts.take()]
    assert [count.tolist() for count in taken] == [[i] * 3 for i in range(300) for _ in range(2)]
    assert {(count.dtype, tuple(count.shape)) for count in taken} == {(torch.int32, (3,))}
    assert not any(count.data_ptr() % 16 or count.is_inference() for count in taken)


def test_counts_are_there_again_when_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    counts = _OwnCounts(3, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        with pytest.raises(torch.OutOfMemoryError):
            counts.take()
    assert [count.shape[0] for count in counts.take()] == [3, 3]
