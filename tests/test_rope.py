"""RoPE, and RoPE with staging: against a plain formula, against the two ops apart, and opcheck."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from cases import Geometry, Span, make_batch, make_step, same_bits
from torch import Tensor

from nwor_compile import ops
from nwor_compile.ops import rope, staging
from nwor_compile.ops.library import pick

SPANS = [Span(5, 1, 3), Span(0, 6), Span(0, 0), Span(9, 1), Span(2, 1, 2)]
GEOMETRIES = {
    "nhd": Geometry(),
    "hnd-bf16": Geometry("hnd", torch.bfloat16, head_size=16),
    "packed-fp16-mqa": Geometry("packed", torch.float16, kv_heads=1, heads=3),
    "nhd-fp8": Geometry("nhd", torch.bfloat16, "fp8_e4m3", scale="head"),
    "5d-uint8": Geometry("5d", torch.float16, "fp8_e5m2", as_uint8=True, scale="tensor"),
    "odd head": Geometry("packed_hnd", torch.bfloat16, head_size=24, kv_heads=3, heads=9),
}
WIDTHS = ("full", "half")


@pytest.fixture(params=["reference", "triton"])
def how(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton":
        pytest.importorskip("triton")
    with ops.implementation(request.param):
        yield request.param


def expected_rotation(
    x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, is_neox: bool
) -> Tensor:
    """Element by element, from the definition; float32 by torch's scalar tensors."""
    out, half = x.clone(memory_format=torch.contiguous_format), rotary_dim // 2
    wide, c, s = x.float(), cos.float(), sin.float()
    for i in range(half):
        a, b = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
        ca, cb = (a, b) if cos.shape[1] == rotary_dim else (i, i)
        for t in range(x.shape[0]):
            left, right = wide[t, :, a] * c[t, ca], wide[t, :, b] * s[t, ca]
            out[t, :, a] = (left - right).to(x.dtype)
            left, right = wide[t, :, b] * c[t, cb], wide[t, :, a] * s[t, cb]
            out[t, :, b] = (left + right).to(x.dtype)
    return out


class Case:
    """One layer of a step with RoPE before its write; q, k, v are views of a packed tensor."""

    def __init__(self, geometry: Geometry, *, width: str, rotary_dim: int, seed: int = 0) -> None:
        g = geometry
        self.step = make_step(make_batch(SPANS, g, padding=2, without_slot=0.2), seed=seed)
        self.layer, self.batch = self.step.layers[0], self.step.batch
        row_map = self.batch.row_map.clone()
        # Two of the certain rows are mirrored, to the staging rows after the 5 of the drafts.
        row_map[0], row_map[9] = -(5 + 2), -(6 + 2)
        self.batch = replace(self.batch, row_map=row_map)
        generator = torch.Generator().manual_seed(seed)
        tokens = self.batch.slot_mapping.shape[0]
        sizes = [n * g.head_size for n in (g.heads, g.kv_heads, g.kv_heads)]
        packed = torch.randn(tokens, sum(sizes), generator=generator).to(g.model_dtype)
        self.q, self.k, self.v = (
            part.unflatten(1, (-1, g.head_size)) for part in packed.split(sizes, dim=1)
        )
        columns = rotary_dim if width == "full" else rotary_dim // 2
        dtype = torch.float32 if width == "full" else g.model_dtype
        tables = torch.randn(2, tokens, columns, generator=generator).to(dtype)
        self.cos, self.sin = tables[0], tables[1]
        self.rotary_dim = rotary_dim

    def stage(self, key: Tensor) -> None:
        layer = self.layer
        ops.stage_kv(
            key, self.v, layer.cache.key, layer.cache.value, layer.staged_key, layer.staged_value,
            layer.state, self.batch.slot_mapping, self.batch.row_map, *layer.format,
        )  # fmt: skip

    def write(self, key: Tensor) -> None:
        """Directly, all rows."""
        cache = self.layer.cache
        ops.reshape_and_cache(
            key, self.v, cache.key, cache.value, self.batch.slot_mapping, *self.layer.format
        )

    def fused(self, is_neox: bool) -> tuple[Tensor, Tensor]:
        layer = self.layer
        return ops.rope_stage_kv(
            self.q, self.k, self.v, self.cos, self.sin, self.rotary_dim, is_neox, layer.cache.key,
            layer.cache.value, layer.staged_key, layer.staged_value, layer.state,
            self.batch.slot_mapping, self.batch.row_map, None, *layer.format,
        )  # fmt: skip

    def memory(self) -> list[Tensor]:
        layer = self.layer
        return [*layer.cache.stored, layer.staged_key, layer.staged_value, layer.state]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(same_bits(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("part", ["all", "some"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_fused_has_the_bits_of_rope_and_then_staging(
    geometry: str, part: str, width: str, is_neox: bool, how: str
) -> None:
    g = GEOMETRIES[geometry]
    rotary_dim = g.head_size if part == "all" else g.head_size // 2 + 2
    ours = Case(g, width=width, rotary_dim=rotary_dim)
    apart = Case(g, width=width, rotary_dim=rotary_dim)
    q, k = ours.fused(is_neox)
    wanted = [
        expected_rotation(x, apart.cos, apart.sin, rotary_dim, is_neox) for x in (apart.q, apart.k)
    ]
    with ops.implementation("reference"):
        apart.stage(wanted[1])
    assert_same([q, k], wanted)
    assert q.is_contiguous()
    assert k.is_contiguous()
    assert_same(ours.memory(), apart.memory())
    assert_same([ours.q, ours.k, ours.v], [apart.q, apart.k, apart.v])


@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_prepared_write_has_the_same_bits_call_after_call(
    geometry: str, staged: bool, how: str
) -> None:
    g = GEOMETRIES[geometry]
    ours, apart = (Case(g, width="half", rotary_dim=g.head_size) for _ in range(2))
    layer, slots = ours.layer, ours.batch.slot_mapping
    to = (layer.staged_key, layer.staged_value, layer.state, ours.batch.row_map)
    write = pick(rope.ROPE_WRITE, slots.device)(
        ours.cos, ours.sin, g.head_size, True, layer.cache.key, layer.cache.value,
        to if staged else None, *layer.format,
    )  # fmt: skip
    positions = torch.arange(slots.shape[0]).flip(0)
    for seed, (dtype, packed) in enumerate(product((torch.int32, torch.int64), (True, False))):
        rows = Case(g, width="half", rotary_dim=g.head_size, seed=seed)
        q, k, v = (x if packed else x.contiguous() for x in (rows.q, rows.k, rows.v))
        wanted = [
            expected_rotation(x, ours.cos[positions], ours.sin[positions], g.head_size, True)
            for x in (q, k)
        ]
        write(q, k, v, positions.to(dtype), slots.to(dtype))
        assert_same([q, k], wanted)
        apart.v = v
        with ops.implementation("reference"):
            (apart.stage if staged else apart.write)(k)
        assert_same(ours.memory(), apart.memory())
    before = [x.clone() for x in ours.memory()]
    write(q[:0], k[:0], v[:0], positions[:0], slots[:0])
    assert_same(ours.memory(), before)


def test_the_rounding_is_one_of_the_exact_value_not_one_a_product(how: str) -> None:
    """bfloat16 in, float64 check: half an ulp of the result, which rounding each product breaks."""
    generator = torch.Generator().manual_seed(3)
    x, angle = torch.randn(64, 4, 16, generator=generator), torch.rand(64, 8, generator=generator)
    x = x.bfloat16()
    table = torch.cat([angle.cos(), angle.sin()], dim=1).bfloat16()
    q, k = x.clone(), x.clone()
    ops.rotary_embedding(torch.arange(64), q, k, 16, table, True)
    c, s = (t.unsqueeze(1).double() for t in table.chunk(2, dim=1))
    a, b = x.double().chunk(2, dim=2)
    exact = torch.cat([a * c - b * s, b * c + a * s], dim=2)
    # The float32 sum before it may move an exact tie: a relative 2^-24 beside 2^-9.
    limit = torch.exp2(exact.abs().log2().floor() - 8) * (1 + 2.0**-14)
    assert ((q.double() - exact).abs() <= limit).all()
    products = [(m * n).bfloat16().double() for m, n in ((a, c), (b, s))]
    eager = (products[0] - products[1]).bfloat16().double()
    assert ((eager - exact[..., :8]).abs() > limit[..., :8]).any()


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("flat", [True, False])
def test_rotary_embedding_changes_q_and_k_in_place(is_neox: bool, flat: bool, how: str) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(5, 10 * 8, generator=generator)
    table = torch.randn(7, 6, generator=generator)
    positions = torch.tensor([6, 0, 3, -1, 7], dtype=torch.int32)
    before = packed.clone()
    q, k = packed[:, :32], packed[:, 32:64]
    if not flat:
        q, k = q.unflatten(1, (-1, 8)), k.unflatten(1, (-1, 8))
    ops.rotary_embedding(positions, q, k, 8, table, is_neox)
    inside = torch.tensor([True, True, True, False, False])
    rows = torch.where(inside.unsqueeze(1), table[torch.where(inside, positions.long(), 0)], 0)
    want = expected_rotation(
        before[:, :64].unflatten(1, (-1, 8)), rows[:, :3], rows[:, 3:], 6, is_neox
    )
    assert same_bits(packed[:, :64], want.flatten(1))
    assert same_bits(packed[:, 64:], before[:, 64:])


def test_rows_past_the_slot_mapping_are_rotated_and_not_written(how: str) -> None:
    case = Case(Geometry(), width="half", rotary_dim=8)
    case.batch = replace(case.batch, slot_mapping=case.batch.slot_mapping[:3])
    apart = Case(Geometry(), width="half", rotary_dim=8)
    apart.batch = case.batch
    q, k = case.fused(True)
    assert_same(
        [q, k], [expected_rotation(x, case.cos, case.sin, 8, True) for x in (case.q, case.k)]
    )
    apart.stage(k)
    assert_same(case.memory(), apart.memory())


def test_overflowing_draft_rows_go_nowhere_and_raise_the_flag(how: str) -> None:
    case = Case(Geometry(), width="half", rotary_dim=8)
    case.layer = replace(
        case.layer, staged_key=case.layer.staged_key[:2], staged_value=case.layer.staged_value[:2]
    )
    case.fused(True)
    assert case.layer.state.tolist() == [2, 1]


def test_no_tokens(how: str) -> None:
    q, table = torch.empty(0, 4, 8), torch.randn(3, 8)
    ops.rotary_embedding(torch.empty(0, dtype=torch.int64), q, q[:, :2], 8, table, True)


# ---- the window overloads ----------------------------------------------------------------------


def register(case: Case) -> Tensor:
    routing = staging.Routing(case.batch.row_map, case.batch.num_drafts, case.batch.tail_start)
    layer = case.layer
    staged = staging.LayerStaging(
        "layer", layer.staged_key, layer.staged_value, layer.state, routing
    )
    staging.register_layer(layer.cache.key, layer.cache.value, staged)
    return layer.cache.key


def window_arguments(case: Case, is_neox: bool) -> tuple[Any, ...]:
    layer = case.layer
    return (
        case.q, case.k, case.v, case.cos, case.sin, case.rotary_dim, is_neox, layer.cache.key,
        layer.cache.value, case.batch.slot_mapping, *layer.format,
    )  # fmt: skip


def in_place_arguments(case: Case, is_neox: bool, flat: bool) -> tuple[Any, ...]:
    layer = case.layer
    tokens, _, size = case.q.shape
    table = torch.cat([case.cos, case.sin], dim=1).flip(0)  # token t is at position T - 1 - t
    q, k, v = (x.clone().contiguous() for x in (case.q, case.k, case.v))
    if flat:
        q, k = q.flatten(1), k.flatten(1)
    positions = torch.arange(tokens).flip(0)
    return (
        positions, q, k, v, size, table, is_neox, layer.cache.key, layer.cache.value,
        case.batch.slot_mapping, *layer.format,
    )  # fmt: skip


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("geometry", ["nhd", "nhd-fp8", "5d-uint8"])
def test_window_overload_stages_or_writes_directly(geometry: str, inside: bool, how: str) -> None:
    case, apart = (Case(GEOMETRIES[geometry], width="full", rotary_dim=6) for _ in range(2))
    if inside:
        cache = register(case)
        before = staging.executions()
        try:
            q, k = ops.rope_stage_kv_window(*window_arguments(case, False))
        finally:
            staging.unregister_layer(cache)
        assert staging.executions() == before + 1
        assert_same([q, k], list(apart.fused(False)))
    else:
        q, k = ops.rope_stage_kv_window(*window_arguments(case, False))
        layer = apart.layer
        ops.reshape_and_cache(
            k, apart.v, layer.cache.key, layer.cache.value, apart.batch.slot_mapping, *layer.format
        )
    assert_same(case.memory(), apart.memory())


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("is_neox", [True, False])
def test_in_place_overload_equals_the_other(is_neox: bool, flat: bool, how: str) -> None:
    case, apart = (Case(GEOMETRIES["hnd-bf16"], width="half", rotary_dim=12) for _ in range(2))
    cache = register(case)
    try:
        arguments = in_place_arguments(case, is_neox, flat)
        assert ops.rope_stage_kv_window_in_place(*arguments) is None
    finally:
        staging.unregister_layer(cache)
    q, k = apart.fused(is_neox)
    shape = (-1, *q.shape[1:])
    assert_same([arguments[1].view(shape), arguments[2].view(-1, *k.shape[1:])], [q, k])
    assert_same(case.memory(), apart.memory())


def test_a_window_of_too_few_tokens_says_so() -> None:
    case = Case(Geometry(), width="half", rotary_dim=8)
    case.batch = replace(case.batch, row_map=case.batch.row_map[:3])
    cache = register(case)
    try:
        with pytest.raises(ValueError, match="at most 3; raise max_tokens"):
            ops.rope_stage_kv_window(*window_arguments(case, True))
    finally:
        staging.unregister_layer(cache)


def test_an_unregistered_cache_inside_a_window_is_an_error() -> None:
    case = Case(Geometry(), width="half", rotary_dim=8)
    before = [tensor.clone() for tensor in case.memory()]
    staging.window_opened()
    try:
        with pytest.raises(staging.UnregisteredCacheError, match="not registered"):
            ops.rope_stage_kv_window(*window_arguments(case, True))
    finally:
        staging.window_closed()
    assert_same(case.memory(), before)


# ---- opcheck and errors ------------------------------------------------------------------------

ALL_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor",
             "test_aot_dispatch_dynamic")  # fmt: skip


def clean(geometry: str) -> Case:
    """opcheck compares NaN unequal, so no staging row may hold one."""
    case = Case(GEOMETRIES[geometry], width="half", rotary_dim=8)
    for staged in (case.layer.staged_key, case.layer.staged_value):
        staged.view(torch.uint8).zero_()
    return case


@pytest.mark.parametrize("geometry", ["nhd", "hnd-bf16", "5d-uint8", "packed-fp16-mqa"])
@pytest.mark.parametrize("op", ["default", "window", "window_"])
def test_opcheck(op: str, geometry: str) -> None:
    case = clean(geometry)
    layer = case.layer
    if op == "window_":
        arguments = in_place_arguments(case, True, flat=False)
    elif op == "window":
        arguments = window_arguments(case, True)
    else:
        arguments = (
            *window_arguments(case, True)[:9], layer.staged_key, layer.staged_value, layer.state,
            case.batch.slot_mapping, case.batch.row_map, None, *layer.format,
        )  # fmt: skip
    overload = getattr(torch.ops.nwor.rope_stage_kv, op)
    results = torch.library.opcheck(overload, arguments, {}, test_utils=ALL_TESTS)
    assert results == dict.fromkeys(ALL_TESTS, "SUCCESS")


def test_opcheck_of_rotary_embedding() -> None:
    q, k, table = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(9, 6)
    results = torch.library.opcheck(
        torch.ops.nwor.rotary_embedding.default, (torch.arange(5), q, k, 8, table, False)
    )
    assert set(results.values()) == {"SUCCESS"}


Q, K, TABLE = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q, K[:2], TABLE, TABLE, 8), "equal tokens and head size"),
        ((Q, K.double(), TABLE, TABLE, 8), "one dtype"),
        ((Q, K, TABLE, TABLE, 7), "even number from 2 to 8, got 7"),
        ((Q, K, TABLE, TABLE, 10), "even number from 2 to 8, got 10"),
        ((Q, K, TABLE, TABLE, 6), "rows, 6 or 3"),
        ((Q, K, TABLE, TABLE[:2], 8), "equal shapes"),
        ((Q, K, TABLE[:2], TABLE[:2], 8), "a row for each of 3 tokens, got 2"),
        ((Q, K, TABLE.int(), TABLE.int(), 8), "one dtype"),
        ((Q, K, TABLE, TABLE, 8, torch.zeros(3)), "int32 or int64"),
        ((Q, K, TABLE, TABLE, 8, torch.zeros(2).long()), r"expected shape \[3\]"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        rope.check_rope(*arguments)


def test_flat_rows_must_be_whole_heads() -> None:
    with pytest.raises(ValueError, match=r"expected \[tokens, heads, 8\] or"):
        ops.rotary_embedding(torch.arange(3), torch.zeros(3, 30), K, 8, TABLE, True)
    with pytest.raises(ValueError, match=r"\[positions, rotary_dim\]"):
        ops.rotary_embedding(torch.arange(3), Q, K, 8, TABLE[0], True)


def test_rotation_keeps_the_length_of_a_pair() -> None:
    angle = torch.full((1, 4), math.pi / 3)
    x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1))
    for is_neox in (True, False):
        out = rope.rotate(x, angle.cos(), angle.sin(), 8, is_neox)
        torch.testing.assert_close(out.norm(dim=2), x.norm(dim=2))
        assert not torch.equal(out, x)
