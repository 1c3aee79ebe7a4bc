"""The pass: `reshape_and_cache` becomes `stage_kv`, its attention becomes `verify_attention`.

Before (a Dynamo graph; after AOTAutograd the write sits in `auto_functionalized_v2`):

    nwor.reshape_and_cache(k, v, key_cache, value_cache, slot_mapping)
    out = nwor.paged_attention(q, key_cache, value_cache, block_table, seq_lens, starts, scale)

After:

    nwor.stage_kv.window(k, v, key_cache, value_cache, slot_mapping)
    out = nwor.verify_attention.window(q, key_cache, value_cache, block_table, ..., scale)

The window overloads take what the ops they replace took and route rows by device data, so one
graph serves verification, plain decode and prefill. `visibility.py` decides; this file rewrites.
"""

from __future__ import annotations

import functools
import hashlib
import time
from pathlib import Path
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import Graph, GraphModule, Node

from nwor_compile.passes.calls import callee, is_functionalized, overload_of, twin_arguments
from nwor_compile.passes.report import Decision, Report, VisibilityError, keep
from nwor_compile.passes.rope_fuse import fuse
from nwor_compile.passes.rope_plan import Rope, find_rope
from nwor_compile.passes.table import CacheReader, CacheWrite, op_name, resolve
from nwor_compile.passes.touches import Touches
from nwor_compile.passes.visibility import Write, judge, subgraph_writes

# How `auto_functionalized_v2` says which view of its base a mutated argument is.
_VIEW_KEYS = (
    *("base_index", "alias", "size", "stride", "storage_offset"),
    *("slice_dim", "slice_start", "slice_end"),
)


def rewrite(
    graph: Graph, *, strict: bool = False, rope: bool = True, name: str = "graph"
) -> Report:
    """Stage every cache write of `graph` that can be staged safely; return what was done.

    With `rope`, a staged write does the rotation before it as well, where it can. Running it again
    changes nothing. With `strict`, a write that must stay direct raises VisibilityError before
    anything is changed; a rotation that stays apart does not.
    """
    start = time.perf_counter()
    writes = judge(graph)
    ropes = _ropes(graph, writes) if rope else {}
    inner = [
        Decision(path, op, reason="it is inside a control-flow subgraph, which is not followed")
        for path, op in subgraph_writes(graph)
    ]
    report = Report(name, [_decision(write, ropes) for write in writes] + inner)
    if strict and report.refused:
        raise VisibilityError(
            "strict mode, and these cache writes cannot be staged:\n"
            + "\n".join(f"  {d.node} ({d.op}): {d.reason}" for d in report.refused)
        )
    for write in writes:
        if not write.reason:
            _transform(graph, write, ropes.get(write.node, ""))
    if report.rewritten:
        graph.eliminate_dead_code(is_impure_node=_keeps)
        graph.lint()
    report.seconds = time.perf_counter() - start
    keep(report)
    return report


@functools.cache
def sources_hash() -> str:
    """A hash of all files of this package: a helper changes the result as much as the pass."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _ropes(graph: Graph, writes: list[Write]) -> dict[Node, Rope | str]:
    """For each write that is staged its rotation, or why that stays apart; by the write's node."""
    staged = [write for write in writes if not write.reason]
    if not staged:
        return {}
    touches = Touches(graph, [write.node for write in staged])
    return {write.node: find_rope(write, touches) for write in staged}


def _decision(write: Write, ropes: dict[Node, Rope | str]) -> Decision:
    readers = tuple(node.name for node, _ in write.readers)
    rope = ropes.get(write.node, "")
    why = rope if isinstance(rope, str) else ""
    return Decision(
        write.node.name, write.op, readers, write.reason, not isinstance(rope, str), why
    )


def _transform(graph: Graph, write: Write, rope: Rope | str) -> None:
    if not isinstance(rope, str):
        fuse(graph, write, rope)
    elif is_functionalized(write.node):
        _swap_functionalized(graph, write.node, write.row)
    else:
        _swap(graph, write.node, write.row)
    for node, row in write.readers:
        _swap(graph, node, row)


def _swap(graph: Graph, node: Node, row: CacheWrite | CacheReader) -> None:
    """Replace a plain call by its staged twin with the same arguments, in the twin's order."""
    staged = _staged(row)
    args, kwargs = _twin_call(node, node.args, node.kwargs, row)
    with graph.inserting_before(node):
        twin = graph.call_function(staged, args, kwargs)
    _replace(graph, node, twin)
    if "eager_input_vals" in node.meta:
        args, kwargs = node.meta["eager_input_vals"]
        twin.meta["eager_input_vals"] = _twin_call(node, args, kwargs, row)


def _twin_call(
    node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], row: CacheWrite | CacheReader
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a plain call (or what was recorded of them) as its twin takes them."""
    op, staged = overload_of(node.target), _staged(row)
    if op is None:
        raise RuntimeError(f"{node.name} lost its op between the decision and the rewrite")
    names = [argument.name for argument in op._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    named = twin_arguments(given, row, op, staged)
    positional = []
    for argument in staged._schema.arguments:
        if argument.name not in named:
            break
        positional.append(named.pop(argument.name))
    return tuple(positional), named


def _swap_functionalized(graph: Graph, node: Node, row: CacheWrite) -> None:
    """Replace the op inside `auto_functionalized`; v2 also names its arguments in view keys."""
    args, kwargs = _functionalized_call(node, node.args, node.kwargs, row)
    with graph.inserting_before(node):
        twin = graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    _replace(graph, node, twin)
    if "eager_input_vals" in node.meta:
        args, kwargs = node.meta["eager_input_vals"]
        twin.meta["eager_input_vals"] = _functionalized_call(node, args, kwargs, row)


def _functionalized_call(
    node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], row: CacheWrite
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    op, staged = overload_of(callee(node)), _staged(row)
    if op is None:
        raise RuntimeError(f"{node.name} lost its op between the decision and the rewrite")
    renamed = {}
    for old in (argument.name for argument in op._schema.arguments):
        new = row.rename.get(old, old)
        renamed[old] = new
        renamed.update({f"_{old}_{part}": f"_{new}_{part}" for part in _VIEW_KEYS})
    return (staged, *args[1:]), {renamed.get(key, key): value for key, value in kwargs.items()}


def _staged(row: CacheWrite | CacheReader) -> OpOverload:
    op = resolve(row.staged)
    if op is None:  # judge() refuses such a row, so this is a bug of the pass
        raise RuntimeError(f"{row.staged} vanished between the decision and the rewrite")
    return op


def _replace(graph: Graph, node: Node, twin: Node) -> None:
    twin.meta.update(node.meta)
    node.replace_all_uses_with(twin)
    graph.erase_node(node)


def _keeps(node: Node) -> bool:
    """What dead-code elimination must keep: whatever is not known to be without effects.

    FX takes a packet (as Dynamo leaves them) for pure even if its op mutates.
    """
    if node.op in ("placeholder", "output") or isinstance(node.target, OpOverloadPacket):
        return True
    if node.op == "call_function" and isinstance(callee(node), OpOverload):
        return node.is_impure() or op_name(node.target).startswith("nwor::")
    return True


def rewrite_module(
    module: GraphModule, *, strict: bool = False, rope: bool = True, name: str = "graph"
) -> Report:
    """`rewrite` on a GraphModule, recompiled if something changed."""
    report = rewrite(module.graph, strict=strict, rope=rope, name=name)
    if report.rewritten:
        module.recompile()
    return report
