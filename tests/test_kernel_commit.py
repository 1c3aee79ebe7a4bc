"""The judge and the commit of a window as kernels, against their specifications; on a GPU if there
is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from cases import Geometry, same_bits
from torch import Tensor
from window_support import ALL, NONE, SOME, Rig, rig

pytest.importorskip("triton")

from nwor_compile import ops
from nwor_compile.ops import commit, counter_size, scv
from nwor_compile.ops.commit import Closing, CommitPlan
from nwor_compile.ops.error_bits import COUNT_MISMATCH, EARLY_WRITE, ID_MISMATCH, OVERFLOW
from nwor_compile.ops.kernels import commit as commit_kernels
from nwor_compile.ops.kernels import scv as scv_kernels
from nwor_compile.ops.kernels.testing import LAYOUTS, empty_cache
from nwor_compile.ops.scv import JudgePlan, Verdict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GUARD = 77
BITS = {"id_mismatch": ID_MISMATCH, "count_mismatch": COUNT_MISMATCH, "overflow": OVERFLOW}


def guarded_verdict(requests: int, drafts: int) -> tuple[Verdict, Tensor, Tensor]:
    """A verdict full of an earlier window's, and the memory around it."""
    numbers = torch.full((3 * requests + 16,), GUARD, dtype=torch.int32, device=DEVICE)
    mask = torch.ones(drafts + 16, dtype=torch.bool, device=DEVICE)
    inner = numbers[8:-8].view(3, requests)
    return Verdict(mask[8:-8], inner, *inner.unbind(0)), numbers, mask


def assert_guard(numbers: Tensor, mask: Tensor) -> None:
    assert numbers[:8].eq(GUARD).all()
    assert numbers[-8:].eq(GUARD).all()
    assert mask[:8].all()
    assert mask[-8:].all()


# The judge -----------------------------------------------------------------------------------


@dataclass
class Sampler:
    """One step's ids and counts, and the room of a larger graph."""

    sampled_ids: Tensor
    draft_ids: Tensor
    num_sampled: Tensor | None
    num_rejected: Tensor | None
    drafts: Tensor
    staged: Tensor
    state: Tensor
    room: tuple[int, int]
    error: int = 0

    def run(self, judge: Any) -> tuple[Tensor, Tensor, Tensor]:
        verdict, numbers, mask = guarded_verdict(*self.room)
        error = torch.tensor([self.error], dtype=torch.int32, device=DEVICE)
        plan = JudgePlan(self.drafts, self.staged, self.state, error, max_drafts=4, **BITS)
        judge(plan, self.sampled_ids, self.draft_ids, self.num_sampled, self.num_rejected, verdict)
        assert_guard(numbers, mask)
        first = verdict.mask.clone(), verdict.numbers.clone(), error.clone()
        # Once more, for what a plan keeps from its first launch.
        verdict.mask.fill_(True)
        verdict.numbers.fill_(GUARD)
        judge(plan, self.sampled_ids, self.draft_ids, self.num_sampled, self.num_rejected, verdict)
        again = verdict.mask, verdict.numbers, error
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert_guard(numbers, mask)
        return verdict.mask, verdict.numbers, error


def random_sampler(
    seed: int,
    requests: int,
    *,
    most: int = 4,
    dtypes: Sequence[torch.dtype] = (torch.int64,) * 4,
    counted: bool = True,
    spare: int = 0,
) -> Sampler:
    """Ids that often match, strided, with too few ids, columns or counts now and then."""
    rng = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    counts = ints(0, most + 1, requests)
    if requests > 2:
        counts[ints(0, requests, requests // 3)] = 0  # prefill, plain decode
    total = int(counts.sum())
    columns = most + 1 - int(ints(0, 5, 1)) // 4
    draft_ids = ints(0, 3, total + int(ints(0, 4, 1)))
    sampled = ints(0, 3, requests, columns)
    said = ints(0, most + 2, requests)
    starts = counts.cumsum(0) - counts
    for r in range(requests):
        taken = min(int(said[r]) - int(ints(0, 8, 1) > 0), int(counts[r]), columns)
        if taken > 0:
            sampled[r, :taken] = draft_ids[starts[r] : starts[r] + taken]
    sampled[torch.arange(columns) >= said[:, None]] = -1 if not counted else 2**31 - 1
    max_requests = requests + spare
    drafts = torch.zeros(max_requests, dtype=torch.int32)
    drafts[:requests] = counts
    layers = int(ints(1, 400, 1))
    state = torch.stack([torch.full((layers,), total), torch.zeros(layers).long()], 1)
    given = (sampled, draft_ids, said, ints(0, 5, requests))
    strided = [
        torch.stack([t, t], t.dim()).to(dtype).to(DEVICE).flatten(t.dim() - 1)[..., ::2]
        for t, dtype in zip(given, dtypes, strict=True)
    ]
    return Sampler(
        strided[0],
        strided[1],
        strided[2] if counted else None,
        strided[3] if counted and seed % 3 else None,
        drafts.to(DEVICE),
        drafts.clone().to(DEVICE),
        state.to(torch.int32).to(DEVICE),
        (max_requests, draft_ids.shape[0] + spare * most),
    )


def assert_judged_alike(sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
    want, got = sampler.run(scv.judge), sampler.run(scv_kernels.judge)
    for index, (left, right) in enumerate(zip(want, got, strict=True)):
        assert torch.equal(left, right), index
    return got


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("requests", [1, 5, 64, 65, 200])
@pytest.mark.parametrize("spare", [0, 70])
def test_the_judge_does_what_the_specification_says(
    requests: int, counted: bool, spare: int
) -> None:
    seen = set()
    for seed in range(4):
        found = assert_judged_alike(random_sampler(seed, requests, counted=counted, spare=spare))
        seen.add(int(found[2]))
        assert spare == 0 or not found[1][:, requests:].any()
    assert seen <= {0, ID_MISMATCH}


@pytest.mark.parametrize("place", range(4))
def test_the_judge_takes_int32_for_any_of_its_inputs(place: int) -> None:
    dtypes = [torch.int64] * 4
    dtypes[place] = torch.int32
    for seed in range(1, 3):
        assert_judged_alike(random_sampler(seed, 9, dtypes=dtypes))
    assert_judged_alike(random_sampler(7, 9, dtypes=(torch.int32,) * 4))


def test_int64_ids_are_compared_whole() -> None:
    """Two ids that agree in their lower halves, and one that is negative in its upper half only."""
    sampler = random_sampler(1, 2, counted=False)
    big = 2**32
    sampler = replace(
        sampler,
        sampled_ids=torch.tensor([[5 + big, 7, 1], [5, -big, 1]], device=DEVICE),
        draft_ids=torch.tensor([5, 7, 5, 0], device=DEVICE),
        drafts=torch.tensor([2, 2], dtype=torch.int32, device=DEVICE),
        room=(2, 4),
    )
    _, numbers, _ = assert_judged_alike(sampler)
    assert numbers[0].tolist() == [0, 0]
    assert numbers[1].tolist() == [3, 1]


def test_spans_longer_than_a_pass_of_the_judge() -> None:
    for counted in (False, True):
        assert_judged_alike(random_sampler(3, 70, most=48, counted=counted))


def test_more_than_a_thousand_requests_and_hundreds_of_layers() -> None:
    _, numbers, error = assert_judged_alike(random_sampler(2, 1100, most=2, spare=50))
    assert int(numbers[0].sum()) > 100
    assert int(error) in (0, ID_MISMATCH)


def test_a_draft_without_an_id_is_a_mismatch() -> None:
    sampler = random_sampler(5, 6)
    total = int(sampler.drafts.sum())
    assert total > 0
    for length in (total - 1, 0):
        short = replace(sampler, draft_ids=sampler.draft_ids[:length], room=(6, total))
        assert int(assert_judged_alike(short)[2]) == ID_MISMATCH


def test_no_columns_accept_nothing() -> None:
    sampler = random_sampler(5, 6, counted=False)
    sampler.sampled_ids = sampler.sampled_ids[:, :0]
    _, numbers, error = assert_judged_alike(sampler)
    assert not numbers.any()
    assert int(error) == 0


@pytest.mark.parametrize("layer", [0, 255, 256, 299])
@pytest.mark.parametrize(("column", "bit"), [(0, COUNT_MISMATCH), (1, OVERFLOW)])
def test_a_layer_out_of_step_raises_its_bit_and_clears_no_other(
    layer: int, column: int, bit: int
) -> None:
    sampler = random_sampler(5, 3)
    total = int(sampler.staged.sum())
    sampler.state = torch.tensor([[total, 0]] * 300, dtype=torch.int32, device=DEVICE)
    clean = int(assert_judged_alike(sampler)[2])
    sampler.state[layer, column] += 1
    sampler.error = EARLY_WRITE
    assert int(assert_judged_alike(sampler)[2]) == clean | EARLY_WRITE | bit


def test_layers_that_stage_too_much_and_too_little_do_not_cancel() -> None:
    sampler = random_sampler(5, 3)
    total = int(sampler.staged.sum())
    sampler.state = torch.tensor([[total - 1, 1], [total + 1, 0]], dtype=torch.int32, device=DEVICE)
    assert int(assert_judged_alike(sampler)[2]) & ~ID_MISMATCH == COUNT_MISMATCH | OVERFLOW


# The commit ----------------------------------------------------------------------------------


@dataclass
class Case:
    """Layers with staging, and what one commit of them is given."""

    plan: CommitPlan
    memory: list[Tensor]
    slots: Tensor
    rows: Tensor | None
    mask: Tensor
    error: Tensor
    num_drafts: Tensor
    verdict: Verdict
    guards: tuple[Tensor, Tensor]
    counters: Tensor
    row_map: Tensor
    open_drafts: Tensor

    def closing(self) -> Closing:
        return Closing(self.verdict, self.row_map, self.open_drafts)

    def run(self, commit_batch: Any, *, count: bool, close: bool) -> list[Tensor]:
        commit_batch(
            self.plan, self.slots, self.rows, self.mask, self.error, self.num_drafts,
            self.verdict.accepted, self.counters if count else None, 5,
            self.closing() if close else None,
        )  # fmt: skip
        assert_guard(*self.guards)
        return [
            *self.memory, self.mask, self.verdict.numbers, self.counters, self.row_map,
            self.open_drafts, self.error, self.num_drafts,
        ]  # fmt: skip


def make_cache(
    layout: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """K and V of one of `LAYOUTS`, or packed in rows that follow each other by one stride."""
    if layout != "packed rows":
        return empty_cache(layout, *shape, dtype, DEVICE)
    _, both = empty_cache("NHD", *shape[:3], 2 * shape[3], dtype, DEVICE)
    return both[..., : shape[3]], both[..., shape[3] :]


def make_case(
    seed: int,
    requests: int,
    *,
    layout: str = "NHD",
    dtype: torch.dtype = torch.float16,
    tail: bool = False,
    placed: bool = False,
    error: int = 0,
    layers: int = 3,
    direct: bool = False,
) -> Case:
    """`tail`: staging is the last blocks of the caches. `direct`: no draft may move."""
    rng = torch.Generator().manual_seed(seed)

    def ints(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=rng)

    heads, size, block_size = 2, 24, 4
    counts = ints(0, 5, requests)
    drafts = int(counts.sum()) + 3
    spare = -(-2 * drafts // block_size)
    blocks = drafts + 2
    total = blocks + (spare if tail else 0)
    caches = [make_cache(layout, (total, block_size, heads, size), dtype) for _ in range(layers)]
    keys, values = [k for k, _ in caches], [v for _, v in caches]
    memory = [*keys, *values]
    if tail:
        staged = [[cache[blocks:].flatten(0, 1) for cache in some] for some in (keys, values)]
        assert staged[0][0].data_ptr() == keys[0][blocks:].data_ptr()
    else:
        shape = (layers, spare * block_size, heads, size)
        staged_key = torch.zeros(shape, dtype=dtype, device=DEVICE)
        # Rows of V are further apart than those of K.
        apart = torch.zeros(layers, shape[1], 2 * heads, size, dtype=dtype, device=DEVICE)
        memory += [staged_key, apart]
        staged = [[*staged_key], [rows[:, :heads] for rows in apart]]
    for rows in (*staged[0], *staged[1]):
        rows.copy_(torch.randn(rows.shape, generator=rng).to(dtype).to(DEVICE))
    lists = (keys, values, staged[0], staged[1])
    slots = torch.randperm(blocks * block_size, generator=rng)[: drafts + 1] - 1
    slots[-2] = blocks * block_size * 9  # outside the cache
    rows = torch.randperm(spare * block_size, generator=rng)[:drafts].to(torch.int32)
    rows[0], rows[-1] = -1, 2**30  # no such staging rows
    verdict, numbers, guarded = guarded_verdict(requests + 2, drafts)
    verdict.mask.copy_(torch.rand(drafts, generator=rng) < 0.6)
    accepted = torch.minimum(counts, ints(0, 5, requests))
    verdict.numbers.zero_()
    verdict.accepted[:requests] = accepted.to(torch.int32).to(DEVICE)
    verdict.num_sampled[:requests] = ints(0, 7, requests).to(torch.int32).to(DEVICE)
    verdict.num_rejected[:requests] = ints(0, 4, requests).to(torch.int32).to(DEVICE)
    num_drafts = torch.zeros(requests + 5, dtype=torch.int32)
    num_drafts[:requests] = counts
    return Case(
        plan=CommitPlan(*lists, ops.cache_table(*lists)),
        memory=memory,
        slots=slots.to(DEVICE),
        rows=rows.to(DEVICE) if placed else None,
        mask=verdict.mask[:0] if direct else verdict.mask,
        error=torch.tensor([error], dtype=torch.int32, device=DEVICE),
        num_drafts=num_drafts.to(DEVICE),
        verdict=verdict,
        guards=(numbers, guarded),
        counters=ints(0, 99, counter_size(4)).to(DEVICE),
        row_map=ints(-9, 9, 3000).to(torch.int32).to(DEVICE),
        open_drafts=num_drafts.clone().to(DEVICE),
    )


def assert_committed_alike(
    seed: int, requests: int, *, count: bool = True, close: bool = True, **options: Any
) -> Case:
    want, got = (make_case(seed, requests, **options) for _ in range(2))
    expected = want.run(commit.commit_batch, count=count, close=close)
    found = got.run(commit_kernels.commit_batch, count=count, close=close)
    for index, (left, right) in enumerate(zip(expected, found, strict=True)):
        assert same_bits(left, right) if left.is_floating_point() else torch.equal(left, right), (
            index
        )
    return got


@pytest.mark.parametrize("error", [0, 4])
@pytest.mark.parametrize("placed", [False, True])
@pytest.mark.parametrize("requests", [1, 6, 70])
def test_the_commit_does_what_the_specification_says(
    requests: int, placed: bool, error: int
) -> None:
    assert_committed_alike(requests, requests, placed=placed, error=error)


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("close", [False, True])
def test_a_commit_that_counts_or_closes_or_neither(count: bool, close: bool) -> None:
    for error in (0, 1):
        case = assert_committed_alike(3, 9, count=count, close=close, error=error)
        assert case.row_map.eq(-1).all() == close
        assert bool(case.open_drafts.any()) != close


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_commit_of_every_layout(layout: str, dtype: torch.dtype) -> None:
    assert_committed_alike(1, 5, layout=layout, dtype=dtype, placed=True)


@pytest.mark.parametrize("error", [0, 1])
@pytest.mark.parametrize("layout", ["NHD", "packed rows"])
def test_staging_in_the_last_blocks_of_the_caches(layout: str, error: int) -> None:
    before = make_case(4, 8, layout=layout, tail=True, placed=True)
    case = assert_committed_alike(4, 8, layout=layout, tail=True, placed=True, error=error)
    staged = (*case.plan.staged_keys, *case.plan.staged_values)
    earlier = (*before.plan.staged_keys, *before.plan.staged_values)
    assert all(same_bits(a, b) for a, b in zip(staged, earlier, strict=True))
    moved = [not same_bits(a, b) for a, b in zip(case.memory, before.memory, strict=True)]
    assert moved == [error == 0] * len(moved)


def test_without_rows_to_move_the_window_is_closed_all_the_same() -> None:
    for error in (0, 1):
        case = assert_committed_alike(2, 6, count=False, direct=True, error=error)
        assert case.row_map.eq(-1).all()
        assert bool(case.verdict.mask.any()) == (error == 0)


def test_more_than_a_thousand_requests() -> None:
    assert_committed_alike(5, 1100, layers=1, placed=True)


def test_an_error_leaves_each_request_its_first_token() -> None:
    """A prefill that goes on has sampled none, and keeps none."""
    case = make_case(6, 4, error=2)
    said, refused = (n[:4].clone() for n in (case.verdict.num_sampled, case.verdict.num_rejected))
    case.run(commit_kernels.commit_batch, count=True, close=True)
    assert not case.verdict.accepted.any()
    assert not case.verdict.mask.any()
    kept = said.clamp(max=1)
    assert torch.equal(case.verdict.num_sampled[:4], kept)
    assert torch.equal(case.verdict.num_rejected[:4], refused + said - kept)


# Whole windows -------------------------------------------------------------------------------


def window_outcome(implementation: Any, tail: bool, given: bool, skip: Sequence[int]) -> list[Any]:
    def outcome(r: Rig) -> list[Any]:
        found: list[Any] = []
        for accepted in (SOME, ALL, NONE):
            sampling = r.sampling(accepted)
            assert sampling.num_sampled is not None
            counts = (sampling.num_sampled, torch.full_like(sampling.num_sampled, 2))
            r.begin()
            r.forward(skip=skip)
            result = r.window.commit(
                sampling.sampled_ids, r.batch.draft_ids, *(counts if given else ())
            )
            kept = (result.num_sampled, result.num_rejected)
            found += [
                result.accepted.tolist(), result.mask.tolist(), result.error.tolist(),
                [None if n is None else n.tolist() for n in kept],
                r.window.metrics(), [layer.cache.dump() for layer in r.layers],
                r.window.tensors.routing.row_map.tolist(),
                r.window.tensors.routing.num_drafts.tolist(),
            ]  # fmt: skip
        return found

    with ops.implementation(implementation), rig(
        geometries=(Geometry(), Geometry(head_size=16)), tail=tail
    ) as r:  # fmt: skip
        return outcome(r)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests/gpu compares windows on a GPU")
@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("skip", [(), (3,)])
def test_windows_with_kernels_are_windows_without(
    tail: bool, given: bool, skip: tuple[int, ...]
) -> None:
    want = window_outcome("reference", tail, given, skip)
    got = window_outcome("triton", tail, given, skip)
    for left, right in zip(want, got, strict=True):
        if isinstance(left, list) and left and isinstance(left[0], tuple):
            assert all(
                same_bits(a, b)
                for mine, theirs in zip(left, right, strict=True)
                for a, b in zip(mine, theirs, strict=True)
            )
        else:
            assert left == right
