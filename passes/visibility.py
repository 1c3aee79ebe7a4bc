"""The proof: a write may be staged only if every later reader of its cache reads staging too.

NOTE [visibility]: a staged row is not in the cache until its commit. An op that reads the cache
between the write and the commit, and knows nothing of staging, would read the slot's old content.
So each write is judged by everything that touches its memory in the graph:

- readers after it that the table can redirect, and that read just this write's two caches: fine;
- any other op after it, the graph's output included: the write stays direct;
- a reader before it, or of an older functional version: it would be right as it is, but a compiler
  may run it after the write on a copy of the cache, or the write on one, and no window knows the
  copy: the write stays direct (without staging, the copy is only slow);
- a second write to overlapping memory, by whatever op: it stays direct, since staging holds one
  row a draft;
- key and value caches that may overlap: it stays direct, since the cache would hold one of the two
  where staging holds both;
- no reader after it: it stays direct, since the reader must then be in another graph, which cannot
  be seen from here;
- a control-flow or other higher-order op that takes the cache: the write stays direct, since what
  its subgraphs do is not followed; so for a module call that is no layer of torch.nn;
- memory of which nothing was recorded while tracing could be the cache, and is taken for it.

What the proof cannot see: an op that reaches the cache other than through its arguments, and
readers in other graphs. Neither does a graph input that is returned as it is show: Dynamo hands the
caller its own tensor back, without an output in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.nn import Module
from torch.utils import _pytree as pytree

from nwor_compile.passes.aliases import Aliases
from nwor_compile.passes.calls import (
    ANYWHERE,
    View,
    arguments,
    attribute,
    bases,
    callee,
    is_functionalized,
    mutated_views,
    new_version,
    overload_of,
    staged_arguments,
    view_of,
)
from nwor_compile.passes.table import (
    CacheReader,
    CacheWrite,
    find_reader,
    find_write,
    misfit,
    op_name,
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
    problem = misfit(write.row)
    if problem:
        return problem
    if write.key is None or write.value is None:
        return "its caches have no recorded shapes, so their aliases are unknown"
    if not aliases.two_halves(write.key, write.value):
        return "its key cache and its value cache may overlap"
    for other in writes:
        if other is not write and aliases.meet(_caches(write), _caches(other)):
            return f"two writes to one cache: {other.node.name} writes it too"
    for node in order:
        problem = _touch(write, node, order, aliases) or _outdated(write, node, order, aliases)
        if problem:
            return problem
    if not write.readers:
        return "no reader of this cache in the graph; one in another graph would miss staged rows"
    return ""


def _touch(write: Write, node: Node, order: dict[Node, int], aliases: Aliases) -> str:
    """Judge one node against a write; a reader that can be redirected is added to it."""
    if node is write.node or node.op in ("placeholder", "get_attr") or aliases.is_view(node):
        return ""
    if new_version(node) is not None or _is_write_back(node, aliases):
        return ""
    if node.op == "call_module" and order[node] > order[write.node] and _is_opaque(node):
        return f"{node.name} calls module {node.target}, which may hold a cache of its own"
    caches = _caches(write)
    if not aliases.meet(caches, aliases.touched(node)):
        return ""
    if isinstance(callee(node), HigherOrderOperator):
        return f"{node.name} ({callee(node)}) takes the cache into a subgraph"
    if not _sees(write, node, order, aliases):
        if aliases.meet(caches, aliases.written(node)):
            return f"two writes to one cache: {node.name} writes it too"
        return _copied(node)
    row = find_reader(node.target)
    if row is None:
        return _unknown(node)
    problem = _mismatch(write, node, row, aliases)
    if not problem:
        write.readers.append((node, row))
    return problem


def _outdated(write: Write, node: Node, order: dict[Node, int], aliases: Aliases) -> str:
    """Judge a node after a functional write by all memory of its bases, not by the caches alone."""
    if not is_functionalized(write.node) or order[node] <= order[write.node]:
        return ""
    if aliases.is_view(node) or new_version(node) is not None or _is_write_back(node, aliases):
        return ""
    given = [n for n in pytree.tree_leaves(bases(write.node)) if isinstance(n, Node)]
    whole = [view.anywhere() for base in given for view in aliases.memory(base)]
    for source in node.all_input_nodes:
        meets = aliases.meet(whole, list(aliases.memory(source)))
        if meets and not _carries(source, write, aliases):
            return _copied(node)
    return ""


def _copied(node: Node) -> str:
    return (
        f"{node.name} reads the cache as it was before the write, so the compiler may copy it, "
        "and a copy has no staging"
    )


def _unknown(node: Node) -> str:
    if node.op == "output":
        return "the cache leaves the graph through its output"
    name = op_name(callee(node)) or getattr(node.target, "__name__", str(node.target))
    return f"{node.name} ({name}) touches the cache after the write and does not read staging"


def _mismatch(write: Write, node: Node, row: CacheReader, aliases: Aliases) -> str:
    """Why a known reader cannot be redirected with this write; empty if it can."""
    problem = misfit(row)
    if problem:
        return f"{node.name}: {problem}"
    given = arguments(node)
    caches = (row.key_cache, row.value_cache)
    for name, written in zip(caches, (write.key, write.value), strict=True):
        argument = given.get(name)
        view = view_of(argument) if isinstance(argument, Node) else None
        if view is None or written is None or not aliases.same(view, written):
            return f"{node.name} reads {name} through another view than the write's"
        if is_functionalized(write.node) and not _carries(argument, write, aliases):
            return f"{node.name} reads {name} as it was before the write"
    others = [v for name, v in given.items() if name not in caches]
    views = [view for v in others if isinstance(v, Node) for view in aliases.memory(v)]
    if aliases.meet(_caches(write), views):
        return f"{node.name} also takes the cache as another argument"
    stored = staged_arguments(write.node, write.row).get("kv_cache_dtype")
    if staged_arguments(node, row).get("kv_cache_dtype") != stored:
        return f"{node.name} reads another kv_cache_dtype than the write's {stored!r}"
    return ""


def _caches(write: Write) -> list[View]:
    return [view if view is not None else ANYWHERE for view in (write.key, write.value)]


def _sees(write: Write, node: Node, order: dict[Node, int], aliases: Aliases) -> bool:
    """True if a node comes after the write: in order, and for a functional write by data flow."""
    if order[node] < order[write.node]:
        return False
    if not is_functionalized(write.node):
        return True
    if any(_carries(source, write, aliases) for source in node.all_input_nodes):
        return True
    # What was copied back into the graph's input is seen through that input, too.
    return any(
        _is_write_back(other, aliases) and _carries(other, write, aliases)
        for other, index in order.items()
        if order[write.node] < index < order[node] and other.op == "call_function"
    )


def _carries(node: object, write: Write, aliases: Aliases) -> bool:
    """True if a value is (a view of) a version that the functional write made, or a later one."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current in seen or not isinstance(current, Node):
            continue
        seen.add(current)
        version = new_version(current)
        if version is not None:
            call, candidates = version
            if call is write.node:
                return True
            pending.extend(candidates)
        elif _is_write_back(current, aliases):
            pending.append(current.args[1])
        elif _reinterprets(current, write, aliases):
            pending.extend(current.all_input_nodes)
    return False


def _reinterprets(node: Node, write: Write, aliases: Aliases) -> bool:
    """True if a node's value lies in the family of the write's memory, so that it aliases it."""
    family = {aliases.family(v.storage) for v in _caches(write) if v.storage is not None}
    views = aliases.memory(node)
    return any(v.storage is None or aliases.family(v.storage) in family for v in views)


def _is_opaque(node: Node) -> bool:
    """True for a module call that may read more than its arguments and torch.nn's own weights."""
    module = attribute(node)
    if not isinstance(module, Module):
        return True
    return any(not type(m).__module__.startswith("torch.nn.modules.") for m in module.modules())


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
