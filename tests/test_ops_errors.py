"""Every refusal: the right error, a message that names the argument, and nothing changed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    Arguments,
    Geometry,
    Span,
    accept_arguments,
    commit_arguments,
    make_batch,
    make_sampling,
    make_step,
    paged_arguments,
    same_bits,
    stage_arguments,
    verify_arguments,
    write_arguments,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nwor_compile import ops

ROOT = Path(__file__).resolve().parents[1]
Change = Callable[[Arguments], dict[str, Any]]


def arguments_of(op: str) -> Arguments:
    batch = make_batch([Span(5, 1, 3), Span(0, 4), Span(2, 1, 2)], Geometry(head_size=8))
    step = make_step(batch, layers=2)
    layer = step.layers[0]
    for tensor in (step.staged_key, step.staged_value):
        tensor.copy_(torch.randn(tensor.shape))
    if op == "accept_mask":
        return accept_arguments(batch, make_sampling(batch, [1, 0, 2]))
    if op == "commit_kv":
        accepted = torch.tensor([1, 0, 2], dtype=torch.int32)
        mask = torch.tensor([True, False, False, True, True])
        counters = torch.zeros(ops.counter_size(3), dtype=torch.int64)
        return commit_arguments(step, mask, accepted, 0, counters)
    builders: dict[str, Callable[..., Arguments]] = {
        "reshape_and_cache": write_arguments,
        "stage_kv": stage_arguments,
        "paged_attention": paged_arguments,
        "verify_attention": verify_arguments,
    }
    return builders[op](layer, batch)


def tensors_of(arguments: Arguments) -> Iterator[Tensor]:
    for value in arguments.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from value


def cut(name: str, *index: Any) -> Change:
    """An argument indexed, so that its shape is wrong."""
    return lambda a: {name: a[name][index]}


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda a: {name: a[name].to(dtype)}


def put(**values: Any) -> Change:
    return lambda a: values


def on_meta(name: str) -> Change:
    return lambda a: {name: a[name].to("meta")}


F16, F64, I8, I16 = torch.float16, torch.float64, torch.int8, torch.int16
ROWS = slice(None)

WRITE: list[tuple[str, Change, type[Exception], str]] = [
    ("key-2d", cut("key", ROWS, 0), ValueError, "key, value: expected equal shapes"),
    ("value-shape", cut("value", slice(1, None)), ValueError, "key, value: expected equal shapes"),
    ("value-dtype", cast("value", F16), TypeError, "value is torch.float16"),
    ("slots-dtype", cast("slot_mapping", torch.float32), TypeError, "slot_mapping: expected int32"),
    ("slots-2d", cut("slot_mapping", None), ValueError, "slot_mapping: expected shape"),
    ("too-many-slots", lambda a: {"slot_mapping": torch.zeros(99, dtype=torch.int64)}, ValueError,
     "slot_mapping: 99 entries for 11 rows"),
    ("cache-3d", cut("key_cache", 0), ValueError, "caches: expected 4-D"),
    ("value-cache-3d", cut("value_cache", 0), ValueError, "caches: expected 4-D"),
    ("blocks-differ", cut("value_cache", slice(1, None)), ValueError, "differ in blocks"),
    ("cache-heads", lambda a: {n: a[n][:, :, :1] for n in ("key_cache", "value_cache")}, ValueError,
     "expected rows of 2 heads x 8"),
    ("cache-size", lambda a: {n: a[n][..., :4] for n in ("key_cache", "value_cache")}, ValueError,
     "expected rows of 2 heads x 8"),
    ("value-cache-dtype", cast("value_cache", F16), TypeError, "value is torch.float16"),
    ("cache-dtype", lambda a: {n: a[n].to(F16) for n in ("key_cache", "value_cache")}, TypeError,
     "key_cache: kv_cache_dtype='auto'"),
    ("fp8-in-a-float-cache", put(kv_cache_dtype="fp8_e4m3"), TypeError, "float8_e4m3fn or"),
    ("unknown-format", put(kv_cache_dtype="int4"), ValueError, "expected one of auto, fp8"),
    ("scale-dtype", put(k_scale=torch.ones(1, dtype=F64)), ValueError, "k_scale: expected float32"),
    ("scale-length", put(v_scale=torch.ones(3)), ValueError, "v_scale: expected float32"),
    ("scale-2d", put(v_scale=torch.ones(1, 2)), ValueError, "v_scale: expected float32"),
    ("device", on_meta("slot_mapping"), ValueError, "slot_mapping on meta"),
]  # fmt: skip
STAGE = [
    *WRITE,
    ("staged-shape", cut("staged_key", ROWS, ROWS, slice(4)), ValueError, "staged_key: expected"),
    ("staged-empty", cut("staged_key", slice(0)), ValueError, "staged_key: expected [rows >= 1"),
    ("staged-differ", cut("staged_value", slice(1)), ValueError, "differ"),
    ("staged-dtypes-differ", cast("staged_value", F16), ValueError, "differ"),
    ("staged-dtype", lambda a: {n: a[n].to(F16) for n in ("staged_key", "staged_value")}, TypeError,
     "staged_key: kv_cache_dtype='auto'"),
    ("rows-short", cut("row_map", slice(10)), ValueError, "raise max_tokens"),
    ("rows-dtype", cast("row_map", I16), TypeError, "row_map: expected int32"),
    ("state-dtype", cast("stage_state", torch.int64), ValueError, "stage_state: expected int32"),
    ("state-length", cut("stage_state", slice(1)), ValueError, "stage_state: expected int32"),
    ("row-device", on_meta("row_map"), ValueError, "row_map on meta"),
]  # fmt: skip
PAGED: list[tuple[str, Change, type[Exception], str]] = [
    ("query-2d", cut("query", ROWS, 0), ValueError, "query: expected [tokens, heads"),
    ("query-size", cut("query", ROWS, ROWS, slice(4)), ValueError, "expected rows of 2 heads x 4"),
    ("query-heads", cut("query", ROWS, slice(3)), ValueError, "3 heads are no multiple"),
    ("query-dtype", cast("query", F16), TypeError, "key_cache: kv_cache_dtype='auto'"),
    ("cache-3d", cut("key_cache", 0), ValueError, "caches: expected 4-D"),
    ("lens-dtype", cast("seq_lens", torch.float32), TypeError, "seq_lens: expected int32"),
    ("lens-2d", cut("seq_lens", None), ValueError, "seq_lens: expected shape"),
    (
        "starts-short",
        cut("query_start_loc", slice(3)),
        ValueError,
        "query_start_loc: expected shape [4]",
    ),
    ("table-1d", cut("block_table", 0), ValueError, "block_table: expected [3, max_blocks]"),
    (
        "table-rows",
        cut("block_table", slice(2)),
        ValueError,
        "block_table: expected [3, max_blocks]",
    ),
    ("table-dtype", cast("block_table", torch.float32), TypeError, "block_table: expected int32"),
    ("window", put(sliding_window=-1), ValueError, "sliding_window and softcap: expected >= 0"),
    ("softcap", put(softcap=-0.5), ValueError, "sliding_window and softcap: expected >= 0"),
    ("scale-length", put(k_scale=torch.ones(3)), ValueError, "k_scale: expected float32"),
    ("format", put(kv_cache_dtype="fp16"), ValueError, "expected one of auto"),
    ("device", on_meta("block_table"), ValueError, "block_table on meta"),
]
VERIFY = [
    *PAGED,
    ("staged-shape", cut("staged_key", ROWS, slice(1)), ValueError, "staged_key: expected"),
    ("staged-dtype", lambda a: {n: a[n].to(F16) for n in ("staged_key", "staged_value")}, TypeError,
     "staged_key: kv_cache_dtype='auto'"),
    ("drafts-short", cut("num_drafts", slice(2)), ValueError, "raise max_requests"),
    ("tails-short", cut("tail_start", slice(2)), ValueError, "raise max_requests"),
    ("drafts-dtype", cast("num_drafts", I8), TypeError, "num_drafts: expected int32"),
    ("tail-device", on_meta("tail_start"), ValueError, "tail on meta"),
]  # fmt: skip
ACCEPT: list[tuple[str, Change, type[Exception], str]] = [
    ("1d", cut("sampled_ids", 0), ValueError, "sampled_ids: expected 2-D"),
    ("3d", cut("sampled_ids", None), ValueError, "sampled_ids: expected 2-D"),
    ("float-ids", cast("sampled_ids", torch.float32), TypeError, "sampled_ids: expected int32"),
    ("bool-ids", cast("sampled_ids", torch.bool), TypeError, "sampled_ids: expected int32"),
    ("float-drafts", cast("draft_ids", torch.float32), TypeError, "draft_ids: expected int32"),
    ("drafts-2d", cut("draft_ids", None), ValueError, "draft_ids: expected shape"),
    (
        "counts-short",
        cut("cu_num_drafts", slice(2)),
        ValueError,
        "cu_num_drafts: expected shape [3]",
    ),
    ("counts-dtype", cast("cu_num_drafts", I16), TypeError, "cu_num_drafts: expected int32"),
    ("sampled-short", cut("num_sampled", slice(2)), ValueError, "num_sampled: expected shape [3]"),
    ("sampled-dtype", cast("num_sampled", torch.float32), TypeError, "num_sampled: expected int32"),
    ("device", on_meta("draft_ids"), ValueError, "draft_ids on meta"),
]


def first_of(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """The caches of a list, the second one changed: the first layer is fine."""
    return lambda a: {name: [a[name][0], change(a[name][1])]}


def each(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Every tensor of a list changed."""
    return lambda a: {name: [change(tensor) for tensor in a[name]]}


def restrided(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


COMMIT: list[tuple[str, Change, type[Exception], str]] = [
    ("no-layers", put(key_caches=[], value_caches=[]), ValueError, "caches: expected as many"),
    ("fewer-values", lambda a: {"value_caches": a["value_caches"][:1]}, ValueError,
     "expected as many"),
    ("staged-layers", lambda a: {"staged_keys": a["staged_keys"][:1]}, ValueError,
     "staged_keys: expected one for each of 2 layers, got 1"),
    ("staged-2d", each("staged_values", lambda t: t[0]), ValueError,
     "staged_values: expected [rows, kv_heads, head_size] a layer"),
    ("staged-second-shape", first_of("staged_keys", lambda t: t[1:]), ValueError,
     "staged_keys: layer 1 has"),
    ("staged-second-strides", first_of("staged_values", lambda t: restrided(t[None])[0]),
     ValueError, "staged_values: layer 1 has"),
    ("staged-second-dtype", first_of("staged_keys", lambda t: t.view(torch.int32)), TypeError,
     "staged_keys: layer 1 is torch.int32"),
    ("staged-differ", each("staged_values", lambda t: t[:2]), ValueError,
     "staged_keys and staged_values: expected equal shapes"),
    ("staged-value-dtype", each("staged_values", lambda t: t.to(torch.int32)), TypeError,
     "staged_values are torch.int32"),
    ("staged-dtype", lambda a: {n: [t.to(F16) for t in a[n]]
                                for n in ("staged_keys", "staged_values")},
     TypeError, "staged rows are torch.float16, the cache is torch.float32"),
    ("staged-bits", lambda a: {n: [t.view(torch.int32) for t in a[n]]
                               for n in ("staged_keys", "staged_values")},
     TypeError, "staged rows are torch.int32"),
    ("no-staging-row", lambda a: {"rows": torch.zeros(5, dtype=torch.int32)}
     | {n: [t[:0] for t in a[n]] for n in ("staged_keys", "staged_values")},
     ValueError, "at least one staging row"),
    ("rows-short", put(rows=torch.zeros(4, dtype=torch.int32)), ValueError,
     "rows: expected int32 [at least 5]"),
    ("rows-dtype", put(rows=torch.zeros(5, dtype=torch.int64)), ValueError, "rows: expected int32"),
    ("rows-2d", put(rows=torch.zeros(5, 1, dtype=torch.int32)), ValueError,
     "rows: expected int32"),
    ("rows-device", put(rows=torch.zeros(5, dtype=torch.int32, device="meta")), ValueError,
     "rows on meta"),
    ("table-of-caches-alone", put(cache_table=torch.zeros(2, 2, dtype=torch.int64)), ValueError,
     "cache_table: expected int64 [4, layers = 2]"),
    ("table-dtype", put(cache_table=torch.zeros(4, 2)), ValueError, "cache_table: expected int64"),
    ("second-layer-blocks", first_of("key_caches", lambda t: t[1:]), ValueError, "layer 1 has key"),
    ("second-layer-strides", first_of("key_caches", restrided),
     ValueError, "layer 1 has key"),
    ("second-value-strides", first_of("value_caches", restrided),
     ValueError, "layer 1 has key"),
    ("second-value-dtype", first_of("value_caches", lambda t: t.view(torch.int32)), ValueError,
     "layer 1 has key"),
    ("slots-short", cut("slots", slice(4)), ValueError, "slots: expected at least 5"),
    ("slots-dtype", cast("slots", torch.float32), TypeError, "slots: expected int32"),
    ("mask-dtype", cast("mask", torch.int32), ValueError, "mask: expected bool"),
    ("mask-2d", cut("mask", None), ValueError, "mask: expected bool"),
    ("mask-long", put(mask=torch.ones(99, dtype=torch.bool)), ValueError,
     "mask: expected at most 7 entries"),
    ("drafts-length", cut("num_drafts", slice(2)), ValueError, "num_drafts: expected shape [3]"),
    ("accepted-dtype", cast("accepted", torch.float32), TypeError, "accepted: expected int32"),
    ("accepted-0d", cut("accepted", 0), ValueError, "accepted: expected shape"),
    ("error-shape", put(error=torch.zeros((), dtype=torch.int32)), ValueError,
     "error: expected int32 [1]"),
    ("error-two", put(error=torch.zeros(2, dtype=torch.int32)), ValueError,
     "error: expected int32 [1]"),
    ("error-dtype", put(error=torch.zeros(1, dtype=torch.bool)), ValueError,
     "error: expected int32 [1]"),
    ("counters-short", cut("counters", slice(3)), ValueError, "counters: expected int64"),
    ("counters-dtype", cast("counters", torch.int32), ValueError, "counters: expected int64"),
    ("device", on_meta("mask"), ValueError, "mask on meta"),
]  # fmt: skip
REFUSALS = [
    pytest.param(op, change, error, message, id=f"{op}-{name}")
    for op, cases in (
        ("reshape_and_cache", WRITE),
        ("stage_kv", STAGE),
        ("paged_attention", PAGED),
        ("verify_attention", VERIFY),
        ("accept_mask", ACCEPT),
        ("commit_kv", COMMIT),
    )
    for name, change, error, message in cases
]


@pytest.mark.parametrize(("op", "change", "error", "message"), REFUSALS)
def test_a_bad_argument_is_refused_and_nothing_changes(
    op: str, change: Change, error: type[Exception], message: str
) -> None:
    good = arguments_of(op)
    bad = good | change(good)
    watched = [t for t in (*tensors_of(good), *tensors_of(bad)) if t.device.type != "meta"]
    before = [t.clone() for t in watched]
    with pytest.raises(error, match=re.escape(message)):
        getattr(ops, op)(**bad)
    assert all(same_bits(tensor, copy) for tensor, copy in zip(watched, before, strict=True))


@pytest.mark.parametrize("op", ["reshape_and_cache", "stage_kv", "paged_attention",
                                "verify_attention", "accept_mask", "commit_kv"])  # fmt: skip
def test_the_unchanged_arguments_are_accepted(op: str) -> None:
    """Otherwise the refusals above would prove nothing."""
    getattr(ops, op)(**arguments_of(op))


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("reshape_and_cache", put(kv_cache_dtype="int4"), "expected one of auto"),
        ("stage_kv", cut("row_map", slice(3)), "raise max_tokens"),
        ("paged_attention", put(softcap=-1.0), "expected >= 0"),
        ("verify_attention", cut("num_drafts", slice(1)), "raise max_requests"),
        ("accept_mask", cut("sampled_ids", 0), "expected 2-D"),
        ("commit_kv", each("staged_keys", lambda t: t[0]), "expected [rows, kv_heads"),
    ],
)
def test_a_bad_call_fails_already_while_it_is_traced(op: str, change: Change, message: str) -> None:
    good = arguments_of(op)
    bad = good | change(good)
    with FakeTensorMode() as mode:
        fake = {
            name: [mode.from_tensor(t) for t in value]
            if isinstance(value, list)
            else mode.from_tensor(value)
            if isinstance(value, Tensor)
            else value
            for name, value in bad.items()
        }
        with pytest.raises(ValueError, match=re.escape(message)):
            getattr(ops, op)(**fake)


def test_an_unknown_implementation_is_refused() -> None:
    before = ops.set_implementation("reference")
    try:
        with pytest.raises(ValueError, match="expected auto, reference or triton, got 'nonsense'"):
            ops.set_implementation("nonsense")  # type: ignore[arg-type]
        assert ops.set_implementation("reference") == "reference"
    finally:
        ops.set_implementation(before)


def test_the_implementation_is_restored_after_an_exception() -> None:
    before = ops.set_implementation("auto")
    try:
        with pytest.raises(KeyError), ops.implementation("reference"):
            raise KeyError
        assert ops.set_implementation("auto") == "auto"
    finally:
        ops.set_implementation(before)


def test_import_ops_from_the_root_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ops"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "ImportError: expected to be imported as 'nwor_compile.ops'" in done.stderr


def test_ops_import_without_triton_and_vllm() -> None:
    code = (
        "import sys; sys.modules['triton'] = sys.modules['vllm'] = None\n"
        "import torch, nwor_compile.ops as ops\n"
        "cache, row = [torch.zeros(2, 4, 1, 8) for _ in range(2)], torch.ones(1, 1, 8)\n"
        "ops.reshape_and_cache(row, row, *cache, torch.tensor([5]))\n"
        "assert cache[0][1, 1].eq(1).all() and cache[0].sum() == 8"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
