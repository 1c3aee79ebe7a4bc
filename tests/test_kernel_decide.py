"""A window decided in one launch against its specification, judge and commit; on a GPU if there is
one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import Geometry, Span, same_bits, write_arguments
from torch import Tensor
from window_support import ALL, MIXED, NONE, SOME, Rig, rig

pytest.importorskip("triton")

from nwor_compile.ops import stage_kv_window
from nwor_compile.ops.decide import MOST_IDS, MOST_REQUESTS, deciding, fits, kinds
from nwor_compile.ops.error_bits import BAD_COUNTS, COUNT_MISMATCH, ID_MISMATCH, OVERFLOW
from nwor_compile.ops.kernels import decide as kernel
from nwor_compile.ops.kernels.decide import Deciding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEOMETRY = Geometry(device=DEVICE)
GUARD = 77
Change = Callable[[Rig], Any]


def decided(
    make: Any, r: Rig, given: Sequence[Any], change: Change, mirrored: bool
) -> list[Tensor]:
    """All that a window leaves which `make` decides."""
    r.begin()
    for layer in r.layers:
        stage_kv_window(**write_arguments(layer, r.batch))
    change(r)
    tensors = r.window.tensors
    plan = tensors.deciding
    assert plan is not None
    plan.mask.fill_(True)
    plan.accepted.fill_(GUARD)
    requests = given[0].shape[0]
    memory = torch.full((2, requests + 16), GUARD, dtype=torch.int32, device=DEVICE)
    counts = (memory[0, 8:-8], memory[1, 8:-8])
    mirror = torch.full(tensors.counters.shape, GUARD, pin_memory=DEVICE == "cuda")
    own = None if given[2] is None else counts
    make(plan, *given)(*given, own, mirror if mirrored else None)
    assert memory[:, :8].eq(GUARD).all()
    assert memory[:, -8:].eq(GUARD).all()
    assert own is not None or memory.eq(GUARD).all()
    assert plan.accepted[requests:].eq(GUARD).all()
    if mirrored:
        assert torch.equal(tensors.counters.cpu(), mirror)
    assert mirrored or mirror.eq(GUARD).all()
    rows = [part for layer in r.layers for part in layer.cache.dump()]
    found = [
        plan.accepted, memory, plan.mask, tensors.error, tensors.counters, tensors.routing.row_map,
        tensors.routing.num_drafts, tensors.drafts, tensors.state, *rows,
    ]  # fmt: skip
    found = [tensor.clone() for tensor in found]
    r.window.abort()
    return found


def nothing(r: Rig) -> None:
    """No fault."""


def assert_decided_alike(
    spans: Sequence[Span],
    accepted: Sequence[int],
    *,
    change: Change = nothing,
    tail: bool = False,
    dtype: torch.dtype = torch.int64,
    strided: bool = False,
    counted: bool = True,
    refused: bool = True,
    ids: int | None = None,
    shift: int = 0,
    **options: Any,
) -> list[Tensor]:
    outcomes = []
    for make in (deciding, Deciding):
        options.setdefault("max_requests", len(spans))
        with rig(spans, geometries=(GEOMETRY,), tail=tail, **options) as r:
            sampling = r.sampling(accepted, counted=counted)
            said = sampling.num_sampled
            given: list[Any] = [
                sampling.sampled_ids, r.batch.draft_ids.long()[:ids] + shift,
                said, torch.arange(len(spans), device=DEVICE) if counted and refused else None,
            ]  # fmt: skip
            for index, tensor in enumerate(given):
                if tensor is not None:
                    tensor = tensor.to(dtype)
                    apart = torch.stack([tensor, tensor], -1)[..., 0]
                    given[index] = apart if strided else tensor
            # Twice, for what is kept of the first.
            runs = [decided(make, r, given, change, mirrored) for mirrored in (True, False)]
            outcomes.append([part for run in runs for part in run])
    for index, (want, have) in enumerate(zip(*outcomes, strict=True)):
        alike = same_bits(want, have) if want.is_floating_point() else torch.equal(want, have)
        assert alike, index
    return outcomes[1]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("accepted", [NONE, SOME, ALL])
def test_it_does_what_the_specification_says(
    accepted: list[int], counted: bool, tail: bool
) -> None:
    found = assert_decided_alike(MIXED, accepted, tail=tail, counted=counted, max_requests=8)
    assert found[0][: len(accepted)].tolist() == accepted
    assert found[3].item() == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_ids_and_counts_of_any_dtype_and_strides(
    dtype: torch.dtype, strided: bool, refused: bool
) -> None:
    assert_decided_alike(MIXED, SOME, dtype=dtype, strided=strided, refused=refused)


@pytest.mark.parametrize(("requests", "drafts"), [(1, 1), (16, 2), (17, 3), (64, 4), (3, 40)])
def test_few_requests_and_as_many_as_there_may_be(requests: int, drafts: int) -> None:
    """Lanes of both widths, spans longer than a pass."""
    spans = [Span(3 + 5 * (r % 4), 1, drafts if r % 3 else drafts // 2) for r in range(requests)]
    accepted = [span.drafts if r % 2 else span.drafts // 2 for r, span in enumerate(spans)]
    found = assert_decided_alike(
        spans, accepted, tail=True, layers=1, max_drafts=drafts, max_tokens=400
    )
    assert found[0][: len(accepted)].tolist() == accepted


@pytest.mark.parametrize("layers", [2, 3])
def test_programs_that_take_two_layers(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_MANY", 2 * layers)
    for spans, accepted, each in ((MIXED, SOME, 2), ([Span(5, 1, 4)], [3], 1)):
        with rig(spans, layers=layers, geometries=(GEOMETRY,)) as r:
            plan, sampling = r.window.tensors.deciding, r.sampling(accepted)
            assert plan is not None
            made = Deciding(plan, sampling.sampled_ids, r.batch.draft_ids, None, None)
            assert made.sizes[-1] == each
        found = assert_decided_alike(spans, accepted, layers=layers)
        assert found[0][: len(accepted)].tolist() == accepted


FAULTS: dict[str, tuple[Change, int]] = {
    "begin": (lambda r: r.window.tensors.error.bitwise_or_(BAD_COUNTS), BAD_COUNTS),
    "a layer staged too much": (lambda r: r.window.tensors.state[1, 0].add_(1), COUNT_MISMATCH),
    "a layer met one too many": (lambda r: r.window.tensors.state[0, 1].add_(2), OVERFLOW),
}


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_anywhere_moves_no_row(fault: str, tail: bool) -> None:
    change, bit = FAULTS[fault]
    found = assert_decided_alike(MIXED, ALL, change=change, tail=tail)
    accepted, counts, mask, error, *_ = found
    assert error.item() == bit
    assert not mask[: sum(span.drafts for span in MIXED)].any()
    assert accepted[: len(MIXED)].tolist() == NONE
    assert counts[0, 8:-8].max() == 1


def test_ids_that_disagree_and_drafts_without_an_id() -> None:
    assert int(assert_decided_alike(MIXED, ALL, shift=1)[3]) == ID_MISMATCH
    assert int(assert_decided_alike(MIXED, ALL, shift=2**40)[3]) == ID_MISMATCH
    assert int(assert_decided_alike(MIXED, ALL, ids=8)[3]) & ID_MISMATCH
    assert int(assert_decided_alike(MIXED, SOME, ids=0)[3]) & ID_MISMATCH


def test_more_layers_than_are_looked_at_at_once() -> None:
    def last(r: Rig) -> None:
        r.window.tensors.state[-1, 0].add_(1)

    spans = [Span(5, 1, 1)]
    for change, error in ((nothing, 0), (last, COUNT_MISMATCH)):
        found = assert_decided_alike(spans, [1], layers=130, change=change)
        assert found[3].item() == error


@pytest.mark.parametrize("max_drafts", [1, 4, 5, 40])
def test_no_step_needs_a_kernel_that_no_warm_up_compiled(max_drafts: int) -> None:
    with rig([Span(5, 1, 1)], max_requests=70, max_drafts=max_drafts, max_tokens=400) as r:
        plan = r.window.tensors.deciding
        assert plan is not None

        def needed(requests: int, ids: int, *, counted: bool = False) -> tuple[int, ...]:
            said = torch.zeros(requests) if counted else None
            given = (torch.zeros(requests, max_drafts + 1), torch.zeros(ids), said, said)
            return Deciding(plan, *given).constants

        compiled = {needed(requests, max_drafts) for requests in kinds(r.window.max_requests)}
        assert len(compiled) == 2
        for requests in range(1, MOST_REQUESTS + 1):
            for ids in (0, 1, requests, MOST_IDS):
                assert needed(requests, ids) in compiled
                assert needed(requests, ids, counted=True) in compiled
    assert kinds(16) == (1,)


def test_what_fits() -> None:
    assert fits(MOST_REQUESTS, MOST_IDS)
    assert not fits(MOST_REQUESTS + 1, 1)
    assert not fits(1, MOST_IDS + 1)


def test_windows_that_are_not_decided_in_one_launch() -> None:
    other = Geometry(head_size=16, device=DEVICE)
    settings: list[dict[str, Any]] = [
        {"geometries": (GEOMETRY, other)},
        {"mode": "off"},
        {"window": {"share_error": lambda flag: None}},
    ]
    for options in settings:
        with rig(**{"geometries": (GEOMETRY,), **options}) as r:
            assert r.window.tensors.deciding is None
            assert not r.window.validator.in_one_launch(1, 4)
    with rig(geometries=(GEOMETRY,)) as r:
        assert r.window.validator.in_one_launch(6, 30)
        assert not r.window.validator.in_one_launch(1, MOST_IDS + 1)
        pageable = torch.zeros(r.window.tensors.counters.shape, dtype=torch.int64)
        r.window.mirror_counters(pageable)
        assert not r.window.validator.in_one_launch(6, 30)
        r.window.stop_mirror()
        assert r.window.validator.in_one_launch(6, 30)
