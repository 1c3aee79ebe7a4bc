"""The begin kernel against `nwor_compile.routing`, its specification; on a GPU if there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from nwor_compile.ops.counters import COUNTERS
from nwor_compile.ops.kernels.begin import begin_rows
from nwor_compile.routing import BAD_COUNTS, OVERFLOW, allocate_routing, route, snapshot_slots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_DRAFTS = 4


def expected(case: Any, capacity: int, max_requests: int, max_tokens: int) -> dict[str, Tensor]:
    """What the specification makes of a step."""
    counts, starts, mappings = case
    routing = allocate_routing(max_tokens, max_requests, DEVICE)
    has_slots = torch.stack([(mapping >= 0).any() for mapping in mappings]).any()
    bits = route(
        routing, counts, starts, has_slots=has_slots, max_drafts=MAX_DRAFTS, capacity=capacity
    )
    kept = [torch.full((capacity + 1,), 77, dtype=torch.int64, device=DEVICE) for _ in mappings]
    for slots, mapping in zip(kept, mappings, strict=True):
        snapshot_slots(slots, routing.row_map, mapping)
    tokens = mappings[0].shape[0]
    certain = ((mappings[0] >= 0) & (routing.row_map[:tokens] < 0)).sum()
    return {
        "row_map": routing.row_map, "num_drafts": routing.num_drafts, "error": bits,
        "tail_start": routing.tail_start, "drafts": routing.num_drafts, "certain": certain,
        **{f"slots {index}": slots for index, slots in enumerate(kept)},
    }  # fmt: skip


def got(case: Any, capacity: int, max_requests: int, max_tokens: int) -> dict[str, Tensor]:
    """What the kernel makes of it, in buffers that hold an earlier step."""
    counts, starts, mappings = case

    def dirty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, 77, dtype=dtype, device=DEVICE)

    routing = allocate_routing(max_tokens, max_requests, DEVICE)
    drafts, tails, error = dirty(max_requests), dirty(max_requests), dirty(1)
    kept = [dirty(capacity + 1, dtype=torch.int64) for _ in mappings]
    state, counters = dirty(300, 2), torch.zeros(32, dtype=torch.int64, device=DEVICE)
    begin_rows(
        counts, starts, mappings, routing.row_map, routing.num_drafts, tails, drafts, error, state,
        counters, kept, max_drafts=MAX_DRAFTS, capacity=capacity, bad_counts=BAD_COUNTS,
        overflow=OVERFLOW,
    )  # fmt: skip
    assert not state.any()
    assert int(counters.sum()) == int(counters[COUNTERS["certain"]])
    return {
        "row_map": routing.row_map, "num_drafts": routing.num_drafts, "error": error,
        "tail_start": tails, "drafts": drafts, "certain": counters[COUNTERS["certain"]],
        **{f"slots {index}": slots for index, slots in enumerate(kept)},
    }  # fmt: skip


def step(
    counts: list[int], spans: list[int], padding: int = 0, groups: int = 1, slots: bool = True
) -> Any:
    """Counts, starts and slot mappings of a step; each slot group has its own slots."""
    tokens = sum(spans)
    starts = torch.tensor([0, *spans]).cumsum(0).to(torch.int32).to(DEVICE)
    generator = torch.Generator().manual_seed(tokens)
    mappings = []
    for _ in range(groups):
        mapping = torch.full((tokens + padding,), -1, dtype=torch.int64)
        if slots:
            mapping[:tokens] = torch.randperm(10_000, generator=generator)[:tokens]
        mappings.append(mapping.to(DEVICE))
    return torch.tensor(counts, dtype=torch.int32, device=DEVICE), starts, mappings


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
}


@pytest.mark.parametrize("name", CASES)
def test_kernel_does_what_the_specification_says(name: str) -> None:
    case = CASES[name]
    capacity = 12 if name == "more rows than staging" else 400
    sizes = (capacity, 100, 600)
    want, have = expected(case, *sizes), got(case, *sizes)
    for what, tensor in want.items():
        torch.testing.assert_close(have[what].cpu(), tensor.cpu(), check_dtype=False, msg=what)


def test_more_requests_than_the_widest_lane() -> None:
    case = step([1, 0] * 2050, [2, 1] * 2050)
    want, have = expected(case, 2100, 4200, 6200), got(case, 2100, 4200, 6200)
    for what, tensor in want.items():
        torch.testing.assert_close(have[what].cpu(), tensor.cpu(), check_dtype=False, msg=what)


def test_int64_counts_and_strided_inputs() -> None:
    counts, starts, mappings = CASES["spans of all lengths"]
    wide = torch.stack((counts, counts), 1).long()[:, 1]
    longer = torch.stack((starts, starts), 1).long()[:, 0]
    want = got((counts, starts, mappings), 400, 100, 600)
    have = got((wide, longer, [m.to(torch.int32) for m in mappings]), 400, 100, 600)
    for what, tensor in want.items():
        torch.testing.assert_close(have[what], tensor, msg=what)
