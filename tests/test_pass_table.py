"""The op table: further ops by a row, vLLM's ops by name, and rows that do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
from graphs import BLOCK, BLOCKS, FORMS, KV_HEADS, SCALE, SIZE, STAGED, Step, targets, trace
from torch import Tensor
from torch.library import Library

from nwor_compile.ops.attention import paged_attention_reference
from nwor_compile.passes import (
    CacheReader,
    CacheWrite,
    NworPass,
    register_reader,
    register_write,
    rewrite,
    table,
)

NAMES = {"k": "key", "v": "value", "k_cache": "key_cache", "v_cache": "value_cache"}
SHORT = NAMES | {"slots": "slot_mapping", "fmt": "kv_cache_dtype", "ks": "k_scale", "vs": "v_scale"}
LOOK = {"k": "key_cache", "v": "value_cache", "blocks": "block_table", "fmt": "kv_cache_dtype"}


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a test vanish with it."""
    monkeypatch.setattr(table, "_writes", dict(table._writes))
    monkeypatch.setattr(table, "_readers", dict(table._readers))


class Ops:
    """A namespace of its own for a test's ops: torch does not like names to be defined again."""

    _count = itertools.count()

    def __init__(self) -> None:
        self.ns = f"nwor_table_{next(self._count)}"
        self._library = Library(self.ns, "DEF")
        _libraries.append(self._library)

    def define(self, signature: str, run: Callable[..., Any] | None = None) -> None:
        define(self._library, signature, run)

    def write_row(self, **fields: Any) -> CacheWrite:
        fields = {"rename": SHORT, "key_cache": "k_cache", "value_cache": "v_cache"} | fields
        return CacheWrite(f"{self.ns}::put", **fields)

    def reader_row(self, **fields: Any) -> CacheReader:
        return CacheReader(
            f"{self.ns}::look", **{"rename": LOOK, "key_cache": "k", "value_cache": "v"} | fields
        )

    def register(self, write: str, reader: str) -> None:
        """Define both ops by their schemas, and give them their rows."""
        self.define(write, put)
        self.define(reader, look)
        register_write(self.write_row())
        register_reader(self.reader_row())

    def layer(self, step: Step, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        """A layer through these ops, called as packets and partly by name."""
        ops = getattr(torch.ops, self.ns)
        ops.put(step.key, step.value, key_cache, slots=step.slots, v_cache=value_cache)
        out: Tensor = ops.look(
            step.query, key_cache, value_cache, step.table, step.lens, step.starts
        )
        return out


_libraries: list[Library] = []


@pytest.fixture
def ops() -> Ops:
    return Ops()


def define(lib: Library, signature: str, run: Callable[..., Any] | None) -> None:
    name = signature.split("(", 1)[0]
    lib.define(signature)
    if run is None:
        return

    def fake(first: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        return None if signature.endswith("-> ()") else torch.empty_like(first)

    lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{lib.ns}::{name}", fake, lib=lib)


def put(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *options: Any
) -> None:
    """The plainest paged write there is."""
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // BLOCK, slot % BLOCK] = k[token]
            v_cache[slot // BLOCK, slot % BLOCK] = v[token]


def look(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float = SCALE,
    fmt: str = "auto",
) -> Tensor:
    return paged_attention_reference(
        query, k, v, blocks, seq_lens, query_start_loc, scale, 0, 0.0, fmt
    )


PUT = (
    "put(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, "
    'str fmt="auto", Tensor? ks=None, Tensor? vs=None) -> ()'
)
LOOK_SCHEMA = (
    "look(Tensor query, Tensor k, Tensor v, Tensor blocks, Tensor seq_lens, "
    f'Tensor query_start_loc, float scale={SCALE!r}, str fmt="auto") -> Tensor'
)


@pytest.mark.parametrize("form", FORMS)
def test_a_registered_op_with_other_argument_names_is_staged(form: str, ops: Ops) -> None:
    ops.register(PUT, LOOK_SCHEMA)
    graph = trace(ops.layer, graphs.verify_step(), *graphs.make_caches(), form=form)
    report = rewrite(graph)
    assert targets(graph) == STAGED, report
    names = {argument.name for argument in graphs.stage_window._schema.arguments}
    for node in graph.nodes:
        if node.args[:1] == (graphs.stage_window,):
            given = {key for key in node.kwargs if not key.startswith("_")}
            assert given <= names
            mutated = [key for key in node.kwargs if key.endswith("_base_index")]
            assert form == "v1" or mutated == ["_key_cache_base_index", "_value_cache_base_index"]
        if node.target is graphs.verify_window:
            # The twin has no default for the scale, so the op's own is written out.
            assert node.args[6] == SCALE


def test_a_packet_from_dynamo_is_known_by_its_only_overload(ops: Ops) -> None:
    ops.register(PUT, LOOK_SCHEMA)
    step, caches = graphs.verify_step(), graphs.make_caches()
    direct = [cache.clone() for cache in caches]
    want = ops.layer(step, *direct)
    outcome = graphs.run_window(
        graphs.rewritten(ops.layer), step, {"layer": (caches[0], caches[1])}, *caches
    )
    assert torch.equal(outcome.out, want)
    graphs.assert_staged(outcome, direct, step)


def test_a_packet_of_several_overloads_is_not_taken_for_one(ops: Ops) -> None:
    ops.register(PUT, LOOK_SCHEMA)
    ops.define(PUT.replace("put(", "put.other("))
    graph = trace(ops.layer, graphs.verify_step(), *graphs.make_caches(), form="plain")
    assert not rewrite(graph).decisions


def test_a_default_that_the_twin_does_not_share_is_written_out(
    ops: Ops,
) -> None:
    ops.register(PUT.replace('"auto"', '"fp8_e4m3"'), LOOK_SCHEMA.replace('"auto"', '"fp8_e4m3"'))
    step = graphs.verify_step()
    caches = [torch.zeros(BLOCKS, BLOCK, KV_HEADS, SIZE, dtype=torch.uint8) for _ in range(2)]
    graph = trace(ops.layer, step, *caches, form="plain")
    assert rewrite(graph).rewritten
    calls = [
        node for node in graph.nodes if node.target in (graphs.stage_window, graphs.verify_window)
    ]
    assert ["fp8_e4m3" in (*node.args, *node.kwargs.values()) for node in calls] == [True, True]


def test_readers_and_writes_that_differ_in_a_default_format_do_not_match(
    ops: Ops,
) -> None:
    ops.register(PUT, LOOK_SCHEMA.replace('"auto"', '"fp8_e4m3"'))
    graph = trace(ops.layer, graphs.verify_step(), *graphs.make_caches(), form="plain")
    (refused,) = rewrite(graph).refused
    assert "another kv_cache_dtype" in refused.reason


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "mutates one cache": (PUT.replace("(b!)", ""), {}, "its schema mutates"),
    "mutates in another order": (
        PUT.replace("k_cache,", "x,").replace("v_cache", "k_cache").replace("x,", "v_cache,"),
        {},
        "its schema mutates",
    ),
    "returns something": (PUT.replace("-> ()", "-> Tensor"), {}, "expected no result"),
    "takes what the twin does not": (
        PUT.replace("Tensor? ks", "int extra=0, Tensor? ks"), {}, "has no argument extra"
    ),
    "another type": (
        PUT.replace('str fmt="auto"', "int fmt=0"), {}, "argument kv_cache_dtype is"
    ),
    "lacks what the twin needs": (
        PUT.replace("Tensor slots, ", ""),
        {"rename": {name: new for name, new in SHORT.items() if name != "slots"}},
        "needs an argument slot_mapping",
    ),
    "renames what is not there": (PUT, {"rename": SHORT | {"z": "w"}}, "no argument z to rename"),
    "two become one": (PUT, {"rename": SHORT | {"vs": "k_scale"}}, "two of its arguments become"),
    "reader that mutates": (
        LOOK_SCHEMA.replace("Tensor k,", "Tensor(a!) k,"), {}, "expected it to mutate []"
    ),
    "reader without such a cache": (LOOK_SCHEMA, {"key_cache": "keys"}, "no argument keys"),
    "reader of several results": (
        LOOK_SCHEMA.replace("-> Tensor", "-> (Tensor, Tensor)"), {}, "expected one result"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_does_not_fit_its_op_is_refused(case: str, ops: Ops) -> None:
    schema, fields, message = BAD[case]
    ops.define(schema)
    before = list(table.rows())
    writes = schema.startswith("put")
    row: Any = ops.write_row(**fields) if writes else ops.reader_row(**fields)
    register: Any = register_write if writes else register_reader
    with pytest.raises(ValueError, match=f"{ops.ns}|nwor::") as error:
        register(row)
    assert message in str(error.value)
    assert list(table.rows()) == before


def test_an_op_defined_after_its_row_is_held_against_it_in_the_graph(ops: Ops) -> None:
    register_write(ops.write_row())
    register_reader(ops.reader_row())
    ops.define(PUT.replace("Tensor? ks", "int extra=0, Tensor? ks"), put)
    ops.define(LOOK_SCHEMA, look)
    graph = trace(ops.layer, graphs.verify_step(), *graphs.make_caches(), form="plain")
    (refused,) = rewrite(graph).refused
    assert "has no argument extra" in refused.reason


@pytest.mark.parametrize("missing", ["write", "reader"])
def test_a_twin_that_does_not_exist_keeps_the_write_direct(missing: str, ops: Ops) -> None:
    ops.define(PUT, put)
    ops.define(LOOK_SCHEMA, look)
    later = {"staged": f"{ops.ns}::later"}
    register_write(ops.write_row(**(later if missing == "write" else {})))
    register_reader(ops.reader_row(**(later if missing == "reader" else {})))
    graph = trace(ops.layer, graphs.verify_step(), *graphs.make_caches(), form="plain")
    (refused,) = rewrite(graph).refused
    assert f"twin {ops.ns}::later is not registered" in refused.reason


def test_rows_may_be_repeated_but_not_contradicted(ops: Ops) -> None:
    ops.define(PUT, put)
    register_write(ops.write_row())
    count = len(list(table.rows()))
    register_write(ops.write_row())
    assert len(list(table.rows())) == count
    with pytest.raises(ValueError, match="already in the table"):
        register_write(ops.write_row(rename=NAMES))


def test_rows_of_the_other_kind_are_refused(ops: Ops) -> None:
    with pytest.raises(TypeError, match="expected a CacheWrite, got CacheReader"):
        register_write(ops.reader_row())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected a CacheReader, got CacheWrite"):
        register_reader(ops.write_row())  # type: ignore[arg-type]


def test_a_row_changes_the_pass_uuid(ops: Ops) -> None:
    before = NworPass().uuid()
    register_write(ops.write_row())
    with_write = NworPass().uuid()
    register_reader(ops.reader_row())
    assert len({before, with_write, NworPass().uuid()}) == 3


# --- vLLM's writers, as stand-ins with vLLM's schemas ---

VLLM = (
    "(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()"
)
X = 4  # elements that vLLM's 5-D key cache keeps together


def put_5d(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, *options: Any
) -> None:
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            k_cache[slot // BLOCK, :, :, slot % BLOCK] = k[token].view(KV_HEADS, SIZE // X, X)
            v_cache[slot // BLOCK, :, :, slot % BLOCK] = v[token]


@pytest.fixture(scope="module")
def vllm_ops() -> None:
    if hasattr(torch.ops._C_cache_ops, "reshape_and_cache_flash"):
        pytest.skip("vLLM's own ops are loaded")
    lib = Library("_C_cache_ops", "FRAGMENT")
    _libraries.append(lib)
    define(lib, f"reshape_and_cache_flash{VLLM}", put)
    define(lib, f"reshape_and_cache{VLLM}", put_5d)


def vllm_layer(op: str) -> Callable[..., Tensor]:
    def fn(step: Step, key_cache: Tensor, value_cache: Tensor, one: Tensor) -> Tensor:
        getattr(torch.ops._C_cache_ops, op)(
            step.key, step.value, key_cache, value_cache, step.slots, "auto", one, one
        )
        return graphs.read(step, key_cache, value_cache)

    return fn


@pytest.mark.usefixtures("vllm_ops")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["reshape_and_cache_flash", "reshape_and_cache"])
def test_vllms_writers_are_known_by_name(op: str, form: str) -> None:
    step, one = graphs.verify_step(), torch.ones(1)
    caches = graphs.make_caches() if op.endswith("flash") else caches_5d()
    graph = trace(vllm_layer(op), step, *caches, one, form=form)
    report = rewrite(graph)
    assert [decision.op for decision in report.rewritten] == [f"_C_cache_ops::{op}"]
    assert targets(graph) == STAGED


@pytest.mark.usefixtures("vllm_ops")
@pytest.mark.parametrize("op", ["reshape_and_cache_flash", "reshape_and_cache"])
def test_a_step_through_vllms_writer_keeps_drafts_out_of_the_cache(op: str) -> None:
    step, one, fn = graphs.verify_step(), torch.ones(1), vllm_layer(op)
    flash = op.endswith("flash")
    caches = graphs.make_caches() if flash else caches_5d()
    logical = graphs.as_stored if flash else graphs.from_5d
    direct = [cache.clone() for cache in caches]
    want = fn(step, *direct, one)
    layers = {"layer": (caches[0], caches[1])}
    outcome = graphs.run_window(graphs.rewritten(fn), step, layers, *caches, one, logical=logical)
    assert torch.equal(outcome.out, want)
    graphs.assert_staged(outcome, list(logical(*direct)), step)


def caches_5d() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    key = torch.randn(BLOCKS, KV_HEADS, SIZE // X, BLOCK, X, generator=generator)
    return [key, torch.randn(BLOCKS, KV_HEADS, SIZE, BLOCK, generator=generator)]
