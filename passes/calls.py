"""One view of an op call, whether it is plain or inside `auto_functionalized` (v1 or v2)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Node

from nwor_compile.passes.table import op_name, resolve

FUNCTIONALIZED = (auto_functionalized, auto_functionalized_v2)


@dataclass(frozen=True)
class View:
    """Part of a tensor's storage, in elements; sizes may be symbolic."""

    storage: int
    offset: Any
    size: tuple[Any, ...]
    stride: tuple[Any, ...]


def value_of(node: Node) -> object:
    """What a node computes, as recorded while tracing: post-grad `val`, Dynamo `example_value`."""
    return node.meta.get("val", node.meta.get("example_value"))


def storage_of(node: Node) -> int | None:
    """Identity of the storage of a node's tensor; None if it has none or nothing was recorded."""
    value = value_of(node)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def view_of(node: Node) -> View | None:
    """The part of its storage that a node's tensor covers."""
    value = value_of(node)
    if not isinstance(value, Tensor):
        return None
    return View(
        value.untyped_storage()._cdata,
        value.storage_offset(),
        tuple(value.shape),
        tuple(value.stride()),
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
    """The overload behind an overload or packet."""
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


def mutated_views(node: Node) -> dict[str, View | None]:
    """The part of storage that each mutated argument of a call covers, by name."""
    op = overload_of(callee(node))
    if op is None:
        return {}
    names = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
    if node.target is auto_functionalized_v2:
        return {name: _v2_view(node, name) for name in names}
    given = arguments(node)
    found = {}
    for name in names:
        argument = given.get(name)
        found[name] = view_of(argument) if isinstance(argument, Node) else None
    return found


def bases(node: Node) -> list[Node]:
    """Tensors that a functionalized call returns a new version of, in the order of its outputs."""
    if node.target is auto_functionalized_v2:
        return list(node.kwargs["_all_bases"])  # type: ignore[arg-type]
    given = arguments(node)
    return [given[name] for name in mutated_views(node)]


def base_output(node: Node) -> tuple[Node, int] | None:
    """(functionalized call, index into `bases`) if a node is the getitem of a new version."""
    if node.op != "call_function" or node.target is not operator.getitem:
        return None
    source, index = node.args
    if not isinstance(source, Node) or not isinstance(index, int) or not is_functionalized(source):
        return None
    op = overload_of(callee(source))
    returns = len(op._schema.returns) if op is not None else 0
    # A call without results still has a None in front of its new versions.
    first = max(1, returns)
    return (source, index - first) if index >= first else None


def _v2_view(node: Node, name: str) -> View | None:
    """Read back how v2 describes an argument as a view of its base."""
    kwargs = node.kwargs
    index = kwargs.get(f"_{name}_base_index")
    if not isinstance(index, int):
        return None
    base = view_of(bases(node)[index])
    if base is None:
        return None
    if f"_{name}_size" in kwargs:
        size, stride, offset = (
            kwargs[f"_{name}_{part}"] for part in ("size", "stride", "storage_offset")
        )
        return View(base.storage, _value(offset), _values(size), _values(stride))
    if f"_{name}_slice_dim" in kwargs:
        dim, start, end = (_value(kwargs[f"_{name}_slice_{p}"]) for p in ("dim", "start", "end"))
        length = torch.sym_min(end, base.size[dim]) - start
        size = (*base.size[:dim], length, *base.size[dim + 1 :])
        return View(base.storage, base.offset + start * base.stride[dim], size, base.stride)
    return base


def _value(item: Any) -> Any:
    return value_of(item) if isinstance(item, Node) else item


def _values(items: Any) -> tuple[Any, ...]:
    return tuple(_value(item) for item in items)
