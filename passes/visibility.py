"""The proof: a write may be staged only if every later reader of its cache reads staging too.

NOTE [visibility]: a staged row is not in the cache until its commit. An op that reads the cache
between the write and the commit, and knows nothing of staging, would read the slot's old content.
So each write is judged by everything that touches its memory in the graph:

- readers after it that the table can redirect, and that read just this write's two caches: fine;
- any other op after it, the graph's output included: the write stays direct;
- readers before it, or of an older functional version: they do not see this step's rows in a
  direct run either, and are left as they are;
- a second write to overlapping memory: both stay direct, since staging holds one row a draft;
- no reader after it: it stays direct, since the reader must then be in another graph, which cannot
  be seen from here;
- a control-flow or other higher-order op that takes the cache: the write stays direct, since what
  its subgraphs do is not followed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from nwor_compile.passes.aliases import Aliases, is_view
from nwor_compile.passes.calls import (
    View,
    arguments,
    base_output,
    bases,
    callee,
    is_functionalized,
    mutated_views,
    overload_of,
    value_of,
    view_of,
)
from nwor_compile.passes.table import (
    CacheReader,
    CacheWrite,
    find_reader,
    find_write,
    op_name,
    resolve,
)


@dataclass
class Write:
    """A cache write in the graph, the readers to redirect with it, or why it stays direct."""

    node: Node
    row: CacheWrite
    key: View | None
    value: View | None
    readers: list[tuple[Node, CacheReader]] = field(default_factory=list)
    reason: str = ""

    @property
    def op(self) -> str:
        """Name of the writing op."""
        return op_name(callee(self.node))


def judge(graph: Graph) -> list[Write]:
    """Find the cache writes of a graph and decide each; nothing is changed."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    aliases = Aliases(graph)
    writes = [write for node in graph.nodes if (write := _find(node)) is not None]
    for write in writes:
        write.reason = _refuse(write, writes, order, aliases)
        if write.reason:
            write.readers.clear()
    return writes


def subgraph_writes(graph: Graph) -> list[tuple[str, str]]:
    """(path, op) of cache writes inside subgraphs; the pass does not look at their readers."""
    owner = graph.owning_module
    found = []
    for path, module in owner.named_modules() if owner is not None else []:
        if path and isinstance(module, GraphModule):
            found += [
                (f"{path}.{node.name}", op_name(callee(node)))
                for node in module.graph.nodes
                if find_write(callee(node)) is not None
            ]
    return found


def _find(node: Node) -> Write | None:
    row = find_write(callee(node))
    if row is None:
        return None
    views = mutated_views(node)
    return Write(node, row, views.get(row.key_cache), views.get(row.value_cache))


def _refuse(write: Write, writes: list[Write], order: dict[Node, int], aliases: Aliases) -> str:
    """Why a write must stay direct; empty if it may be staged, with its readers filled in."""
    if resolve(write.row.staged) is None:
        return f"its staged twin {write.row.staged} is not registered"
    if write.key is None or write.value is None:
        return "its caches have no recorded shapes, so their aliases are unknown"
    for other in writes:
        if other is not write and _meets(write, _caches(other), aliases):
            return f"two writes to one cache: {other.node.name} writes it too"
    for node in order:
        problem = _touch(write, node, order, aliases)
        if problem:
            return problem
    if not write.readers:
        return "no reader of this cache in the graph; one in another graph would miss staged rows"
    return ""


def _touch(write: Write, node: Node, order: dict[Node, int], aliases: Aliases) -> str:
    """Judge one node against a write; a reader that can be redirected is added to it."""
    if node is write.node or node.op in ("placeholder", "get_attr") or is_view(node):
        return ""
    if base_output(node) is not None or _is_write_back(node, aliases):
        return ""
    views = _used(node)
    if not _meets(write, views, aliases):
        return ""
    if isinstance(node.target, HigherOrderOperator) and not is_functionalized(node):
        return f"{node.name} ({node.target.name()}) takes the cache into a subgraph"
    if not _sees(write, node, order):
        return ""
    row = find_reader(node.target)
    if row is None:
        return _unknown(node)
    problem = _mismatch(write, node, row, aliases)
    if not problem:
        write.readers.append((node, row))
    return problem


def _unknown(node: Node) -> str:
    if node.op == "output":
        return "the cache leaves the graph through its output"
    name = op_name(callee(node)) or str(node.target)
    return f"{node.name} ({name}) touches the cache after the write and does not read staging"


def _mismatch(write: Write, node: Node, row: CacheReader, aliases: Aliases) -> str:
    """Why a known reader cannot be redirected with this write; empty if it can."""
    if resolve(row.staged) is None:
        return f"{node.name}: its staged twin {row.staged} is not registered"
    given = arguments(node)
    for name, written in ((row.key_cache, write.key), (row.value_cache, write.value)):
        argument = given.get(name)
        view = view_of(argument) if isinstance(argument, Node) else None
        if view is None or written is None or not aliases.same(view, written):
            return f"{node.name} reads {name} through another view than the write's"
    others = [v for k, v in given.items() if k not in (row.key_cache, row.value_cache)]
    views = [view_of(v) for v in others if isinstance(v, Node)]
    if _meets(write, [v for v in views if v is not None], aliases):
        return f"{node.name} also takes the cache as another argument"
    stored = arguments(write.node).get("kv_cache_dtype", "auto")
    if given.get("kv_cache_dtype", "auto") != stored:
        return f"{node.name} reads another kv_cache_dtype than the write's {stored!r}"
    return ""


def _caches(write: Write) -> list[View]:
    return [view for view in (write.key, write.value) if view is not None]


def _meets(write: Write, views: list[View], aliases: Aliases) -> bool:
    return any(aliases.overlap(mine, view) for mine in _caches(write) for view in views)


def _used(node: Node) -> list[View]:
    """The memory that a node reads or writes: its tensor arguments.

    A functionalized call passes whole bases through but touches only the views it describes.
    """
    skip: set[Node] = set(bases(node)) if is_functionalized(node) else set()
    views = [view_of(source) for source in node.all_input_nodes if source not in skip]
    if is_functionalized(node):
        views += list(mutated_views(node).values())
    for source in node.all_input_nodes:
        value = value_of(source)
        if isinstance(value, list | tuple) and not is_functionalized(source):
            views += [_tensor_view(item) for item in value]
    return [view for view in views if view is not None]


def _tensor_view(value: Any) -> View | None:
    if not hasattr(value, "untyped_storage"):
        return None
    return View(
        value.untyped_storage()._cdata,
        value.storage_offset(),
        tuple(value.shape),
        tuple(value.stride()),
    )


def _sees(write: Write, node: Node, order: dict[Node, int]) -> bool:
    """True if a node comes after the write: in order, and for a functional write by data flow."""
    if order[node] < order[write.node]:
        return False
    if not is_functionalized(write.node):
        return True
    return any(_descends(source, write.node) for source in node.all_input_nodes)


def _descends(node: Node, write: Node) -> bool:
    """True if a tensor is (a view of) a version that the functional write made, or a later one."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        output = base_output(current)
        if output is not None:
            call, index = output
            if call is write:
                return True
            pending.append(bases(call)[index])
        elif is_view(current):
            pending.extend(current.all_input_nodes)
    return False


def _is_write_back(node: Node, aliases: Aliases) -> bool:
    """Functionalization's epilogue: the last version of an input is copied back into it."""
    op = overload_of(node.target) if node.op == "call_function" else None
    if op is None or op.name() != "aten::copy_":
        return False
    target, source = node.args[:2]
    if not isinstance(target, Node) or not isinstance(source, Node) or target.op != "placeholder":
        return False
    one, other = view_of(target), view_of(source)
    return one is not None and other is not None and aliases.same(one, other)
