"""The begin kernel against `nwor_compile.routing`, its specification; on a GPU if there is one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nwor_compile.ops.counters import COUNTERS
from nwor_compile.ops.error_bits import BAD_COUNTS
from nwor_compile.ops.kernels import begin as kernel
from nwor_compile.routing import BeginPlan, Kept, TailRows, allocate_routing, begin_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_DRAFTS = 4
TAIL = TailRows(block_size=16, rows=32)


@dataclass(frozen=True)
class Case:
    """Counts, starts, slot mappings, lengths and ids of a step."""

    counts: Tensor | None
    starts: Tensor
    mappings: list[Tensor]
    lengths: Tensor
    ids: Tensor


def step(
    counts: list[int],
    spans: list[int],
    padding: int = 0,
    groups: int = 1,
    slots: bool = True,
    lengths: list[int] | None = None,
) -> Case:
    """A step; each slot group has its own slots."""
    tokens = sum(spans)
    starts = torch.tensor([0, *spans]).cumsum(0).to(torch.int32).to(DEVICE)
    generator = torch.Generator().manual_seed(tokens)
    mappings = []
    for _ in range(groups):
        mapping = torch.full((tokens + padding,), -1, dtype=torch.int64)
        if slots:
            mapping[:tokens] = torch.randperm(10_000, generator=generator)[:tokens]
        mappings.append(mapping.to(DEVICE))
    if lengths is None:
        context = torch.randint(0, 60, (len(spans),), generator=generator)
        lengths = (context + torch.tensor(spans)).tolist()
    return Case(
        torch.tensor(counts, dtype=torch.int32, device=DEVICE), starts, mappings,
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        torch.randint(0, 99, (tokens + padding,), generator=generator).to(DEVICE),
    )  # fmt: skip


def run(
    begin: Any, case: Case, capacity: int, max_requests: int, max_tokens: int, tail: TailRows | None
) -> dict[str, Tensor]:
    """What `begin` makes of a step, in buffers that hold an earlier one."""

    def dirty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, 77, dtype=dtype, device=DEVICE)

    routing = allocate_routing(max_tokens, max_requests, DEVICE)
    routing.num_drafts.fill_(77)
    routing.tail_start.fill_(77)
    counters = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    kept = Kept(
        dirty(max_requests), dirty(1), dirty(300, 2), counters,
        None if tail is None else dirty(capacity), dirty(capacity, dtype=torch.int64),
        dirty(1, dtype=torch.int64),
    )  # fmt: skip
    slots = [dirty(capacity + 1, dtype=torch.int64) for _ in case.mappings]
    staging_rows = capacity if tail is None else max_requests * tail.rows
    plan = BeginPlan(routing, kept, slots, MAX_DRAFTS, capacity, staging_rows, tail)
    lengths = None if tail is None else case.lengths
    begin(plan, case.counts, case.starts, case.mappings, lengths, case.ids)
    assert not kept.state.any()
    assert int(counters.sum()) == int(counters[COUNTERS["certain"]])
    used = int(kept.drafts.sum())
    assert tail is not None or kept.rows is None
    assert kept.draft_ids is not None
    assert kept.epoch is not None
    return {
        "row_map": routing.row_map, "num_drafts": routing.num_drafts, "error": kept.error,
        "drafts": kept.drafts, "certain": counters[COUNTERS["certain"]],
        "tail_start": torch.where(routing.num_drafts > 0, routing.tail_start, 0),
        "rows": torch.arange(used) if kept.rows is None else kept.rows,
        "draft_ids": kept.draft_ids, "epoch": kept.epoch,
        **{f"slots {index}": own for index, own in enumerate(slots)},
    }  # fmt: skip


CASES = {
    "one request": step([4], [5]),
    "spans of all lengths": step([4, 0, 2, 1, 0], [5, 1, 3, 9, 40], padding=7),
    "empty spans": step([0, 3, 0], [0, 4, 0], padding=3),
    "no drafts": step([0, 0], [1, 30]),
    "two groups": step([2, 3], [3, 8], padding=2, groups=2),
    "warm-up without slots": step([4, 4], [5, 5], slots=False),
    "too many drafts": step([5, 1], [6, 2]),
    "no certain token": step([3, 1], [3, 2]),
    "a negative count": step([-1, 2], [4, 3]),
    "more rows than staging": step([4, 4, 4, 4], [5, 5, 5, 5]),
    "more tokens than a block": step([4, 0, 3], [5, 400, 4]),
    "more requests than a lane": step([1] * 70, [2] * 70),
    "first draft at a block's start": step([4, 4], [5, 8], lengths=[20, 36]),
    "first draft at a block's end": step([4, 4], [5, 9], lengths=[19, 35]),
    "shorter than its span": step([4, 2], [5, 3], lengths=[4, 30]),
}


@pytest.mark.parametrize("tail", [None, TAIL], ids=["rows", "tail blocks"])
@pytest.mark.parametrize("name", CASES)
def test_kernel_does_what_the_specification_says(name: str, tail: TailRows | None) -> None:
    case = CASES[name]
    sizes = (12 if name == "more rows than staging" else 400, 100, 600, tail)
    want, have = run(begin_rows, case, *sizes), run(kernel.begin_rows, case, *sizes)
    for what, tensor in want.items():
        torch.testing.assert_close(have[what].cpu(), tensor.cpu(), check_dtype=False, msg=what)


def test_more_requests_than_the_widest_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "_LANES", (4, 8))
    case = step([1, 0] * 20, [2, 1] * 20)
    sizes = (24, 42, 62, None)
    want, have = run(begin_rows, case, *sizes), run(kernel.begin_rows, case, *sizes)
    for what, tensor in want.items():
        torch.testing.assert_close(have[what].cpu(), tensor.cpu(), check_dtype=False, msg=what)


def test_int64_counts_and_strided_inputs() -> None:
    case = CASES["spans of all lengths"]
    assert case.counts is not None
    wide = torch.stack((case.counts, case.counts), 1).long()[:, 1]
    longer = torch.stack((case.starts, case.starts), 1).long()[:, 0]
    other = Case(
        wide, longer, [m.to(torch.int32) for m in case.mappings],
        torch.stack((case.lengths, case.lengths), 1).long()[:, 1], case.ids.to(torch.int32),
    )  # fmt: skip
    want = run(kernel.begin_rows, case, 400, 100, 600, TAIL)
    have = run(kernel.begin_rows, other, 400, 100, 600, TAIL)
    for what, tensor in want.items():
        torch.testing.assert_close(have[what], tensor, msg=what)


@pytest.mark.parametrize("tail", [None, TAIL], ids=["rows", "tail blocks"])
def test_logit_starts_say_what_counts_say(tail: TailRows | None) -> None:
    case = CASES["spans of all lengths"]
    assert case.counts is not None
    starts = torch.cat([case.counts.new_zeros(1), (case.counts + 1).cumsum(0)]).to(torch.int32)
    other = replace(case, counts=starts)
    want = run(begin_rows, case, 400, 100, 600, tail)
    for begin in (begin_rows, kernel.begin_rows):
        have = run(begin, other, 400, 100, 600, tail)
        for what, tensor in want.items():
            torch.testing.assert_close(have[what], tensor, check_dtype=False, msg=what)


@pytest.mark.parametrize("tail", [None, TAIL], ids=["rows", "tail blocks"])
@pytest.mark.parametrize("name", CASES)
def test_spans_say_what_counts_of_all_but_one_say(name: str, tail: TailRows | None) -> None:
    case = CASES[name]
    spans = case.starts.diff()
    counted = replace(case, counts=torch.where(spans == 0, 0, spans - 1))
    sizes = 12 if name == "more rows than staging" else 900, 100, 600, tail
    want = run(begin_rows, counted, *sizes)
    for begin in (begin_rows, kernel.begin_rows):
        have = run(begin, replace(case, counts=None), *sizes)
        for what, tensor in want.items():
            torch.testing.assert_close(have[what].cpu(), tensor.cpu(), check_dtype=False, msg=what)


def test_a_span_that_runs_backwards_raises_the_flag() -> None:
    case = step([4, 2, 1], [5, 3, 2])
    case.starts[1] = 9  # requests 0 and 2 overlap: whose tokens those are, nobody can say
    for begin in (begin_rows, kernel.begin_rows):
        have = run(begin, replace(case, counts=None), 400, 100, 600, TAIL)
        assert int(have["error"]) == BAD_COUNTS
        assert not have["num_drafts"].any()
        assert not have["drafts"].any()


def test_tail_rows_have_the_place_in_the_block_that_the_cache_will_give_them() -> None:
    # 38 tokens, 4 of them drafts: the first draft is row 34 % 16 = 2 of its block, and the span's
    # certain tokens 31 to 33 end in it.
    case = step([0, 4], [3, 7], lengths=[3, 38])
    routed = run(begin_rows, case, 400, 2, 10, TAIL)
    first = 1 * TAIL.rows + 2
    assert routed["rows"][:4].tolist() == [first, first + 1, first + 2, first + 3]
    assert routed["row_map"].tolist() == [
        -1, -1, -1, -1, -(first - 2) - 2, -(first - 1) - 2, first, first + 1, first + 2, first + 3,
    ]  # fmt: skip
    assert routed["tail_start"].tolist() == [0, first]
