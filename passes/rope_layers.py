"""RoPE and the staged write of a layer as one op, where a layer name stands for the cache.

Before (`q1` and `k1` stand for a dozen nodes of plain torch each, as Dynamo traces them):

    q1, k1 = rotations of q, k by the rows `positions` of `cos_sin_cache`
    dep = vllm.unified_kv_cache_update(k1, v, layer_name)
    vllm.unified_attention_with_output(q1, k1, v, out, layer_name, kv_cache_dummy_dep=dep)

After:

    dep = nwor.vllm_rope_stage(q, k, v, positions, cos_sin_cache, is_neox, layer_name)
    nwor.vllm_verify(q, k, v, out, layer_name, kv_cache_dummy_dep=dep)

NOTE [in place]: the op rotates q and k where they lie, as vLLM's own rotary op does. So it takes no
memory, its results need no further nodes between the two ops, where vLLM cuts the graph, and
nothing that is compiled comes between them. It takes a proof: q, k and v share no element, no other
node touches q or k after the write, and neither is memory of the graph's inputs.

NOTE [rounded inputs]: compiled together with what makes q and k, a rotation takes them unrounded
(Inductor keeps products in float32 between pointwise operations, also where the graph says
bfloat16). The op takes them from memory, rounded. So the bits stay only where q and k come out of
an op that stores them rounded anyway, such as a matrix product; after a norm the rotation stays.

Whether a write is staged was decided before and does not change here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nwor_compile.passes.calls import (
    View,
    arguments,
    callee,
    is_functionalized,
    overload_of,
    value_of,
    view_of,
)
from nwor_compile.passes.rope_lookup import Lookup, find_lookup
from nwor_compile.passes.rope_match import (
    Rotation,
    erase_unused,
    find_rotation,
    name_of,
)
from nwor_compile.passes.rope_plan import (
    between_nodes,
    changed,
    covers,
    find_query,
    result_of,
    views_to,
)
from nwor_compile.passes.table import ROTARY_OPS, op_name
from nwor_compile.passes.touches import Touches

# Torch's own calls whose results are in memory, rounded, whatever is compiled with them.
_STORED = frozenset(("linear", "mm", "addmm", "matmul", "bmm", "baddbmm", "empty", "new_empty"))
# Ops of these namespaces may be compiled into pointwise code.
_COMPILED = ("aten", "prims", "vllm_ir")


@dataclass(frozen=True)
class LayerRope:
    """The rotation that a layer's write can do as well; it begins with the node `rows`."""

    query: Rotation
    key: Rotation
    lookup: Lookup
    rows: Node


def find_layer_rope(write: Node, readers: Sequence[Node], touches: Touches) -> LayerRope | str:
    """What can be fused with a write that will be staged; or why it stays apart.

    readers: the attention ops that depend on it.
    """
    if any(is_functionalized(reader) for reader in readers):
        return "the graph is functionalized"
    given = arguments(write)
    key, value = given["key"], given["value"]
    queries = [arguments(reader)["query"] for reader in readers]
    k = find_rotation(result_of(key, touches), touches)
    if isinstance(k, str):
        return _rotary_op(key, write, touches) or k
    q = find_query(queries, k, touches)
    if isinstance(q, str):
        return q
    lookup, other = find_lookup(k, touches), find_lookup(q, touches)
    if isinstance(lookup, str):
        return lookup
    if isinstance(other, str) or (lookup.table, lookup.positions) != (other.table, other.positions):
        return "query and key are rotated by different angles"
    found = LayerRope(q, k, lookup, min(lookup.rows, other.rows, key=touches.order.__getitem__))
    return (
        _users_problem(found, write, readers, queries, touches)
        or _memory_problem(found, write, value, readers, touches)
        or _order_problem(found, write, touches)
        or found
    )


def fuse_layer(
    graph: Graph, write: Node, readers: Sequence[Node], rope: LayerRope, op: OpOverload
) -> Node:
    """Replace a write and its rotation by `op`, and give the readers what it rotates."""
    given = arguments(write)
    q, k = rope.query, rope.key
    with graph.inserting_before(write):
        fused = graph.call_function(
            op,
            (
                q.x, k.x, given["value"], rope.lookup.positions, rope.lookup.table, k.is_neox,
                given["layer_name"],
            ),
        )  # fmt: skip
    fused.meta.update(write.meta)
    write.replace_all_uses_with(fused)
    rotated = {arguments(reader)[name] for reader in readers for name in ("query", "key")}
    for reader in readers:
        taken = arguments(reader)
        reader.replace_input_with(taken["query"], q.x)
        if taken["key"] is given["key"]:
            reader.replace_input_with(taken["key"], k.x)
    graph.erase_node(write)
    erase_unused(graph, rotated)
    return fused


def _rotary_op(key: Node, write: Node, touches: Touches) -> str:
    """Says that a custom op has rotated the key, if one has."""
    memory = [*touches.aliases.memory(key)]
    for node in touches.near(memory):
        rotates = op_name(callee(node)) in ROTARY_OPS and touches.order[node] < touches.order[write]
        if rotates and touches.aliases.meet(touches.written(node), memory):
            return f"{node.name} rotates it, an op whose rounding is its own"
    return ""


def _users_problem(
    rope: LayerRope,
    write: Node,
    readers: Sequence[Node],
    queries: Sequence[Node],
    touches: Touches,
) -> str:
    """Why more than the write and its readers needs what is rotated, or they need it otherwise."""
    key = arguments(write)["key"]
    for node, rotation in ((key, rope.key), *((query, rope.query) for query in queries)):
        if not covers(view_of(node), value_of(rotation.result)):
            return f"{node.name} is not all of what is rotated, in its order"
    allowed, pending, seen = {write, *readers}, [rope.query.result, rope.key.result], set[Node]()
    while pending:
        for user in pending.pop().users:
            if user in allowed or user in seen:
                continue
            if not touches.aliases.is_view(user):
                return f"{user.name} uses what is rotated as well"
            seen.add(user)
            pending.append(user)
    for reader in readers:
        taken = [n for n in reader.all_input_nodes if n in (rope.key.result, *seen)]
        if any(n is not key and n not in queries for n in taken):
            return f"{reader.name} takes the rotated key otherwise than the write"
    return ""


def _memory_problem(
    rope: LayerRope, write: Node, value: Node, readers: Sequence[Node], touches: Touches
) -> str:
    """Why q and k cannot be rotated in place, see NOTE [in place]; or would differ in bits."""
    q, k, aliases = rope.query.x, rope.key.x, touches.aliases
    for x in (q, k):
        maker = views_to(x, touches)[0]
        given = [view for node in maker.all_input_nodes for view in aliases.memory(node)]
        if maker.op in ("placeholder", "get_attr") or aliases.meet(aliases.memory(x), given):
            return f"{maker.name} is not made in this graph"
        if not _is_stored(maker):
            return f"{maker.name}, of which {x.name} is made, may stay unrounded in compiled code"
        if not _has_rows(view_of(x)):
            return f"{x.name} is not [tokens, heads, head_size] with heads side by side"
    memory = [[*aliases.memory(x)] for x in (q, k, value)]
    if any(aliases.meet(memory[i], memory[j]) for i, j in ((0, 1), (0, 2), (1, 2))):
        return "query, key and value may overlap"
    rotated = memory[0] + memory[1]
    for node in touches.near(rotated):
        later = touches.order[node] > touches.order[write] and node not in readers
        if later and aliases.meet(touches.touched(node), rotated):
            return f"{node.name} takes what is not rotated, after the write"
    return ""


def _order_problem(rope: LayerRope, write: Node, touches: Touches) -> str:
    order, lookup = touches.order, rope.lookup
    inputs = (rope.query.x, rope.key.x, lookup.positions, lookup.table)
    late = [node.name for node in inputs if order[node] > order[write]]
    if late:
        return f"{late[0]} comes after the write"
    first = min((rope.rows, *rope.query.arithmetic, *rope.key.arithmetic), key=order.__getitem__)
    memory = [view for node in inputs for view in touches.aliases.memory(node)]
    return changed(between_nodes(first, write), memory, touches)


def _is_stored(node: Node) -> bool:
    op = overload_of(node.target) if node.op == "call_function" else None
    if op is not None and op.namespace not in _COMPILED:
        return True
    return name_of(node) in _STORED


def _has_rows(view: View | None) -> bool:
    """True for `[T, heads, D]` whose tokens lie apart and whose heads lie side by side."""
    if view is None or view.size is None or len(view.size) != 3:
        return False
    _, heads, size = view.size
    row, head, element = view.stride
    wanted: tuple[Any, ...] = (element == 1, head == size, row >= heads * size)
    return all(statically_known_true(condition) for condition in wanted)
