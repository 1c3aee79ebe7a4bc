"""The ops that write and read paged caches: one row each, no branches elsewhere.

Ops are named as in their schema (`namespace::op` or `namespace::op.overload`) and looked up when a
graph is matched, so a row may name an op of a library that is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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


_writes: dict[str, CacheWrite] = {}
_readers: dict[str, CacheReader] = {}


def register_write(row: CacheWrite) -> None:
    """Add a cache-writing op. Raises ValueError if the op has another row, or does not fit."""
    _add(_writes, row)


def register_reader(row: CacheReader) -> None:
    """Add a cache-reading op. Raises ValueError if the op has another row, or does not fit."""
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
        # Dynamo keeps packets; calling one without overload picks by arguments, and the ops of
        # this table have one that fits.
        return target._qualified_op_name
    return ""


def resolve(name: str) -> OpOverload | None:
    """The overload named `namespace::op[.overload]`; None if it does not exist (yet)."""
    qualified, _, overload = name.partition(".")
    namespace, _, op = qualified.partition("::")
    packet = getattr(getattr(torch.ops, namespace), op, None)
    return getattr(packet, overload or "default", None) if packet is not None else None


def _add(table: dict[str, CacheWrite] | dict[str, CacheReader], row: object) -> None:
    if not isinstance(row, CacheWrite | CacheReader):
        raise TypeError(f"expected a CacheWrite or CacheReader, got {type(row).__name__}")
    known = table.get(row.op)
    if known is not None and known != row:
        raise ValueError(f"{row.op}: already in the table as {known}")
    _check(row)
    table[row.op] = row  # type: ignore[assignment]


def _check(row: CacheWrite | CacheReader) -> None:
    """Hold a row against the schemas, as far as its ops exist."""
    expected = [row.key_cache, row.value_cache] if isinstance(row, CacheWrite) else []
    for name, renamed in ((row.op, False), (row.staged, True)):
        op = resolve(name)
        if op is None:
            continue
        wanted = [row.rename.get(arg, arg) for arg in expected] if renamed else expected
        mutated = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
        if mutated != wanted:
            raise ValueError(
                f"{name}: expected it to mutate {wanted}, its schema mutates {mutated}"
            )
        if isinstance(row, CacheWrite) and op._schema.returns:
            raise ValueError(f"{name}: expected an op that returns nothing: {op._schema}")


register_write(CacheWrite("nwor::reshape_and_cache"))
# vLLM's; `reshape_and_cache` is the 5-D key layout, which the staged op knows by its rank.
register_write(CacheWrite("_C_cache_ops::reshape_and_cache_flash"))
register_write(CacheWrite("_C_cache_ops::reshape_and_cache"))
register_reader(CacheReader("nwor::paged_attention"))
