"""A small model with RoPE and paged caches on the GPU, and steps of one size but of many kinds."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nwor_compile import Committed, NworConfig, Window

HEADS, KV_HEADS, SIZE, HIDDEN = 8, 2, 64, 256
LAYERS, BLOCKS, BLOCK, COLUMNS = 2, 24, 16, 4
REQUESTS, DRAFTS, POSITIONS = 4, 3, 64
Span = tuple[int, int, int]  # rows in the cache, certain tokens, drafts

# Four requests of four tokens each: what a captured graph of one size must serve.
VARIANTS: list[tuple[list[Span], list[int]]] = [
    ([(7, 1, 3), (3, 1, 3), (20, 1, 3), (0, 1, 3)], [3, 1, 0, 2]),
    ([(7, 4, 0), (3, 2, 2), (20, 1, 3), (31, 3, 1)], [0, 2, 3, 0]),
    ([(7, 4, 0), (3, 4, 0), (20, 4, 0), (0, 4, 0)], [0, 0, 0, 0]),
    ([(40, 2, 2), (1, 1, 3), (30, 4, 0), (15, 1, 3)], [1, 0, 0, 1]),
]


class Model(nn.Module):
    """Layers of QKV, RoPE, cache write, attention. Caches are buffers: static for CUDA graphs."""

    cos: Tensor
    sin: Tensor

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        rows = (HEADS + 2 * KV_HEADS) * SIZE
        self.qkv = nn.ModuleList(nn.Linear(HIDDEN, rows, bias=False) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(HEADS * SIZE, HIDDEN) for _ in range(LAYERS))
        angle = torch.rand(POSITIONS, 1, SIZE)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        shape = (BLOCKS, BLOCK, KV_HEADS, SIZE)
        for i in range(LAYERS):
            self.register_buffer(f"key_cache_{i}", torch.randn(shape))
            self.register_buffer(f"value_cache_{i}", torch.randn(shape))
        self.requires_grad_(False)
        self.to("cuda", dtype)

    def caches(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (getattr(self, f"key_cache_{i}"), getattr(self, f"value_cache_{i}"))
            for i in range(LAYERS)
        ]

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def forward(
        self, x: Tensor, positions: Tensor, slots: Tensor, table: Tensor, lens: Tensor,
        starts: Tensor,
    ) -> Tensor:  # fmt: skip
        cos, sin = self.cos[positions], self.sin[positions]
        sizes = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
        for i, (key_cache, value_cache) in enumerate(self.caches()):
            parts = self.qkv[i](x).split(sizes, dim=-1)
            q, k, v = (part.unflatten(-1, (-1, SIZE)) for part in parts)
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            torch.ops.nwor.reshape_and_cache(k, v, key_cache, value_cache, slots)
            out = torch.ops.nwor.paged_attention(
                q, key_cache, value_cache, table, lens, starts, SIZE**-0.5
            )
            x = x + self.out[i](out.flatten(1))
        return x


class Step(NamedTuple):
    """Inputs of the model, and of the window around it."""

    x: Tensor
    positions: Tensor
    slots: Tensor
    table: Tensor
    lens: Tensor
    starts: Tensor
    num_drafts: Tensor
    sampled: Tensor
    draft_ids: Tensor
    kept: list[int]  # slots that hold their row after the commit

    def inputs(self) -> tuple[Tensor, ...]:
        return self[:6]


def make_step(
    spans: Sequence[Span], accepted: Sequence[int], seed: int = 0, dtype: Any = torch.float32
) -> Step:
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(BLOCKS, generator=rng)[: len(spans) * COLUMNS]
    table = order.view(len(spans), COLUMNS)
    slots, positions, starts, kept, ids = [], [], [0], [], []
    sampled = torch.full((len(spans), DRAFTS + 1), -1)
    for r, ((context, certain, drafts), taken) in enumerate(zip(spans, accepted, strict=True)):
        for j in range(certain + drafts):
            position = context + j
            slot = int(table[r, position // BLOCK]) * BLOCK + position % BLOCK
            slots.append(slot)
            positions.append(position)
            if j < certain + taken:
                kept.append(slot)
        ids += [100 * r + j for j in range(drafts)]
        sampled[r, :taken] = torch.tensor([100 * r + j for j in range(taken)])
        sampled[r, taken] = 99999
        starts.append(len(slots))

    def index(values: Any, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=kind).cuda()

    lens = [c + s + d for c, s, d in spans]
    return Step(
        torch.randn(len(slots), HIDDEN, generator=rng).to(dtype).cuda(),
        index(positions, torch.int64), index(slots, torch.int64), index(table), index(lens),
        index(starts), index([d for _, _, d in spans]), index(sampled), index(ids), kept,
    )  # fmt: skip


def variants(count: int) -> Iterator[tuple[Step, list[int]]]:
    """Steps of sixteen tokens, fresh numbers in each."""
    for i in range(count):
        spans, accepted = VARIANTS[i % len(VARIANTS)]
        yield make_step(spans, accepted, seed=i), accepted


def open_window(model: Model, **settings: Any) -> Window:
    layers = {f"layers.{i}": pair for i, pair in enumerate(model.caches())}
    return Window(
        layers, max_requests=REQUESTS, max_drafts=DRAFTS, max_tokens=64,
        config=NworConfig(**{"scv": "graph", **settings}),
    )  # fmt: skip


def run_window(run: Callable[..., Tensor], window: Window, step: Step) -> tuple[Tensor, Committed]:
    with torch.no_grad(), window.step(step.num_drafts, step.starts, step.slots):
        out = run(*step.inputs())
        return out.clone(), window.commit(step.sampled, step.draft_ids)


class Reference:
    """The same model, run eagerly and writing directly, on caches of its own."""

    def __init__(self, model: Model) -> None:
        self.model, self.direct = model, copy.deepcopy(model)

    def start(self) -> None:
        """Take over the caches of the model, before a step."""
        for mine, theirs in zip(self._flat(self.direct), self._flat(self.model), strict=True):
            mine.copy_(theirs)
        self.before = [cache.clone() for cache in self._flat(self.model)]

    def check(self, step: Step, out: Tensor) -> None:
        """The result is that of direct writes, and the caches have the kept rows and no other."""
        want = self.direct(*step.inputs())
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
        kept = torch.tensor(step.kept, device="cuda")
        caches = zip(self._flat(self.model), self.before, self._flat(self.direct), strict=True)
        for cache, before, direct in caches:
            expected = before.clone().view(-1, KV_HEADS, SIZE)
            expected[kept] = direct.view(-1, KV_HEADS, SIZE)[kept]
            torch.testing.assert_close(cache.view(-1, KV_HEADS, SIZE), expected)
            untouched = torch.ones(BLOCKS * BLOCK, dtype=torch.bool, device="cuda")
            untouched[kept] = False
            rows, old = (c.view(-1, KV_HEADS, SIZE)[untouched] for c in (cache, before))
            assert torch.equal(rows, old)

    @staticmethod
    def _flat(model: Model) -> Iterable[Tensor]:
        return [cache for pair in model.caches() for cache in pair]
