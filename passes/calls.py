"""One view of an op call, whether it is plain or inside `auto_functionalized` (v1 or v2)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nwor_compile.passes.table import CacheReader, CacheWrite, op_name, resolve

FUNCTIONALIZED = (auto_functionalized, auto_functionalized_v2)


@dataclass(frozen=True)
class View:
    """Part of a tensor's storage; offset, sizes and strides in elements, possibly symbolic.

    size None: somewhere in that storage. storage None: it could be any memory.
    """

    storage: int | None
    offset: Any = 0
    size: tuple[Any, ...] | None = None
    stride: tuple[Any, ...] = ()
    dtype: torch.dtype | None = None

    def anywhere(self) -> View:
        """The whole storage."""
        return View(self.storage)


ANYWHERE = View(None)


class _Missing:
    """No value was recorded for a node."""


MISSING = _Missing()


def value_of(node: Node) -> object:
    """What a node computes, as recorded while tracing: post-grad `val`, Dynamo `example_value`.

    The attribute itself for a `get_attr` without a record; MISSING for any other node without one.
    """
    for key in ("val", "example_value"):
        if key in node.meta:
            return node.meta[key]
    return attribute(node) if node.op == "get_attr" else MISSING


def attribute(node: Node) -> object:
    """What a `get_attr` or `call_module` node names; MISSING if its graph has no such attribute."""
    value: object = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name, MISSING)
    return value


def tensor_views(value: object) -> tuple[View, ...]:
    """The memory of every tensor in a value: a tensor, or a nest of containers."""
    found = []
    for leaf in [value] if isinstance(value, Tensor) else pytree.tree_leaves(value):
        if not isinstance(leaf, Tensor):
            continue
        if is_traceable_wrapper_subclass(leaf):
            names, _ = leaf.__tensor_flatten__()
            found += [view for name in names for view in tensor_views(getattr(leaf, name))]
        else:
            found.append(_tensor_view(leaf))
    return tuple(found)


def view_of(node: Node) -> View | None:
    """The part of its storage that a node's tensor covers; None if it is no plain tensor."""
    value = value_of(node)
    if not isinstance(value, Tensor) or is_traceable_wrapper_subclass(value):
        return None
    view = _tensor_view(value)
    return view if view.size is not None else None


def _tensor_view(tensor: Tensor) -> View:
    if tensor.layout is not torch.strided:
        return ANYWHERE
    return View(
        tensor.untyped_storage()._cdata,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


def is_functionalized(node: Node) -> bool:
    """True for a call wrapped by `auto_functionalized`, either generation."""
    return node.op == "call_function" and node.target in FUNCTIONALIZED


def callee(node: Node) -> object:
    """The op that a node calls: the wrapped one for a functionalized call."""
    if node.op != "call_function":
        return None
    return node.args[0] if is_functionalized(node) and node.args else node.target


def overload_of(target: object) -> OpOverload | None:
    """The overload behind an overload, or behind a packet that has just one."""
    if isinstance(target, OpOverload):
        return target
    return resolve(op_name(target)) if isinstance(target, OpOverloadPacket) else None


def arguments(node: Node) -> dict[str, Any]:
    """Arguments by schema name, those that are given. For a v2 call without the mutated ones."""
    if is_functionalized(node):
        return {k: v for k, v in node.kwargs.items() if not k.startswith("_")}
    op = overload_of(node.target)
    if op is None:
        return dict(node.kwargs)
    names = [argument.name for argument in op._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def staged_arguments(node: Node, row: CacheWrite | CacheReader) -> dict[str, Any]:
    """Arguments of a call under the names of its staged twin, defaults included."""
    op, staged = overload_of(callee(node)), resolve(row.staged)
    if op is None or staged is None:
        return {}
    return twin_arguments(arguments(node), row, op, staged, explicit=True)


def twin_arguments(
    given: dict[str, Any],
    row: CacheWrite | CacheReader,
    op: OpOverload,
    staged: OpOverload,
    *,
    explicit: bool = False,
) -> dict[str, Any]:
    """Arguments of `op` by the names of `staged`, in its order.

    A default of `op` that `staged` does not share is written out; with `explicit`, all are.
    """
    defaults = {a.name: a.default_value for a in staged._schema.arguments if a.has_default_value()}
    found = {row.rename.get(name, name): value for name, value in given.items()}
    for argument in op._schema.arguments:
        name = row.rename.get(argument.name, argument.name)
        if name not in found and argument.has_default_value():
            default = argument.default_value
            if explicit or name not in defaults or defaults[name] != default:
                found[name] = default
    order = [argument.name for argument in staged._schema.arguments]
    return {name: found[name] for name in order if name in found}


def mutated_names(op: OpOverload) -> list[str]:
    """Arguments that an op writes, in the order of its schema."""
    return [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]


def mutated_views(node: Node) -> dict[str, View | None]:
    """The part of storage that each mutated argument of a call covers, by name; None: unknown."""
    op = overload_of(callee(node))
    if op is None:
        return {}
    names = mutated_names(op)
    if node.target is auto_functionalized_v2:
        return {name: _v2_view(node, name) for name in names}
    given = arguments(node)
    found = {}
    for name in names:
        argument = given.get(name)
        found[name] = view_of(argument) if isinstance(argument, Node) else None
    return found


def bases(node: Node) -> list[Any]:
    """Tensors that a functionalized call returns a new version of, in the order of its outputs."""
    if node.target is auto_functionalized_v2:
        return list(node.kwargs["_all_bases"])  # type: ignore[arg-type]
    op = overload_of(callee(node))
    given = arguments(node)
    return [given.get(name) for name in mutated_names(op)] if op is not None else []


def new_version(node: Node) -> tuple[Node, list[Node]] | None:
    """(functionalized call, its bases that a node may be the new version of), if it is one."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return None
    source, index = node.args
    if not isinstance(source, Node) or not isinstance(index, int) or not is_functionalized(source):
        return None
    op = overload_of(callee(source))
    candidates = bases(source)
    if op is not None:
        # A call without results still has a None in front of its new versions.
        index -= max(1, len(op._schema.returns))
        if index < 0:
            return None
        candidates = candidates[index : index + 1]
    return source, [n for n in pytree.tree_leaves(candidates) if isinstance(n, Node)]


def _v2_view(node: Node, name: str) -> View | None:
    """Read back how v2 describes an argument as a view of its base."""
    kwargs = node.kwargs
    index = kwargs.get(f"_{name}_base_index")
    if not isinstance(index, int):
        return None
    base = view_of(bases(node)[index])
    if base is None or base.size is None:
        return None
    if f"_{name}_size" in kwargs:
        size, stride, offset = (
            kwargs[f"_{name}_{part}"] for part in ("size", "stride", "storage_offset")
        )
        return replace(base, offset=_value(offset), size=_values(size), stride=_values(stride))
    if f"_{name}_slice_dim" in kwargs:
        dim, start, end = (_value(kwargs[f"_{name}_slice_{p}"]) for p in ("dim", "start", "end"))
        length = torch.sym_min(end, base.size[dim]) - start
        size = (*base.size[:dim], length, *base.size[dim + 1 :])
        return replace(base, offset=base.offset + start * base.stride[dim], size=size)
    return base


def _value(item: Any) -> Any:
    return value_of(item) if isinstance(item, Node) else item


def _values(items: Any) -> tuple[Any, ...]:
    return tuple(_value(item) for item in items)
