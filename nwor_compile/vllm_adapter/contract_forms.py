"""What an entry of the contract can say about vLLM's source, and whether a source keeps it.

NOTE [contract]: the check reads vLLM's source, it imports none of it. So it costs milliseconds at
start, works on the unpacked package of another version or platform (the tests do that), and names
the version and the mismatch instead of failing somewhere inside a step. What only exists at run
time, the schemas of the registered ops, is compared when the twins are registered: see
`ops.check_twins`; the shapes of what is patched, when it is patched: see `patches.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nwor_compile.vllm_adapter.versions import Version


@dataclass(frozen=True, kw_only=True)
class Span:
    """Versions in which an entry holds: from `since` up to, not including, `until`."""

    since: Version = ()
    until: Version = (1000,)


@dataclass(frozen=True)
class Function(Span):
    """A function or method: `path` below the package, dotted `name`, and its parameters in order.

    exact: this package implements or replaces it, so a further parameter would be lost. Otherwise
        it is wrapped or called, and further parameters are passed on.
    """

    path: str
    name: str
    parameters: tuple[str, ...]
    exact: bool = False


@dataclass(frozen=True)
class Names(Span):
    """Names that a class body (or with an empty `name` the module) must define."""

    path: str
    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Attributes(Span):
    """Attributes that methods of a class must set on `self`."""

    path: str
    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class CustomOp(Span):
    """An op that `direct_register_custom_op` registers: what it mutates, and, since the schema is
    inferred from it, the signature of its function as `ast.unparse` writes it."""

    path: str
    name: str
    mutates: tuple[str, ...]
    signature: str = ""


@dataclass(frozen=True)
class Text(Span):
    """An expression, or an assignment, that the function or class `name` must contain."""

    path: str
    name: str
    expression: str


Entry = Function | Names | Attributes | CustomOp | Text


def broken(entry: Entry, root: Path) -> str:
    """What the source below `root` lacks of `entry`; empty if nothing."""
    try:
        module = _parse(root / entry.path)
    except OSError:
        return "the file is missing"
    if isinstance(entry, CustomOp):
        return _broken_op(entry, module)
    scope = _lookup(module, entry.name)
    if scope is None:
        return f"{entry.name} is missing"
    if isinstance(entry, Function):
        return _broken_function(entry, scope)
    if isinstance(entry, Text):
        (statement,) = ast.parse(entry.expression).body
        wanted = statement.value if isinstance(statement, ast.Expr) else statement
        there = any(
            type(node) is type(wanted) and ast.dump(node) == ast.dump(wanted)
            for node in ast.walk(scope)
        )
        return "" if there else f"{entry.name} has no `{entry.expression}`"
    names = _defined(scope) if isinstance(entry, Names) else _set_on_self(scope)
    missing = set(entry.members) - set(names)
    if not missing:
        return ""
    return f"{entry.name or 'the module'} has no {', '.join(sorted(missing))}"


@lru_cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _lookup(module: ast.Module, dotted: str) -> ast.AST | None:
    scope: ast.AST | None = module
    for name in filter(None, dotted.split(".")):
        scope = next(
            (
                node
                for node in getattr(scope, "body", [])
                if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
            ),
            None,
        )
    return scope


def _broken_function(entry: Function, node: ast.AST) -> str:
    if not isinstance(node, ast.FunctionDef):
        return f"{entry.name} is no function"
    arguments = node.args
    given = tuple(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    fits = given if entry.exact else given[: len(entry.parameters)]
    if fits == entry.parameters:
        return ""
    return f"{entry.name} takes ({', '.join(given)}), expected ({', '.join(entry.parameters)})"


def _defined(scope: ast.AST) -> Iterator[str]:
    for node in getattr(scope, "body", []):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.If):
            yield from _defined(node)
        else:
            yield from (t.id for t in _targets(node) if isinstance(t, ast.Name))


def _set_on_self(scope: ast.AST) -> Iterator[str]:
    for node in ast.walk(scope):
        for target in _targets(node):
            if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                yield target.attr


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.AnnAssign):
        return [node.target]
    if isinstance(node, ast.Assign):
        return [e for t in node.targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]
    return []


def _broken_op(entry: CustomOp, module: ast.Module) -> str:
    for node in ast.walk(module):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != (
            "direct_register_custom_op"
        ):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        name = given.get("op_name")
        if not isinstance(name, ast.Constant) or name.value != entry.name:
            continue
        mutates = tuple(ast.literal_eval(given["mutates_args"])) if "mutates_args" in given else ()
        if mutates != entry.mutates:
            return f"op {entry.name} mutates {mutates}, expected {entry.mutates}"
        signature = _signature(module, ast.unparse(given["op_func"]))
        if entry.signature and signature != entry.signature:
            return f"op {entry.name} is {signature}, expected {entry.signature}"
        return ""
    return f"op {entry.name} is not registered"


def _signature(module: ast.Module, name: str) -> str:
    node = _lookup(module, name)
    if not isinstance(node, ast.FunctionDef):
        return "defined elsewhere"
    returns = "None" if node.returns is None else ast.unparse(node.returns)
    return f"({ast.unparse(node.args)}) -> {returns}"
