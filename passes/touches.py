"""Which nodes a write has to be held against: one index a graph, built once.

A graph of many layers has many writes, and nearly all of its nodes touch the memory of one write or
of none. So nodes are kept by the family of the memory they touch (`Aliases.family`), and a write
looks at those of its own families only, besides the nodes that may touch any memory.
"""

from __future__ import annotations

from collections import defaultdict

from torch.fx import Graph, Node
from torch.nn import Module

from nwor_compile.passes.aliases import Aliases
from nwor_compile.passes.calls import View, attribute, new_version, overload_of, view_of


class Touches:
    """The nodes of one graph by the memory they touch; the graph must not change meanwhile."""

    def __init__(self, graph: Graph) -> None:
        self.aliases = Aliases(graph)
        self.order: dict[Node, int] = {node: index for index, node in enumerate(graph.nodes)}
        self.opaque: set[Node] = set()
        self.write_backs: set[Node] = set()
        # New versions, and what each may be the new version of, by their functionalized call.
        self._versions: dict[Node, dict[Node, list[Node]]] = defaultdict(dict)
        self._version_nodes: set[Node] = set()
        # None: nodes that may touch any memory.
        self._by_family: dict[int | None, list[Node]] = defaultdict(list)
        for node in self.order:
            self._add(node)

    def near(self, views: list[View]) -> list[Node]:
        """Nodes that may touch some of these views, in the order of the graph.

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
                later = self._versions.get(user, {})
                pending += [version for version, bases in later.items() if node in bases]
                if self._passes_on(node, user, families):
                    pending.append(user)
        return seen

    def _passes_on(self, node: Node, user: Node, families: set[int | None]) -> bool:
        """True if `user`, which is no new version, still has the rows that `node` has."""
        if user in self._version_nodes:
            return False
        if user in self.write_backs:
            return user.args[1] is node
        found = self.aliases.families(self.aliases.memory(user))
        return None in found or not found.isdisjoint(families)

    def _add(self, node: Node) -> None:
        version = new_version(node)
        if version is not None:
            call, candidates = version
            self._versions[call][node] = candidates
            self._version_nodes.add(node)
        elif _is_write_back(node, self.aliases):
            self.write_backs.add(node)
        elif node.op not in ("placeholder", "get_attr") and not self.aliases.is_view(node):
            families = self.aliases.families(self.aliases.touched(node))
            for source in node.all_input_nodes:
                families |= self.aliases.families(self.aliases.memory(source))
            if node.op == "call_module" and _is_opaque(node):
                self.opaque.add(node)
                families.add(None)
            for family in families:
                self._by_family[family].append(node)


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
