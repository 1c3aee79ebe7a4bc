"""Which nodes touch the same cache memory.

Tensors that share a storage while tracing alias each other, however the views were made; so do the
versions that functionalization makes of one mutated tensor. Two views of one storage are told
apart only if their address ranges provably do not meet: the interleaved halves of a packed cache
count as one.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nwor_compile.passes.calls import (
    View,
    base_output,
    bases,
    is_functionalized,
    overload_of,
    storage_of,
)

# Dynamo graphs hold Python functions and methods without a schema; these only reinterpret. A name
# counts as a view only where the result also shares its input's storage.
_VIEW_NAMES = frozenset(
    (
        *("view", "view_as", "reshape", "flatten", "unflatten", "contiguous", "as_strided"),
        *("permute", "transpose", "t", "T", "mT", "getattr", "movedim", "moveaxis"),
        *("swapaxes", "swapdims", "diagonal", "unfold", "expand", "expand_as"),
        *("getitem", "select", "narrow", "slice", "unsqueeze", "squeeze"),
        *("unbind", "split", "split_with_sizes", "chunk", "tensor_split", "detach", "alias"),
    )
)


class Aliases:
    """Storages of a graph, merged over the versions of functionalized calls."""

    def __init__(self, graph: Graph) -> None:
        self._parent: dict[int, int] = {}
        for node in graph.nodes:
            output = base_output(node)
            if output is None:
                continue
            call, index = output
            self._merge(storage_of(bases(call)[index]), storage_of(node))

    def family(self, storage: int) -> int:
        """One number for all storages that are versions of one memory."""
        while storage in self._parent:
            storage = self._parent[storage]
        return storage

    def _merge(self, one: int | None, other: int | None) -> None:
        if one is None or other is None:
            return
        one, other = self.family(one), self.family(other)
        if one != other:
            self._parent[other] = one

    def overlap(self, one: View, other: View) -> bool:
        """False only if two views provably share no element."""
        if self.family(one.storage) != self.family(other.storage):
            return False
        return not (
            statically_known_true(_end(one) < other.offset)
            or statically_known_true(_end(other) < one.offset)
        )

    def same(self, one: View, other: View) -> bool:
        """True if two views provably cover the same elements in the same order."""
        return (
            self.family(one.storage) == self.family(other.storage)
            and len(one.size) == len(other.size)
            and statically_known_true(one.offset == other.offset)
            and all(
                statically_known_true(a == b)
                for a, b in zip((*one.size, *one.stride), (*other.size, *other.stride), strict=True)
            )
        )


def _end(view: View) -> Any:
    """The largest element offset that a view reaches."""
    last = view.offset
    for size, stride in zip(view.size, view.stride, strict=True):
        last = last + (size - 1) * stride
    return last


def is_view(node: Node) -> bool:
    """True if a node only reinterprets its input: same storage, nothing read or written."""
    storage = storage_of(node)
    if storage is None or all(storage_of(source) != storage for source in node.all_input_nodes):
        # unbind, split and chunk give tuples: their getitems are judged one by one.
        return _is_view_tuple(node)
    op = overload_of(node.target)
    if op is not None:
        schema = op._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        return not writes and any(r.alias_info is not None for r in schema.returns)
    return _name(node) in _VIEW_NAMES


def _is_view_tuple(node: Node) -> bool:
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, list | tuple) or is_functionalized(node):
        return False
    inputs = {storage_of(source) for source in node.all_input_nodes}
    shares = all(
        hasattr(item, "untyped_storage") and item.untyped_storage()._cdata in inputs
        for item in value
    )
    op = overload_of(node.target)
    known = op.name() if op is not None else _name(node)
    return shares and known.removeprefix("aten::").split(".")[0] in _VIEW_NAMES


def _name(node: Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", "")
