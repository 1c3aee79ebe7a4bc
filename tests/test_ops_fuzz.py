"""Whole steps over random batches: stage, verify, accept, commit, each against the oracle."""

from __future__ import annotations

import oracle
import torch
from cases import (
    Batch,
    Geometry,
    Layer,
    Sampling,
    Span,
    accept_arguments,
    attend_exactly,
    batches,
    commit_arguments,
    commit_exactly,
    geometries,
    make_batch,
    make_step,
    paged_arguments,
    same_bits,
    samplings,
    span_lists,
    stage_arguments,
    stage_exactly,
    verify_arguments,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nwor_compile import ops
from nwor_compile.ops import COUNTERS, counter_size

LAYERS, MAX_DRAFTS = 2, 6

windows = st.sampled_from([0, 0, 1, 4, 100])
softcaps = st.sampled_from([0.0, 0.0, 1.5, 30.0])
seeds = st.integers(0, 2**16)


def stage_and_check(
    layer: Layer, batch: Batch, capacity: int, order: list[int]
) -> tuple[oracle.Rows, oracle.Rows]:
    rows: oracle.Rows = layer.cache.rows()
    staging: oracle.Rows = {}
    staged, overflow = oracle.stage(
        rows, staging, capacity, layer.key, layer.value, batch.slot_mapping.tolist(),
        batch.row_map.tolist(), *layer.format,
    )  # fmt: skip
    ops.stage_kv(**stage_arguments(layer, batch, order))
    assert layer.cache.holds(rows)
    assert layer.state.tolist() == [staged, int(overflow)]
    for row, (key, value) in staging.items():
        assert same_bits(layer.staged_key[row].view(key.dtype), key)
        assert same_bits(layer.staged_value[row].view(value.dtype), value)
    return rows, staging


@given(st.data(), batches(), seeds, windows, softcaps, st.sampled_from([0, 0, 0, 1]))
@settings(max_examples=80)
def test_a_step_agrees_with_the_oracle(
    data: st.DataObject, batch: Batch, seed: int, window: int, softcap: float, fault: int
) -> None:
    step = make_step(batch, LAYERS, seed)
    order = data.draw(st.permutations(range(batch.slot_mapping.shape[0])))
    sampling = data.draw(samplings(batch))
    options = {"sliding_window": window, "softcap": softcap}
    caches, stagings = [], []
    for layer in step.layers:
        rows, staging = stage_and_check(layer, batch, step.capacity, order)
        caches.append(rows)
        stagings.append(staging)
        out = ops.verify_attention(**verify_arguments(layer, batch, **options))
        want_out = attend_exactly(layer, batch, rows, staging, **options)
        assert want_out.units(out) <= oracle.ERROR_UNITS
        assert not out[batch.tokens :].any()

    mask, accepted, mismatch = ops.accept_mask(**accept_arguments(batch, sampling))
    want = oracle.accept(
        sampling.sampled_ids.tolist(),
        batch.draft_ids.tolist(),
        batch.cu_num_drafts.tolist(),
        None if sampling.num_sampled is None else sampling.num_sampled.tolist(),
    )
    assert mask.tolist() == want.mask
    assert accepted.tolist() == want.accepted == list(sampling.accepted)
    assert bool(mismatch) is want.mismatch is False

    counters = torch.zeros(counter_size(MAX_DRAFTS), dtype=torch.int64)
    ops.commit_kv(**commit_arguments(step, mask, accepted, mismatch + fault, counters))
    for layer, rows, staging in zip(step.layers, caches, stagings, strict=True):
        oracle.commit(rows, staging, batch.draft_slots.tolist(), want.mask, bool(fault))
        assert layer.cache.holds(rows)
    drafts = [span.drafts for span in batch.spans]
    total = oracle.count(drafts, want.accepted, bool(fault), LAYERS, MAX_DRAFTS)
    assert {name: int(counters[place]) for name, place in COUNTERS.items()} == {
        name: total[name] for name in COUNTERS
    }
    assert counters[8 : 8 + MAX_DRAFTS].tolist() == total["drafted_at"]
    assert counters[8 + MAX_DRAFTS :].tolist() == total["accepted_at"]


@given(span_lists(), geometries(), seeds, windows, softcaps)
@settings(max_examples=80)
def test_the_tail_from_staging_is_the_tail_from_the_cache_bit_for_bit(
    spans: list[Span], geometry: Geometry, seed: int, window: int, softcap: float
) -> None:
    batch = make_batch(spans, geometry, seed)
    layer = make_step(batch, seed=seed).layers[0]
    _, staging = stage_exactly(layer, batch)
    options = {"sliding_window": window, "softcap": softcap}
    staged = ops.verify_attention(**verify_arguments(layer, batch, **options))
    commit_exactly(layer, batch, staging)
    cached = ops.paged_attention(**paged_arguments(layer, batch, **options))
    assert torch.equal(staged, cached)
    assert same_bits(staged, cached)


@given(batches(), seeds, windows)
def test_poison_outside_the_visible_rows_changes_no_bit(
    batch: Batch, seed: int, window: int
) -> None:
    layer = make_step(batch, seed=seed).layers[0]
    rows, _ = stage_exactly(layer, batch)
    before = ops.verify_attention(**verify_arguments(layer, batch, sliding_window=window))
    seen = {
        slot
        for r, span in enumerate(batch.spans)
        for slot in batch.used_slots(r, 0, span.length - span.drafts)
    }
    layer.cache.poison([slot for slot in rows if slot not in seen])
    after = ops.verify_attention(**verify_arguments(layer, batch, sliding_window=window))
    assert before.isfinite().all()
    assert same_bits(before, after)


@given(batches(), seeds, st.integers(0, 8))
def test_overflow_commits_nothing(batch: Batch, seed: int, capacity: int) -> None:
    """A staging buffer that is too small: the flag, no cache row, and zero drafts accepted."""
    step = make_step(batch, 1, seed, spare_rows=0)
    layer, rows = step.layers[0], step.layers[0].cache.rows()
    small = max(1, min(capacity, step.capacity))
    arguments = stage_arguments(layer, batch) | {
        "staged_key": layer.staged_key[:small],
        "staged_value": layer.staged_value[:small],
    }
    staging: oracle.Rows = {}
    staged, overflow = oracle.stage(
        rows, staging, small, layer.key, layer.value, batch.slot_mapping.tolist(),
        batch.row_map.tolist(), *layer.format,
    )  # fmt: skip
    ops.stage_kv(**arguments)
    assert layer.state.tolist() == [staged, int(batch.drafts > small)] == [staged, int(overflow)]
    assert layer.cache.holds(rows)
    if overflow:
        mask = torch.ones(batch.drafts, dtype=torch.bool)
        ops.commit_kv(**commit_arguments(step, mask, batch.num_drafts, layer.state[1:]))
        assert layer.cache.holds(rows)


ids = st.integers(0, 2)


@st.composite
def random_samplers(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], list[int] | None]:
    """Anything a sampler could hand over, lies included: few ids, so that matches are common."""
    drafts = draw(st.lists(st.lists(ids, max_size=5), min_size=1, max_size=6))
    columns = draw(st.integers(0, 7))
    rows = st.lists(st.integers(-1, 2), min_size=columns, max_size=columns)
    sampled = [draw(rows) for _ in drafts]
    counts = [draw(st.integers(-1, 8)) for _ in drafts]
    return sampled, drafts, draw(st.sampled_from([None, counts]))


@given(random_samplers(), st.sampled_from([torch.int32, torch.int64]), st.integers(0, 3))
@settings(max_examples=300)
def test_acceptance_agrees_with_the_host_loop_for_any_sampler(
    case: tuple[list[list[int]], list[list[int]], list[int] | None], dtype: torch.dtype, extra: int
) -> None:
    sampled, drafts, counts = case
    flat = [token for row in drafts for token in row] + [1] * extra
    ends = torch.tensor([len(row) for row in drafts]).cumsum(0).to(dtype)
    mask, accepted, mismatch = ops.accept_mask(
        torch.tensor(sampled, dtype=dtype).reshape(len(drafts), -1),
        torch.tensor(flat, dtype=dtype),
        ends,
        None if counts is None else torch.tensor(counts, dtype=dtype),
    )
    want = oracle.accept(sampled, flat, ends.tolist(), counts)
    assert (mask.tolist(), accepted.tolist()) == (want.mask, want.accepted)
    assert bool(mismatch) is want.mismatch


@given(st.data(), batches())
def test_garbage_past_the_count_never_influences(data: st.DataObject, batch: Batch) -> None:
    sampling: Sampling = data.draw(samplings(batch))
    if sampling.num_sampled is None:
        return
    clean = ops.accept_mask(**accept_arguments(batch, sampling))
    ids_ = sampling.sampled_ids.clone()
    for r, number in enumerate(sampling.num_sampled.tolist()):
        for column in range(number, ids_.shape[1]):
            ids_[r, column] = data.draw(st.sampled_from([-1, 0, 2**31 - 1, 1000]))
    dirty = ops.accept_mask(**accept_arguments(batch, sampling) | {"sampled_ids": ids_})
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
