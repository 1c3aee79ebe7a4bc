"""Which nodes touch the same cache memory.

Tensors that share a storage while tracing alias each other, however the views were made; so do the
versions that functionalization makes of one mutated tensor. Two views of one storage are told
apart only by proof: their address ranges do not meet, or, with equal strides, no two of their
indices give one address (the halves of a packed cache, interleaved layers).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from nwor_compile.passes.calls import (
    ANYWHERE,
    MISSING,
    View,
    attribute,
    is_functionalized,
    mutated_names,
    new_version,
    overload_of,
    tensor_views,
    value_of,
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
# These ask a tensor for its shape, not for its elements.
_METADATA_NAMES = frozenset(
    (
        *("size", "stride", "numel", "storage_offset", "dim", "ndimension", "is_contiguous"),
        *("sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "_assert_tensor_metadata"),
        *("element_size", "getattr"),
    )
)
_MAX_STEPS = 8  # of one dimension that are tried in the proof that two views do not meet


class Aliases:
    """The memory behind the nodes of one graph; answers are kept, so the graph must not change."""

    def __init__(self, graph: Graph) -> None:
        self._parent: dict[int, int] = {}
        self._memory: dict[Node, tuple[View, ...]] = {}
        self._views: dict[Node, bool] = {}
        attributes: dict[int, Node] = {}
        for node in graph.nodes:
            version = new_version(node)
            for base in version[1] if version is not None else ():
                self._merge(node, base)
            if node.op == "get_attr":
                # One tensor may be fetched, and then faked, more than once.
                for view in tensor_views(attribute(node)):
                    if view.storage is not None:
                        self._merge(attributes.setdefault(view.storage, node), node)

    def memory(self, node: Node) -> tuple[View, ...]:
        """The memory that a node's value lies in; all of its inputs' memory if nothing is known."""
        found = self._memory.get(node)
        if found is None:
            found = self._memory[node] = tuple(self._find_memory(node))
        return found

    def is_view(self, node: Node) -> bool:
        """True if a node only reinterprets its input, or asks for its shape: no element is read
        or written."""
        found = self._views.get(node)
        if found is None:
            found = self._views[node] = self._find_view(node)
        return found

    def meet(self, ones: Sequence[View], others: Sequence[View]) -> bool:
        """True unless every view of one list provably shares nothing with the other list's."""
        return any(self.overlap(one, other) for one in ones for other in others)

    def overlap(self, one: View, other: View) -> bool:
        """False only if two views provably share no element."""
        if one.storage is None or other.storage is None:
            return True
        if self.family(one.storage) != self.family(other.storage):
            return False
        if one.size is None or other.size is None:
            return True
        return not (_apart(one, other) or _apart(other, one) or _interleaved(one, other))

    def same(self, one: View, other: View) -> bool:
        """True if two views provably cover the same elements in the same order."""
        if one.storage is None or other.storage is None or one.size is None or other.size is None:
            return False
        return (
            self.family(one.storage) == self.family(other.storage)
            and one.dtype == other.dtype
            and len(one.size) == len(other.size)
            and statically_known_true(one.offset == other.offset)
            and all(
                statically_known_true(a == b)
                for a, b in zip((*one.size, *one.stride), (*other.size, *other.stride), strict=True)
            )
        )

    def two_halves(self, key: View, value: View) -> bool:
        """True if the caches of one write are two: proven, or, where strides are symbolic and the
        proof is out of reach, at least known to begin at different places."""
        if not self.overlap(key, value):
            return True
        if all(isinstance(number, int) for number in (*key.stride, *value.stride)):
            return False
        return statically_known_true(key.offset != value.offset)

    def family(self, storage: int) -> int:
        """One number for all storages that are versions of one memory."""
        first = storage
        while first in self._parent:
            first = self._parent[first]
        while storage != first:  # the next call finds it in one step
            self._parent[storage], storage = first, self._parent[storage]
        return first

    def families(self, views: Sequence[View]) -> set[int | None]:
        """The families of some views; None stands for memory that could be any."""
        return {None if v.storage is None else self.family(v.storage) for v in views}

    def _merge(self, one: Node, other: Node) -> None:
        for mine in tensor_views(value_of(one)):
            for theirs in tensor_views(value_of(other)):
                if mine.storage is None or theirs.storage is None:
                    continue
                first, second = self.family(mine.storage), self.family(theirs.storage)
                if first != second:
                    self._parent[second] = first

    def _find_memory(self, node: Node) -> list[View]:
        value = value_of(node)
        if value is not MISSING:
            return list(tensor_views(value))
        if node.op in ("placeholder", "get_attr"):
            return [ANYWHERE]
        version = new_version(node)
        sources = version[1] if version is not None else node.all_input_nodes
        return [view.anywhere() for source in sources for view in self.memory(source)]

    def _find_view(self, node: Node) -> bool:
        value = value_of(node)
        if value is MISSING or is_functionalized(node):
            return False
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            container = value_of(node.args[0])
            if isinstance(container, list | tuple | dict):
                return True  # takes a tensor out of a container, and does nothing to it
        inputs = {v.storage for source in node.all_input_nodes for v in self.memory(source)}
        storages = {view.storage for view in self.memory(node)}
        if not storages:
            return _is_torch(node, _METADATA_NAMES)
        if None in storages or not storages <= inputs:
            return False
        op = overload_of(node.target)
        if op is None:
            return _is_torch(node, _VIEW_NAMES)
        returns = op._schema.returns
        aliased = all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        # Elsewhere an op that returns an alias may read it too.
        return op.namespace in ("aten", "prims") and aliased and not mutated_names(op)


def _is_torch(node: Node, names: frozenset[str]) -> bool:
    """True if a node calls torch's own function, method or op of one of these names."""
    if isinstance(node.target, str):
        return node.op == "call_method" and node.target in names
    op = overload_of(node.target)
    if op is not None:
        return op.namespace == "aten" and op._schema.name.removeprefix("aten::") in names
    if node.target is operator.getitem or node.target is getattr:
        return True
    name = getattr(node.target, "__name__", "")
    return name in names and node.target in (
        getattr(torch, name, None),
        getattr(Tensor, name, None),
    )


def _itemsize(view: View) -> int:
    return view.dtype.itemsize if view.dtype is not None else 1


def _apart(low: View, high: View) -> bool:
    """True if the bytes of one view provably end before the other's begin."""
    last = low.offset
    for size, stride in zip(low.size or (), low.stride, strict=True):
        last = last + (size - 1) * stride
    return statically_known_true((last + 1) * _itemsize(low) <= high.offset * _itemsize(high))


def _interleaved(one: View, other: View) -> bool:
    """True if two views of equal strides provably have no address in common."""
    # A comparison of symbolic numbers would install a guard, so those are left alone.
    known = (*one.stride, *other.stride, one.offset, other.offset)
    if not all(isinstance(number, int) for number in known):
        return False
    if one.stride != other.stride or one.dtype != other.dtype:
        return False
    distance = other.offset - one.offset
    dims = [
        (stride, -_steps(size_other), _steps(size_one))
        for stride, size_one, size_other in zip(
            one.stride, one.size or (), other.size or (), strict=True
        )
        if stride > 0
    ]
    return not _reaches(distance, sorted(dims, key=lambda dim: dim[0], reverse=True))


def _steps(size: Any) -> float:
    return size - 1 if isinstance(size, int) else math.inf


def _reaches(distance: int, dims: list[tuple[int, float, float]]) -> bool:
    """False if no n with low <= n <= high a dimension gives sum(n * stride) == distance.

    Dimensions come by falling stride, so where they nest only a step or two of each can fit.
    """
    if not dims:
        return distance == 0
    (stride, low, high), *rest = dims
    below = sum(s * least for s, least, _ in rest)
    above = sum(s * most for s, _, most in rest)
    if math.isinf(below) or math.isinf(above):
        return True  # a smaller dimension of unknown size
    first = max(low, -((above - distance) // stride))
    last = min(high, (distance - below) // stride)
    if last - first >= _MAX_STEPS:
        return True
    return any(_reaches(distance - n * stride, rest) for n in range(int(first), int(last) + 1))
