"""Finding a rotation in plain torch code: by what it computes, not by how it is written.

NOTE [evaluation]: models write RoPE in many ways (halves or pairs, `rotate_half`, `chunk`, `stack`,
tables of full or half width, parts that are not rotated), and Dynamo and AOTAutograd write each
another way. So nothing is matched by form. The nodes between a candidate x, its tables and the
result are run on random integers in float64 and compared with RoPE. They are made of additions,
products and rearrangements only, hence each element of the result is a polynomial in the inputs,
and two different polynomials of degree 2 agree at a random point out of 2^20 values a variable with
a chance below 2^-18; all elements of a few tokens must agree, exactly. Casts are left out of the
run and judged apart: one that rounds between two steps of the arithmetic is no RoPE of ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from nwor_compile.ops.rope import rotate_exactly
from nwor_compile.passes.calls import overload_of, value_of
from nwor_compile.passes.touches import Touches

_ARITHMETIC = frozenset(("add", "sub", "mul", "neg", "negative", "multiply", "subtract"))
_REARRANGING = frozenset(
    (
        *("cat", "concat", "concatenate", "stack", "reshape", "flatten", "contiguous", "clone"),
        *("_unsafe_view", "expand", "expand_as", "repeat_interleave", "repeat"),
    )
)
CASTS = frozenset(
    (
        *("to", "float", "half", "bfloat16", "type_as", "type", "_to_copy"),
        "convert_element_type",
    )
)
_MAX_ELEMENTS = 1 << 22  # of a rotation whose number of tokens is fixed in the graph
_TOKENS = 3  # to try, where the number of tokens is symbolic
_MAX_CANDIDATES = 8
_RANGE = 1 << 20


@dataclass(frozen=True)
class Rotation:
    """`result` is RoPE of `x`, both `[T, heads, D]`, by tables `[T, 1, w]` or `[T, w]`.

    Fields as in `nwor_compile.ops.rope_stage_kv`. arithmetic: the nodes that compute it.
    """

    result: Node
    x: Node
    cos: Node
    sin: Node
    rotary_dim: int
    is_neox: bool
    arithmetic: frozenset[Node]


def find_rotation(result: Node, touches: Touches) -> Rotation | str:
    """The rotation that ends in `result`; or why it is none that can be fused."""
    value = value_of(result)
    if not isinstance(value, Tensor) or value.dim() != 3:
        return "it is no tensor [tokens, heads, head_size]"
    region = Region(result, touches)
    if not region.products:
        return "nothing rotates it in this graph"
    tokens = Numbers(value.shape[0])
    try:
        elements = math.prod(tokens(size) for size in value.shape)
    except UnknownError:
        return "sizes other than its number of tokens are symbolic"
    if elements > _MAX_ELEMENTS:
        return "its number of tokens is fixed and too large to check the rotation"
    reason = "what computes it is no RoPE by tables of one row a token"
    for x in region.candidates():
        found = _try(region, x, tokens)
        if isinstance(found, Rotation):
            return found
        reason = found or reason
    return reason


def same_value(one: Node, other: Node) -> bool:
    """True if two nodes provably compute the same: the same calls of the same inputs."""
    if one is other:
        return True
    if one.op not in ("call_function", "call_method") or one.op != other.op:
        return False
    if one.target != other.target or one.is_impure() or _may_change(one):
        return False
    return _same_tree((one.args, one.kwargs), (other.args, other.kwargs))


def _same_tree(one: Any, other: Any) -> bool:
    """Equal constants in equal containers (slices too), and nodes of the same value."""
    if isinstance(one, Node) or isinstance(other, Node):
        return isinstance(one, Node) and isinstance(other, Node) and same_value(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, slice):
        one, other = (one.start, one.stop, one.step), (other.start, other.stop, other.step)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same_tree(one[k], other[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same_tree, one, other))
    return bool(one == other)


def _may_change(node: Node) -> bool:
    """True for calls that need not give the same twice, or are not known not to."""
    return name_of(node) not in (
        _ARITHMETIC | _REARRANGING | CASTS | {"index_select", "index", "getitem", "embedding"}
        | {"view", "unsqueeze", "squeeze", "chunk", "split", "select", "slice", "cos", "sin"}
        | {"split_with_sizes", "unflatten", "permute", "transpose", "size"}
    )  # fmt: skip


def name_of(node: Node) -> str:
    """What a node calls, without namespace or overload; empty for anything but torch's own."""
    op = overload_of(node.target)
    if op is not None:
        return op._schema.name.split("::")[1] if op.namespace in ("aten", "prims") else ""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    module = getattr(node.target, "__module__", "") or ""
    name = getattr(node.target, "__name__", "")
    ours = module in ("_operator", "operator") or module.split(".")[0] == "torch"
    # Built-in functions of torch have no module.
    return name if ours or node.target is getattr(torch, name, None) else ""


class Region:
    """The nodes behind `result` that only calculate, rearrange, view or cast, in graph order."""

    def __init__(self, result: Node, touches: Touches) -> None:
        self.result, self.aliases = result, touches.aliases
        self.inner: set[Node] = set()
        self.leaves: set[Node] = set()
        pending = [result]
        while pending:
            node = pending.pop()
            if node in self.inner or node in self.leaves:
                continue
            if self._transparent(node):
                self.inner.add(node)
                pending += [n for n in node.all_input_nodes if _is_tensor(n)]
            else:
                self.leaves.add(node)
        self.nodes = sorted(self.inner | self.leaves, key=touches.order.__getitem__)
        self.products = [
            n for n in self.nodes if n in self.inner and name_of(n) in ("mul", "multiply")
        ]

    def candidates(self) -> list[Node]:
        """What could be x: of the result's shape and dtype, earliest first."""
        want = value_of(self.result)
        found = [node for node in self.nodes if node is not self.result and _alike(node, want)]
        return found[:_MAX_CANDIDATES]

    def after(self, x: Node) -> list[Node]:
        """The nodes of the region that depend on x, in order."""
        found: set[Node] = {x}
        for node in self.nodes:
            if node in self.inner and any(n in found for n in node.all_input_nodes):
                found.add(node)
        return [node for node in self.nodes if node in found and node is not x]

    def _transparent(self, node: Node) -> bool:
        name = name_of(node)
        if name in _ARITHMETIC:
            return _is_tensor(node) and "out" not in node.kwargs
        return name in _REARRANGING or name in CASTS or self.aliases.is_view(node)


def _is_tensor(node: Node) -> bool:
    """True for a tensor, or a container of tensors."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value_of(node)))


def _alike(node: Node, want: object) -> bool:
    value = value_of(node)
    return (
        isinstance(value, Tensor)
        and isinstance(want, Tensor)
        and value.dtype == want.dtype
        and value.shape == want.shape
    )


def _try(region: Region, x: Node, tokens: Numbers) -> Rotation | str:
    """The rotation of `x`; else why not, or nothing if x is just not what is rotated."""
    after = region.after(x)
    inside = {x, *after}
    tables: list[Node] = []
    for product in (n for n in after if n in set(region.products)):
        others = [n for n in product.all_input_nodes if n not in inside]
        if len(product.all_input_nodes) != 2 or len(others) != 1:
            return ""
        tables += [n for n in others if not any(same_value(n, known) for known in tables)]
    if len(tables) != 2:
        return ""
    # One generator: tables of equal shape must not get equal numbers.
    generator = torch.Generator().manual_seed(0)
    numbers = [random_like(value_of(node), tokens, generator) for node in (x, *tables)]
    if any(number is None for number in numbers):
        return ""
    known = dict(zip((x, *tables), numbers, strict=True))
    for node in after:
        for other in node.all_input_nodes:
            twin = next((t for t in tables if same_value(other, t)), None)
            if twin is not None:
                known[other] = known[twin]
    got = run_nodes(region.result, known, tokens)
    if got is None:
        return ""
    wide = [rows_of(known[table], known[x].shape[0]) for table in tables]
    if wide[0] is None or wide[1] is None or wide[0].shape != wide[1].shape:
        return ""
    found = _compare(got, known[x], wide)
    if found is None:
        return ""
    first, rotary_dim, is_neox = found
    rounded = _rounds_between(after)
    if rounded:
        return rounded
    cos, sin = tables[first], tables[1 - first]
    arithmetic = frozenset(node for node in after if not region.aliases.is_view(node))
    return Rotation(region.result, x, cos, sin, rotary_dim, is_neox, arithmetic)


def _compare(got: Tensor, x: Tensor, tables: list[Any]) -> tuple[int, int, bool] | None:
    """(index of cos, rotary_dim, is_neox) by which RoPE of x is `got`."""
    width, size = tables[0].shape[1], x.shape[2]
    for rotary_dim in (width, 2 * width):
        if rotary_dim % 2 or not 2 <= rotary_dim <= size:
            continue
        for is_neox in (True, False):
            for first in (0, 1):
                want = rotate_exactly(x, tables[first], tables[1 - first], rotary_dim, is_neox)
                if torch.equal(got, want):
                    return first, rotary_dim, is_neox
    return None


def _rounds_between(after: Iterable[Node]) -> str:
    """A cast to fewer bits of a sum or product that is calculated with afterwards."""
    calculated: set[Node] = set()
    rounded: dict[Node, Node] = {}
    for node in after:
        inputs = node.all_input_nodes
        name = name_of(node)
        if name in ("add", "sub", "mul", "multiply", "subtract"):
            culprit = next((rounded[n] for n in inputs if n in rounded), None)
            if culprit is not None:
                return f"{culprit.name} rounds in the middle of its rotation"
            calculated.add(node)
            continue
        if any(n in calculated for n in inputs):
            calculated.add(node)
        source = next((rounded[n] for n in inputs if n in rounded), None)
        if source is not None:
            rounded[node] = source
        elif name in CASTS and node in calculated and narrows(node):
            rounded[node] = node
    return ""


def narrows(node: Node) -> bool:
    before, now = (value_of(n) for n in (node.all_input_nodes[0], node))
    if not isinstance(before, Tensor) or not isinstance(now, Tensor):
        return True
    return torch.finfo(now.dtype).eps > torch.finfo(before.dtype).eps


def rows_of(table: Any, tokens: int) -> Tensor | None:
    """A table as `[T, width]`; None if it has not one row a token for all heads."""
    if table.dim() == 3 and table.shape[1] == 1:
        table = table.squeeze(1)
    return table if table.dim() == 2 and table.shape[0] == tokens else None


class Numbers:
    """Sizes as plain numbers; a number of tokens that is symbolic becomes small.

    A size with other symbols in it raises UnknownError: only the tokens may be symbolic.
    """

    def __init__(self, tokens: int | SymInt) -> None:
        symbols = tokens.node.expr.free_symbols if isinstance(tokens, SymInt) else ()
        self._values = dict.fromkeys(symbols, _TOKENS)

    def __call__(self, size: int | SymInt) -> int:
        if not isinstance(size, SymInt):
            return int(size)
        expr = size.node.expr.subs(self._values)
        if expr.free_symbols:
            raise UnknownError
        return int(expr)


def random_like(value: object, tokens: Callable[[Any], int], generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return None
    try:
        shape = [tokens(size) for size in value.shape]
    except UnknownError:
        return None
    return torch.randint(-_RANGE, _RANGE, shape, generator=generator).double()


def run_nodes(result: Node, known: dict[Node, Any], tokens: Numbers) -> Tensor | None:
    """The region on numbers; None if it needs anything that is not known."""
    values: dict[Node, Any] = dict(known)

    def value(node: Node) -> Any:
        if node in values:
            return values[node]
        plain = value_of(node)
        if isinstance(plain, int | SymInt):
            found: Any = tokens(plain)
        elif node.op not in ("call_function", "call_method") or not name_of(node):
            raise UnknownError
        elif name_of(node) in CASTS:
            found = value(node.all_input_nodes[0])
        elif not (name_of(node) in _ARITHMETIC | _REARRANGING or _reinterprets(node)):
            raise UnknownError
        else:
            args, kwargs = _map((node.args, node.kwargs), value)
            found = _called(node, args, kwargs)
        values[node] = found
        return found

    try:
        found = value(result)
    except (UnknownError, RuntimeError, TypeError, ValueError, IndexError):
        return None  # sizes that only fit the traced number of tokens, say: not matched
    return found if isinstance(found, Tensor) else None


def call_on(node: Node, known: dict[Node, Any], tokens: Numbers) -> Tensor | None:
    """One call on numbers, its sizes apart all of them known; None if it cannot be made."""

    def value(source: Node) -> Any:
        if source in known:
            return known[source]
        plain = value_of(source)
        if isinstance(plain, int | SymInt):
            return tokens(plain)
        raise UnknownError

    try:
        args, kwargs = _map((node.args, node.kwargs), value)
        found = _called(node, args, kwargs)
    except (UnknownError, RuntimeError, TypeError, ValueError, IndexError):
        return None
    return found if isinstance(found, Tensor) else None


def _called(node: Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def erase_unused(graph: Graph, nodes: Iterable[Node]) -> None:
    """Erase those of `nodes` that nothing uses, and what only they used; calculations alone."""
    pending = list(nodes)
    while pending:
        node = pending.pop()
        known = node.op in ("call_function", "call_method") and not _may_change(node)
        if node.users or not known or node.is_impure() or node.graph is not graph:
            continue
        sources = node.all_input_nodes
        graph.erase_node(node)
        pending += sources


class UnknownError(Exception):
    """The region needs a value that is no part of it."""


def _map(tree: Any, value: Callable[[Node], Any]) -> Any:
    """Nodes replaced by their values, also those inside slices."""
    if isinstance(tree, Node):
        return value(tree)
    if isinstance(tree, slice):
        return slice(*(_map(part, value) for part in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, tuple):
        return tuple(_map(item, value) for item in tree)
    if isinstance(tree, list):
        return [_map(item, value) for item in tree]
    if isinstance(tree, dict):
        return {key: _map(item, value) for key, item in tree.items()}
    if isinstance(tree, SymInt):
        raise UnknownError
    return tree


def _reinterprets(node: Node) -> bool:
    """True if a node's result shares its input's storage, or it asks for a shape."""
    sources = {
        leaf.untyped_storage()._cdata
        for n in node.all_input_nodes
        for leaf in pytree.tree_leaves(value_of(n))
        if isinstance(leaf, Tensor)
    }
    leaves = [leaf for leaf in pytree.tree_leaves(value_of(node)) if isinstance(leaf, Tensor)]
    return all(leaf.untyped_storage()._cdata in sources for leaf in leaves)


def turned_alike(q: Rotation, k: Rotation) -> bool:
    """Whether both are rotated by the same angles in the same form."""
    same = (q.rotary_dim, q.is_neox) == (k.rotary_dim, k.is_neox)
    return same and same_value(q.cos, k.cos) and same_value(q.sin, k.sin)
