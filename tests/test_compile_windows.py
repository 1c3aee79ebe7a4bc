"""Models that Inductor compiled with the pass, run through real windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
from graphs import BLOCK, BLOCKS, HEADS, KV_HEADS, SIZE, Step, layer
from torch import Tensor, nn
from torch.nn import functional as F

import nwor_compile
from nwor_compile import NworConfig, Window
from nwor_compile.ops.staging import executions

KINDS = ("options", "backend")
HIDDEN = 16


def compiled(fn: Callable[..., Any], kind: str, **settings: Any) -> Any:
    torch._dynamo.reset()
    if kind == "backend":
        return torch.compile(
            fn, backend="nwor", options={"strict": True}, fullgraph=True, **settings
        )
    options = nwor_compile.compile_options(NworConfig(strict=True))
    return torch.compile(fn, options=options, fullgraph=True, **settings)


class Model(nn.Module):
    """Two layers of attention over a stream of hidden states."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        rows = (HEADS + 2 * KV_HEADS) * SIZE
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, rows) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(HEADS * SIZE, HIDDEN) for _ in range(2))
        self.requires_grad_(False)

    def forward(self, x: Tensor, step: Step, caches: list[Tensor]) -> Tensor:
        sizes = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
        for i in range(2):
            parts = self.qkv[i](F.silu(x)).split(sizes, dim=-1)
            query, key, value = (part.unflatten(-1, (-1, SIZE)) for part in parts)
            now = step._replace(query=query, key=key, value=value)
            x = x + self.out[i](layer(now, caches[2 * i], caches[2 * i + 1]).flatten(1))
        return x


# (rows in the cache, certain tokens, drafts) of each request
STEPS = {
    "verify": [(5, 1, 2), (2, 1, 1)],
    "decode": [(5, 1, 0), (2, 1, 0)],
    "prefill": [(0, 6, 0), (0, 3, 0)],
    "mixed": [(5, 1, 2), (0, 4, 0), (3, 1, 0)],
    "one verify, one chunk": [(4, 1, 3), (2, 2, 0)],
}


def make_step(spans: list[tuple[int, int, int]], seed: int) -> tuple[Tensor, Step, Tensor]:
    """Hidden states, the step (without q, k and v), and the draft counts."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randperm(BLOCKS, generator=generator)[: 2 * len(spans)]
    table = blocks.view(len(spans), 2).int()
    slots, starts, lens = [], [0], []
    for request, (context, certain, drafts) in enumerate(spans):
        for position in range(context, context + certain + drafts):
            block = int(table[request, position // BLOCK])
            slots.append(block * BLOCK + position % BLOCK)
        starts.append(len(slots))
        lens.append(context + certain + drafts)
    x = torch.randn(len(slots), HIDDEN, generator=generator)
    step = Step(
        None, None, None, torch.tensor(slots), table,
        torch.tensor(lens, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32),
    )  # fmt: skip
    return x, step, torch.tensor([drafts for _, _, drafts in spans])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_serves_every_kind_of_step_without_recompiling(kind: str) -> None:
    model = Model()
    run = compiled(model, kind)
    caches = graphs.make_caches(layers=2)
    layers = {f"layer.{i}": (caches[2 * i], caches[2 * i + 1]) for i in range(2)}
    window = Window(
        layers, max_requests=4, max_drafts=3, max_tokens=16, config=NworConfig(scv="off")
    )
    before_executions = executions()
    try:
        for number, (name, spans) in enumerate(STEPS.items()):
            x, step, drafts = make_step(spans, seed=number)
            direct = [cache.clone() for cache in caches]
            want = model(x, step, direct)
            before = [cache.clone() for cache in caches]
            if number == 0:
                # (dynamic=True would take the number of requests for the number of KV heads, since
                # both are 2 here, and make it static with that.)
                for tensor in (x, step.slots, step.table, step.lens, step.starts):
                    torch._dynamo.mark_dynamic(tensor, 0)
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                window.begin(drafts, step.starts, step.slots)
                out = run(x, step, caches)
            torch.testing.assert_close(out, want, msg=name)
            is_draft = draft_tokens(spans)
            hold(caches, before, direct, step.slots, is_draft)
            sampled = torch.full((len(spans), 4), -1)
            sampled[:, 0] = 5
            window.commit(sampled, torch.full((int(drafts.sum()),), 7))
            # Nothing was accepted: the caches hold the certain rows and no other.
            hold(caches, before, direct, step.slots, is_draft)
    finally:
        window.close()
    assert executions() - before_executions == 2 * len(STEPS)


def draft_tokens(spans: list[tuple[int, int, int]]) -> list[bool]:
    return [j >= certain for _, certain, drafts in spans for j in range(certain + drafts)]


def hold(
    caches: list[Tensor],
    before: list[Tensor],
    direct: list[Tensor],
    slots: Tensor,
    is_draft: list[bool],
) -> None:
    """Draft slots are as before, certain slots as in a direct run, and no other slot changed."""
    for cache, old, new in zip(caches, before, direct, strict=True):
        want = old.clone().view(-1, KV_HEADS, SIZE)
        for slot, draft in zip(slots.tolist(), is_draft, strict=True):
            if not draft:
                want[slot] = new.view(-1, KV_HEADS, SIZE)[slot]
        torch.testing.assert_close(cache.view(-1, KV_HEADS, SIZE), want)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_outside_a_window_a_compiled_model_writes_directly(kind: str) -> None:
    def fn(step: Step, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        return layer(step, key_cache, value_cache) * 2

    step, caches = graphs.verify_step(), graphs.make_caches()
    direct = [cache.clone() for cache in caches]
    want = fn(step, *direct)
    assert torch.equal(compiled(fn, kind)(step, *caches), want)
    assert all(torch.equal(a, b) for a, b in zip(caches, direct, strict=True))


def packed(step: Step, cache: Tensor) -> Tensor:
    return layer(step, *cache.split(SIZE, dim=-1))


def stacked(step: Step, cache: Tensor) -> Tensor:
    return layer(step, *cache.unbind(0))


def by_heads(step: Step, cache: Tensor) -> Tensor:
    return layer(step, cache[0].permute(0, 2, 1, 3), cache[1].permute(0, 2, 1, 3))


def read_twice(step: Step, cache: Tensor) -> Tensor:
    return layer(step, cache[0], cache[1]) - 2 * graphs.read(step, cache[0], cache[1])


def permuted(cache: Tensor) -> tuple[Tensor, ...]:
    return cache[0].permute(0, 2, 1, 3), cache[1].permute(0, 2, 1, 3)


LAYOUTS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], Callable[..., Any]]] = {
    "packed": (packed, (BLOCKS, BLOCK, KV_HEADS, 2 * SIZE), lambda c: c.split(SIZE, dim=-1)),
    "stacked": (stacked, (2, BLOCKS, BLOCK, KV_HEADS, SIZE), lambda c: c.unbind(0)),
    "by heads": (by_heads, (2, BLOCKS, KV_HEADS, BLOCK, SIZE), permuted),
    "read twice": (read_twice, (2, BLOCKS, BLOCK, KV_HEADS, SIZE), lambda c: c.unbind(0)),
}


def old_rows_too(step: Step, cache: Tensor) -> Tensor:
    """Reads the cache before the write, and uses what it read only after it."""
    old = cache.sum(dtype=torch.float64).float()
    return layer(step, cache[0], cache[1]) + old


@pytest.mark.slow
def test_a_read_that_inductor_moves_behind_the_write_would_have_copied_the_cache() -> None:
    """Why a reader before the write keeps it direct: Inductor runs it later, and copies."""
    torch._dynamo.reset()
    step, cache = graphs.verify_step(), torch.randn(2, BLOCKS, BLOCK, KV_HEADS, SIZE)
    run = torch.compile(old_rows_too, options=nwor_compile.compile_options(NworConfig()))
    direct = cache.clone()
    want = old_rows_too(step, direct)
    window = Window(
        {"layer": (cache[0], cache[1])}, max_requests=2, max_drafts=2, max_tokens=8,
        config=NworConfig(scv="off"),
    )  # fmt: skip
    try:
        window.begin(torch.tensor(graphs.DRAFTS), step.starts, step.slots)
        # Staged, this would raise UnregisteredCacheError.
        torch.testing.assert_close(run(step, cache), want)
        assert torch.equal(cache, direct)
        window.abort()
    finally:
        window.close()


@pytest.mark.parametrize("accept", [0, 2])
@pytest.mark.parametrize("case", LAYOUTS)
def test_rewritten_graphs_equal_eager_in_python(case: str, accept: int) -> None:
    check_layout(case, graphs.rewritten(LAYOUTS[case][0]), accept)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", LAYOUTS)
def test_compiled_graphs_equal_eager(case: str, kind: str) -> None:
    check_layout(case, compiled(LAYOUTS[case][0], kind), accept=1)


def check_layout(case: str, run: Callable[..., Any], accept: int) -> None:
    fn, shape, views = LAYOUTS[case]
    step = graphs.verify_step()
    cache = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    direct = cache.clone()
    want = fn(step, direct)
    outcome = graphs.run_window(run, step, {"layer": tuple(views(cache))}, cache, accept=accept)
    torch.testing.assert_close(outcome.out, want)
    graphs.assert_staged(outcome, [part.clone() for part in views(direct)], step, accept)
