"""The rewrite of a staged write with its RoPE into one call.

Plain torch (`q1` and `k1` stand for a dozen nodes; functionalized the write sits in
`auto_functionalized`, and its new versions of the caches follow the two results):

    q1 = rotation of q by cos, sin
    k1 = rotation of k by cos, sin
    nwor.reshape_and_cache(k1, v, key_cache, value_cache, slots)

becomes

    q1, k1 = nwor.rope_stage_kv.window(q, k, v, cos, sin, rotary_dim, is_neox, key_cache,
                                       value_cache, slots)

and a rotary op with its write

    _C.rotary_embedding(positions, q, k, head_size, cos_sin_cache, is_neox)
    _C_cache_ops.reshape_and_cache_flash(k, v, key_cache, value_cache, slots, ...)

becomes

    nwor.rope_stage_kv.window_(positions, q, k, v, head_size, cos_sin_cache, is_neox, key_cache,
                               value_cache, slots, ...)
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._ops import OpOverload
from torch.fx import Graph, Node

from nwor_compile.passes.calls import (
    arguments,
    is_functionalized,
    staged_arguments,
    value_of,
)
from nwor_compile.passes.rope_plan import RotaryOp, TorchRope, base_of
from nwor_compile.passes.table import resolve
from nwor_compile.passes.visibility import Write

FUSED_OPS = ("nwor::rope_stage_kv.window", "nwor::rope_stage_kv.window_")
_CACHES = ("key_cache", "value_cache")


def fuse(graph: Graph, write: Write, rope: TorchRope | RotaryOp) -> None:
    """Replace the write and the rotation by one staged call. The plan is from `find_rope`."""
    if isinstance(rope, TorchRope):
        _fuse_torch(graph, write, rope)
    else:
        _fuse_op(graph, write, rope)


def _fuse_torch(graph: Graph, write: Write, rope: TorchRope) -> None:
    q, k = rope.query, rope.key
    results = [q.result, k.result]
    for node in rope.hoisted:
        write.node.prepend(node)
    with graph.inserting_before(write.node):
        cos, sin = (_table(graph, table, write.node) for table in (k.cos, k.sin))
        given = {
            "query": q.x, "key": k.x, "cos": cos, "sin": sin,
            "rotary_dim": k.rotary_dim, "is_neox": k.is_neox,
        }  # fmt: skip
        op = _overload(FUSED_OPS[0])
        fused = _call(graph, write, op, given, [value_of(node) for node in results])
        rotated = []
        for index, result in enumerate(results):
            node = graph.call_function(operator.getitem, (fused, index))
            node.meta.update(result.meta)
            rotated.append(node)
    _move(rope.moved, rotated[-1])
    for result, node in zip(results, rotated, strict=True):
        result.replace_all_uses_with(node)
    _take_over(write.node, fused, shift=len(results) - 1)
    graph.erase_node(write.node)


def _fuse_op(graph: Graph, write: Write, rope: RotaryOp) -> None:
    call = rope.node
    op = _overload(FUSED_OPS[1])
    with graph.inserting_before(write.node):
        given = _rotary_arguments(call)
        given["value"] = _value_before(graph, rope, write)
        fused = _call(graph, write, op, given, [], call)
    _move(rope.moved, fused)
    if is_functionalized(call):
        versions = len(value_of(call)) - 1  # type: ignore[arg-type]
        _take_over(call, fused, shift=0)
        _take_over(write.node, fused, shift=versions)
    graph.erase_node(write.node)
    graph.erase_node(call)


def _rotary_arguments(call: Node) -> dict[str, Any]:
    """Arguments of a rotary op that the fused op takes, with v2's description of views."""
    wanted = ("positions", "query", "key", "head_size", "cos_sin_cache", "is_neox")
    given = {name: value for name, value in arguments(call).items() if name in wanted}
    if call.target is auto_functionalized_v2:
        given.update({k: v for k, v in call.kwargs.items() if k.startswith(("_query_", "_key_"))})
    return given


def _call(
    graph: Graph,
    write: Write,
    op: OpOverload,
    given: dict[str, Any],
    results: list[object],
    call: Node | None = None,
) -> Node:
    """The fused call in the form of the write, with its recorded value."""
    node = write.node
    named = staged_arguments(node, write.row)
    del named["key"]  # the rotated one
    named |= given
    if not is_functionalized(node):
        order = [argument.name for argument in op._schema.arguments]
        args = tuple(named[name] for name in order)
        fused = graph.call_function(op, args)
        _record(fused, node, tuple(results) if results else None)
        return fused
    first = value_of(node)
    versions = list(first[1:])  # type: ignore[index]
    if node.target is auto_functionalized:
        caches = {new: arguments(node)[old] for new, old in _cache_names(write).items()}
        kwargs = named | caches
        order = [argument.name for argument in op._schema.arguments]
        kwargs = {name: kwargs[name] for name in order if name in kwargs}
    else:
        ours = list(call.kwargs["_all_bases"]) if call is not None else []  # type: ignore[arg-type]
        kwargs = {k: v for k, v in named.items() if k not in _CACHES}
        kwargs.update(_view_keys(write, len(ours)))
        kwargs["_all_bases"] = [*ours, *node.kwargs["_all_bases"]]  # type: ignore[misc]
    fused = graph.call_function(node.target, (op,), kwargs)  # type: ignore[arg-type]
    if call is not None:
        versions = [*value_of(call)[1:], *versions]  # type: ignore[index]
    _record(fused, node, (*(results or [None]), *versions))
    return fused


def _cache_names(write: Write) -> dict[str, str]:
    """Name in the fused op to name in the op of the write, of both caches."""
    row = write.row
    return {row.rename.get(old, old): old for old in (row.key_cache, row.value_cache)}


def _view_keys(write: Write, offset: int) -> dict[str, Any]:
    """v2's description of the caches as views, their bases counted from `offset`."""
    found, kwargs = {}, dict[str, Any](write.node.kwargs)
    for new, old in _cache_names(write).items():
        for key, value in kwargs.items():
            if key.startswith(f"_{old}_"):
                part = key.removeprefix(f"_{old}_")
                shift = offset if part == "base_index" and value is not None else 0
                found[f"_{new}_{part}"] = value + shift if shift else value
    return found


def _value_before(graph: Graph, rope: RotaryOp, write: Write) -> Node:
    """The value of the write, not as a view of a new version that the rotary op made."""
    if not rope.value:
        given: Node = staged_arguments(write.node, write.row)["value"]
        return given
    version, *views = rope.value
    old, new = version, base_of(rope.node, version)
    for view in views:
        copy = graph.node_copy(view, functools.partial(_replaced, old, new))
        copy.meta.update(view.meta)
        old, new = view, copy
    return new


def _replaced(old: Node, new: Node, node: Node) -> Node:
    return new if node is old else node


def _table(graph: Graph, table: Node, like: Node) -> Node:
    """A table `[T, 1, w]` as `[T, w]`."""
    value = value_of(table)
    if not isinstance(value, Tensor) or value.dim() == 2:
        return table
    node = graph.call_function(torch.ops.aten.select.int, (table, 1, 0))
    key = "val" if "val" in table.meta else "example_value"
    node.meta[key] = value.select(1, 0)
    return node


def _record(node: Node, like: Node, value: object) -> None:
    for key in ("val", "example_value"):
        if key in like.meta or (key == "val" and is_functionalized(like)):
            node.meta[key] = value
    node.meta.update(
        {k: v for k, v in like.meta.items() if k in ("stack_trace", "nn_module_stack")}
    )


def _move(nodes: list[Node], after: Node) -> None:
    for node in nodes:
        after.append(node)
        after = node


def _take_over(old: Node, fused: Node, shift: int) -> None:
    """The new versions that `old` made are made by `fused`, `shift` places further on."""
    for user in list(old.users):
        if user.target is not operator.getitem or user.args[0] is not old:
            raise RuntimeError(
                f"{user.name} takes the result of {old.name} otherwise than expected"
            )
        index = user.args[1]
        if not isinstance(index, int):
            raise RuntimeError(f"{user.name}: expected a number, got {index!r}")
        user.args = (fused, index + shift)


def _overload(name: str) -> OpOverload:
    op = resolve(name)
    if op is None:
        raise RuntimeError(f"{name} is not registered: import nwor_compile.ops first")
    return op
