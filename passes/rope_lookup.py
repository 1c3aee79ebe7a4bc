"""Where the angles of a rotation come from: rows of one table, by position.

    rows = cos_sin_cache.index_select(0, positions)
    cos, sin = rows.chunk(2, dim=-1)

As the rotation itself (NOTE [evaluation] in `rope_match`), it is not matched by how it is written:
the nodes are run on random numbers and must give the rows of the table at the positions, cosines in
the first half of a row and sines in the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from nwor_compile.passes.calls import value_of, view_of
from nwor_compile.passes.rope_match import (
    CASTS,
    Numbers,
    Region,
    Rotation,
    UnknownError,
    call_on,
    name_of,
    narrows,
    random_like,
    rows_of,
    run_nodes,
    same_value,
)
from nwor_compile.passes.touches import Touches

_LOOKUPS = ("index_select", "index", "getitem", "embedding")
_TABLE_ROWS = 11  # of the random table


@dataclass(frozen=True)
class Lookup:
    """Angles are `table[positions]`, which node `rows` reads.

    table: `[positions, rotary_dim]`; positions: `[T]`.
    """

    table: Node
    positions: Node
    rows: Node


def find_lookup(rotation: Rotation, touches: Touches) -> Lookup | str:
    """The table and positions behind the angles of `rotation`; or why there are none to be used."""
    regions = [Region(node, touches) for node in (rotation.cos, rotation.sin)]
    leaves = [leaf for region in regions for leaf in region.leaves]
    if not leaves or not all(same_value(leaf, leaves[0]) for leaf in leaves):
        return "its angles do not come from one table of cosines and sines"
    rows = leaves[0]
    if any(name_of(n) in CASTS and narrows(n) for region in regions for n in region.inner):
        return "its angles are rounded after they were read"
    found = _operands(rows)
    if isinstance(found, str):
        return found
    table, positions = found
    if value_of(table).shape[1] != rotation.rotary_dim:  # type: ignore[attr-defined]
        return "its table has not a cosine and a sine for each pair"
    if not _evaluates(rotation, leaves, table, positions):
        return "its angles are not the rows of a table at the positions"
    return Lookup(table, _without_views(positions, touches), rows)


def _operands(rows: Node) -> tuple[Node, Node] | str:
    """Table and positions of a lookup."""
    if name_of(rows) not in _LOOKUPS:
        return "its angles are calculated in the graph"
    tables: list[Node] = []
    indices: list[Node] = []
    for node in rows.all_input_nodes:
        value = value_of(node)
        if isinstance(value, Tensor):
            (tables if value.dtype.is_floating_point else indices).append(node)
    if len(tables) != 1 or len(indices) != 1:
        return "its angles are not looked up by one index"
    table, positions = tables[0], indices[0]
    if table.op not in ("placeholder", "get_attr"):
        return f"its table {table.name} is made in the graph"
    two, one = value_of(table), value_of(positions)
    if not isinstance(two, Tensor) or not isinstance(one, Tensor) or two.dim() != 2:
        return "its table is not [positions, angles]"
    if one.dim() != 1 or one.dtype not in (torch.int32, torch.int64):
        return "its positions are not one number a token"
    return table, positions


def _evaluates(rotation: Rotation, leaves: list[Node], table: Node, positions: Node) -> bool:
    """True if cos and sin, run on random numbers, are the halves of the table's rows."""
    tokens = Numbers(value_of(rotation.result).shape[0])  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(1)
    width = rotation.rotary_dim
    numbers = torch.rand(_TABLE_ROWS, width, generator=generator, dtype=torch.float64)
    try:
        count = tokens(value_of(positions).shape[0])  # type: ignore[attr-defined]
    except UnknownError:
        return False
    index = torch.randint(0, _TABLE_ROWS, (count,), generator=generator)
    want = numbers[index]
    got = call_on(leaves[0], {table: numbers, positions: index}, tokens)
    if got is None or not torch.equal(got, want):
        return False
    row = random_like(value_of(leaves[0]), tokens, generator)
    if row is None or row.shape != want.shape:
        return False
    known = dict.fromkeys(leaves, row)
    halves = row.split(width // 2, dim=1)
    for node, half in zip((rotation.cos, rotation.sin), halves, strict=True):
        found = run_nodes(node, known, tokens)
        angles = None if found is None else rows_of(found, half.shape[0])
        if angles is None or not torch.equal(angles, half):
            return False
    return True


def _without_views(node: Node, touches: Touches) -> Node:
    """What `node` is the same view of: a flattened row of positions is those positions."""
    while touches.aliases.is_view(node) and len(node.all_input_nodes) == 1:
        source = node.all_input_nodes[0]
        one, other = view_of(node), view_of(source)
        if one is None or other is None or not touches.aliases.same(one, other):
            break
        node = source
    return node
