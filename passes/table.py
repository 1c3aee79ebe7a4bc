"""The ops that write and read paged caches: one row each, no branches elsewhere.

Ops are named as in their schema (`namespace::op` or `namespace::op.overload`) and looked up when a
graph is matched, so a row may name an op of a library that is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket


@dataclass(frozen=True)
class CacheWrite:
    """An op that writes rows into a paged cache, and its staged twin.

    op: name. staged: name of the op that replaces it. rename: argument of `op` to argument of
    `staged`, where they differ. key_cache, value_cache: the mutated arguments of `op`. Both ops
    must return nothing and mutate just those two, in the same order.
    """

    op: str
    staged: str = "nwor::stage_kv.window"
    rename: dict[str, str] = field(default_factory=dict)
    key_cache: str = "key_cache"
    value_cache: str = "value_cache"


@dataclass(frozen=True)
class CacheReader:
    """An op that reads a paged cache, and the op that reads cache and staging.

    Fields as in `CacheWrite`; neither op mutates anything.
    """

    op: str
    staged: str = "nwor::verify_attention.window"
    rename: dict[str, str] = field(default_factory=dict)
    key_cache: str = "key_cache"
    value_cache: str = "value_cache"


# Ops that rotate q and k in place, with the arguments of vLLM's `rotary_embedding`: positions,
# query, key, head_size, cos_sin_cache, is_neox. Further arguments must have their defaults.
ROTARY_OPS = (
    "nwor::rotary_embedding",
    "_C::rotary_embedding",
    "vllm::flashinfer_rotary_embedding",
)

_writes: dict[str, CacheWrite] = {}
_readers: dict[str, CacheReader] = {}


def register_write(row: CacheWrite) -> None:
    """Add a cache-writing op. Raises ValueError if the op has another row, or does not fit.

    Ops that do not exist yet are held against the row when a graph has one.
    """
    if not isinstance(row, CacheWrite):
        raise TypeError(f"register_write: expected a CacheWrite, got {type(row).__name__}")
    _add(_writes, row)


def register_reader(row: CacheReader) -> None:
    """Add a cache-reading op. Raises ValueError if the op has another row, or does not fit."""
    if not isinstance(row, CacheReader):
        raise TypeError(f"register_reader: expected a CacheReader, got {type(row).__name__}")
    _add(_readers, row)


def rows() -> Iterator[CacheWrite | CacheReader]:
    """All rows, in the order they were added; part of the pass's uuid."""
    yield from _writes.values()
    yield from _readers.values()


def find_write(target: object) -> CacheWrite | None:
    """The row of a write op, given as an overload or a packet."""
    return _writes.get(op_name(target))


def find_reader(target: object) -> CacheReader | None:
    """The row of a reading op, given as an overload or a packet."""
    return _readers.get(op_name(target))


def op_name(target: object) -> str:
    """`namespace::op[.overload]`, without `.default`; empty if `target` is no torch op."""
    if isinstance(target, OpOverload):
        return target.name().removesuffix(".default")
    if isinstance(target, OpOverloadPacket):
        # Dynamo keeps packets. With several overloads the arguments decide which one runs, so
        # only a packet of one is known.
        return target._qualified_op_name if target.overloads() == ["default"] else ""
    return ""


def resolve(name: str) -> OpOverload | None:
    """The overload named `namespace::op[.overload]`; None if it does not exist (yet)."""
    qualified, _, overload = name.partition(".")
    namespace, _, op = qualified.partition("::")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    return getattr(packet, overload or "default", None) if packet is not None else None


def misfit(row: CacheWrite | CacheReader) -> str:
    """How a row contradicts the schemas of its ops; empty if it fits them."""
    op, staged = resolve(row.op), resolve(row.staged)
    if staged is None:
        return f"its staged twin {row.staged} is not registered"
    if op is None:
        return ""
    writes = isinstance(row, CacheWrite)
    for called, names in (
        (op, [row.key_cache, row.value_cache]),
        (staged, [row.rename.get(name, name) for name in (row.key_cache, row.value_cache)]),
    ):
        problem = _caches_misfit(called, names, writes)
        if problem:
            return problem
    return _arguments_misfit(row, op, staged)


def _caches_misfit(op: OpOverload, caches: list[str], writes: bool) -> str:
    arguments = op._schema.arguments
    mutated = [a.name for a in arguments if a.alias_info and a.alias_info.is_write]
    wanted = caches if writes else []
    if mutated != wanted:
        return f"{op.name()}: expected it to mutate {wanted}, its schema mutates {mutated}"
    missing = [name for name in caches if name not in [a.name for a in arguments]]
    if missing:
        return f"{op.name()}: it has no argument {', '.join(missing)}: {op._schema}"
    if len(op._schema.returns) != (0 if writes else 1):
        return f"{op.name()}: expected {'no' if writes else 'one'} result: {op._schema}"
    return ""


def _arguments_misfit(row: CacheWrite | CacheReader, op: OpOverload, staged: OpOverload) -> str:
    arguments = {argument.name: argument for argument in op._schema.arguments}
    unknown = [name for name in row.rename if name not in arguments]
    if unknown:
        return f"{op.name()}: it has no argument {', '.join(unknown)} to rename: {op._schema}"
    taken = {argument.name: argument for argument in staged._schema.arguments}
    renamed = {row.rename.get(name, name): argument for name, argument in arguments.items()}
    if len(renamed) != len(arguments):
        return f"{op.name()}: two of its arguments become one of {staged.name()}: {row.rename}"
    for name, argument in renamed.items():
        if name not in taken:
            return f"{staged.name()}: it has no argument {name}, which {op.name()} takes"
        if not argument.type.isSubtypeOf(taken[name].type):
            return (
                f"{staged.name()}: its argument {name} is {taken[name].type}, in {op.name()} it "
                f"is {argument.type}"
            )
    for name, argument in taken.items():
        if name not in renamed and not argument.has_default_value():
            return f"{staged.name()}: it needs an argument {name}, which {op.name()} does not take"
    return ""


def _add(table: dict[str, Any], row: CacheWrite | CacheReader) -> None:
    known = table.get(row.op)
    if known is not None and known != row:
        raise ValueError(f"{row.op}: already in the table as {known}")
    # Later is early enough for the twin: it may be defined after the row is added.
    problem = misfit(row) if resolve(row.staged) is not None else ""
    if problem:
        raise ValueError(problem)
    table[row.op] = row


register_write(CacheWrite("nwor::reshape_and_cache"))
# vLLM's; `reshape_and_cache` is the 5-D key layout, which the staged op knows by its rank.
register_write(CacheWrite("_C_cache_ops::reshape_and_cache_flash"))
register_write(CacheWrite("_C_cache_ops::reshape_and_cache"))
register_reader(CacheReader("nwor::paged_attention"))
