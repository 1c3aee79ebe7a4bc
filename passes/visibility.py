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

from collections import defaultdict
from dataclasses import dataclass, field

from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from nwor_compile.passes.calls import (
    ANYWHERE,
    View,
    arguments,
    bases,
    callee,
    is_functionalized,
    mutated_views,
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
from nwor_compile.passes.touches import Touches


@dataclass
class Write:
    """A cache write in the graph, the readers to redirect with it, or why it stays direct.

    carriers, whole: for a functional write, the values that have its rows, and all memory of the
    tensors that it makes new versions of.
    """

    node: Node
    row: CacheWrite
    key: View | None
    value: View | None
    readers: list[tuple[Node, CacheReader]] = field(default_factory=list)
    reason: str = ""
    carriers: set[Node] = field(default_factory=set)
    whole: list[View] = field(default_factory=list)

    @property
    def op(self) -> str:
        """Name of the writing op."""
        return op_name(callee(self.node))

    @property
    def caches(self) -> list[View]:
        """What it writes; memory that is not known could be any."""
        return [view if view is not None else ANYWHERE for view in (self.key, self.value)]


def judge(graph: Graph) -> list[Write]:
    """Find the cache writes of a graph and decide each; nothing is changed."""
    writes = [write for node in graph.nodes if (write := _find(node)) is not None]
    if not writes:
        return []
    touches = Touches(graph, [write.node for write in writes])
    by_family: dict[int | None, list[Write]] = defaultdict(list)
    for write in writes:
        for family in touches.aliases.families(write.caches):
            by_family[family].append(write)
    for write in writes:
        write.reason = _refuse(write, by_family, touches)
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


def _refuse(write: Write, by_family: dict[int | None, list[Write]], touches: Touches) -> str:
    """Why a write must stay direct; empty if it may be staged, with its readers filled in."""
    problem = misfit(write.row)
    if problem:
        return problem
    if write.key is None or write.value is None:
        return "its caches have no recorded shapes, so their aliases are unknown"
    if not touches.aliases.two_halves(write.key, write.value):
        return "its key cache and its value cache may overlap"
    problem = _rival(write, by_family, touches)
    if problem:
        return problem
    if is_functionalized(write.node):
        given = [n for n in pytree.tree_leaves(bases(write.node)) if isinstance(n, Node)]
        memory = touches.aliases.memory
        write.whole = [view.anywhere() for base in given for view in memory(base)]
        write.carriers = touches.carriers(write.node, write.caches)
    for node in touches.near(write.caches + write.whole):
        problem = _touch(write, node, touches) or _outdated(write, node, touches)
        if problem:
            return problem
    if not write.readers:
        return "no reader of this cache in the graph; one in another graph would miss staged rows"
    return ""


def _rival(write: Write, by_family: dict[int | None, list[Write]], touches: Touches) -> str:
    """Name the first other write that may write the same memory; empty if there is none."""
    keys = touches.aliases.families(write.caches) | {None}
    others = [other for key in keys for other in by_family.get(key, ()) if other is not write]
    for other in sorted(others, key=lambda other: touches.order[other.node]):
        if touches.aliases.meet(write.caches, other.caches):
            return f"two writes to one cache: {other.node.name} writes it too"
    return ""


def _touch(write: Write, node: Node, touches: Touches) -> str:
    """Judge one node near a write; a reader that can be redirected is added to the write."""
    if node is write.node:
        return ""
    aliases, order = touches.aliases, touches.order
    if node in touches.opaque and order[node] > order[write.node]:
        return f"{node.name} calls module {node.target}, which may hold a cache of its own"
    if not aliases.meet(write.caches, touches.touched(node)):
        return ""
    if isinstance(callee(node), HigherOrderOperator):
        return f"{node.name} ({callee(node)}) takes the cache into a subgraph"
    if not _sees(write, node, touches):
        if aliases.meet(write.caches, touches.written(node)):
            return f"two writes to one cache: {node.name} writes it too"
        return _copied(node)
    row = find_reader(node.target)
    if row is None:
        return _unknown(node)
    problem = _mismatch(write, node, row, touches)
    if not problem:
        write.readers.append((node, row))
    return problem


def _outdated(write: Write, node: Node, touches: Touches) -> str:
    """Judge a node after a functional write by all memory of its bases, not by the caches alone."""
    if not is_functionalized(write.node) or touches.order[node] <= touches.order[write.node]:
        return ""
    for source in node.all_input_nodes:
        if source not in write.carriers and touches.aliases.meet(
            write.whole, touches.aliases.memory(source)
        ):
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


def _mismatch(write: Write, node: Node, row: CacheReader, touches: Touches) -> str:
    """Why a known reader cannot be redirected with this write; empty if it can."""
    problem = misfit(row)
    if problem:
        return f"{node.name}: {problem}"
    aliases, given = touches.aliases, arguments(node)
    caches = (row.key_cache, row.value_cache)
    for name, written in zip(caches, (write.key, write.value), strict=True):
        argument = given.get(name)
        view = view_of(argument) if isinstance(argument, Node) else None
        if view is None or written is None or not aliases.same(view, written):
            return f"{node.name} reads {name} through another view than the write's"
        if is_functionalized(write.node) and argument not in write.carriers:
            return f"{node.name} reads {name} as it was before the write"
    others = [v for name, v in given.items() if name not in caches]
    views = [view for v in others if isinstance(v, Node) for view in aliases.memory(v)]
    if aliases.meet(write.caches, views):
        return f"{node.name} also takes the cache as another argument"
    stored = staged_arguments(write.node, write.row).get("kv_cache_dtype")
    if staged_arguments(node, row).get("kv_cache_dtype") != stored:
        return f"{node.name} reads another kv_cache_dtype than the write's {stored!r}"
    return ""


def _sees(write: Write, node: Node, touches: Touches) -> bool:
    """True if a node comes after the write: in order, and for a functional write by data flow."""
    order = touches.order
    if order[node] < order[write.node]:
        return False
    if not is_functionalized(write.node):
        return True
    if any(source in write.carriers for source in node.all_input_nodes):
        return True
    # What was copied back into the graph's input is seen through that input, too.
    copied = write.carriers & touches.write_backs
    return any(order[write.node] < order[other] < order[node] for other in copied)
