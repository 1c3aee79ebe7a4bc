"""Which nodes a write has to be held against: one index a graph, built once.

A graph of many layers has many writes, and nearly all of its nodes touch the memory of one write or
of none. So nodes are kept by the family of the memory they touch (`Aliases.family`), and a write
looks at those of its own families only, besides the nodes that may touch any memory.
"""

from __future__ import annotations

import operator
from collections import defaultdict

from torch.fx import Graph, Node
from torch.nn import Module
from torch.utils import _pytree as pytree

from nwor_compile.passes.aliases import Aliases
from nwor_compile.passes.calls import (
    View,
    arguments,
    attribute,
    bases,
    callee,
    is_functionalized,
    mutated_names,
    mutated_views,
    new_version,
    overload_of,
    view_of,
)


class Touches:
    """The nodes of one graph that touch what some writes take, by the memory they touch.

    The graph must not change meanwhile.
    """

    def __init__(self, graph: Graph, writes: list[Node]) -> None:
        self.aliases = Aliases(graph)
        self.order: dict[Node, int] = {node: index for index, node in enumerate(graph.nodes)}
        self.opaque: set[Node] = set()
        self.write_backs: set[Node] = set()
        self._touched: dict[Node, list[View]] = {}
        # New versions, and what each may be the new version of, by their functionalized call.
        self._versions: dict[Node, dict[Node, list[Node]]] = defaultdict(dict)
        self._version_nodes: set[Node] = set()
        # None: nodes that may touch any memory.
        self._by_family: dict[int | None, list[Node]] = defaultdict(list)
        self._families: dict[Node, set[int | None]] = {}
        wanted = self._taken(writes)
        for node in self.order:
            self._add(node, wanted)

    def near(self, views: list[View]) -> list[Node]:
        """Nodes that may touch some of these views, which a write takes, in the graph's order.

        Without those that neither read nor write an element: inputs, attributes, views, the
        versions that functionalization makes, and its copies of them into the graph's inputs.
        """
        families = self.aliases.families(views)
        keys = set(self._by_family) if None in families else families | {None}
        found = {node for key in keys for node in self._by_family.get(key, ())}
        return sorted(found, key=self.order.__getitem__)

    def carriers(self, call: Node, views: list[View]) -> set[Node]:
        """Values that are a version which a functional write of `views` made, a later version of
        it, a view of one, or a graph input that one was copied back into."""
        families = self.aliases.families(views)
        pending, seen = list(self._versions.get(call, ())), set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            for user in node.users:
                later = self._versions.get(user, {}).items()
                pending += [version for version, older in later if node in older]
                if self._passes_on(node, user, families):
                    pending.append(user)
        return seen

    def touched(self, node: Node) -> list[View]:
        """The memory that a node may read or write: its tensor arguments.

        A functionalized call passes whole bases through but touches only the views it describes.
        """
        found = self._touched.get(node)
        if found is None:
            found = self._touched[node] = self._find_touched(node)
        return found

    def written(self, node: Node) -> list[View]:
        """The memory that a node writes, as far as its schema or name says so."""
        op = overload_of(callee(node))
        if is_functionalized(node):
            views = mutated_views(node)
            known = {
                name: view
                for name, view in views.items()
                if view is not None or node.kwargs.get(f"_{name}_base_index", 0) is None
            }
            if op is not None and len(known) == len(views):
                return [view for view in known.values() if view is not None]
            sources = [n for n in pytree.tree_leaves(bases(node)) if isinstance(n, Node)]
        elif op is not None:
            given = arguments(node)
            leaves = pytree.tree_leaves([given.get(name) for name in mutated_names(op)])
            sources = [leaf for leaf in leaves if isinstance(leaf, Node)]
        else:
            sources = _written_by_name(node)
        return [view for source in sources for view in self.aliases.memory(source)]

    def _passes_on(self, node: Node, user: Node, families: set[int | None]) -> bool:
        """True if `user`, which is no new version, still has the rows that `node` has."""
        if user in self._version_nodes:
            return False
        if user in self.write_backs:
            return user.args[1] is node
        found = self._families_of(user)
        return None in found or not found.isdisjoint(families)

    def _add(self, node: Node, wanted: set[int | None]) -> None:
        version = new_version(node)
        if version is not None:
            call, candidates = version
            self._versions[call][node] = candidates
            self._version_nodes.add(node)
        elif _is_write_back(node, self.aliases):
            self.write_backs.add(node)
        elif node.op not in ("placeholder", "get_attr"):
            families = self._taken([node])
            if node.op == "call_module" and _is_opaque(node):
                self.opaque.add(node)
                families.add(None)
            near = None in wanted or None in families or not families.isdisjoint(wanted)
            if near and not self.aliases.is_view(node):
                for family in families:
                    self._by_family[family].append(node)

    def _taken(self, nodes: list[Node]) -> set[int | None]:
        """Families of the nodes' inputs: whatever a node touches comes in through one of them."""
        sources = {source for node in nodes for source in node.all_input_nodes}
        return {family for source in sources for family in self._families_of(source)}

    def _families_of(self, node: Node) -> set[int | None]:
        found = self._families.get(node)
        if found is None:
            found = self._families[node] = self.aliases.families(self.aliases.memory(node))
        return found

    def _find_touched(self, node: Node) -> list[View]:
        if not is_functionalized(node):
            return [view for source in node.all_input_nodes for view in self.aliases.memory(source)]
        given = pytree.tree_leaves(list(arguments(node).values()))
        views = [v for leaf in given if isinstance(leaf, Node) for v in self.aliases.memory(leaf)]
        return views + self.written(node)


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
    given = arguments(node)
    target, source = given.get("self"), given.get("src")
    if not isinstance(target, Node) or not isinstance(source, Node) or target.op != "placeholder":
        return False
    one, other = view_of(target), view_of(source)
    return one is not None and other is not None and aliases.same(one, other)


def _written_by_name(node: Node) -> list[Node]:
    """What a call without a schema writes, by Python's and torch's naming."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    out = [leaf for leaf in pytree.tree_leaves(node.kwargs.get("out")) if isinstance(leaf, Node)]
    in_place = name.endswith("_") and not name.endswith("__")
    if node.target is operator.setitem or name == "setitem" or in_place:
        out += [arg for arg in node.args[:1] if isinstance(arg, Node)]
    return out
