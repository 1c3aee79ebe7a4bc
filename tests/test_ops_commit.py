"""`commit_kv`: accepted rows of every layer to their slots, all or nothing, counted once."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import (
    FORMATS,
    LAYOUTS,
    Batch,
    Geometry,
    Span,
    Step,
    commit_arguments,
    make_batch,
    make_step,
    same_bits,
    stage_arguments,
)
from torch import Tensor

from nwor_compile import ops
from nwor_compile.ops import COUNTERS, counter_size

SPANS = [Span(5, 1, 3), Span(0, 7), Span(0, 0), Span(2, 1, 5), Span(9, 1)]
MASK = [True, True, False, True, False, False, False, False]
ACCEPTED = [2, 0, 0, 1, 0]
MAX_DRAFTS = 6


def staged_step(batch: Batch, layers: int = 2) -> tuple[Step, list[oracle.Rows], list[oracle.Rows]]:
    """A step whose rows are staged by the op, and what the oracle holds: caches and staging."""
    step = make_step(batch, layers)
    caches, stagings = [], []
    for layer in step.layers:
        rows, staging = layer.cache.rows(), oracle.Rows()
        oracle.stage(
            rows, staging, step.capacity, layer.key, layer.value, batch.slot_mapping.tolist(),
            batch.row_map.tolist(), *layer.format,
        )  # fmt: skip
        ops.stage_kv(**stage_arguments(layer, batch))
        caches.append(rows)
        stagings.append(staging)
    return step, caches, stagings


def read(counters: Tensor) -> dict[str, int]:
    return {name: int(counters[place]) for name, place in COUNTERS.items()}


def tensors(mask: list[bool], accepted: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(mask, dtype=torch.bool), torch.tensor(accepted, dtype=torch.int32)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accepted_rows_reach_their_slots_in_every_layer_and_rejected_rows_never(
    layout: str, form: tuple[torch.dtype, str, bool]
) -> None:
    dtype, name, as_uint8 = form
    batch = make_batch(SPANS, Geometry(layout, dtype, name, as_uint8))
    step, caches, stagings = staged_step(batch, layers=3)
    ops.commit_kv(**commit_arguments(step, *tensors(MASK, ACCEPTED)))
    for layer, rows, staging in zip(step.layers, caches, stagings, strict=True):
        rejected = [s for s, m in zip(batch.draft_slots.tolist(), MASK, strict=True) if not m]
        stale = {slot: rows[slot] for slot in rejected}
        oracle.commit(rows, staging, batch.draft_slots.tolist(), MASK, error=False)
        assert all(rows[slot] is stale[slot] for slot in rejected)
        assert layer.cache.holds(rows)


@pytest.mark.parametrize("mask", [[True] * 8, [False] * 8], ids=["all", "none"])
def test_all_and_nothing_accepted(mask: list[bool]) -> None:
    batch = make_batch(SPANS)
    step, caches, stagings = staged_step(batch)
    ops.commit_kv(**commit_arguments(step, *tensors(mask, [3 * mask[0], 0, 0, 5 * mask[0], 0])))
    for layer, rows, staging in zip(step.layers, caches, stagings, strict=True):
        oracle.commit(rows, staging, batch.draft_slots.tolist(), mask, error=False)
        assert layer.cache.holds(rows)


@pytest.mark.parametrize("error", [1, 2, -1, 2**31 - 1])
def test_an_error_moves_no_row_of_any_layer_and_rejects_all_drafts(error: int) -> None:
    batch = make_batch(SPANS)
    step, caches, _ = staged_step(batch)
    counters = torch.zeros(counter_size(MAX_DRAFTS), dtype=torch.int64)
    ops.commit_kv(**commit_arguments(step, *tensors([True] * 8, [3, 0, 0, 5, 0]), error, counters))
    for layer, rows in zip(step.layers, caches, strict=True):
        assert layer.cache.holds(rows)
    got = read(counters)
    assert (got["staged"], got["committed"], got["rejected"], got["errors"]) == (8, 0, 8, 1)
    assert counters[8 + MAX_DRAFTS :].tolist() == [0] * MAX_DRAFTS


def test_a_masked_row_without_a_slot_is_skipped() -> None:
    batch = make_batch([Span(5, 1, 3)])
    step, caches, stagings = staged_step(batch)
    slots = batch.draft_slots.clone()
    slots[0], slots[1] = -1, step.layers[0].cache.slots
    arguments = commit_arguments(step, *tensors([True] * 3, [3])) | {"slots": slots}
    ops.commit_kv(**arguments)
    for layer, rows, staging in zip(step.layers, caches, stagings, strict=True):
        oracle.commit(rows, staging, slots.tolist(), [True] * 3, error=False)
        assert layer.cache.holds(rows)


def test_slots_may_be_a_longer_persistent_buffer() -> None:
    batch = make_batch([Span(5, 1, 3)])
    step, caches, stagings = staged_step(batch)
    slots = torch.cat([batch.draft_slots, torch.zeros(9, dtype=torch.int64)])
    ops.commit_kv(**commit_arguments(step, *tensors([True] * 3, [3])) | {"slots": slots})
    for layer, rows, staging in zip(step.layers, caches, stagings, strict=True):
        oracle.commit(rows, staging, slots.tolist(), [True] * 3, error=False)
        assert layer.cache.holds(rows)


def test_rows_land_by_their_slot_whatever_the_order() -> None:
    batch = make_batch([Span(5, 1, 5)])
    step, caches, stagings = staged_step(batch)
    slots = batch.draft_slots[torch.tensor([3, 0, 4, 1, 2])]
    mask = [True, False, True, True, False]
    ops.commit_kv(**commit_arguments(step, *tensors(mask, [3])) | {"slots": slots})
    for layer, rows, staging in zip(step.layers, caches, stagings, strict=True):
        oracle.commit(rows, staging, slots.tolist(), mask, error=False)
        assert layer.cache.holds(rows)


def test_unstaged_rows_of_the_buffer_never_reach_the_cache() -> None:
    """They hold NaN here; a commit that reads beyond its mask would spread it."""
    batch = make_batch(SPANS)
    step, _, _ = staged_step(batch)
    ops.commit_kv(**commit_arguments(step, *tensors([True] * 8, [3, 0, 0, 5, 0])))
    for layer in step.layers:
        key, value = layer.cache.dump()
        assert not key.isnan().any()
        assert not value.isnan().any()


def test_the_staging_buffers_and_inputs_are_left_alone() -> None:
    batch = make_batch(SPANS)
    step, _, _ = staged_step(batch)
    arguments = commit_arguments(step, *tensors(MASK, ACCEPTED))
    names = ("slots", "mask", "error", "num_drafts", "accepted")
    read = [arguments[name] for name in names]
    read += [*arguments["staged_keys"], *arguments["staged_values"]]
    before = [tensor.clone() for tensor in read]
    ops.commit_kv(**arguments)
    assert all(same_bits(now, then) for now, then in zip(read, before, strict=True))


def test_an_empty_mask_commits_nothing() -> None:
    batch = make_batch([Span(5, 1), Span(0, 3)])
    step, caches, _ = staged_step(batch)
    counters = torch.zeros(counter_size(2), dtype=torch.int64)
    ops.commit_kv(**commit_arguments(step, *tensors([], [0, 0]), 0, counters))
    for layer, rows in zip(step.layers, caches, strict=True):
        assert layer.cache.holds(rows)
    assert not counters.any()  # no drafts: not a window


def test_two_groups_of_different_geometry_count_their_rows_once() -> None:
    """A call each; only the first is given the counters."""
    counters = torch.zeros(counter_size(4), dtype=torch.int64)
    for index, geometry in enumerate((Geometry(), Geometry(kv_heads=1, heads=1, head_size=16))):
        batch = make_batch([Span(5, 1, 4)], geometry)
        step, caches, stagings = staged_step(batch)
        ops.commit_kv(
            **commit_arguments(
                step, *tensors([True, True, False, False], [2]), 0, None if index else counters
            )
        )
        for layer, rows, staging in zip(step.layers, caches, stagings, strict=True):
            oracle.commit(rows, staging, batch.draft_slots.tolist(), [True, True], error=False)
            assert layer.cache.holds(rows)
    got = read(counters)
    assert (got["windows"], got["staged"], got["committed"], got["rejected"]) == (1, 4, 2, 2)


@pytest.mark.parametrize("error", [0, 1])
def test_counters_agree_with_a_loop_over_requests(error: int) -> None:
    batch = make_batch(SPANS)
    step, _, _ = staged_step(batch)
    counters = torch.zeros(counter_size(MAX_DRAFTS), dtype=torch.int64)
    total: dict[str, int] = dict.fromkeys(COUNTERS, 0)
    for mask, accepted in ((MASK, ACCEPTED), ([False] * 8, [0] * 5)):
        ops.commit_kv(**commit_arguments(step, *tensors(mask, accepted), error, counters))
        want = oracle.count([3, 0, 0, 5, 0], accepted, bool(error), 2, MAX_DRAFTS)
        for name in total:
            amount = want[name]
            assert isinstance(amount, int)
            total[name] += amount
    assert read(counters) == total
    assert counters[8 : 8 + MAX_DRAFTS].tolist() == [4, 4, 4, 2, 2, 0]
    accepted_at = [0] * 6 if error else [2, 1, 0, 0, 0, 0]
    assert counters[8 + MAX_DRAFTS :].tolist() == accepted_at


def test_8_drafts_count_as_8_not_4096() -> None:
    """Old failure: every thread of a block incremented; 8 rows x 8 heads x 64 elements = 4096."""
    geometry = Geometry(kv_heads=8, heads=8, head_size=64)
    batch = make_batch([Span(3, 1, 4), Span(5, 1, 4)], geometry)
    step, _, _ = staged_step(batch)
    counters = torch.zeros(counter_size(4), dtype=torch.int64)
    mask = [True] * 4 + [False] * 4
    ops.commit_kv(**commit_arguments(step, *tensors(mask, [4, 0]), 0, counters))
    got = read(counters)
    assert (got["staged"], got["committed"], got["rejected"]) == (8, 4, 4)


def test_1920_drafts_of_4_layers_count_as_1920_not_7680() -> None:
    """Old failure: unique rows were multiplied by the layers. Only stage_operations is."""
    geometry = Geometry(kv_heads=1, heads=1, head_size=4)
    batch = make_batch([Span(1, 1, 48)] * 40, geometry)
    step = make_step(batch, layers=4)
    for layer in step.layers:
        ops.stage_kv(**stage_arguments(layer, batch))
        assert layer.state.tolist() == [1920, 0]
    counters = torch.zeros(counter_size(48), dtype=torch.int64)
    accepted = [r % 49 for r in range(40)]
    mask = [j < taken for taken in accepted for j in range(48)]
    ops.commit_kv(**commit_arguments(step, *tensors(mask, accepted), 0, counters))
    got = read(counters)
    assert got["staged"] == 1920
    assert (got["committed"], got["rejected"]) == (780, 1140)
    assert got["stage_operations"] == 7680
    assert counters[8 : 8 + 48].tolist() == [40] * 48
    assert counters[8 + 48 :].tolist() == [sum(a > k for a in accepted) for k in range(48)]


def test_counters_add_up_over_windows() -> None:
    batch = make_batch([Span(5, 1, 3)])
    step, _, _ = staged_step(batch)
    counters = torch.zeros(counter_size(3), dtype=torch.int64)
    for taken in (0, 1, 2, 3, 3):
        mask = [j < taken for j in range(3)]
        ops.commit_kv(**commit_arguments(step, *tensors(mask, [taken]), 0, counters))
    got = read(counters)
    assert (got["windows"], got["staged"], got["committed"], got["rejected"]) == (5, 15, 9, 6)
    assert counters[8:].tolist() == [5, 5, 5, 4, 3, 2]


def test_a_count_above_the_counted_positions_loses_no_row() -> None:
    """Positions past the counters' length are not tracked, totals are."""
    batch = make_batch([Span(5, 1, 5)])
    step, _, _ = staged_step(batch)
    counters = torch.zeros(counter_size(2), dtype=torch.int64)
    ops.commit_kv(**commit_arguments(step, *tensors([True] * 5, [5]), 0, counters))
    assert read(counters)["committed"] == 5
    assert counters[8:].tolist() == [1, 1, 1, 1]


def test_the_address_table_lists_caches_then_staging_keys_before_values() -> None:
    batch = make_batch([Span(5, 1, 3)], Geometry(layout="packed"))
    step = make_step(batch, layers=2)
    lists = (
        step.key_caches(),
        step.value_caches(),
        [layer.staged_key for layer in step.layers],
        [layer.staged_value for layer in step.layers],
    )
    table = ops.cache_table(*lists)
    assert table.dtype == torch.int64
    assert table.tolist() == [[tensor.data_ptr() for tensor in tensors] for tensors in lists]
    assert int(table[1, 0] - table[0, 0]) == 8 * 4  # the value half of a packed row


def test_two_commits_of_the_same_window_leave_the_cache_as_one() -> None:
    batch = make_batch(SPANS)
    step, _, _ = staged_step(batch)
    arguments = commit_arguments(step, *tensors(MASK, ACCEPTED))
    ops.commit_kv(**arguments)
    rows = [layer.cache.rows() for layer in step.layers]
    ops.commit_kv(**arguments)
    assert all(a.cache.holds(b) for a, b in zip(step.layers, rows, strict=True))
