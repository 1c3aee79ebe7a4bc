"""The pass for graphs in which a layer name stands for the cache, on ops shaped like vLLM's."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Graph, Node

from nwor_compile.passes.layer_ops import LayerOps, rewrite_layers
from nwor_compile.passes.report import VisibilityError

_library = torch.library.Library("nwor_layer_test", "FRAGMENT")
WRITE = "(Tensor key, Tensor value, str layer_name) -> Tensor"
ATTENTION = (
    "(Tensor query, Tensor key, Tensor value, Tensor(a3!) output, str layer_name, "
    "Tensor? output_scale=None, Tensor? kv_cache_dummy_dep=None) -> ()"
)
for _name in ("write", "staged_write"):
    _library.define(_name + WRITE)
_library.define(
    "fused_write(Tensor(a0!) query, Tensor key, Tensor value, str layer_name) -> Tensor"
)
for _name in ("attention", "staged_attention"):
    _library.define(_name + ATTENTION)

SPACE = torch.ops.nwor_layer_test
OPS = LayerOps(
    write="nwor_layer_test::write",
    staged_write="nwor_layer_test::staged_write",
    attention="nwor_layer_test::attention",
    staged_attention="nwor_layer_test::staged_attention",
)


class Build:
    """A graph of layers, in vLLM's pattern."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.q, self.k, self.v, self.out = (self.graph.placeholder(n) for n in "qkvo")

    def write(self, layer: Any = "a.0") -> Node:
        return self.graph.call_function(SPACE.write.default, (self.k, self.v, layer))

    def attend(self, dep: Node | None, layer: Any = "a.0", functional: bool = False) -> Node:
        if functional:
            return self.graph.call_function(
                auto_functionalized,
                (SPACE.attention.default,),
                {
                    "query": self.q, "key": self.k, "value": self.v, "output": self.out,
                    "layer_name": layer, "output_scale": None, "kv_cache_dummy_dep": dep,
                },
            )  # fmt: skip
        return self.graph.call_function(
            SPACE.attention.default,
            (self.q, self.k, self.v, self.out, layer),
            {"kv_cache_dummy_dep": dep},
        )

    def done(self, *outputs: Node) -> Graph:
        self.graph.output(outputs or (self.out,))
        return self.graph


def targets(graph: Graph) -> list[str]:
    names = []
    for node in graph.nodes:
        if node.op == "call_function":
            op = node.args[0] if node.target is auto_functionalized else node.target
            names.append(op._opname)
    return names


@pytest.mark.parametrize("functional", [False, True])
def test_writes_and_their_attention_are_redirected(functional: bool) -> None:
    build = Build()
    for layer in ("a.0", "a.1"):
        build.attend(build.write(layer), layer, functional)
    graph = build.done()
    report = rewrite_layers(graph, OPS, strict=True)
    assert targets(graph) == ["staged_write", "staged_attention"] * 2
    assert len(report.rewritten) == 2
    if functional:
        attends = [n for n in graph.nodes if n.target is auto_functionalized]
        assert [n.kwargs["layer_name"] for n in attends] == ["a.0", "a.1"]
        assert all(n.kwargs["kv_cache_dummy_dep"].op == "call_function" for n in attends)


def test_a_layer_name_may_be_a_graph_input() -> None:
    build = Build()
    name = build.graph.placeholder("layer_name")
    build.attend(build.write(name), name)
    graph = build.done()
    rewrite_layers(graph, OPS, strict=True)
    staged = [n for n in graph.nodes if n.op == "call_function"]
    assert [n.args[2 if i == 0 else 4] for i, n in enumerate(staged)] == [name, name]


def test_a_second_run_changes_nothing() -> None:
    build = Build()
    build.attend(build.write())
    graph = build.done()
    rewrite_layers(graph, OPS)
    before = str(graph)
    report = rewrite_layers(graph, OPS)
    assert str(graph) == before
    assert not report.rewritten
    assert not report.refused


def test_attention_without_a_write_is_redirected_too() -> None:
    """KV sharing: it reads another layer's staged rows."""
    build = Build()
    build.attend(build.write("a.0"), "a.0")
    build.attend(None, "a.1")
    graph = build.done()
    rewrite_layers(graph, OPS)
    assert targets(graph) == ["staged_write", "staged_attention", "staged_attention"]


def leaks(build: Build) -> Graph:
    write = build.write()
    build.attend(write)
    return build.done(write)


def unread(build: Build) -> Graph:
    build.write()
    return build.done()


@pytest.mark.parametrize(
    ("make", "reason"), [(leaks, "uses it"), (unread, "no attention op of this graph")]
)
def test_a_write_with_another_reader_or_none_stays_direct(make: Any, reason: str) -> None:
    graph = make(Build())
    before = str(graph)
    report = rewrite_layers(graph, OPS)
    assert str(graph) == before
    assert reason in report.refused[0].reason
    with pytest.raises(VisibilityError, match=reason):
        rewrite_layers(make(Build()), OPS, strict=True)


def test_one_direct_write_keeps_the_whole_graph_direct() -> None:
    """A layer staged here and direct there would fail every window."""
    build = Build()
    build.attend(build.write("a.0"), "a.0")
    build.write("a.1")
    graph = build.done()
    report = rewrite_layers(graph, OPS)
    assert targets(graph) == ["write", "attention", "write"]
    assert report.refused[0].reason == "another write of this graph is direct"


def test_graphs_without_the_ops_are_left_alone() -> None:
    graph = Build().done()
    report = rewrite_layers(graph, OPS, strict=True)
    assert not report.decisions


@pytest.mark.parametrize("functional", [False, True])
def test_a_fusion_that_swallowed_the_write_is_refused(functional: bool) -> None:
    """vLLM's rope fusions leave an op of their own, on which the attention depends."""
    build = Build()
    build.attend(build.write("a.0"), "a.0")
    fused: Any = SPACE.fused_write.default
    if functional:
        call = build.graph.call_function(
            auto_functionalized,
            (fused,),
            {"q": build.q, "key": build.k, "value": build.v, "layer_name": "a.1"},
        )
        dep = build.graph.call_function(operator.getitem, (call, 0))
    else:
        dep = build.graph.call_function(fused, (build.q, build.k, build.v, "a.1"))
    build.attend(dep, "a.1", functional)
    graph = build.done()
    before = str(graph)
    named = "nwor_layer_test::fused_write writes the cache .* turn off the fusion"
    with pytest.raises(VisibilityError, match=named):
        rewrite_layers(graph, OPS, strict=True)
    report = rewrite_layers(graph, OPS)
    assert str(graph) == before
    assert not report.rewritten
