"""The pass for graphs whose caches are not graph values: a layer name stands for the cache.

vLLM's graphs look so. Before:

    dep = vllm.unified_kv_cache_update(k, v, layer_name)
    vllm.unified_attention_with_output(q, k, v, out, layer_name, kv_cache_dummy_dep=dep)

After:

    dep = nwor.vllm_stage(k, v, layer_name)
    nwor.vllm_verify(q, k, v, out, layer_name, kv_cache_dummy_dep=dep)

The attention may sit inside `auto_functionalized`. The layer name may be a string or an opaque
graph input; it is passed on, never looked at, since one compiled piece can serve several layers.

NOTE [visibility by name]: the cache can only be reached through ops that take a layer name, so a
write is staged only if its result (the dummy that orders the two) goes to redirected attention
ops and nowhere else. Attention without a write of its own (KV sharing) reads another layer's
staged rows and is redirected as well. Attention that depends on another op's write (a fusion put
rope or a norm into it) cannot be staged: that write goes to the cache.
"""

from __future__ import annotations

import operator
import time
from dataclasses import dataclass, replace

from torch._ops import OpOverload
from torch.fx import Graph, Node

from nwor_compile.passes.calls import arguments, callee, is_functionalized
from nwor_compile.passes.report import Decision, Report, VisibilityError, keep
from nwor_compile.passes.rope_layers import LayerRope, find_layer_rope, fuse_layer
from nwor_compile.passes.table import op_name, resolve
from nwor_compile.passes.touches import Touches

DEPENDENCY = "kv_cache_dummy_dep"
"""The attention op's argument that orders it after the write."""


@dataclass(frozen=True)
class LayerOps:
    """A write op and an attention op that name their layer, and the twins with equal arguments."""

    write: str = "vllm::unified_kv_cache_update"
    staged_write: str = "nwor::vllm_stage"
    attention: str = "vllm::unified_attention_with_output"
    staged_attention: str = "nwor::vllm_verify"
    rope_write: str = "nwor::vllm_rope_stage"


def rewrite_layers(
    graph: Graph, ops: LayerOps, *, strict: bool = False, rope: bool = False, name: str = "graph"
) -> Report:
    """Redirect the layer ops of `graph`; return what was done. Running it again changes nothing.

    With `strict`, a write that must stay direct raises VisibilityError before any change. With
    `rope`, a staged write does the rotation before it as well, where it can (`rope_layers.py`).
    """
    start = time.perf_counter()
    writes = [node for node in graph.nodes if op_name(callee(node)) == ops.write]
    readers = [node for node in graph.nodes if op_name(callee(node)) == ops.attention]
    foreign = [d for d in (_foreign(reader, ops) for reader in readers) if d is not None]
    report = Report(name, [_decide(write, ops) for write in writes] + foreign)
    ropes = _ropes(graph, writes, ops) if rope and not report.refused else {}
    if strict and report.refused:
        raise VisibilityError(
            "strict mode, and these cache writes cannot be staged:\n"
            + "\n".join(f"  {d.node}: {d.reason}" for d in report.refused)
        )
    if report.refused:
        # A layer that is staged by one graph and direct in another would fail every window.
        report.decisions = [
            d
            if d.reason
            else Decision(d.node, d.op, reason="another write of this graph is direct")
            for d in report.decisions
        ]
    else:
        for index, node in enumerate(writes):
            found = ropes.get(node, "")
            if isinstance(found, str):
                _swap(graph, node, ops.staged_write)
            else:
                fuse_layer(graph, node, _readers(node, ops), found, _twin(ops.rope_write))
            decision = report.decisions[index]
            why = found if isinstance(found, str) else ""
            report.decisions[index] = replace(decision, fused=node in ropes and not why, rope=why)
        for node in readers:
            _swap(graph, node, ops.staged_attention)
        graph.lint()
    report.seconds = time.perf_counter() - start
    keep(report)
    return report


def _decide(write: Node, ops: LayerOps) -> Decision:
    readers = _readers(write, ops)
    others = [user for user in write.users if user not in readers]
    reason = ""
    if others:
        reason = f"{others[0].name} ({op_name(callee(others[0])) or others[0].target}) uses it"
    elif not readers:
        reason = "no attention op of this graph depends on it"
    return Decision(write.name, ops.write, tuple(reader.name for reader in readers), reason)


def _readers(write: Node, ops: LayerOps) -> list[Node]:
    return [user for user in write.users if op_name(callee(user)) == ops.attention]


def _ropes(graph: Graph, writes: list[Node], ops: LayerOps) -> dict[Node, LayerRope | str]:
    """For each write its rotation, or why that stays apart."""
    touches = Touches(graph, list(graph.nodes))  # a rotation may begin in any memory
    return {write: find_layer_rope(write, _readers(write, ops), touches) for write in writes}


def _foreign(reader: Node, ops: LayerOps) -> Decision | None:
    """The refusal of an attention op whose cache another op of this graph has written."""
    dep = arguments(reader).get(DEPENDENCY)
    source = dep
    if isinstance(source, Node) and source.target is operator.getitem:
        source = source.args[0]
    if not isinstance(source, Node):
        return None
    op = op_name(callee(source))
    if not op or op in (ops.write, ops.staged_write):
        return None  # a graph input, where the graph was split between the two, or ours
    reason = (
        f"{op} writes the cache of {reader.name} instead; turn off the fusion that put it there"
    )
    return Decision(source.name, op, reason=reason)


def _swap(graph: Graph, node: Node, staged: str) -> None:
    twin_op = _twin(staged)
    with graph.inserting_before(node):
        if is_functionalized(node):
            args = (twin_op, *node.args[1:])
            twin = graph.call_function(node.target, args, dict(node.kwargs))  # type: ignore[arg-type]
        else:
            twin = graph.call_function(twin_op, node.args, dict(node.kwargs))
    twin.meta.update(node.meta)
    node.replace_all_uses_with(twin)
    graph.erase_node(node)


def _twin(name: str) -> OpOverload:
    op = resolve(name)
    if op is None:
        raise RuntimeError(f"{name} is not registered: import nwor_compile.vllm_adapter.ops first")
    return op
