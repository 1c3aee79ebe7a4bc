"""RoPE and the staged write of a layer in one op, where a layer name stands for the cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from graphs import compact, trace
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from nwor_compile.ops.rope import rotary_embedding_reference
from nwor_compile.passes.calls import callee
from nwor_compile.passes.layer_ops import LayerOps, rewrite_layers
from nwor_compile.passes.report import Report

HEADS, KV_HEADS, SIZE, HIDDEN, POSITIONS = 3, 1, 8, 16, 32
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]

# ---- ops shaped like vLLM's, which remember what they were given --------------------------------

_library = torch.library.Library("nwor_rope_test", "FRAGMENT")
WRITE = "(Tensor key, Tensor value, str layer_name) -> Tensor"
ATTENTION = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a3!) output, str layer_name, "
    "Tensor? kv_cache_dummy_dep=None) -> ()"
)
ROPE_WRITE = (
    "(Tensor(a0!) query, Tensor(a1!) key, Tensor value, Tensor positions, Tensor cos_sin_cache, "
    "bool is_neox, str layer_name) -> Tensor"
)
_written: dict[str, tuple[Tensor, Tensor]] = {}


def _write(key: Tensor, value: Tensor, layer_name: str) -> Tensor:
    _written[layer_name] = (key.clone(), value.clone())
    return key.new_empty(0)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, output: Tensor, layer_name: str,
    kv_cache_dummy_dep: Tensor | None = None,
) -> None:  # fmt: skip
    rows, values = _written[layer_name]
    assert torch.equal(rows, key)
    assert torch.equal(values, value)
    output.copy_(query.to(rows.dtype) * rows.sum(1, keepdim=True) + values.sum(1, keepdim=True))


def _rope_write(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, table: Tensor, is_neox: bool,
    layer_name: str,
) -> Tensor:  # fmt: skip
    rotary_embedding_reference(positions, query, key, query.shape[2], table, is_neox)
    return _write(key, value, layer_name)


for _name, _schema, _op in (
    ("write", WRITE, _write), ("staged_write", WRITE, _write),
    ("attention", ATTENTION, _attend), ("staged_attention", ATTENTION, _attend),
    ("rope_write", ROPE_WRITE, _rope_write),
):  # fmt: skip
    _library.define(_name + _schema)
    _library.impl(_name, _op, "CPU")
    _fake = (lambda *a, **k: None) if _schema is ATTENTION else (lambda x, *a, **k: x.new_empty(0))
    torch.library.register_fake(f"nwor_rope_test::{_name}", _fake, lib=_library)

SPACE = torch.ops.nwor_rope_test
OPS = LayerOps(*(f"nwor_rope_test::{name}" for name in (
    "write", "staged_write", "attention", "staged_attention", "rope_write",
)))  # fmt: skip

# ---- a layer as vLLM writes it ------------------------------------------------------------------


def turn(x: Tensor, cos: Tensor, sin: Tensor, is_neox: bool) -> Tensor:
    """vLLM's `ApplyRotaryEmb.forward_static`."""
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    if is_neox:
        x1, x2 = torch.chunk(x, 2, dim=-1)
    else:
        x1, x2 = x[..., ::2], x[..., 1::2]
    o1 = x1 * cos - x2 * sin
    o2 = x2 * cos + x1 * sin
    if is_neox:
        return torch.cat((o1, o2), dim=-1)
    return torch.stack((o1, o2), dim=-1).flatten(-2)


def angles(positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = table.index_select(0, positions.flatten()).chunk(2, dim=-1)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, is_neox: bool) -> Tensor:
    """One of q and k in vLLM's `RotaryEmbedding.forward_static`."""
    shape = x.shape
    x = x.view(cos.shape[0], -1, SIZE)
    turned = turn(x[..., :rotary], cos, sin, is_neox)
    return torch.cat((turned, x[..., rotary:]), dim=-1).reshape(shape)


def rope(
    positions: Tensor, q: Tensor, k: Tensor, table: Tensor, is_neox: bool = True
) -> tuple[Tensor, Tensor]:
    cos, sin = angles(positions, table)
    width = table.shape[1]
    return rotate(q, cos, sin, width, is_neox), rotate(k, cos, sin, width, is_neox)


def project(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return F.linear(x, weight).split(WIDTHS, dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, name: str = "a") -> Tensor:
    """vLLM's `Attention.forward`."""
    output = torch.empty(torch.Size((q.shape[0], WIDTHS[0])), dtype=q.dtype, device=q.device)
    q, output = q.view(-1, HEADS, SIZE), output.view(-1, HEADS, SIZE)
    k, v = k.view(-1, KV_HEADS, SIZE), v.view(-1, KV_HEADS, SIZE)
    dep = SPACE.write(k, v, name)
    SPACE.attention(q, k, v, output, name, kv_cache_dummy_dep=dep)
    return output.view(-1, WIDTHS[0])


Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(rotary: int = SIZE, dtype: torch.dtype = torch.float32, tokens: int = 5) -> Inputs:
    """x, weight, positions and table."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, HIDDEN, generator=rng).to(dtype)
    weight = torch.randn(sum(WIDTHS), HIDDEN, generator=rng).to(dtype)
    positions = torch.randint(0, POSITIONS, (tokens,), generator=rng)
    return x, weight, positions, torch.randn(POSITIONS, rotary, generator=rng).to(dtype)


def llama(is_neox: bool = True) -> Callable[..., Tensor]:
    def run(x: Tensor, weight: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        q, k, v = project(x, weight)
        return attend(*rope(positions, q, k, table, is_neox), v)

    return run


def traced(fn: Callable[..., Any], given: Inputs, *, dynamic: bool = True) -> Graph:
    if dynamic:
        for tensor in (given[0], given[2]):
            torch._dynamo.mark_dynamic(tensor, 0)
    return trace(fn, *given, form="plain")


def called(graph: Graph) -> list[str]:
    names = []
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            name = getattr(callee(node), "__name__", str(node.target))
            names.append(name.removesuffix(".default"))
    return names


def rewritten(fn: Callable[..., Any], given: Inputs) -> tuple[Graph, Report]:
    graph = traced(fn, given)
    return graph, rewrite_layers(graph, OPS, strict=True, rope=True)


# ---- fuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rotary", "is_neox"), [(SIZE, True), (SIZE, False), (4, True), (6, False)]
)
def test_a_layer_rotates_in_its_write(
    rotary: int, is_neox: bool, dtype: torch.dtype, dynamic: bool
) -> None:
    fn, given = llama(is_neox), inputs(rotary, dtype)
    graph = traced(fn, given, dynamic=dynamic)
    (decision,) = rewrite_layers(graph, OPS, strict=True, rope=True).decisions
    assert (decision.fused, decision.rope, decision.reason) == (True, "", "")
    names = called(graph)
    assert names[-3:-1] == ["rope_write", "staged_attention"]
    gone = {"write", "attention", "mul", "sub", "add", "cat", "stack", "index_select", "chunk"}
    assert not gone & set(names)
    before = compact(graph)
    assert rewrite_layers(graph, OPS, strict=True, rope=True).decisions == []
    assert compact(graph) == before


@pytest.mark.parametrize(("rotary", "is_neox"), [(SIZE, True), (SIZE, False), (4, True)])
def test_what_is_written_and_attended_has_the_bits_of_before(rotary: int, is_neox: bool) -> None:
    given = inputs(rotary)
    want = llama(is_neox)(*given)
    rows = _written.pop("a")

    def backend(module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        (decision,) = rewrite_layers(module.graph, OPS, strict=True, rope=True).decisions
        assert decision.fused
        module.recompile()
        return module.forward

    torch._dynamo.reset()
    got = torch.compile(llama(is_neox), backend=backend, fullgraph=True)(*given)
    assert torch.equal(got, want)
    for one, other in zip(_written.pop("a"), rows, strict=True):
        assert torch.equal(one, other)


def test_layers_that_share_their_angles_are_all_fused() -> None:
    def run(x: Tensor, weight: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        cos, sin = angles(positions, table)
        for name in "abc":
            q, k, v = project(x, weight)
            q, k = (rotate(part, cos, sin, SIZE, True) for part in (q, k))
            x = attend(q, k, v, name)[:, :HIDDEN]
        return x

    graph, report = rewritten(run, inputs())
    assert [decision.fused for decision in report.decisions] == [True] * 3
    assert not {"index_select", "mul"} & set(called(graph))


def test_without_rope_the_rotation_stays() -> None:
    graph = traced(llama(), inputs())
    (decision,) = rewrite_layers(graph, OPS, strict=True).decisions
    assert (decision.staged, decision.fused, decision.rope) == (True, False, "")
    assert called(graph).count("staged_write") == 1


def test_a_name_that_is_a_graph_input_is_passed_on() -> None:
    graph = traced(llama(), inputs())
    write, reader = (n for n in graph.nodes if "nwor_rope_test" in str(n.target))
    with graph.inserting_before(next(iter(graph.nodes))):
        name = graph.placeholder("layer_name")
    name.meta["example_value"] = object()
    write.args = (*write.args[:2], name)
    reader.args = (*reader.args[:4], name)
    assert rewrite_layers(graph, OPS, strict=True, rope=True).decisions[0].fused
    fused, attention = (n for n in graph.nodes if "nwor_rope_test" in str(n.target))
    assert fused.args[-1] is name
    assert attention.args[4] is name


# ---- stays apart --------------------------------------------------------------------------------


def edited(edit: Callable[..., Any]) -> Callable[..., Any]:
    """A layer whose rotation and attention `edit(q, k, v, positions, table)` writes."""

    def run(x: Tensor, weight: Tensor, positions: Tensor, table: Tensor) -> Any:
        return edit(*project(x, weight), positions, table)

    return run


def normalised(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    q = q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True))
    return attend(*rope(positions, q, k, table), v)


def used_elsewhere(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Any:
    q, k = rope(positions, q, k, table)
    return attend(q, k, v), k.sum()


def scaled_query(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    q, k = rope(positions, q, k, table)
    return attend(q * 0.5, k, v)


def quantised_query(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """As vLLM's `Attention.forward` for a backend that attends with fp8 queries."""
    q, k = rope(positions, q, k, table)
    return attend((q.float() * 0.5).clamp(-448, 448).to(torch.float8_e4m3fn), k, v)


def table_of_another_dtype(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor
) -> Tensor:
    return attend(*rope(positions, q, k, table.double().float()), v)


def rounded_angles(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = (part.bfloat16().float() for part in angles(positions, table))
    q, k = (rotate(part, cos, sin, SIZE, True) for part in (q, k))
    return attend(q, k, v)


def angles_in_the_graph(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor
) -> Tensor:
    angle = positions.unsqueeze(-1).float() * table[0, : SIZE // 2]
    q, k = (rotate(part, angle.cos(), angle.sin(), SIZE, True) for part in (q, k))
    return attend(q, k, v)


def sines_first(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    sin, cos = angles(positions, table)
    q, k = (rotate(part, cos, sin, SIZE, True) for part in (q, k))
    return attend(q, k, v)


def shifted_rows(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = table.roll(1, 0).index_select(0, positions).chunk(2, dim=-1)
    q, k = (rotate(part, cos, sin, SIZE, True) for part in (q, k))
    return attend(q, k, v)


def wrong_sign(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    cos, sin = angles(positions, table)
    q, k = (rotate(part, cos, -sin, SIZE, True) for part in (q, k))
    return attend(q, k, v)


def other_positions(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    q = rotate(q, *angles(positions + 1, table), SIZE, True)
    return attend(q, rotate(k, *angles(positions, table), SIZE, True), v)


def taken_after_the_write(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor
) -> Tensor:
    out = attend(*rope(positions, q, k, table), v)
    return out + q


def changed_in_between(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    rotated = rope(positions, q, k, table)
    k.mul_(2)
    return attend(*rotated, v)


def table_changed(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    rotated = rope(positions, q, k, table)
    table.mul_(2)
    return attend(*rotated, v)


def overlapping(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    return attend(*rope(positions, q, q[:, :SIZE], table), v)


def rotated_by_an_op(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    torch.ops.nwor.rotary_embedding(positions, q, k, SIZE, table, True)
    return attend(q, k, v)


APART: dict[str, tuple[Callable[..., Any], str]] = {
    "normalised": (normalised, "may stay unrounded in compiled code"),
    "used elsewhere": (used_elsewhere, "uses what is rotated as well"),
    "scaled query": (scaled_query, "its query: what computes it is no RoPE"),
    "quantised query": (quantised_query, "its query is torch.float8_e4m3fn, its key torch.float32"),
    "table of another dtype": (table_of_another_dtype, "is made in the graph"),
    "rounded angles": (rounded_angles, "rounded after they were read"),
    "angles in the graph": (angles_in_the_graph, "do not come from one table"),
    "sines first": (sines_first, "not the rows of a table"),
    "shifted rows": (shifted_rows, "is made in the graph"),
    "wrong sign": (wrong_sign, "not the rows of a table"),
    "other positions": (other_positions, "in different ways"),
    "taken after the write": (taken_after_the_write, "takes what is not rotated"),
    "changed in between": (changed_in_between, "changes what the rotation reads"),
    "table changed": (table_changed, "changes what the rotation reads"),
    "overlapping": (overlapping, "may overlap"),
    "rotated by an op": (rotated_by_an_op, "an op whose rounding is its own"),
}


@pytest.mark.parametrize("case", APART)
def test_what_cannot_be_fused_stays_apart_and_is_staged(case: str) -> None:
    edit, reason = APART[case]
    graph, report = rewritten(edited(edit), inputs())
    (decision,) = report.decisions
    assert decision.staged
    assert not decision.fused
    assert reason in decision.rope
    assert {"staged_write", "staged_attention"} <= set(called(graph))
    assert "rope_write" not in called(graph)


def test_inputs_of_the_graph_are_not_rotated_in_place() -> None:
    def run(q: Tensor, k: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        return attend(*rope(positions, q, k, table), k + 1)

    _, _, positions, table = inputs()
    graph = trace(run, torch.randn(5, 24), torch.randn(5, 8), positions, table, form="plain")
    (decision,) = rewrite_layers(graph, OPS, rope=True).decisions
    assert "is not made in this graph" in decision.rope


def test_eager_rounding_in_inductor_keeps_rope_apart() -> None:
    import torch._inductor.config as inductor

    graph = traced(llama(), inputs())
    with inductor.patch(emulate_precision_casts=True):
        (decision,) = rewrite_layers(graph, OPS, rope=True).decisions
    assert "round as eager code does" in decision.rope


def test_a_functionalized_graph_keeps_rope_apart() -> None:
    graph = trace(llama(), *inputs(), form="v2")
    (decision,) = rewrite_layers(graph, OPS, rope=True).decisions
    assert decision.staged
    assert decision.rope == "the graph is functionalized"


def test_where_a_write_stays_direct_nothing_is_fused() -> None:
    graph = traced(llama(), inputs())
    (write,) = (n for n in graph.nodes if "nwor_rope_test.write" in str(n.target))
    output = next(iter(reversed(graph.nodes)))
    output.args = ((*output.args[0], write),)
    before = compact(graph)
    report = rewrite_layers(graph, OPS, rope=True)
    assert compact(graph) == before
    assert not report.decisions[0].fused


# ---- printed ------------------------------------------------------------------------------------


def renamed(graph: Graph) -> Graph:
    """The same graph with names by what is called: Dynamo's differ between versions of torch."""
    copy, found = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        name = node.name if node.op == "placeholder" else None
        found[node] = copy.create_node(node.op, node.target, args, kwargs, name)
    return copy


class TestGoldens(expecttest.TestCase):
    """EXPECTTEST_ACCEPT=1 rewrites them."""

    def test_a_layer_of_vllm(self) -> None:
        graph = traced(llama(), inputs(), dynamic=False)
        self.assertExpectedInline(
            compact(renamed(graph)),
            """\
linear = linear(l_x_, l_weight_)
split = split(linear, [24, 8, 8], dim=-1)
getitem = getitem(split, 0)
getitem_1 = getitem(split, 1)
getitem_2 = getitem(split, 2)
flatten = flatten(l_positions_)
index_select = index_select(l_table_, 0, flatten)
chunk = chunk(index_select, 2, dim=-1)
getitem_3 = getitem(chunk, 0)
getitem_4 = getitem(chunk, 1)
view = view(getitem, 5, -1, 8)
getitem_5 = getitem(view, [Ellipsis, slice(None, 8, None)])
unsqueeze = unsqueeze(getitem_3, -2)
to = to(unsqueeze, torch.float32)
unsqueeze_1 = unsqueeze(getitem_4, -2)
to_1 = to(unsqueeze_1, torch.float32)
chunk_1 = chunk(getitem_5, 2, dim=-1)
getitem_6 = getitem(chunk_1, 0)
getitem_7 = getitem(chunk_1, 1)
mul = mul(getitem_6, to)
mul_1 = mul(getitem_7, to_1)
sub = sub(mul, mul_1)
mul_2 = mul(getitem_7, to)
mul_3 = mul(getitem_6, to_1)
add = add(mul_2, mul_3)
cat = cat([sub, add], dim=-1)
getitem_8 = getitem(view, [Ellipsis, slice(8, None, None)])
cat_1 = cat([cat, getitem_8], dim=-1)
reshape = reshape(cat_1, [5, 24])
view_1 = view(getitem_1, 5, -1, 8)
getitem_9 = getitem(view_1, [Ellipsis, slice(None, 8, None)])
unsqueeze_2 = unsqueeze(getitem_3, -2)
to_2 = to(unsqueeze_2, torch.float32)
unsqueeze_3 = unsqueeze(getitem_4, -2)
to_3 = to(unsqueeze_3, torch.float32)
chunk_2 = chunk(getitem_9, 2, dim=-1)
getitem_10 = getitem(chunk_2, 0)
getitem_11 = getitem(chunk_2, 1)
mul_4 = mul(getitem_10, to_2)
mul_5 = mul(getitem_11, to_3)
sub_1 = sub(mul_4, mul_5)
mul_6 = mul(getitem_11, to_2)
mul_7 = mul(getitem_10, to_3)
add_1 = add(mul_6, mul_7)
cat_2 = cat([sub_1, add_1], dim=-1)
getitem_12 = getitem(view_1, [Ellipsis, slice(8, None, None)])
cat_3 = cat([cat_2, getitem_12], dim=-1)
reshape_1 = reshape(cat_3, [5, 8])
empty = empty([5, 24], dtype=torch.float32, device=cpu)
view_2 = view(reshape, -1, 3, 8)
view_3 = view(empty, -1, 3, 8)
view_4 = view(reshape_1, -1, 1, 8)
view_5 = view(getitem_2, -1, 1, 8)
write = write(view_4, view_5, a)
attention = attention(view_2, view_4, view_5, view_3, a, kv_cache_dummy_dep=write)
view_6 = view(view_3, -1, 24)
return [view_6]""",
        )
        rewrite_layers(graph, OPS, strict=True, rope=True)
        self.assertExpectedInline(
            compact(renamed(graph)),
            """\
linear = linear(l_x_, l_weight_)
split = split(linear, [24, 8, 8], dim=-1)
getitem = getitem(split, 0)
getitem_1 = getitem(split, 1)
getitem_2 = getitem(split, 2)
view = view(getitem, 5, -1, 8)
view_1 = view(getitem_1, 5, -1, 8)
empty = empty([5, 24], dtype=torch.float32, device=cpu)
view_2 = view(empty, -1, 3, 8)
view_3 = view(getitem_2, -1, 1, 8)
rope_write_default = nwor_rope_test.rope_write(view, view_1, view_3, l_positions_, l_table_,
    True, a)
staged_attention_default = nwor_rope_test.staged_attention(view, view_1, view_3, view_2, a,
    kv_cache_dummy_dep=rope_write_default)
view_4 = view(view_2, -1, 24)
return [view_4]""",
        )
