"""Which staged writes can rotate q and k as well, and where the one call may stand.

The fused call stands where the write stood. So everything that used the rotated q and k before that
place must be able to move behind it, which only views can, and nothing in between may change what
the rotation reads. Whether the write may be staged at all was decided before (`visibility.py`):
fusing changes no reader of the cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nwor_compile.passes.calls import (
    View,
    arguments,
    callee,
    is_functionalized,
    mutated_views,
    new_version,
    overload_of,
    value_of,
    view_of,
)
from nwor_compile.passes.rope_match import Rotation, find_rotation, turned_alike
from nwor_compile.passes.table import ROTARY_OPS, op_name
from nwor_compile.passes.touches import Touches
from nwor_compile.passes.visibility import Write


@dataclass(frozen=True)
class TorchRope:
    """Rotations of q and k in plain torch code.

    moved: views of the results that must move behind the call. hoisted: what the query is made of
    after the write, and must move before it.
    """

    query: Rotation
    key: Rotation
    moved: list[Node] = field(default_factory=list)
    hoisted: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class RotaryOp:
    """A call of a rotary op.

    moved: views of its new versions that must move. value: the views that lead from a new version
    to the value; they can as well be taken of what was given to the op, which leaves V as it is.
    """

    node: Node
    moved: list[Node] = field(default_factory=list)
    value: list[Node] = field(default_factory=list)


Rope = TorchRope | RotaryOp


def find_rope(write: Write, touches: Touches) -> Rope | str:
    """The rotation that the write can do as well; or why it cannot.

    Empty if no rotation is near: nothing to report.
    """
    if write.row.staged != "nwor::stage_kv.window":
        return ""
    given = {write.row.rename.get(k, k): v for k, v in arguments(write.node).items()}
    key, value = given.get("key"), given.get("value")
    if not isinstance(key, Node) or not isinstance(value, Node):
        return ""
    call = _rotary_call(key, write, touches)
    if call is not None:
        return _judge_op(call, key, value, write, touches)
    return _judge_torch(key, value, write, touches)


# ---- a rotary op -------------------------------------------------------------------------------


def _rotary_call(key: Node, write: Write, touches: Touches) -> Node | None:
    """The last rotary op before the write that made the key, if any."""
    version = new_version(views_to(key, touches)[0])
    if version is not None:
        return version[0] if op_name(callee(version[0])) in ROTARY_OPS else None
    memory, node = touches.aliases.memory(key), write.node.prev
    while node.op != "root":
        rotates = op_name(callee(node)) in ROTARY_OPS and not is_functionalized(node)
        if rotates and touches.aliases.meet(touches.written(node), memory):
            return node
        node = node.prev
    return None


def _judge_op(call: Node, key: Node, value: Node, write: Write, touches: Touches) -> RotaryOp | str:
    problem = _arguments_problem(call)
    if problem:
        return problem
    functional = is_functionalized(call) or is_functionalized(write.node)
    if functional and call.target is not write.node.target:
        return f"{call.name} and the write are functionalized in different ways"
    views = mutated_views(call)
    one, two, taken = views.get("query"), views.get("key"), view_of(value)
    if one is None or two is None or taken is None:
        return f"what {call.name} rotates, or the value, is not known"
    if _meet(one, two, touches) or _meet(one, taken, touches) or _meet(two, taken, touches):
        return f"query, key and value of {call.name} and the write may overlap"
    if is_functionalized(call):
        chain = views_to(key, touches)
        version = new_version(chain[0])
        if version is None or version[0] is not call:
            return f"{call.name} rotates another key than is written"
        if call.target is not auto_functionalized_v2:
            # A new version of its own: the second, after the query's.
            made = view_of(chain[0])
            two = made if made is not None and chain[0].args[1] == 2 else two
    if _rows(view_of(key)) is None or _rows(view_of(key)) != _rows(two):
        return f"{call.name} rotates another key than is written"
    return _place_op(call, value, write, touches)


def _arguments_problem(call: Node) -> str:
    op = overload_of(callee(call))
    if op is None:
        return f"{call.name} has no schema"
    known = ["positions", "query", "key", "head_size", "cos_sin_cache", "is_neox"]
    if [argument.name for argument in op._schema.arguments][: len(known)] != known:
        return f"{call.name} takes other arguments than vLLM's rotary_embedding"
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments}
    extra = [n for n, v in arguments(call).items() if n not in known and v != defaults.get(n)]
    return f"{call.name} sets {', '.join(extra)}" if extra else ""


class _Rows(NamedTuple):
    """Rows that are contiguous each, in elements of `dtype`."""

    dtype: torch.dtype | None
    offset: int
    stride: int
    width: int


def _rows(view: View | None) -> _Rows | None:
    """A view `[T, heads, D]` or `[T, heads * D]` as rows; None if it is not known to be that."""
    if view is None or view.size is None or len(view.size) not in (2, 3):
        return None
    width = view.size[-1] if len(view.size) == 2 else view.size[1] * view.size[2]
    whole = len(view.size) == 2 or view.stride[1] == view.size[2] or view.size[1] == 1
    numbers = (view.offset, view.stride[0], width)
    if view.stride[-1] != 1 or not whole or not all(isinstance(n, int) for n in numbers):
        return None
    return _Rows(view.dtype, *numbers)


def _meet(one: View, other: View, touches: Touches) -> bool:
    """True unless two views are of different memory, or of different columns of the same rows."""
    if not touches.aliases.meet([one], [other]):
        return False
    ours, theirs = _rows(one), _rows(other)
    if ours is None or theirs is None or ours.dtype != theirs.dtype:
        return True
    low, high = sorted((ours, theirs), key=lambda rows: rows.offset)
    apart = (
        low.stride == high.stride
        and low.offset + low.width <= high.offset
        and high.offset + high.width <= low.offset + low.stride
    )
    return not apart


def views_to(node: Node, touches: Touches) -> list[Node]:
    """The views that lead to `node`, which comes last; first what they are views of."""
    found = [node]
    while new_version(node) is None and touches.aliases.is_view(node):
        tensors = [n for n in node.all_input_nodes if _has_tensor(n)]
        if len(tensors) != 1:
            break
        node = tensors[0]
        found.append(node)
    return found[::-1]


def _has_tensor(node: Node) -> bool:
    value = value_of(node)
    parts = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(part, Tensor) for part in parts)


def _place_op(call: Node, value: Node, write: Write, touches: Touches) -> RotaryOp | str:
    given = arguments(call)
    inputs = [given["positions"], given["cos_sin_cache"]]
    memory = [v for n in inputs if isinstance(n, Node) for v in touches.aliases.memory(n)]
    between = between_nodes(call, write.node)
    problem = changed(between, memory, touches)
    if problem:
        return problem
    if is_functionalized(call):
        moved = _to_move([call], write, touches)
        if isinstance(moved, str):
            return moved
        problem = _circular(set(moved), [n for n in inputs if isinstance(n, Node)], write, value)
        if problem:
            return problem
        chain = views_to(value, touches)
        version = new_version(chain[0])
        if version is None or version[0] is not call:
            return RotaryOp(call, moved)
        others = {n for node in chain[1:] for n in node.all_input_nodes if n not in chain}
        if not others.isdisjoint(moved):
            return "the shape of the value depends on what is rotated"
        return RotaryOp(call, moved, chain)
    rotated = touches.written(call)
    for node in between:
        if not touches.aliases.is_view(node) and touches.aliases.meet(
            rotated, touches.touched(node)
        ):
            return f"{node.name} uses what is rotated before the write"
    return RotaryOp(call)


# ---- plain torch -------------------------------------------------------------------------------


def _judge_torch(key: Node, value: Node, write: Write, touches: Touches) -> TorchRope | str:
    k = find_rotation(result_of(key, touches), touches)
    if isinstance(k, str):
        return k
    q = find_query([_query(node, write) for node, _ in write.readers], k, touches)
    if isinstance(q, str):
        return q
    if not covers(view_of(key), value_of(k.result)):
        return "the key that is written is not just the rotated one"
    for rotation in (q, k):
        result = value_of(rotation.result)
        if not isinstance(result, Tensor) or not _contiguous(result):
            return f"{rotation.result.name} is not contiguous"
    return _place_torch(q, k, write, touches)


def _query(reader: Node, write: Write) -> Node:
    rows = dict(write.readers)
    given = {rows[reader].rename.get(k, k): v for k, v in arguments(reader).items()}
    query: Node = given["query"]
    return query


def result_of(node: Node, touches: Touches) -> Node:
    """The first node of the shape of `node` that it is a view of, itself if there is none."""
    want = value_of(node)
    for found in views_to(node, touches):
        value = value_of(found)
        if isinstance(value, Tensor) and isinstance(want, Tensor) and value.shape == want.shape:
            return found
    return node


def find_query(queries: Iterable[Node], key: Rotation, touches: Touches) -> Rotation | str:
    """The rotation of the one query that all readers take, if it turns as the key's; or why not."""
    if _rounds_eagerly():
        return "Inductor was told to round as eager code does, which RoPE in one step does not"
    results = {result_of(query, touches) for query in queries}
    if len(results) != 1:
        return "its readers take different queries"
    result = results.pop()
    types = [getattr(value_of(node), "dtype", None) for node in (result, key.result)]
    if types[0] != types[1]:  # quantised after it was rotated
        return "its query is {}, its key {}".format(*types)
    found = find_rotation(result, touches)
    if isinstance(found, str):
        return f"its query: {found}"
    return found if turned_alike(found, key) else "query and key are rotated in different ways"


def _rounds_eagerly() -> bool:
    """True if Inductor rounds between pointwise operations; it is not imported for that."""
    config = sys.modules.get("torch._inductor.config")
    return bool(getattr(config, "emulate_precision_casts", False))


def covers(key: View | None, result: object) -> bool:
    """True if the key of the write is all of a rotation's result, in its order."""
    if key is None or key.size is None or not isinstance(result, Tensor):
        return False
    return (
        key.dtype == result.dtype
        and len(key.size) == result.dim()
        and all(statically_known_true(a == b) for a, b in zip(key.size, result.shape, strict=True))
        and all(
            statically_known_true(a == b) for a, b in zip(key.stride, result.stride(), strict=True)
        )
        and statically_known_true(key.offset == result.storage_offset())
    )


def _contiguous(tensor: Tensor) -> bool:
    expected, strides = 1, []
    for size in reversed(tensor.shape):
        strides.append(expected)
        expected = expected * size
    return all(
        statically_known_true(a == b)
        for a, b in zip(tensor.stride(), reversed(strides), strict=True)
    )


def _place_torch(q: Rotation, k: Rotation, write: Write, touches: Touches) -> TorchRope | str:
    order = touches.order
    hoisted = _to_hoist(q.x, write, touches)
    if isinstance(hoisted, str):
        return hoisted
    steps = sorted(q.arithmetic | k.arithmetic | {write.node}, key=order.__getitem__)
    inputs = (q.x, k.x, k.cos, k.sin)
    memory = [view for node in inputs for view in touches.aliases.memory(node)]
    problem = changed(between_nodes(steps[0], steps[-1]), memory, touches)
    if problem:
        return problem
    moved = _to_move([q.result, k.result], write, touches)
    if isinstance(moved, str):
        return moved
    problem = _circular({*moved, q.result, k.result}, inputs, write)
    return problem or TorchRope(q, k, moved, hoisted)


# ---- places ------------------------------------------------------------------------------------


def between_nodes(first: Node, last: Node) -> list[Node]:
    found, node = [], first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


def changed(between: Iterable[Node], memory: list[View], touches: Touches) -> str:
    for node in between:
        if touches.aliases.meet(touches.written(node), memory):
            return f"{node.name} changes what the rotation reads"
    return ""


def _to_move(sources: list[Node], write: Write, touches: Touches) -> list[Node] | str:
    """Users of some nodes that stand before the write, in order; or why they cannot move."""
    order, found, pending = touches.order, set(), list(sources)
    while pending:
        for user in pending.pop().users:
            if user in found or order[user] >= order[write.node]:
                continue
            # A functionalized call copies nothing, so a new version is a name like a view is.
            if not touches.aliases.is_view(user) and new_version(user) is None:
                return f"{user.name} uses what is rotated before the write"
            found.add(user)
            pending.append(user)
    return sorted(found, key=order.__getitem__)


def _to_hoist(x: Node, write: Write, touches: Touches) -> list[Node] | str:
    """What `x` is made of behind the write, in order, if all of it could as well stand before.

    Inductor moves nodes to where they are used, so a query often comes after the write.
    """
    order, found, pending = touches.order, set(), [x]
    functional = is_functionalized(write.node)
    while pending:
        node = pending.pop()
        if node in found or order[node] < order[write.node]:
            continue
        pure = functional and isinstance(node.target, OpOverload) and not node.is_impure()
        if node is write.node or not (touches.aliases.is_view(node) or pure):
            return f"{node.name}, of which the query is made, cannot move before the write"
        found.add(node)
        pending += node.all_input_nodes
    return sorted(found, key=order.__getitem__)


def _circular(
    behind: set[Node], inputs: Iterable[Node], write: Write, value: Node | None = None
) -> str:
    """Why the one call would need what comes behind it. The key that it takes is another."""
    given = {write.row.rename.get(k, k): v for k, v in arguments(write.node).items()}
    needed = {*inputs, *(n for name, n in given.items() if isinstance(n, Node) and name != "key")}
    found = sorted((needed - {value}) & behind, key=lambda node: node.name)
    return f"{found[0].name} depends on what is rotated" if found else ""


def base_of(call: Node, version: Node) -> Node:
    """The tensor that `version` is the new version of, as `call` took it."""
    index = version.args[1]
    if not isinstance(index, int):
        raise RuntimeError(f"{version.name} is no new version of {call.name}")
    if call.target is auto_functionalized_v2:
        base: Node = call.kwargs["_all_bases"][index - 1]  # type: ignore[index,assignment]
        return base
    older: Node = arguments(call)[("query", "key")[index - 1]]
    return older
