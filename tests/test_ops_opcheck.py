"""`torch.library.opcheck` of every op and overload, and no op whose shapes depend on data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    Arguments,
    Batch,
    Geometry,
    Layer,
    Span,
    Step,
    accept_arguments,
    commit_arguments,
    make_batch,
    make_sampling,
    make_step,
    paged_arguments,
    stage_arguments,
    stage_exactly,
    verify_arguments,
    write_arguments,
)
from torch.utils._python_dispatch import TorchDispatchMode

from nwor_compile import ops
from nwor_compile.ops import attention, cache_write, commit, scv, staging

SPANS = [Span(5, 1, 3), Span(0, 6), Span(0, 0), Span(9, 1), Span(2, 1, 2)]
GEOMETRIES = {
    "nhd": Geometry(),
    "hnd-bf16": Geometry("hnd", torch.bfloat16),
    "packed-uint8": Geometry("packed", torch.bfloat16, "fp8_e4m3", as_uint8=True, scale="head"),
    "nhd-fp8": Geometry("nhd", torch.bfloat16, "fp8_e4m3", scale="head"),
    "5d-uint8": Geometry("5d", torch.float16, "fp8_e5m2", as_uint8=True, scale="tensor"),
}


def staged_step(geometry: Geometry, layers: int = 1) -> Step:
    step = make_step(make_batch(SPANS, geometry, padding=2), layers)
    for tensor in (step.staged_key, step.staged_value):  # opcheck compares with NaN unequal
        if geometry.kv_cache_dtype == "auto":
            tensor.zero_()
        else:
            tensor.view(torch.uint8).zero_()
    for layer in step.layers:
        stage_exactly(layer, step.batch)
    return step


def commit_case(step: Step) -> Arguments:
    mask = torch.tensor([True, False, False, True, True])
    accepted = torch.tensor([1, 0, 0, 0, 2], dtype=torch.int32)
    counters = torch.zeros(ops.counter_size(3), dtype=torch.int64)
    return commit_arguments(step, mask, accepted, 0, counters)


def accept_case(step: Step) -> Arguments:
    return accept_arguments(step.batch, make_sampling(step.batch, [1, 0, 0, 0, 2]))


def paged_out_case(step: Step) -> Arguments:
    arguments = paged_arguments(step.layers[0], step.batch)
    return {"out": torch.zeros_like(arguments["query"]), **arguments}


def overload_of(name: str) -> torch._ops.OpOverload:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.nwor, packet), overload or "default")


def of_layer(build: Callable[..., Arguments], **options: Any) -> Callable[[Step], Arguments]:
    return lambda step: build(step.layers[0], step.batch, **options)


CASES: dict[str, tuple[Callable[[Step], Arguments], Callable[..., Any]]] = {
    "reshape_and_cache": (of_layer(write_arguments), cache_write.reshape_and_cache_reference),
    "stage_kv": (of_layer(stage_arguments), cache_write.stage_kv_reference),
    "accept_mask": (accept_case, scv.accept_mask_reference),
    "commit_kv": (commit_case, commit.commit_kv_reference),
    "paged_attention": (of_layer(paged_arguments), attention.paged_attention_reference),
    "paged_attention_out": (paged_out_case, attention.paged_attention_out_reference),
    "verify_attention": (
        of_layer(verify_arguments, sliding_window=4, softcap=20.0),
        attention.verify_attention_reference,
    ),
}
WINDOW: dict[str, Callable[..., Arguments]] = {
    "stage_kv.window": write_arguments,
    "verify_attention.window": paged_arguments,
}


# Checked in test_rope.py.
ROPE = ["rope_stage_kv", "rope_stage_kv.window", "rope_stage_kv.window_", "rotary_embedding"]

TESTS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
# These two compare values with allclose, which torch 2.13 has for no float8 dtype on the CPU. The
# uint8 geometries run the same code on the same bits through all four.
NEED_ALLCLOSE = ("test_schema", "test_aot_dispatch_dynamic")


def check(overload: torch._ops.OpOverload, arguments: Arguments) -> None:
    values = [
        v for value in arguments.values() for v in (value if isinstance(value, list) else [value])
    ]
    has_float8 = any(isinstance(v, torch.Tensor) and "float8" in str(v.dtype) for v in values)
    tests = tuple(t for t in TESTS if not (has_float8 and t in NEED_ALLCLOSE))
    results = torch.library.opcheck(overload, (), arguments, test_utils=tests)
    assert results == dict.fromkeys(tests, "SUCCESS")


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("op", CASES)
def test_opcheck(op: str, geometry: str) -> None:
    step = staged_step(GEOMETRIES[geometry], layers=2 if op == "commit_kv" else 1)
    check(overload_of(op), CASES[op][0](step))


def test_opcheck_of_optional_arguments() -> None:
    step = staged_step(Geometry(), layers=2)
    arguments = commit_case(step)
    lists = ("key_caches", "value_caches", "staged_keys", "staged_values")
    table = ops.cache_table(*(arguments[name] for name in lists))
    rows = torch.tensor([4, 1, 0, 2, 3, 6], dtype=torch.int32)
    changed = {"counters": None, "cache_table": table, "rows": rows}
    check(torch.ops.nwor.commit_kv.default, arguments | changed)
    sampled = torch.tensor([[1, -1], [3, 4]])
    empty = torch.zeros(0, dtype=torch.int64)
    check(
        torch.ops.nwor.accept_mask.default,
        {"sampled_ids": sampled, "draft_ids": empty, "cu_num_drafts": torch.zeros(2).long()},
    )


@pytest.mark.parametrize("op", ["paged_attention", "verify_attention"])
@pytest.mark.parametrize("empty", [True, False])
def test_opcheck_of_attention_over_a_strided_query(op: str, empty: bool) -> None:
    """The result is contiguous whatever the query's strides, as the fake function says."""
    batch = make_batch([] if empty else SPANS, padding=5)
    layer = make_step(batch).layers[0]
    stage_exactly(layer, batch)
    for tensor in (layer.staged_key, layer.staged_value):
        tensor.nan_to_num_(0.0)
    query = layer.query.transpose(0, 1).contiguous().transpose(0, 1)
    build = paged_arguments if op == "paged_attention" else verify_arguments
    check(getattr(torch.ops.nwor, op).default, build(layer, batch) | {"query": query})


def registered(layer: Layer, batch: Batch, name: str = "layer") -> staging.LayerStaging:
    routing = staging.Routing(batch.row_map, batch.num_drafts, batch.tail_start)
    return staging.LayerStaging(name, layer.staged_key, layer.staged_value, layer.state, routing)


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("op", WINDOW)
def test_opcheck_of_a_window_overload_on_an_unregistered_cache(op: str, geometry: str) -> None:
    step = staged_step(GEOMETRIES[geometry])
    check(overload_of(op), WINDOW[op](step.layers[0], step.batch))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("op", WINDOW)
def test_opcheck_of_a_window_overload_on_a_registered_layer(
    op: str, geometry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """opcheck works on copies, whose addresses nobody registered: every cache is the layer's."""
    step = staged_step(GEOMETRIES[geometry])
    layer = registered(step.layers[0], step.batch)
    found = []

    def lookup(key_cache: torch.Tensor, value_cache: torch.Tensor) -> staging.LayerStaging:
        found.append(key_cache)
        return layer

    monkeypatch.setattr(staging, "lookup", lookup)
    check(overload_of(op), WINDOW[op](step.layers[0], step.batch))
    assert found


def test_every_op_and_overload_is_checked_here() -> None:
    assert sorted([*CASES, *WINDOW, *ROPE]) == sorted(ops.OP_NAMES)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_window_overload_is_the_explicit_op_of_its_registered_layer(geometry: str) -> None:
    step, twin = (make_step(make_batch(SPANS, GEOMETRIES[geometry])) for _ in range(2))
    layer, other, batch = step.layers[0], twin.layers[0], step.batch
    staging.register_layer(layer.cache.key, layer.cache.value, registered(layer, batch))
    try:
        before = staging.executions()
        torch.ops.nwor.stage_kv.window(**write_arguments(layer, batch))
        assert staging.executions() == before + 1
        out = torch.ops.nwor.verify_attention.window(**paged_arguments(layer, batch))
    finally:
        staging.unregister_layer(layer.cache.key)
    ops.stage_kv(**stage_arguments(other, batch))
    assert layer.state.tolist() == other.state.tolist() == [5, 0]
    assert layer.cache.holds(other.cache.rows())
    assert torch.equal(out, ops.verify_attention(**verify_arguments(other, batch)))


def test_a_window_overload_is_the_direct_op_for_an_unregistered_cache() -> None:
    step, twin = (make_step(make_batch(SPANS)) for _ in range(2))
    layer, other, batch = step.layers[0], twin.layers[0], step.batch
    before = staging.executions()
    torch.ops.nwor.stage_kv.window(**write_arguments(layer, batch))
    out = torch.ops.nwor.verify_attention.window(**paged_arguments(layer, batch))
    assert staging.executions() == before
    ops.reshape_and_cache(**write_arguments(other, batch))
    assert layer.cache.holds(other.cache.rows())
    assert torch.equal(out, ops.paged_attention(**paged_arguments(other, batch)))


# Invariant 7 -----------------------------------------------------------------------------------


class DataDependentError(AssertionError):
    """An op read a value on the host or made a shape out of data."""


class NoDataDependence(TorchDispatchMode):
    """Fails on every op that synchronises with the device."""

    FORBIDDEN = frozenset(
        (
            "aten._local_scalar_dense",
            "aten.item",
            "aten.nonzero",
            "aten.nonzero_numpy",
            "aten.argwhere",
            "aten.masked_select",
            "aten._unique",
            "aten._unique2",
            "aten.unique_dim",
            "aten.unique_consecutive",
            "aten.unique_dim_consecutive",
            "aten.bincount",
            "aten.equal",
            "aten.is_nonzero",
            "aten.repeat_interleave",
            "aten._to_copy.to_host",
        )
    )
    INDEXING = ("aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_")

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ) -> Any:
        self.seen += 1
        name = str(func).rpartition(".")[0]
        if name in self.FORBIDDEN:
            raise DataDependentError(name)
        if name in self.INDEXING:
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            if masks:
                raise DataDependentError(f"{name} with a bool mask")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("op", CASES)
def test_a_reference_depends_on_no_data(op: str, geometry: str) -> None:
    step = staged_step(GEOMETRIES[geometry], layers=2 if op == "commit_kv" else 1)
    build, reference = CASES[op]
    arguments = build(step)
    with NoDataDependence() as trace:
        reference(**arguments)
    assert trace.seen > 5


@pytest.mark.parametrize("op", CASES)
def test_an_op_reads_no_value_in_its_checks(op: str) -> None:
    """The same through the registered op, checks included: meta tensors have no values to read.

    This also catches `tolist()` and `numpy()`, which no dispatch mode sees on the CPU.
    """
    step = staged_step(Geometry(), layers=2 if op == "commit_kv" else 1)

    def to_meta(value: Any) -> Any:
        if isinstance(value, list):
            return [to_meta(v) for v in value]
        return value.to("meta") if isinstance(value, torch.Tensor) else value

    with ops.implementation("reference"):
        arguments = {name: to_meta(v) for name, v in CASES[op][0](step).items()}
        overload_of(op)(**arguments)


@pytest.mark.parametrize(
    "code",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.masked_select(t > 0),
        lambda t: t.unique(),
        lambda t: t.__setitem__(t > 0, t[:1]),
        lambda t: torch.repeat_interleave(t.long()),
        lambda t: torch.equal(t, t.clone()),
    ],
)
def test_the_trace_itself_catches_data_dependence(code: Callable[[torch.Tensor], Any]) -> None:
    with NoDataDependence(), pytest.raises(DataDependentError):
        code(torch.tensor([0.0, 1.0, 2.0]))
