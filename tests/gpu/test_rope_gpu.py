"""RoPE with staging on a GPU: the reference's bits at realistic sizes, replays, a big cache."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
pytest.importorskip("triton")

from nwor_compile import ops  # noqa: E402
from nwor_compile.ops import layout  # noqa: E402
from nwor_compile.ops.kernels.testing import LAYOUTS, empty_cache, same_bits  # noqa: E402

SEED = int(os.environ.get("NWOR_SEED", random.SystemRandom().randrange(2**31)))
BLOCK = 16
# heads, KV heads, head size, rotated elements
MODELS = [(32, 8, 128, 128), (24, 8, 128, 128), (64, 8, 64, 32), (32, 32, 64, 64), (8, 1, 256, 64),
          (9, 3, 80, 80)]  # fmt: skip
FORMATS = [
    (torch.bfloat16, "auto", 0),
    (torch.float16, "auto", 0),
    (torch.float32, "auto", 0),
    (torch.bfloat16, "fp8_e4m3", 1),
    (torch.float16, "fp8_e5m2", -1),
]


@pytest.fixture(autouse=True)
def rng() -> torch.Generator:
    print(f"NWOR_SEED={SEED}")
    return torch.Generator("cuda").manual_seed(SEED)


class Case:
    """Random rows of one step, q, k and v packed, with slots -1 and rows without staging."""

    def __init__(
        self, tokens: int, model: tuple[int, int, int, int], dtype: torch.dtype, name: str,
        scales: int, form: str, table: torch.dtype, full: bool, rng: torch.Generator,
    ) -> None:  # fmt: skip
        heads, self.kv_heads, self.size, self.rotary = model
        sizes = [n * self.size for n in (heads, self.kv_heads, self.kv_heads)]
        packed = torch.randn(tokens, sum(sizes), generator=rng, device="cuda").to(dtype)
        self.packed = packed
        self.q, self.k, self.v = (
            part.unflatten(1, (-1, self.size)) for part in packed.split(sizes, 1)
        )
        width = self.rotary if full else self.rotary // 2
        self.cos, self.sin = torch.randn(2, 300, width, generator=rng, device="cuda").to(table)
        self.positions = torch.randint(0, 300, (tokens,), generator=rng, device="cuda")
        self.blocks = -(-tokens // BLOCK) + 3
        order = torch.randperm(self.blocks * BLOCK, generator=rng, device="cuda")
        self.slots = order[:tokens]
        self.slots[::7] = -1
        rows = torch.randperm(tokens, generator=rng, device="cuda").to(torch.int32)
        kind = torch.rand(tokens, generator=rng, device="cuda")  # draft, mirrored or certain
        self.row_map = torch.where(kind < 0.8, torch.where(kind < 0.6, rows, -(rows + 2)), -1)
        self.capacity = max(1, tokens - 3)
        self.name, self.form, self.stored = name, form, layout.cache_dtype(name, dtype)
        number = self.kv_heads if scales < 0 else scales
        self.k_scale = torch.rand(number, generator=rng, device="cuda") + 0.01 if number else None
        self.v_scale = None if self.k_scale is None else self.k_scale * 3

    def memory(self) -> list[Tensor]:
        shape = (BLOCK, self.kv_heads, self.size, self.stored, "cuda")
        cache = empty_cache(self.form, self.blocks, *shape)
        staged = empty_cache("NHD", 1, self.capacity, self.kv_heads, self.size, self.stored, "cuda")
        state = torch.tensor([5, 0], dtype=torch.int32, device="cuda")
        return [*cache, staged[0][0], staged[1][0], state]

    def fused(self, is_neox: bool, memory: list[Tensor] | None = None) -> list[Tensor]:
        memory = self.memory() if memory is None else memory
        cache, value_cache, staged, staged_value, state = memory
        rotated = ops.rope_stage_kv(
            self.q, self.k, self.v, self.cos, self.sin, self.rotary, is_neox, cache, value_cache,
            staged, staged_value, state, self.slots, self.row_map, self.positions, self.name,
            self.k_scale, self.v_scale,
        )  # fmt: skip
        return [*rotated, *memory]

    def apart(self, is_neox: bool) -> list[Tensor]:
        """Our rotary op in place, and then `stage_kv`."""
        memory, packed = self.memory(), self.packed.clone()
        sizes = [self.q[0].numel(), self.k[0].numel(), self.v[0].numel()]
        q, k, v = (part.unflatten(1, (-1, self.size)) for part in packed.split(sizes, 1))
        table = torch.cat([self.cos, self.sin], dim=1)
        ops.rotary_embedding(self.positions, q, k, self.size, table, is_neox)
        cache, value_cache, staged, staged_value, state = memory
        ops.stage_kv(
            k, v, cache, value_cache, staged, staged_value, state, self.slots, self.row_map,
            self.name, self.k_scale, self.v_scale,
        )  # fmt: skip
        return [q.contiguous(), k.contiguous(), *memory]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(left, right, strict=True)):
        assert same_bits(a, b) if a.is_floating_point() else torch.equal(a, b), i


def both(case: Case, call: str, is_neox: bool) -> list[list[Tensor]]:
    found = []
    for how in ("reference", "triton"):
        with ops.implementation(how):
            found.append(getattr(case, call)(is_neox))
    return found


@pytest.mark.parametrize("tokens", [1, 5, 1281])
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_the_reference_s_bits(
    model: tuple[int, int, int, int], is_neox: bool, tokens: int, rng: torch.Generator
) -> None:
    for full, table in ((True, torch.float32), (False, torch.bfloat16)):
        case = Case(tokens, model, torch.bfloat16, "auto", 0, "NHD", table, full, rng)
        assert_same(*both(case, "fused", is_neox))
    assert_same(case.fused(is_neox), case.apart(is_neox))


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize(("dtype", "name", "scales"), FORMATS)
def test_every_format_has_the_bits_of_rope_and_then_staging(
    dtype: torch.dtype, name: str, scales: int, form: str, rng: torch.Generator
) -> None:
    case = Case(81, MODELS[0], dtype, name, scales, form, torch.float32, False, rng)
    assert_same(*both(case, "fused", True))
    assert_same(case.fused(True), case.apart(True))


def test_a_replay_takes_other_rows_slots_and_drafts(rng: torch.Generator) -> None:
    options: tuple[Any, ...] = (torch.bfloat16, "auto", 0, "NHD", torch.float32, True, rng)
    fixed = Case(80, MODELS[0], *options)
    names = ("packed", "cos", "sin", "positions", "slots", "row_map")
    memory = fixed.memory()
    fixed.fused(True, memory)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = fixed.fused(True, memory)
    for i in range(3):
        other = Case(80, MODELS[0], *options)
        if i == 2:
            other.row_map.fill_(-1)  # no drafts at all
        for name in names:
            getattr(fixed, name).copy_(getattr(other, name))
        for tensor, fresh in zip(memory, fixed.memory(), strict=True):
            tensor.copy_(fresh)
        graph.replay()
        assert_same(got, other.fused(True))


def test_a_big_cache_of_more_than_2_31_elements(rng: torch.Generator) -> None:
    heads, kv_heads, size, rotary = MODELS[0]
    blocks = 2**31 // (BLOCK * kv_heads * size) + 8
    shape = (blocks, BLOCK, kv_heads, size)
    key_cache, value_cache = (
        torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    case = Case(4, MODELS[0], torch.bfloat16, "auto", 0, "NHD", torch.float32, False, rng)
    slots = blocks * BLOCK - torch.tensor([1, 3, 18, 100], device="cuda")
    _, k = ops.rope_stage_kv_window(
        case.q, case.k, case.v, case.cos[:4], case.sin[:4], rotary, True, key_cache, value_cache,
        slots,
    )  # fmt: skip
    assert same_bits(key_cache.view(-1, kv_heads, size)[slots], k)
    assert same_bits(value_cache.view(-1, kv_heads, size)[slots], case.v.contiguous())
    assert not key_cache[:500].any()
    assert heads > kv_heads
