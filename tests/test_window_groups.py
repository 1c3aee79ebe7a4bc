"""Layers of several geometries, and several slot mappings, in one window."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Geometry, Span, write_arguments
from torch import Tensor
from window_support import ALL, NONE, SOME, Rig, rig

from nwor_compile import WindowInputError
from nwor_compile.groups import staging_bytes
from nwor_compile.ops import stage_kv_window
from nwor_compile.ops.error_bits import COUNT_MISMATCH
from nwor_compile.scv import Committed

GEOMETRIES = (
    Geometry(),
    Geometry("hnd", head_size=16),
    Geometry("packed", kv_heads=1, heads=2),
    Geometry("5d", head_size=8),
)
GROUPS = {"layers.0": "full", "layers.1": "sliding", "layers.2": "full", "layers.3": "sliding"}


def test_each_geometry_is_one_batch_and_one_commit_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    import nwor_compile.scv as scv

    commit = scv.COMMIT

    def spy(*args: object) -> None:
        calls.append(args)
        commit.reference(*args)

    monkeypatch.setattr(scv, "COMMIT", commit._replace(reference=spy))
    with rig(geometries=GEOMETRIES) as r:
        before = r.rows()
        result = r.run(SOME)
        assert result.error.item() == 0
        assert r.holds(r.expected(before, SOME))
        assert [len(batch.names) for batch in r.window.tensors.batches] == [2, 2, 2, 2]
        assert len(calls) == 4
        flags = {call[4].data_ptr() for call in calls}  # type: ignore[attr-defined]
        assert flags == {r.window.tensors.error.data_ptr()}
        # Rows are counted once a window, so one call alone has the counters, and closes.
        assert [call[7] is not None for call in calls] == [True, False, False, False]
        assert [call[9] is not None for call in calls] == [True, False, False, False]
        metrics = r.window.metrics()
        assert (metrics.nwor_total_staged, metrics.nwor_stage_operations) == (9, 9 * 8)


@pytest.mark.parametrize("layer", range(4))
def test_one_layer_out_of_step_stops_every_geometry(layer: int) -> None:
    with rig(layers=1, geometries=GEOMETRIES) as r:
        before = r.rows()
        r.begin()
        r.forward(skip=[layer])
        result = r.commit(ALL)
        assert result.error.item() == COUNT_MISMATCH
        assert r.holds(r.expected(before, NONE, skip=[layer]))
        r.assert_next_window_is_clean()


def other_slots(r: Rig) -> Tensor:
    """A second mapping with the same tokens in other blocks of the pool."""
    slots, size = r.batch.slot_mapping, r.batch.blocks * 4
    moved = (slots + 8) % size
    return torch.where(slots < 0, slots, moved)


def run_groups(r: Rig, accepted: list[int]) -> tuple[Committed, list[Tensor]]:
    mappings = {"full": r.batch.slot_mapping, "sliding": other_slots(r)}
    r.begin(slot_mapping=mappings)
    used = []
    for index, layer in enumerate(r.layers):
        slots = mappings[GROUPS[f"layers.{index}"]]
        used.append(slots)
        stage_kv_window(**write_arguments(layer, replace(r.batch, slot_mapping=slots)))
    return r.commit(accepted), used


@pytest.mark.parametrize("accepted", [NONE, SOME, ALL])
def test_each_slot_group_commits_to_its_own_slots(accepted: list[int]) -> None:
    with rig(layers=4, window={"groups": GROUPS}) as r:
        before = r.rows()
        result, used = run_groups(r, accepted)
        assert result.error.item() == 0
        batch = r.batch
        for index, slots in enumerate(used):
            r.batch = replace(batch, slot_mapping=slots)
            assert r.layers[index].cache.holds(r.expected(before, accepted)[index])
        r.batch = batch
        buffers = [b.slots.data_ptr() for b in r.window.tensors.batches]
        assert len(buffers) == len(set(buffers)) == 2


def test_invariant_4_each_group_has_one_slot_buffer_however_many_batches() -> None:
    groups = {"layers.0": "full", "layers.1": "full", "layers.2": "full", "layers.3": "sliding"}
    geometries = (Geometry(), Geometry(head_size=16))
    with rig(layers=2, geometries=geometries, window={"groups": groups}) as r:
        places = {(b.group, b.slots.data_ptr()) for b in r.window.tensors.batches}
        assert len(r.window.tensors.batches) == 3
        assert len(places) == 2


@pytest.mark.parametrize("names", [["full"], ["full", "kv"], ["full", "sliding", "kv"], []])
def test_begin_needs_a_slot_mapping_for_each_group_and_no_other(names: list[str]) -> None:
    with rig(layers=4, window={"groups": GROUPS}) as r:
        mappings = dict.fromkeys(names, r.batch.slot_mapping)
        with pytest.raises(WindowInputError, match=r"\['full', 'sliding'\]"):
            r.begin(slot_mapping=mappings)
        with pytest.raises(WindowInputError, match=r"got \['kv'\]"):
            r.begin()
        run_groups(r, SOME)


def test_a_group_with_too_few_slots_stops_the_commit_of_all_groups() -> None:
    """Its layers stage fewer rows than the window has drafts."""
    with rig(layers=2, window={"groups": {"layers.1": "sliding"}}) as r:
        before = r.rows()
        short = other_slots(r)[:5]
        r.begin(slot_mapping={"kv": r.batch.slot_mapping, "sliding": short})
        r.forward(skip=[1])
        arguments = write_arguments(r.layers[1], r.batch)
        stage_kv_window(**arguments | {"slot_mapping": short})
        result = r.commit(ALL)
        assert result.error.item() == COUNT_MISMATCH
        assert r.layers[0].cache.holds(r.expected(before, NONE)[0])


def test_a_group_whose_slots_are_missing_does_not_make_a_warm_up_of_the_others() -> None:
    with rig(layers=2, window={"groups": {"layers.1": "sliding"}}) as r:
        before = r.rows()
        none = torch.full_like(r.batch.slot_mapping, -1)
        r.begin(slot_mapping={"kv": r.batch.slot_mapping, "sliding": none})
        r.forward(skip=[1])
        stage_kv_window(**write_arguments(r.layers[1], r.batch) | {"slot_mapping": none})
        result = r.commit(SOME)
        assert result.accepted.tolist() == SOME
        assert r.layers[0].cache.holds(r.expected(before, SOME)[0])
        assert r.layers[1].cache.holds(before[1])


def test_staging_bytes_are_the_formula_of_the_readme() -> None:
    """32 layers of 8 heads x 128 in bf16, 64 requests with 4 drafts: 32 MiB."""
    assert staging_bytes(32, 8, 128, 2, 64, 4) == 32 * 2**20
    with rig([Span(3, 1, 2)], layers=3) as r:
        assert r.window.staging_bytes == staging_bytes(3, 2, 8, 4, 6, 5)
