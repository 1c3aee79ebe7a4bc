"""The ten invariants of the design, each by its number. 2 and 9 are the pass's: lightly here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from cases import (
    FORMATS,
    LAYOUTS,
    Geometry,
    Span,
    batches,
    make_step,
    paged_arguments,
    same_bits,
    write_arguments,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from window_support import ALL, MIXED, NONE, SOME, Rig, draft_slots, rig, slots_equal

from nwor_compile import NworConfig
from nwor_compile.ops import paged_attention, reshape_and_cache, stage_kv_window
from nwor_compile.ops.error_bits import (
    BAD_COUNTS,
    COUNT_MISMATCH,
    EARLY_WRITE,
    ID_MISMATCH,
    OVERFLOW,
)

# 1: no draft row in a cache before its commit ----------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_invariant_1_no_draft_row_is_in_any_cache_before_its_commit(
    layout: str, form: tuple[torch.dtype, str, bool]
) -> None:
    with rig(geometries=(Geometry(layout, *form),)) as r:
        before = r.rows()
        r.begin()
        r.forward()
        assert r.holds(r.expected(before, NONE))
        r.commit(SOME)
        assert r.holds(r.expected(before, SOME))
        for layer, rows in zip(r.layers, before, strict=True):
            assert slots_equal(layer.cache, rows, r.rejected_slots(SOME))


@pytest.mark.parametrize(
    ("poison", "layout", "form"),
    [
        *(("nan", layout, form) for layout in LAYOUTS for form in FORMATS),
        *(("large", "packed", form) for form in FORMATS),
    ],
    ids=str,
)
def test_invariant_1_poison_stays_in_open_slots_and_changes_no_output(
    poison: str, layout: str, form: tuple[torch.dtype, str, bool]
) -> None:
    geometry = Geometry(layout, *form)
    with rig(geometries=(geometry,)) as plain:
        plain.begin()
        want = plain.forward()
        plain.window.abort()
    with rig(geometries=(geometry,), poison=poison) as r:
        before = r.rows()
        r.begin()
        got = r.forward()
        assert r.holds(r.expected(before, NONE))  # markers in every draft slot
        result = r.commit(SOME)
        assert result.error.item() == 0
        assert result.accepted.tolist() == SOME
        assert r.holds(r.expected(before, SOME))
    assert all(same_bits(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("poison", ["nan", "large"])
def test_invariant_1_poison_shows_in_the_output_of_a_reader_of_the_cache(poison: str) -> None:
    """The check itself can fail: attention that reads only the cache meets the markers."""
    with rig(poison=poison, padding=0) as r:
        r.begin()
        (staged, *_) = r.forward()
        read = paged_attention(**paged_arguments(r.layers[0], r.batch))
        r.window.abort()
        assert not torch.allclose(staged, read, equal_nan=False)


@pytest.mark.parametrize(
    ("layout", "form", "poison", "layer"),
    [
        *((layout, form, "nan", 1) for layout in LAYOUTS for form in (FORMATS[0], FORMATS[3])),
        *(("nhd", form, "large", 1) for form in FORMATS),
        *(("nhd", FORMATS[0], "nan", layer) for layer in (0, 2)),
    ],
    ids=str,
)
def test_invariant_1_a_direct_write_of_a_draft_row_is_found_and_nothing_is_committed(
    layout: str, form: tuple[torch.dtype, str, bool], poison: str, layer: int
) -> None:
    with rig(layers=3, geometries=(Geometry(layout, *form),), poison=poison) as r:
        before = r.rows()
        r.begin()
        r.forward()
        culprit = r.layers[layer]
        reshape_and_cache(**write_arguments(culprit, r.batch))
        result = r.commit(SOME)
        assert result.error.item() == EARLY_WRITE
        assert result.accepted.tolist() == NONE
        assert not bool(result.mask.any())
        innocent = [i for i in range(3) if i != layer]
        wanted = r.expected(before, NONE)
        assert all(r.layers[i].cache.holds(wanted[i]) for i in innocent)


@pytest.mark.parametrize("part", ["key", "value"])
def test_invariant_1_one_changed_element_of_an_open_slot_is_enough(part: str) -> None:
    with rig(poison="nan") as r:
        r.begin()
        r.forward()
        cache = getattr(r.layers[1].cache, part)
        slot = draft_slots(r.batch)[-1]
        cache[slot // 4, slot % 4, 1, 7] = 0.0
        assert r.commit(SOME).error.item() == EARLY_WRITE


def test_invariant_1_poison_ignores_slots_outside_the_cache() -> None:
    """An index past the cache would be a device-side assert on a GPU."""
    with rig(poison="nan") as r:
        slots = r.batch.slot_mapping.clone()
        token = r.batch.draft_tokens[0]
        slots[token] = 10**9
        r.begin(slot_mapping=slots)
        r.forward()
        assert r.commit(NONE).error.item() == 0


def test_invariant_1_slots_of_an_earlier_window_are_no_open_slots_of_a_later_one() -> None:
    """Rows that it committed would be poisoned, and be taken for drafts once more."""
    with rig(poison="nan") as r:
        r.run(ALL)
        before = r.rows()
        r.begin(num_drafts=torch.zeros_like(r.batch.num_drafts))
        assert r.holds(before)
        assert r.window.tensors.batches[0].slots.tolist() == [-1] * 31
        r.window.abort()


# 2: visibility -----------------------------------------------------------------------------------


@given(batch=batches(), poison=st.sampled_from(["off", "nan"]))
def test_invariant_2_attention_sees_staged_rows_as_if_they_were_written(
    batch: Any, poison: str
) -> None:
    """Of one op here; that every reader is such an op is what the pass's tests prove."""
    spans = batch.spans
    staged = Rig(spans, geometries=(batch.geometry,), max_drafts=6, poison=poison)
    try:
        direct = make_step(staged.batch, layers=2, seed=0)
        staged.begin()
        for layer, got in zip(direct.layers, staged.forward(), strict=True):
            reshape_and_cache(**write_arguments(layer, staged.batch))
            want = paged_attention(**paged_arguments(layer, staged.batch))
            assert same_bits(got, want)
        staged.window.abort()
    finally:
        staged.window.close()


# 4: one slot buffer ------------------------------------------------------------------------------


def test_invariant_4_layers_of_a_group_share_one_slot_buffer() -> None:
    with rig(layers=3, geometries=(Geometry(), Geometry(head_size=16))) as r:
        buffers = {batch.slots.data_ptr() for batch in r.window.tensors.batches}
        assert len(r.window.tensors.batches) == 2
        assert len(buffers) == 1


def test_invariant_4_the_snapshot_survives_an_overwritten_slot_mapping() -> None:
    """A drafter reuses the engine's slot mapping before the target's commit."""
    with rig() as r:
        before = r.rows()
        wanted = r.expected(before, ALL)
        kept = r.batch.slot_mapping.clone()
        r.begin()
        r.forward()
        for tensor in (r.batch.slot_mapping, r.batch.num_drafts, r.batch.query_start_loc):
            tensor.fill_(1)
        overwritten = r.batch
        r.batch = replace(r.batch, num_drafts=torch.tensor([s.drafts for s in MIXED]))
        result = r.commit(ALL)
        assert result.error.item() == 0
        assert r.holds(wanted)
        assert not torch.equal(overwritten.slot_mapping, kept)


# 5: registered == staged == committed ------------------------------------------------------------


@pytest.mark.parametrize("missing", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_invariant_5_a_layer_that_does_not_stage_stops_the_commit_of_all(
    missing: Collection[int],
) -> None:
    with rig(layers=3) as r:
        before = r.rows()
        r.begin()
        r.forward(skip=missing)
        result = r.commit(ALL)
        assert result.error.item() == COUNT_MISMATCH
        assert result.accepted.tolist() == NONE
        assert r.holds(r.expected(before, NONE, skip=missing))
        r.assert_next_window_is_clean()


def test_invariant_5_a_layer_that_stages_twice_stops_the_commit_of_all() -> None:
    with rig() as r:
        before = r.rows()
        r.begin()
        r.forward()
        r.forward(skip=[0])
        assert r.commit(ALL).error.item() == COUNT_MISMATCH
        assert r.holds(r.expected(before, NONE))


def test_invariant_5_a_layer_given_fewer_tokens_stops_the_commit_of_all() -> None:
    with rig() as r:
        before = r.rows()
        r.begin()
        r.forward(skip=[1])
        arguments = write_arguments(r.layers[1], r.batch)
        arguments["slot_mapping"] = arguments["slot_mapping"][:4]
        stage_kv_window(**arguments)
        assert r.commit(ALL).error.item() == COUNT_MISMATCH
        assert slots_equal(r.layers[0].cache, before[0], draft_slots(r.batch))


def test_invariant_5_drafter_layers_numbered_after_the_target_are_not_part_of_its_window() -> None:
    """Old failure: "staged tokens 0 < accepted 6 for layer 32", the drafter's layer counted in.

    EAGLE's layer is model.layers.32 behind a target of 32; it runs between begin and commit.
    """
    spans = [Span(5, 1, 6), Span(3, 1, 6)]
    with rig(spans, layers=1, seed=3, max_drafts=6) as drafter:
        drafter.window.close()
        direct = [layer.cache.key for layer in drafter.layers]
        with rig(spans, layers=32, max_drafts=6, window={"direct_caches": direct}) as r:
            assert len(r.window.layer_names) == 32
            before, own = r.rows(), drafter.rows()
            r.begin()
            r.forward()
            drafter.forward()
            result = r.commit([6, 0])
            assert result.error.item() == 0
            assert result.accepted.tolist() == [6, 0]
            assert r.holds(r.expected(before, [6, 0]))
            assert drafter.holds(drafter.expected(own, [6, 6]))
            assert r.window.metrics().nwor_stage_operations == 12 * 32


# 6: all or nothing -------------------------------------------------------------------------------


def _flagged_window(r: Rig, fault: str) -> tuple[Any, list[int]]:
    """Run a window with this fault; its result and the layers whose certain rows are missing."""
    counts = r.batch.num_drafts.clone()
    skip: list[int] = []
    if fault == "as many as the span":
        counts[3] = 6
    elif fault == "negative":
        counts[1] = -1
    elif fault == "no certain token":
        counts[1] = 1
    elif fault == "empty span":
        counts[4] = 2
    elif fault == "count mismatch":
        skip = [len(r.layers) - 1]
    r.begin(num_drafts=counts)
    r.forward(skip=skip)
    sampling = r.sampling(ALL)
    if fault == "id mismatch":
        sampling.sampled_ids[3, 1] += 1  # the count says five accepted, the ids say one
    result = r.window.commit(sampling.sampled_ids, r.batch.draft_ids, sampling.num_sampled)
    return result, skip


@pytest.mark.parametrize("scv", ["off", "graph", "adaptive"])
@pytest.mark.parametrize(
    ("fault", "bit"),
    [
        ("negative", BAD_COUNTS),
        ("no certain token", BAD_COUNTS),
        ("empty span", BAD_COUNTS),
        ("as many as the span", BAD_COUNTS),
        ("count mismatch", COUNT_MISMATCH),
        ("id mismatch", ID_MISMATCH),
    ],
)
def test_invariant_6_an_error_commits_nothing_in_any_layer_of_any_geometry(
    fault: str, bit: int, scv: str
) -> None:
    geometries = (Geometry(), Geometry("hnd", head_size=16), Geometry("5d", torch.float32))
    with rig(geometries=geometries, scv=scv) as r:
        assert len(r.window.tensors.batches) == 3
        before = r.rows()
        result, skip = _flagged_window(r, fault)
        assert result.error.item() & bit
        assert result.accepted.tolist() == NONE
        assert not bool(result.mask.any())
        certain = [0, 0, 0, 0, 0, 0]
        if fault == "as many as the span":
            certain[3] = 5  # that count leaves no certain token, so it says nothing about drafts
        assert r.holds(r.expected(before, certain, skip=skip))
        metrics = r.window.metrics()
        assert (metrics.nwor_total_committed, metrics.nwor_error_windows) == (0, 1)
        r.assert_next_window_is_clean()


def test_invariant_6_too_many_drafts_write_no_draft_row_although_they_cannot_be_staged() -> None:
    """A count above max_drafts that its span allows: these tokens are drafts, and go nowhere."""
    with rig(max_drafts=4) as r:
        before = r.rows()
        r.begin()  # request 3 has 5 drafts
        r.forward()
        assert r.holds(r.expected(before, NONE))
        result = r.commit(ALL)
        assert result.error.item() == BAD_COUNTS | OVERFLOW | ID_MISMATCH
        assert r.holds(r.expected(before, NONE))
        assert r.window.metrics().nwor_unique_tokens == 0


def test_invariant_6_an_overflow_of_all_counts_together_is_flagged_and_writes_no_draft_row() -> (
    None
):
    with rig() as r:
        r.window.opening = replace(r.window.opening, capacity=8)  # the batch has nine drafts
        before = r.rows()
        r.begin()
        assert r.window.tensors.error.item() == OVERFLOW
        for layer in r.layers:
            stage_kv_window(**write_arguments(layer, r.batch))
        r.commit(ALL)
        staged = r.window.tensors.batches[0].staged_keys[0]
        assert staged.shape[0] == 30  # so row 8 exists, and must not have been taken
        assert r.holds(r.expected(before, NONE))


def test_invariant_6_the_outputs_of_certain_rows_are_right_in_a_flagged_window() -> None:
    with rig() as clean:
        clean.begin()
        want = clean.forward()
        clean.window.abort()
    with rig() as r:
        counts = r.batch.num_drafts.clone()
        counts[1] = 7
        r.begin(num_drafts=counts)
        got = r.forward()
        certain = r.batch.row_map < 0
        for a, b in zip(want, got, strict=True):
            assert same_bits(a[certain], b[certain])
        r.window.abort()


def test_invariant_6_the_flag_does_not_outlive_its_window() -> None:
    with rig() as r:
        _flagged_window(r, "negative")
        assert r.window.tensors.error.item()
        r.begin()
        assert r.window.tensors.error.item() == 0
        r.window.abort()


# 7: no host synchronisation ----------------------------------------------------------------------


class Synchronised(AssertionError):
    """Something in the window waited for the device."""


class NoSync(TorchDispatchMode):
    """Fails on every aten op whose result the host must wait for, inside our ops as well."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "nwor":  # look inside: run its kernel under this mode
            with self:
                kernel = torch._C.DispatchKey.CompositeExplicitAutograd
                return func._op_dk(kernel, *args, **kwargs)
        if func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default:
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise Synchronised(f"{func} by a mask")
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            raise Synchronised(str(func))
        return func(*args, **kwargs)


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Run a function so that every known way to wait for the device raises Synchronised."""

    def refuse(name: str) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> Any:
            raise Synchronised(f"Tensor.{name}")

        return call

    def run(call: Callable[[], object]) -> None:
        names = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")
        with monkeypatch.context() as patch:
            for name in (*names, "nonzero"):
                patch.setattr(torch.Tensor, name, refuse(name))
            with NoSync():
                call()

    return run


@pytest.mark.parametrize(
    "waits",
    [
        lambda t: t.item(),
        lambda t: t.tolist(),
        lambda t: bool(t),
        lambda t: int(t),
        lambda t: t.cpu(),
        lambda t: t.view(1)[t.view(1) > 0],
        lambda t: torch.nonzero(t),
        lambda t: torch.masked_select(t, t > 0),
        lambda t: torch.unique(t),
        lambda t: torch.ops.aten._local_scalar_dense(t),
    ],
)
def test_invariant_7_the_check_finds_each_way_to_wait(
    waits: Callable[[Tensor], object], no_sync: Callable[[Callable[[], object]], None]
) -> None:
    with pytest.raises(Synchronised):
        no_sync(lambda: waits(torch.tensor(1)))


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("poison", ["off", "nan"])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("scv", ["graph", "adaptive"])
def test_invariant_7_a_window_never_waits_for_the_device(
    scv: str,
    counted: bool,
    poison: str,
    debug: bool,
    no_sync: Callable[[Callable[[], object]], None],
) -> None:
    geometries = (Geometry(), Geometry(head_size=16))
    with rig(geometries=geometries, scv=scv, poison=poison, debug=debug) as r:
        before, sampling = r.rows(), r.sampling(SOME, counted=counted)
        results: list[Any] = []

        def window() -> None:
            r.begin()
            for layer in r.layers:
                stage_kv_window(**write_arguments(layer, r.batch))
            results.append(
                r.window.commit(sampling.sampled_ids, r.batch.draft_ids, sampling.num_sampled)
            )

        no_sync(window)
        assert results[0].accepted.tolist() == SOME
        assert r.holds(r.expected(before, SOME))


def test_invariant_7_an_aborted_window_never_waits_for_the_device(
    no_sync: Callable[[Callable[[], object]], None],
) -> None:
    with rig() as r:
        no_sync(r.begin)
        no_sync(r.window.abort)


def test_invariant_7_scv_off_does_wait(
    no_sync: Callable[[Callable[[], object]], None],
) -> None:
    with rig(scv="off") as r:
        sampling = r.sampling(SOME)
        no_sync(r.begin)
        with pytest.raises(Synchronised, match="tolist"):
            no_sync(
                lambda: r.window.commit(
                    sampling.sampled_ids, r.batch.draft_ids, sampling.num_sampled
                )
            )


def test_invariant_7_a_flagged_window_and_a_fallback_do_not_wait_either(
    no_sync: Callable[[Callable[[], object]], None],
) -> None:
    with rig() as r:
        counts = r.batch.num_drafts - 1
        no_sync(lambda: r.begin(num_drafts=counts))
        no_sync(lambda: r.window.commit(torch.zeros(3), r.batch.draft_ids))
        assert r.window.metrics().nwor_fallback_count == 1


# 8: the same code for windows, decode, prefill and mixtures --------------------------------------


@pytest.mark.parametrize(
    "spans",
    [
        [Span(7, 1), Span(0, 1), Span(12, 1)],
        [Span(0, 9), Span(4, 5)],
        [Span(5, 1, 3), Span(8, 1, 5)],
        MIXED,
        [Span(0, 0), Span(0, 0)],
    ],
    ids=["decode", "prefill", "verify", "mixed", "padding"],
)
def test_invariant_8_one_path_serves_every_batch(spans: list[Span]) -> None:
    with rig(spans) as r:
        before = r.rows()
        accepted = [(span.drafts + 1) // 2 for span in spans]
        result = r.run(accepted)
        assert result.error.item() == 0
        assert result.accepted.tolist() == accepted
        assert r.holds(r.expected(before, accepted))


def test_invariant_8_a_forward_pass_outside_a_window_writes_directly() -> None:
    with rig() as r:
        r.run(SOME)
        r.new_rows(seed=4)
        before = r.rows()
        got = r.forward()
        assert r.holds(r.expected(before, ALL))
        for layer, out in zip(r.layers, got, strict=True):
            assert same_bits(out, paged_attention(**paged_arguments(layer, r.batch)))
        assert r.window.metrics().nwor_total_staged == 9


def test_invariant_8_routing_is_in_buffers_that_never_move() -> None:
    """So a captured graph replays for any batch."""
    with rig() as r:
        tensors = r.window.tensors
        persistent = (
            *vars(tensors.routing).values(), tensors.drafts, tensors.error, tensors.state,
            tensors.counters, tensors.batches[0].slots, *tensors.batches[0].staged_keys,
        )  # fmt: skip
        places = [tensor.data_ptr() for tensor in persistent]
        r.run(SOME)
        r.begin(num_drafts=r.batch.num_drafts * 0)
        r.window.abort()
        now = (
            *vars(tensors.routing).values(), tensors.drafts, tensors.error, tensors.state,
            tensors.counters, tensors.batches[0].slots, *tensors.batches[0].staged_keys,
        )  # fmt: skip
        assert [tensor.data_ptr() for tensor in now] == places


# 9: compile keys (the caches themselves are tested with the backend) -----------------------------


def test_invariant_9_everything_that_changes_the_graph_is_in_the_key_and_nothing_else() -> None:
    base = NworConfig()
    changes: dict[str, Any] = {
        "mode": "off", "strict": True, "scv": "off", "debug": True, "poison": "nan",
        "attention": "stock", "rope": "separate",
    }  # fmt: skip
    assert set(changes) == set(NworConfig.model_fields)
    changed = {
        name
        for name, value in changes.items()
        if NworConfig(**{name: value}).compile_key() != base.compile_key()
    }
    assert changed == {"mode", "strict", "rope"}


# 10: counters ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "spans", "rows"),
    [
        # Old failure: 7680 = 1920 x 4, each token counted once a layer group.
        (40, [Span(3, 1, 48)], 48),
        # Old failure: every thread of a block counted its token: 4096 instead of 8.
        (1, [Span(3, 1, 8)], 8),
    ],
)
def test_invariant_10_counters_count_token_rows_and_only_operations_count_layers(
    layers: int, spans: list[Span], rows: int
) -> None:
    with rig(spans, layers=layers, max_drafts=48, max_requests=1) as r:
        r.run([rows // 2])
        metrics = r.window.metrics()
        assert metrics.nwor_total_staged == rows
        assert metrics.nwor_total_committed == rows // 2
        assert metrics.nwor_total_rejected == rows - rows // 2
        assert metrics.nwor_stage_operations == rows * layers
        assert r.window.tensors.state[:, 0].tolist() == [rows] * layers


def test_invariant_10_forty_layers_and_forty_eight_tokens_are_1920_operations_not_7680() -> None:
    geometries = tuple(Geometry(head_size=size) for size in (8, 16, 24, 32))
    with rig([Span(3, 1, 48)], layers=10, geometries=geometries, max_drafts=48) as r:
        r.run([11])
        metrics = r.window.metrics()
        assert metrics.nwor_stage_operations == 1920
        assert (metrics.nwor_total_staged, metrics.nwor_total_committed) == (48, 11)


# 3: losslessness of a small model ----------------------------------------------------------------

VOCAB, LENGTH, DRAFTS, STEPS = 13, 64, 3, 10


class TinyModel:
    """Two layers of attention over the paged cache; the last position's argmax is the next token.

    The next token depends on every earlier row, so one stale row changes the text.
    """

    def __init__(self, mode: str, poison: str = "off") -> None:
        self.rig = Rig(
            [Span(0, 6), Span(0, 3)], geometries=(Geometry(spare_blocks=40),),
            max_requests=2, max_drafts=DRAFTS, mode=mode, poison=poison, scv="graph",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        self.embed = torch.randn(VOCAB, 32, generator=generator)
        self.position = torch.randn(LENGTH, 32, generator=generator) * 0.3
        self.project = torch.randn(2, 32, 64, generator=generator) * 0.3
        self.out = torch.randn(2, 32, 32, generator=generator) * 0.3

    def __call__(self, tokens: Tensor, positions: Tensor, batch: Any) -> Tensor:
        x = self.embed[tokens] + self.position[positions]
        for index, layer in enumerate(self.rig.layers):
            query, key, value = (x @ self.project[index]).split([32, 16, 16], dim=1)
            layer = replace(
                layer,
                query=query.view(-1, 4, 8),
                key=key.view(-1, 2, 8),
                value=value.view(-1, 2, 8),
            )
            stage_kv_window(**write_arguments(layer, batch))
            seen = torch.ops.nwor.verify_attention.window(**paged_arguments(layer, batch))
            x = x + seen.flatten(1) @ self.out[index]
        return (x @ self.embed.T).argmax(1)


def propose(step: int, truth: list[int], known: int, generator: torch.Generator) -> list[int]:
    """Drafts at random, or in two steps of three the right ones up to the last."""
    wild = torch.randint(VOCAB, (DRAFTS,), generator=generator).tolist()
    right = truth[known : known + 2]
    return right + wild[2:] if step % 3 and len(right) == 2 else wild


def generate(
    mode: str, truth: list[list[int]] | None = None, poison: str = "off"
) -> tuple[list[list[int]], list[list[int]]]:
    """Texts of two requests and the drafts accepted in each step; without `truth` no drafts."""
    model = TinyModel(mode, poison)
    window, width = model.rig.window, LENGTH // 4
    blocks = model.rig.batch.blocks
    table = torch.arange(2 * width, dtype=torch.int32).flip(0).view(2, width) % blocks
    texts, computed, history = [[1, 2, 3, 4, 5, 6], [7, 8, 9]], [0, 0], []
    generator = torch.Generator().manual_seed(8)
    for step in range(STEPS):
        proposals: list[list[int]] = [[], []]
        if truth is not None and step:
            proposals = [propose(step, truth[r], len(texts[r]), generator) for r in range(2)]
        chunks = [texts[r][computed[r] :] + proposals[r] for r in range(2)]
        positions = [list(range(computed[r], computed[r] + len(chunks[r]))) for r in range(2)]
        starts = torch.tensor([0, len(chunks[0]), len(chunks[0]) + len(chunks[1])])
        slots = [int(table[r, p // 4]) * 4 + p % 4 for r in range(2) for p in positions[r]]
        batch = replace(
            model.rig.batch,
            block_table=table,
            seq_lens=torch.tensor([ps[-1] + 1 for ps in positions]),
            query_start_loc=starts,
            slot_mapping=torch.tensor(slots),
        )
        counts = torch.tensor([len(p) for p in proposals])
        with window.step(counts, starts, batch.slot_mapping):
            said = model(
                torch.tensor(list(chain(*chunks))), torch.tensor(list(chain(*positions))), batch
            )
            sampled = torch.full((2, DRAFTS + 1), -1)
            for r, drafts in enumerate(proposals):
                end = int(starts[r + 1])
                answer = said[end - len(drafts) - 1 : end].tolist()
                taken = next((i for i, d in enumerate(drafts) if d != answer[i]), len(drafts))
                sampled[r, : taken + 1] = torch.tensor(answer[: taken + 1])
            result = window.commit(
                sampled, torch.tensor(list(chain(*proposals)), dtype=torch.int64)
            )
        assert result.error.item() == 0
        history.append(result.accepted.tolist())
        for r, accepted in enumerate(history[-1]):
            computed[r] = len(texts[r]) + accepted
            texts[r] = texts[r] + sampled[r, : accepted + 1].tolist()
    window.close()
    return texts, history


@pytest.mark.parametrize("poison", ["off", "nan", "large"])
def test_invariant_3_a_staged_run_says_and_accepts_what_a_direct_run_does(poison: str) -> None:
    plain, _ = generate("off")
    direct, accepted = generate("off", plain)
    staged, staged_accepted = generate("stage", plain, poison)
    assert staged == direct
    assert staged_accepted == accepted
    counts = {count for step in accepted for count in step}
    assert {0, 2} <= counts  # some steps reject, some accept
    for text, wanted in zip(staged, plain, strict=True):
        common = min(len(text), len(wanted))
        assert text[:common] == wanted[:common]  # speculation changes no token


def test_invariant_3_the_comparison_finds_hidden_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Staged rows that attention does not see: the mistake that everyone makes."""
    plain, _ = generate("off")
    monkeypatch.setattr(torch.ops.nwor.verify_attention, "window", paged_attention)
    assert generate("stage", plain) != generate("off", plain)
