"""The order of begin, commit, abort and close; registration; what a failure leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import window_support
from cases import Geometry
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from window_support import ALL, MIXED, NONE, SOME, Rig, config, open_windows, registered, rig

from nwor_compile import (
    ConfigError,
    NworConfig,
    StagingAllocationError,
    State,
    Window,
    WindowInputError,
    WindowOrderError,
)
from nwor_compile.ops import stage_kv_window, verify_attention_window
from nwor_compile.ops.staging import (
    UnregisteredCacheError,
    executions,
    register_direct,
    unregister_direct,
    unregister_layer,
)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    before = registered(), open_windows()
    yield
    assert (registered(), open_windows()) == before


def make_window(caches: dict[str, tuple[Tensor, Tensor]], **changed: Any) -> Window:
    sizes = {"max_requests": 6, "max_drafts": 5, "max_tokens": 64, "config": config()}
    return Window(caches, **{**sizes, **changed})


# Order -----------------------------------------------------------------------------------------


def test_a_window_is_idle_then_open_then_idle_then_closed() -> None:
    with rig() as r:
        assert r.window.state is State.IDLE
        r.begin()
        assert r.window.state is State.OPEN
        assert open_windows() == 1
        r.forward()
        r.commit(SOME)
        assert r.window.state is State.IDLE
        assert open_windows() == 0
    assert r.window.state is State.CLOSED


def test_results_of_a_given_form_are_looked_at_once() -> None:
    with rig() as r:
        sampling = r.sampling(SOME)
        ids = r.batch.draft_ids
        given = [sampling.sampled_ids, sampling.sampled_ids.float(), sampling.sampled_ids.float()]
        for sampled, form, fallbacks in zip(given, (3, 3, None), (0, 0, 1), strict=True):
            before = r.rows()
            r.begin()
            r.forward()
            result = r.window.commit(sampled, ids, sampling.num_sampled, form=form)
            assert r.window.fallbacks == fallbacks
            expected = SOME if fallbacks == 0 else NONE
            assert result.accepted.tolist() == expected
            assert r.holds(r.expected(before, expected))


def test_a_second_begin_is_refused_and_the_open_window_goes_on() -> None:
    with rig() as r:
        before = r.rows()
        r.begin()
        r.forward()
        kept = r.window.tensors.routing.row_map.clone()
        other = torch.zeros_like(r.batch.num_drafts)
        with pytest.raises(WindowOrderError, match=r"begin: a window is open.*commit.*abort"):
            r.begin(num_drafts=other)
        assert r.window.state is State.OPEN
        assert torch.equal(r.window.tensors.routing.row_map, kept)
        assert r.commit(SOME).accepted.tolist() == SOME
        assert r.holds(r.expected(before, SOME))


@pytest.mark.parametrize("call", ["commit", "abort"])
def test_commit_and_abort_without_begin_are_refused_and_change_nothing(call: str) -> None:
    with rig() as r:
        r.run(SOME)
        rows, metrics = r.rows(), r.window.metrics()
        with pytest.raises(WindowOrderError, match=rf"{call}: no window is open"):
            r.commit(ALL) if call == "commit" else r.window.abort()
        assert r.window.state is State.IDLE
        assert r.holds(rows)
        assert r.window.metrics() == metrics
        assert open_windows() == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda r: r.begin(),
        lambda r: r.commit(NONE),
        lambda r: r.window.abort(),
        lambda r: r.window.warm_up(),
    ],
    ids=["begin", "commit", "abort", "warm_up"],
)
def test_everything_after_close_is_refused(call: Callable[[Rig], object]) -> None:
    with rig() as r:
        r.window.close()
        with pytest.raises(WindowOrderError, match="was closed: make a new one"):
            call(r)
        assert r.window.state is State.CLOSED
        r.window.close()  # closing twice is no error


def test_warm_up_inside_a_window_is_refused() -> None:
    with rig() as r:
        r.begin()
        with pytest.raises(WindowOrderError, match="warm_up: a window is open"):
            r.window.warm_up()
        r.window.abort()


@pytest.mark.parametrize("size", [0, -1, 7])
def test_warm_up_refuses_sizes_that_no_window_can_have(size: int) -> None:
    with rig() as r, pytest.raises(WindowInputError, match="expected 1 to 6"):
        r.window.warm_up([1, size])


# Begin refuses what does not fit, before it changes anything ------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_drafts": torch.zeros(7, dtype=torch.int32)}, r"num_drafts: .*\[1 to 6\]"),
        ({"num_drafts": torch.zeros(0, dtype=torch.int32)}, r"num_drafts: .*\[1 to 6\]"),
        ({"num_drafts": torch.zeros(6)}, "num_drafts: expected int32 or int64"),
        ({"num_drafts": torch.zeros(2, 3, dtype=torch.int32)}, r"num_drafts: .*\[1 to 6\]"),
        ({"query_start_loc": torch.zeros(6, dtype=torch.int32)}, r"query_start_loc: .*\[7\]"),
        ({"query_start_loc": torch.zeros(7)}, "query_start_loc: expected int32 or int64"),
        ({"num_drafts": None}, "one of num_drafts, logit_starts and one_certain"),
        (
            {"logit_starts": torch.zeros(7, dtype=torch.int32)},
            "one of num_drafts, logit_starts and one_certain",
        ),
        (
            {"num_drafts": None, "logit_starts": torch.zeros(8, dtype=torch.int32)},
            r"logit_starts: .*\[2 to 7\]",
        ),
        ({"slot_mapping": torch.zeros(65, dtype=torch.int64)}, r"slot_mapping\[kv\]: .*64"),
        ({"slot_mapping": torch.zeros(4, 2, dtype=torch.int64)}, r"slot_mapping\[kv\]: .*64"),
        ({"slot_mapping": torch.zeros(4)}, r"slot_mapping\[kv\]: expected int32 or int64"),
        ({"slot_mapping": {"other": torch.zeros(4, dtype=torch.int64)}}, r"\['kv'\].*\['other'\]"),
        ({"slot_mapping": {}}, r"one for each of \['kv'\], got \[\]"),
    ],
)
def test_begin_refuses_arguments_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    with rig() as r:
        with pytest.raises(WindowInputError, match=message):
            r.begin(**changed)
        assert r.window.state is State.IDLE
        assert int((r.window.tensors.routing.row_map >= 0).sum()) == 0
        r.assert_next_window_is_clean()


def _meta(name: str) -> Callable[[Rig], dict[str, Any]]:
    return lambda r: {name: getattr(r.batch, name).to("meta")}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (_meta("num_drafts"), "num_drafts: expected int32 or int64 on cpu, got .* on meta"),
        (_meta("query_start_loc"), "query_start_loc: expected int32 or int64 on cpu, got .* meta"),
        (_meta("slot_mapping"), r"slot_mapping\[kv\]: expected int32 or int64 on cpu, got .* meta"),
        (_meta("seq_lens"), "seq_lens: expected int32 or int64 on cpu, got .* on meta"),
        (_meta("block_table"), r"block_table\[kv\]: expected on cpu, got meta"),
        (lambda r: {"num_drafts": r.batch.num_drafts.float()}, "num_drafts: .* got torch.float32"),
        (
            lambda r: {"num_drafts": r.batch.num_drafts[None]},
            r"num_drafts: expected shape \[1 to 6",
        ),
        (lambda r: {"query_start_loc": r.batch.query_start_loc[1:]}, r"query_start_loc: .*\[7\]"),
        (lambda r: {"slot_mapping": {"other": r.batch.slot_mapping}}, "slot_mapping: expected one"),
        (lambda r: {"seq_lens": r.batch.seq_lens[1:]}, r"seq_lens: .*the lengths \[6\], got \[5\]"),
        (lambda r: {"seq_lens": None}, r"seq_lens: .*the lengths \[6\], got None"),
        (
            lambda r: {"block_table": r.batch.block_table.long()},
            r"block_table\[kv\]: expected int32",
        ),
        (lambda r: {"block_table": r.batch.block_table[:, :0].repeat(2, 1)}, r"block_table\[kv\]"),
        (
            lambda r: {"block_table": [r.batch.block_table]},
            "block_table: a window with tail blocks",
        ),
        (lambda r: {"token_ids": r.batch.slot_mapping[1:]}, r"token_ids: expected \[at least"),
        (lambda r: {"token_ids": r.batch.slot_mapping.float()}, "token_ids: expected int32 or"),
    ],
)
def test_a_step_that_fits_lets_no_other_through(
    changed: Callable[[Rig], dict[str, Any]], message: str
) -> None:
    """What fits is remembered and not checked again; whatever differs is."""
    with rig(tail=True) as r:
        r.run(SOME)
        r.begin()
        r.window.abort()
        for _ in range(2):
            with pytest.raises(WindowInputError, match=message):
                r.begin(**changed(r))
            assert r.window.state is State.IDLE
            assert int((r.window.tensors.routing.row_map >= 0).sum()) == 0
        r.assert_next_window_is_clean()


def test_steps_of_other_shapes_dtypes_and_argument_forms_fit_one_after_another() -> None:
    with rig(tail=True, max_requests=8) as r:
        for _ in range(2):
            for drafts, slots in ((torch.int32, torch.int64), (torch.int64, torch.int32)):
                batch = r.batch
                starts = torch.cat(
                    [batch.num_drafts.new_zeros(1), (batch.num_drafts + 1).cumsum(0)]
                )
                for counts in (
                    {"num_drafts": batch.num_drafts.to(drafts)},
                    {"num_drafts": None, "logit_starts": starts.to(drafts)},
                ):
                    r.new_rows(seed=3)
                    before = r.rows()
                    r.begin(
                        **counts,
                        slot_mapping={"kv": batch.slot_mapping.to(slots)},
                        block_table={"kv": batch.block_table},
                    )
                    r.forward()
                    assert r.commit(SOME).accepted.tolist() == SOME
                    assert r.holds(r.expected(before, SOME))


def test_a_slot_mapping_longer_than_max_tokens_is_refused_even_with_many_requests() -> None:
    """The limit is max_tokens, not the length that query_start_loc may have."""
    with rig(max_tokens=4) as r:
        for length in (5, 7):
            with pytest.raises(WindowInputError, match="at most 4"):
                r.begin(slot_mapping=torch.zeros(length, dtype=torch.int64))


def test_a_begin_that_fails_half_way_leaves_direct_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its routing must not stage the rows of the next forward pass: nothing would commit them."""
    with rig(poison="nan") as r:
        before = r.rows()

        def fail(*args: object) -> None:
            raise RuntimeError("device lost")

        with monkeypatch.context() as patch:
            patch.setattr("nwor_compile.window.poison_open_slots", fail)
            with pytest.raises(RuntimeError, match="device lost"):
                r.begin()
        assert r.window.state is State.IDLE
        assert open_windows() == 0
        r.forward()
        assert r.holds(r.expected(before, ALL))  # every row went straight to the cache
        r.assert_next_window_is_clean()


# step() ----------------------------------------------------------------------------------------


def test_step_commits_what_its_block_commits() -> None:
    with rig() as r:
        before, batch = r.rows(), r.batch
        with r.window.step(batch.num_drafts, batch.query_start_loc, batch.slot_mapping) as w:
            assert w is r.window
            r.forward()
            r.commit(SOME)
        assert r.holds(r.expected(before, SOME))


@pytest.mark.parametrize("where", ["before", "between layers", "after"])
def test_an_exception_in_the_forward_pass_aborts_and_passes_through(where: str) -> None:
    with rig(layers=3) as r:
        before, batch = r.rows(), r.batch
        skip = {"before": [0, 1, 2], "between layers": [2], "after": []}[where]

        def forward() -> None:
            with r.window.step(batch.num_drafts, batch.query_start_loc, batch.slot_mapping):
                r.forward(skip=skip)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            forward()
        assert r.window.state is State.IDLE
        assert r.holds(r.expected(before, NONE, skip=skip))
        r.assert_next_window_is_clean()


def test_a_step_that_is_left_without_a_commit_is_aborted() -> None:
    with rig() as r:
        before, batch = r.rows(), r.batch
        with r.window.step(batch.num_drafts, batch.query_start_loc, batch.slot_mapping):
            r.forward()
        assert r.holds(r.expected(before, NONE))
        assert r.window.metrics().nwor_total_staged == 0
        r.assert_next_window_is_clean()


def test_abort_in_mid_window_drops_the_drafts_and_keeps_the_certain_rows() -> None:
    with rig(layers=3) as r:
        before = r.rows()
        r.begin()
        r.forward(skip=[1])
        r.window.abort()
        assert r.holds(r.expected(before, NONE, skip=[1]))
        r.assert_next_window_is_clean()


def test_a_commit_that_fails_closes_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    with rig() as r:
        before = r.rows()
        r.begin()
        r.forward()

        def fail(*args: object) -> None:
            raise RuntimeError("device lost")

        with monkeypatch.context() as patch:
            patch.setattr(r.window.validator, "_prepare", fail)
            with pytest.raises(RuntimeError, match="device lost"):
                r.commit(SOME)
        assert r.window.state is State.IDLE
        assert r.holds(r.expected(before, NONE))
        r.assert_next_window_is_clean()


# Registration ----------------------------------------------------------------------------------


def test_close_unregisters_so_that_rewritten_ops_write_directly() -> None:
    with rig() as r:
        assert registered() == 2
        r.run(SOME)
    assert registered() == 0
    before, ran = r.rows(), executions()
    r.forward()
    assert r.holds(r.expected(before, ALL))
    assert executions() == ran


def test_close_in_an_open_window_aborts_it() -> None:
    with rig() as r:
        before = r.rows()
        r.begin()
        r.forward()
        r.window.close()
        assert open_windows() == 0
        assert r.holds(r.expected(before, NONE))


def test_the_same_caches_can_be_registered_again_after_close() -> None:
    with rig() as r:
        r.run(SOME)
        r.window.close()
        r.window = make_window(r.caches())
        r.assert_next_window_is_clean()


def test_two_windows_over_one_cache_are_refused_and_the_first_keeps_working() -> None:
    with rig() as r:
        with pytest.raises(ValueError, match=r"layers\.0.*registered as.*must be closed before"):
            make_window(r.caches())
        assert registered() == 2
        r.assert_next_window_is_clean()


def test_a_window_that_shares_one_layer_registers_none() -> None:
    with rig(layers=1) as r, rig(layers=1, seed=5) as other:
        other.window.close()
        caches = {"new": other.caches()["layers.0"], "old": r.caches()["layers.0"]}
        with pytest.raises(ValueError, match="'old'"):
            make_window(caches)
        assert registered() == 1
        before = other.rows()
        other.forward()
        assert other.holds(other.expected(before, ALL))
        r.assert_next_window_is_clean()


def caches_of(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(shape or (4, 4, 2, 8), dtype=dtype) for _ in range(count)]


def test_layers_that_share_a_cache_are_refused() -> None:
    a, b, c = caches_of(3)
    for layers in (
        {"x": (a, b), "y": (a, c)},  # one key cache
        {"x": (a, c), "y": (b, c)},  # one value cache
        {"x": (a, b), "y": (b, c)},  # the value cache of one is the key cache of the other
        {"x": (a, a)},
    ):
        with pytest.raises(WindowInputError, match="share a cache are one layer"):
            make_window(layers)
        assert registered() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, b: {}, "at least one"),
        (lambda a, b: {"x": (a, b[:, :2])}, "'x': caches: key .* and value .* differ"),
        (lambda a, b: {"x": (a, b.half())}, "'x': caches: key is torch.float32"),
        (lambda a, b: {"x": (a[0], b[0])}, "'x': caches: expected 4-D"),
        (lambda a, b: {"x": (a, b.to("meta"))}, "on one device"),
    ],
)
def test_layers_that_cannot_be_staged_are_refused_before_anything_is_registered(
    make: Callable[[Tensor, Tensor], dict[str, tuple[Tensor, Tensor]]], message: str
) -> None:
    a, b, good, other = caches_of(4)
    layers = make(a, b)
    with pytest.raises(WindowInputError, match=message):
        make_window({"good": (good, other), **layers} if layers else layers)
    assert registered() == 0


@pytest.mark.parametrize("name", ["max_requests", "max_drafts", "max_tokens"])
@pytest.mark.parametrize("number", [0, -3])
def test_sizes_below_one_are_refused(name: str, number: int) -> None:
    key, value = caches_of(2)
    with pytest.raises(WindowInputError, match=f"{name}: expected at least 1, got {number}"):
        make_window({"x": (key, value)}, **{name: number})


def test_a_group_for_an_unknown_layer_is_refused() -> None:
    key, value = caches_of(2)
    with pytest.raises(WindowInputError, match=r"groups: \['y'\] are no layers"):
        make_window({"x": (key, value)}, groups={"y": "full"})


def test_poison_needs_the_dtype_of_the_cache() -> None:
    """Otherwise the first begin would fail, not the construction."""
    key, value = caches_of(2, dtype=torch.float8_e4m3fn)
    layers = {"x": (key, value)}
    with pytest.raises(WindowInputError, match="'x': key cache: kv_cache_dtype='fp8_e5m2'"):
        make_window(layers, config=config(poison="nan"), kv_cache_dtype="fp8_e5m2")
    make_window(layers, config=config(poison="nan"), kv_cache_dtype="fp8_e4m3").close()


def test_an_error_after_the_layers_were_registered_takes_them_out_again() -> None:
    def direct() -> Iterator[Tensor]:
        yield torch.zeros(4, 4, 2, 8)
        raise KeyError("drafter")

    key, value = caches_of(2)
    with pytest.raises(KeyError, match="drafter"):
        make_window({"x": (key, value)}, direct_caches=direct())
    assert registered() == 0


def test_a_bad_environment_is_found_before_anything_is_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_SCV_MODE", "sometimes")
    key, value = caches_of(2)
    with pytest.raises(ConfigError, match="VLLM_SCV_MODE"):
        make_window({"x": (key, value)}, config=None)
    assert registered() == 0


# Out of memory ---------------------------------------------------------------------------------

STAGED_BYTES = 2 * 1 * 30 * 2 * 8 * 4  # K and V, one layer, 30 rows, 2 heads x 8, float32


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("none left")]
)
def test_out_of_memory_at_allocation_names_the_bytes_and_registers_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = torch.zeros

    def zeros(*args: Any, **options: Any) -> Tensor:
        if args and isinstance(args[0], tuple) and len(args[0]) == 4:
            raise error
        return real(*args, **options)

    key, value = caches_of(2)
    with monkeypatch.context() as patch:
        patch.setattr("nwor_compile.groups.torch.zeros", zeros)
        with pytest.raises(StagingAllocationError, match=rf"needs {STAGED_BYTES} bytes on cpu"):
            make_window({"x": (key, value)})
    assert registered() == 0
    make_window({"x": (key, value)}).close()


def test_out_of_memory_on_the_cpu_is_typed_too() -> None:
    """The CPU allocator raises a plain RuntimeError.

    The first allocation alone is more than a process can address: a kernel that overcommits memory
    would grant anything less, and kill the process when it is filled.
    """
    key, value = caches_of(2)
    with pytest.raises(StagingAllocationError, match="lower max_requests or max_drafts"):
        make_window({"x": (key, value)}, max_requests=2**45)
    assert registered() == 0


def test_another_runtime_error_at_allocation_is_not_called_out_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*args: Any, **options: Any) -> Tensor:
        raise RuntimeError("device-side assert")

    key, value = caches_of(2)
    monkeypatch.setattr("nwor_compile.groups.torch.full", full)
    with pytest.raises(RuntimeError, match="device-side assert"):
        make_window({"x": (key, value)})


# Unregistered and direct caches ------------------------------------------------------------------


def test_an_unregistered_cache_inside_a_window_is_an_error_and_outside_is_direct() -> None:
    with rig() as r, rig(layers=1, seed=7) as stranger:
        stranger.window.close()
        r.begin()
        before = stranger.rows()
        for op in ("write", "attend"):
            with pytest.raises(UnregisteredCacheError, match=r"written unverified.*direct_caches"):
                stranger.forward() if op == "write" else verify_attention_window(
                    **window_support.paged_arguments(stranger.layers[0], stranger.batch)
                )
        assert stranger.holds(before)
        r.window.abort()
        stranger.forward()
        assert stranger.holds(stranger.expected(before, ALL))


def test_a_direct_cache_is_written_directly_inside_a_window() -> None:
    with rig(layers=1, seed=7) as drafter:
        drafter.window.close()
        direct = [layer.cache.key for layer in drafter.layers]
        with rig(window={"direct_caches": direct}) as r:
            before, own = drafter.rows(), r.rows()
            r.begin()
            drafter.forward()
            r.forward()
            result = r.commit(SOME)
            assert drafter.holds(drafter.expected(before, ALL))
            assert r.holds(r.expected(own, SOME))
            assert result.error.item() == 0
        assert registered() == 0


def test_a_direct_cache_stays_direct_until_the_last_window_that_named_it_is_closed() -> None:
    with rig(layers=1, seed=7) as drafter:
        drafter.window.close()
        direct = [drafter.layers[0].cache.key]
        with rig(window={"direct_caches": direct}) as r:
            # The second window names it twice, and is closed twice.
            with rig(layers=1, seed=5, window={"direct_caches": direct * 2}) as other:
                assert registered() == 2 + 1 + 1
                other.window.close()
            assert registered() == 2 + 1
            before, own = drafter.rows(), r.rows()
            r.begin()
            drafter.forward()
            r.forward()
            r.commit(SOME)
            assert drafter.holds(drafter.expected(before, ALL))
            assert r.holds(r.expected(own, SOME))
        assert registered() == 0
        with rig() as r:
            r.begin()
            with pytest.raises(UnregisteredCacheError):
                drafter.forward()
            r.window.abort()


@pytest.mark.parametrize("first", ["layer", "direct"])
def test_a_direct_cache_that_is_a_layer_of_another_window_stays_that_layer(first: str) -> None:
    with rig(layers=1) as r:
        direct = {"direct_caches": [r.layers[0].cache.key]}
        if first == "direct":
            r.window.close()
        with rig(layers=1, seed=5, window=direct) as other:
            if first == "direct":
                r.window = make_window(r.caches())
            staging = r.window.layers["layers.0"]
            other.window.close()
        assert registered() == 1
        ran = executions()
        before = r.rows()
        r.begin()
        r.forward()
        assert executions() == ran + 1
        assert staging.state.tolist() == [sum(ALL), 0]
        r.commit(SOME)
        assert r.holds(r.expected(before, SOME))


@pytest.mark.parametrize("layers_first", [True, False])
def test_closing_the_layers_of_a_cache_leaves_it_direct_for_the_other_window(
    layers_first: bool,
) -> None:
    with rig(layers=1) as r:
        if not layers_first:
            r.window.close()
        with rig(layers=1, seed=5, window={"direct_caches": [r.layers[0].cache.key]}) as other:
            if not layers_first:
                r.window = make_window(r.caches())
            r.window.close()
            before = r.rows()
            other.begin()
            r.forward()
            assert r.holds(r.expected(before, ALL))
            other.window.abort()


def test_taking_back_caches_that_nobody_registered_changes_nothing() -> None:
    (cache,) = caches_of(1)
    unregister_layer(cache)
    unregister_direct(cache)
    register_direct(cache)
    unregister_layer(cache)
    assert registered() == 1
    unregister_direct(cache)
    assert registered() == 0


def test_a_key_cache_with_another_value_cache_is_an_error() -> None:
    with rig() as r:
        r.begin()
        arguments = window_support.write_arguments(r.layers[0], r.batch)
        arguments["value_cache"] = r.layers[1].cache.value
        with pytest.raises(UnregisteredCacheError, match=r"layers\.0.*another value cache"):
            stage_kv_window(**arguments)
        r.window.abort()


# Fake tensors and warm-up ------------------------------------------------------------------------


def test_a_window_of_fake_tensors_stages_nothing() -> None:
    with rig() as r:
        before, metrics = r.rows(), r.window.metrics()
        mode = FakeTensorMode()
        sampling = r.sampling(ALL)
        fake = {
            name: mode.from_tensor(getattr(r.batch, name))
            for name in ("num_drafts", "query_start_loc", "slot_mapping")
        }
        ids = mode.from_tensor(sampling.sampled_ids), mode.from_tensor(r.batch.draft_ids)
        with mode:
            r.begin(**fake)
        assert r.window.state is State.OPEN
        assert open_windows() == 0
        with mode:
            result = r.window.commit(*ids)
        assert result.accepted.shape == (len(MIXED),)
        assert result.mask.shape == r.batch.draft_ids.shape
        assert (result.accepted.dtype, result.mask.dtype) == (torch.int32, torch.bool)
        r.begin(**fake)
        r.window.abort()
        assert r.holds(before)
        assert r.window.metrics() == metrics
        assert int((r.window.tensors.routing.row_map >= 0).sum()) == 0
        r.assert_next_window_is_clean()


def test_a_forward_pass_of_fake_tensors_touches_no_layer() -> None:
    with rig() as r:
        before, ran = r.rows(), executions()
        mode = FakeTensorMode()
        write = window_support.write_arguments(r.layers[0], r.batch)
        attend = window_support.paged_arguments(r.layers[0], r.batch)

        def faked(arguments: dict[str, Any]) -> dict[str, Any]:
            return {
                k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()
            }

        r.begin()  # even in an open window
        with mode:
            assert stage_kv_window(**faked(write)) is None
            out = verify_attention_window(**faked(attend))
        r.window.abort()
        assert out.shape == r.layers[0].query.shape
        assert r.holds(before)
        assert executions() == ran


@pytest.mark.parametrize("drafts", ["none", "as in the batch"])
def test_a_warm_up_step_whose_slots_are_all_missing_stages_nothing(drafts: str) -> None:
    with rig() as r:
        before = r.rows()
        slots = torch.full_like(r.batch.slot_mapping, -1)
        counts = r.batch.num_drafts if drafts != "none" else torch.zeros_like(r.batch.num_drafts)
        r.begin(slot_mapping=slots, num_drafts=counts)
        for layer in r.layers:
            arguments = window_support.write_arguments(layer, r.batch)
            stage_kv_window(**arguments | {"slot_mapping": slots})
        assert int(r.window.tensors.state.abs().sum()) == 0
        assert r.window.metrics().nwor_unique_tokens == 0
        result = r.commit(NONE)
        assert result.error.item() == 0
        assert r.holds(before)
        metrics = r.window.metrics()
        assert (metrics.nwor_total_staged, metrics.nwor_certain_rows) == (0, 0)
        r.assert_next_window_is_clean()


def test_warm_up_leaves_counters_caches_and_routing_alone() -> None:
    with rig() as r:
        r.run(SOME)
        rows, metrics = r.rows(), r.window.metrics()
        r.window.warm_up()
        after = r.window.metrics()
        assert r.holds(rows)
        assert after.nwor_scv_vectorised == metrics.nwor_scv_vectorised + 1
        assert after.model_copy(update={"nwor_scv_vectorised": 1}) == metrics
        r.assert_next_window_is_clean()


def test_settings_come_from_the_environment_when_none_are_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "off")
    monkeypatch.setenv("VLLM_SCV_MODE", "off")
    monkeypatch.delenv("VLLM_NWOR_DEBUG", raising=False)
    key, value = caches_of(2)
    window = make_window({"x": (key, value)}, config=None)
    window.close()
    assert window.config == NworConfig(mode="off", scv="off")


def test_sizes_are_reported_as_allocated() -> None:
    with rig(layers=3, geometries=(Geometry(), Geometry(head_size=16))) as r:
        tensors = [t for b in r.window.tensors.batches for t in (*b.staged_keys, *b.staged_values)]
        assert r.window.capacity == 30
        assert r.window.staging_bytes == sum(t.numel() * t.element_size() for t in tensors)
        assert r.window.row_bytes == 3 * 2 * 2 * 4 * (8 + 16)
        assert r.window.layer_names == tuple(f"layers.{i}" for i in range(6))
