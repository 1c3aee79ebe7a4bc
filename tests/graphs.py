"""Small models over a paged cache, the graphs that torch makes of them, and one verify step."""

from __future__ import annotations

import operator
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from nwor_compile import NworConfig, Window
from nwor_compile.passes.nwor_pass import rewrite_module

HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS = 4, 2, 8, 4, 6
SCALE = SIZE**-0.5
write = torch.ops.nwor.reshape_and_cache.default
attend = torch.ops.nwor.paged_attention.default
stage_window = torch.ops.nwor.stage_kv.window
verify_window = torch.ops.nwor.verify_attention.window

FORMS = ("plain", "v1", "v2")


class Step(NamedTuple):
    """What a layer is called with, apart from its caches: tensors, or nodes in a `Builder`."""

    query: Any
    key: Any
    value: Any
    slots: Any
    table: Any
    lens: Any
    starts: Any


def read(step: Step, key_cache: Tensor, value_cache: Tensor, **options: Any) -> Tensor:
    return attend(
        step.query, key_cache, value_cache, step.table, step.lens, step.starts, SCALE, **options
    )


def layer(step: Step, key_cache: Tensor, value_cache: Tensor) -> Tensor:
    """The canonical graph: one write, one reader."""
    write(step.key, step.value, key_cache, value_cache, step.slots)
    return read(step, key_cache, value_cache)


# A step of two requests: one with two drafts after its certain token, one that decodes plainly.
CONTEXT, DRAFTS = (5, 2), (2, 0)


def verify_step(seed: int = 0, dtype: torch.dtype = torch.float32) -> Step:
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32)
    spans = [1 + drafts for drafts in DRAFTS]
    slots = [
        int(table[r, p // BLOCK]) * BLOCK + p % BLOCK
        for r, span in enumerate(spans)
        for p in range(CONTEXT[r], CONTEXT[r] + span)
    ]
    tokens = len(slots)

    def rows(heads: int) -> Tensor:
        return torch.randn(tokens, heads, SIZE, generator=generator).to(dtype)

    return Step(
        query=rows(HEADS),
        key=rows(KV_HEADS),
        value=rows(KV_HEADS),
        slots=torch.tensor(slots),
        table=table,
        lens=torch.tensor([c + s for c, s in zip(CONTEXT, spans, strict=True)], dtype=torch.int32),
        starts=torch.tensor([0, spans[0], tokens], dtype=torch.int32),
    )


def make_caches(seed: int = 1, *, layers: int = 1) -> list[Tensor]:
    """Key and value caches, layer after layer, full of rows from earlier use."""
    generator = torch.Generator().manual_seed(seed)
    shape = (BLOCKS, BLOCK, KV_HEADS, SIZE)
    return [torch.randn(shape, generator=generator) for _ in range(2 * layers)]


# --- graphs that torch traces ---


def trace(fn: Callable[..., Any], *args: Any, form: str, dynamic: bool | None = None) -> Graph:
    """The graph of `fn(*args)`: Dynamo's (`plain`), or AOTAutograd's in the form v1 or v2."""
    found: list[GraphModule] = []

    def keep(module: GraphModule, example_inputs: Any) -> GraphModule:
        found.append(module)
        return module

    backend: Callable[..., Any] = keep
    if form != "plain":
        backend = aot_autograd(fw_compiler=keep, keep_inference_input_mutations=True)
    torch._dynamo.reset()
    with inductor_config.patch(enable_auto_functionalized_v2=form == "v2"), torch.no_grad():
        torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*args)
    assert len(found) == 1
    return found[0].graph


# --- graphs built by hand, which look the same under every torch ---


class Builder:
    """A graph with fake values on its nodes, as `val` or (Dynamo) `example_value`."""

    def __init__(self, meta: str = "val") -> None:
        self.graph, self.meta = Graph(), meta
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Node:
        with self.mode:
            return self.value_input(name, torch.empty(shape, dtype=dtype))

    def value_input(self, name: str, value: object) -> Node:
        """An input whose fake value is given: a view of another input's, say."""
        return self._record(self.graph.placeholder(name), value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)

        def values(tree: Any) -> Any:
            return torch.fx.node.map_arg(tree, lambda n: n.meta[self.meta])

        with self.mode:
            return self._record(node, target(*values(args), **values(kwargs)))

    def versions(self, call: Node, count: int) -> list[Node]:
        """The new versions that a functionalized call returns."""
        return [self.call(operator.getitem, call, index + 1) for index in range(count)]

    def step(self) -> Step:
        """Inputs for all of a Step."""
        index = torch.int32
        return Step(
            query=self.input("query", 4, HEADS, SIZE),
            key=self.input("key", 4, KV_HEADS, SIZE),
            value=self.input("value", 4, KV_HEADS, SIZE),
            slots=self.input("slots", 4, dtype=torch.int64),
            table=self.input("table", 2, 2, dtype=index),
            lens=self.input("lens", 2, dtype=index),
            starts=self.input("starts", 3, dtype=index),
        )

    def caches(self, prefix: str = "") -> tuple[Node, Node]:
        shape = (BLOCKS, BLOCK, KV_HEADS, SIZE)
        return self.input(f"{prefix}key_cache", *shape), self.input(f"{prefix}value_cache", *shape)

    def write(self, step: Step, key_cache: Any, value_cache: Any, form: str) -> list[Node]:
        """The write in a form; returns the caches as a later reader takes them."""
        if form == "plain":
            self.call(write, step.key, step.value, key_cache, value_cache, step.slots)
            return [key_cache, value_cache]
        options = {"kv_cache_dtype": "auto", "k_scale": None, "v_scale": None}
        inputs = {"key": step.key, "value": step.value}
        caches = {"key_cache": key_cache, "value_cache": value_cache}
        if form == "v1":
            call = self.call(
                auto_functionalized, write, **inputs, **caches, slot_mapping=step.slots, **options
            )
        else:
            views = {f"_{name}_base_index": i for i, name in enumerate(caches)}
            call = self.call(
                auto_functionalized_v2, write, **inputs, slot_mapping=step.slots, **options,
                **views, _all_bases=[key_cache, value_cache],
            )  # fmt: skip
        return self.versions(call, 2)

    def read(self, step: Step, key_cache: Any, value_cache: Any, **options: Any) -> Node:
        return self.call(
            attend, step.query, key_cache, value_cache, step.table, step.lens, step.starts, SCALE,
            **options,
        )  # fmt: skip

    def write_back(self, *pairs: tuple[Any, Any]) -> None:
        for target, source in pairs:
            self.call(torch.ops.aten.copy_.default, target, source)

    def output(self, *nodes: Any) -> Graph:
        self.graph.output(tuple(nodes))
        self.graph.lint()
        return self.graph

    def _record(self, node: Node, value: object) -> Node:
        node.meta[self.meta] = value
        return node


def canonical(form: str) -> Graph:
    """One layer in a form, as torch would trace it."""
    b = Builder("example_value" if form == "plain" else "val")
    step, caches = b.step(), b.caches()
    now = b.write(step, *caches, form)
    out = b.read(step, *now)
    if form != "plain":
        b.write_back(*zip(caches, now, strict=True))
    return b.output(out)


def compact(graph: Graph) -> str:
    """A graph, one short line a node."""
    return "\n".join(line for node in graph.nodes if (line := _line(node)))


def _line(node: Node) -> str:
    if node.op == "placeholder":
        return ""
    if node.op == "output":
        return f"return {_text(node.args[0])}"
    arguments = [_text(arg) for arg in node.args]
    arguments += [f"{name}={_text(arg)}" for name, arg in node.kwargs.items() if arg is not None]
    target = _text(node.target) if node.op == "call_function" else str(node.target)
    line = f"{node.name} = {target}({', '.join(arguments)})"
    return textwrap.fill(line, 92, subsequent_indent="    ", break_long_words=False)


def _text(item: Any) -> str:
    if isinstance(item, list | tuple):
        return f"[{', '.join(_text(i) for i in item)}]"
    if isinstance(item, torch._ops.OpOverload):
        return item.name().replace("::", ".")
    if isinstance(item, float):
        return f"{item:.4g}"
    if callable(item):
        return getattr(item, "__name__", str(item))
    return str(item)


def targets(graph: Graph) -> list[str]:
    """Names of the cache ops of a graph, in order, in whatever form."""
    found = []
    for node in graph.nodes:
        wrapped = node.target in (auto_functionalized, auto_functionalized_v2)
        op = node.args[0] if wrapped else node.target
        name = op.name() if isinstance(op, torch._ops.OpOverload) else str(op)
        if "nwor" in name:
            found.append(name.split("::")[-1])
    return found


STAGED = ["stage_kv.window", "verify_attention.window"]
DIRECT = ["reshape_and_cache", "paged_attention"]


# --- running a step through a window ---


def rewritten(fn: Callable[..., Any], *, fullgraph: bool = True) -> Callable[..., Any]:
    """`fn` through Dynamo and the pass (strict), and then run by Python, without Inductor."""

    def backend(module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        rewrite_module(module, strict=True)
        return module.forward

    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(fn, backend=backend, fullgraph=fullgraph)
    return compiled


def as_stored(key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
    return key_cache, value_cache


def from_5d(key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
    """vLLM's 5-D layout as `[blocks, block_size, heads, size]`."""
    return key_cache.permute(0, 3, 1, 2, 4).flatten(3), value_cache.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Outcome:
    """What a verify step returned, and its caches before, at the end of the forward, and after."""

    out: Any
    before: list[Tensor]
    forward: list[Tensor]
    after: list[Tensor]


def run_window(
    fn: Callable[..., Any],
    step: Step,
    layers: dict[str, tuple[Tensor, Tensor]],
    *args: Any,
    accept: int = 1,
    kv_cache_dtype: str = "auto",
    logical: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = as_stored,
) -> Outcome:
    """Run `fn(step, *args)` in a window over `layers`, and commit `accept` of the two drafts.

    The caches of the outcome are what `logical` makes of each pair.
    """
    config = NworConfig(mode="stage", scv="off")
    window = Window(
        layers,
        max_requests=2,
        max_drafts=2,
        max_tokens=8,
        config=config,
        kv_cache_dtype=kv_cache_dtype,
    )

    def copies() -> list[Tensor]:
        return [cache.clone() for pair in layers.values() for cache in logical(*pair)]

    try:
        before = copies()
        window.begin(torch.tensor(DRAFTS), step.starts, step.slots)
        with torch.no_grad():
            out = fn(step, *args)
        forward = copies()
        # The sampler emits the accepted drafts (7, 8), and one id of its own.
        sampled = torch.tensor([[7, 8, 9][:accept] + [5] + [-1] * (2 - accept), [5, -1, -1]])
        drafts = torch.tensor([7, 8])
        committed = window.commit(sampled, drafts)
        assert committed.accepted.tolist() == [accept, 0]
        assert committed.error.item() == 0
        return Outcome(out, before, forward, copies())
    finally:
        window.close()


def assert_staged(outcome: Outcome, direct: list[Tensor], step: Step, accept: int = 1) -> None:
    """Draft rows reached no cache before the commit; then the accepted ones, and no others, did.

    `direct`: the caches after an eager run of the same step that writes directly.
    """
    certain = torch.tensor([0, 3])
    for before, forward, after, want in zip(
        outcome.before, outcome.forward, outcome.after, direct, strict=True
    ):
        expected = before.clone()
        for token in certain.tolist():
            _copy_row(expected, want, int(step.slots[token]))
        assert torch.equal(forward, expected)
        assert not torch.equal(forward, want)
        for token in range(1, 1 + accept):
            _copy_row(expected, want, int(step.slots[token]))
        assert torch.equal(after, expected)


def _copy_row(target: Tensor, source: Tensor, slot: int) -> None:
    target[slot // BLOCK, slot % BLOCK] = source[slot // BLOCK, slot % BLOCK]
