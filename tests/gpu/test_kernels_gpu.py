"""The Triton kernels on a GPU: realistic sizes, fresh inputs, poisoned outputs, CUDA graphs.

Under compute-sanitizer, leave the cache of 2^31 elements out:
compute-sanitizer --tool memcheck python -m pytest tests/gpu/test_kernels_gpu.py -k "not big"
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
from nwor_compile.ops.kernels.testing import (  # noqa: E402
    LAYOUTS,
    Batch,
    empty_cache,
    exact_attention,
    largest_error,
    make_batch,
    raw,
    same_bits,
)

# Fresh inputs each run; the seed is printed with a failure, and NWOR_SEED repeats it.
SEED = int(os.environ.get("NWOR_SEED", random.SystemRandom().randrange(2**31)))
BLOCK_SIZE, HEADS, SIZE = 16, 8, 128


@pytest.fixture(autouse=True)
def rng() -> torch.Generator:
    print(f"NWOR_SEED={SEED}")
    return torch.Generator("cuda").manual_seed(SEED)


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """torch.empty gives NaN (or the largest integer): an element left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    with ops.implementation("reference"):
        expected = run()
    with ops.implementation("triton"):
        return expected, run()


def assert_same_bits(expected: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    for i, (left, right) in enumerate(zip(expected, got, strict=True)):
        assert same_bits(left, right) if left.is_floating_point() else torch.equal(left, right), i


def clone(tensor: Tensor) -> Tensor:
    """A copy with the same strides; `Tensor.clone` would pack a view of a packed cache."""
    whole = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    raw(whole).copy_(raw(tensor))
    return whole


# ---- writes ---------------------------------------------------------------------------------

FORMATS = [
    (torch.float32, "auto", 0),
    (torch.float16, "auto", 0),
    (torch.bfloat16, "auto", 0),
    (torch.bfloat16, "fp8_e4m3", 1),
    (torch.float16, "fp8_e5m2", HEADS),
    (torch.float32, "fp8_e4m3", HEADS),
]


@pytest.mark.parametrize("tokens", [1, 1281])
@pytest.mark.parametrize(("dtype", "name", "scales"), FORMATS)
@pytest.mark.parametrize("form", LAYOUTS)
def test_writes_equal_the_reference(
    form: str, dtype: torch.dtype, name: str, scales: int, tokens: int, rng: torch.Generator
) -> None:
    blocks = 200
    fused = torch.randn(tokens, 3 * HEADS * SIZE, generator=rng, device="cuda").to(dtype)
    _, key, value = fused.view(tokens, 3, HEADS, SIZE).unbind(1)
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=rng, device="cuda")[:tokens]
    slots[::7] = -1
    row_map = torch.randperm(tokens, generator=rng, device="cuda").to(torch.int32)
    kind = torch.rand(tokens, generator=rng, device="cuda")  # draft, mirrored or certain
    row_map = torch.where(kind < 0.8, torch.where(kind < 0.6, row_map, -(row_map + 2)), -1)
    k_scale = torch.rand(scales, generator=rng, device="cuda") + 0.01 if scales else None
    v_scale = None if k_scale is None else k_scale * 3
    stored = layout.cache_dtype(name, dtype)
    capacity = max(1, tokens - 3)  # a few rows overflow

    def run() -> tuple[Tensor, ...]:
        cache = empty_cache(form, blocks, BLOCK_SIZE, HEADS, SIZE, stored, "cuda")
        direct = clone(cache[0]), clone(cache[1])
        staging = empty_cache("NHD", 1, capacity, HEADS, SIZE, stored, "cuda")
        staged = staging[0][0], staging[1][0]
        state = torch.tensor([5, 0], dtype=torch.int32, device="cuda")
        ops.reshape_and_cache(key, value, *direct, slots, name, k_scale, v_scale)
        ops.stage_kv(key, value, *cache, *staged, state, slots, row_map, name, k_scale, v_scale)
        return (*direct, *cache, *staged, state)

    assert_same_bits(*both(run))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("dtype", "name", "scales"), FORMATS)
def test_stage_kv_into_blocks_of_the_cache_itself(
    dtype: torch.dtype, name: str, scales: int, packed: bool, rng: torch.Generator
) -> None:
    """Staging rows are the last blocks of an NHD cache, which no slot is in."""
    tokens, blocks, tails = 333, 40, 25
    key, value = torch.randn(2, tokens, HEADS, SIZE, generator=rng, device="cuda").to(dtype)
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=rng, device="cuda")[:tokens]
    rows = torch.randperm(tails * BLOCK_SIZE, generator=rng, device="cuda")[:tokens].int()
    kind = torch.rand(tokens, generator=rng, device="cuda")  # draft, mirrored or certain
    row_map = torch.where(kind < 0.8, torch.where(kind < 0.6, rows, -(rows + 2)), -1)
    scale = torch.rand(scales, generator=rng, device="cuda") + 0.01 if scales else None
    stored = layout.cache_dtype(name, dtype)

    def run() -> tuple[Tensor, ...]:
        size = 2 * SIZE if packed else SIZE
        first, second = empty_cache("NHD", blocks + tails, BLOCK_SIZE, HEADS, size, stored, "cuda")
        cache = (first[..., :SIZE], first[..., SIZE:]) if packed else (first, second)
        shape = (tails * BLOCK_SIZE, HEADS, SIZE)
        staged = [c.as_strided(shape, c.stride()[1:], c[blocks].storage_offset()) for c in cache]
        state = torch.tensor([5, 0], dtype=torch.int32, device="cuda")
        ops.stage_kv(
            key, value, cache[0][:blocks], cache[1][:blocks], staged[0], staged[1], state, slots,
            row_map, name, scale, scale,
        )  # fmt: skip
        return (*cache, state)

    assert_same_bits(*both(run))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_rounds_as_torch_does_on_the_cpu(name: str, rng: torch.Generator) -> None:
    """Every float16, and random bits of float32. NaN may lose its sign on the way to the GPU."""
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.float16).float()
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=rng, device="cuda")
    rows = torch.cat([every, bits.to(torch.int32).view(torch.float32).cpu()]).view(-1, 8, 256)
    cache = empty_cache("NHD", rows.shape[0], 1, 8, 256, layout.FP8_DTYPES[name], "cuda")
    there = rows.cuda()
    ops.reshape_and_cache(there, there, *cache, torch.arange(rows.shape[0], device="cuda"), name)
    got, expected = raw(cache[0]).cpu().view(rows.shape), raw(layout.encode(rows, name, None))
    is_nan = rows.isnan()
    assert torch.equal(got[~is_nan], expected[~is_nan])
    assert got[is_nan].bitwise_and(0x7F).eq(0x7F).all()


# ---- acceptance and commit ------------------------------------------------------------------


@pytest.mark.parametrize(("requests", "most"), [(1, 5), (64, 5), (256, 16), (1024, 5), (70, 48)])
@pytest.mark.parametrize("counted", [False, True])
def test_accept_mask_equals_the_reference(
    requests: int, most: int, counted: bool, rng: torch.Generator
) -> None:
    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=rng, device="cuda")

    drafts = randint(most + 1, requests)
    ends = drafts.cumsum(0)
    draft_ids = randint(2, int(ends[-1]) + 100)
    sampled = randint(2, requests, most + 1)
    count = randint(most + 2, requests)
    placeholder = torch.arange(most + 1, device="cuda") >= count.view(-1, 1)
    sampled = sampled.masked_fill(placeholder, -1)
    counts = count.to(torch.int32) if counted else None
    assert_same_bits(*both(lambda: ops.accept_mask(sampled, draft_ids, ends, counts)))


@pytest.mark.parametrize("rows", [1, 5, 80, 1280])
@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_commit_kv_equals_the_reference(
    rows: int, form: str, dtype: torch.dtype, rng: torch.Generator
) -> None:
    layers, blocks = 3, 120
    staged_key, staged_value = (
        torch.randn(layers, rows, HEADS, SIZE, generator=rng, device="cuda").to(dtype)
        for _ in range(2)
    )
    slots = torch.randperm(blocks * BLOCK_SIZE, generator=rng, device="cuda")[:rows] - 2
    mask = torch.rand(rows, generator=rng, device="cuda") < 0.5
    drafts = torch.randint(0, 9, (257,), generator=rng, device="cuda")
    accepted = drafts // 2

    def run(error: int) -> tuple[Tensor, ...]:
        caches = [
            empty_cache(form, blocks, BLOCK_SIZE, HEADS, SIZE, dtype, "cuda") for _ in range(layers)
        ]
        keys, values = [k for k, _ in caches], [v for _, v in caches]
        counters = torch.zeros(ops.counter_size(8), dtype=torch.int64, device="cuda")
        flag = torch.tensor([error], dtype=torch.int32, device="cuda")
        staged = list(staged_key), list(staged_value)
        table = ops.cache_table(keys, values, *staged)
        ops.commit_kv(
            keys, values, *staged, slots, mask, flag, drafts, accepted, counters,
            table, layers,
        )  # fmt: skip
        return (*keys, *values, counters)

    for error in (0, 1):
        assert_same_bits(*both(functools.partial(run, error)))


# ---- attention ------------------------------------------------------------------------------

# float32 sums in another order than the reference's: a small factor. For 16-bit inputs the kernel
# also rounds the softmax weights to 16 bits before the product with V, an error of the size of
# the rounding of the output itself: once more the same, and a factor 2 for the largest of many.
ERROR_FACTOR = {torch.float32: 8.0, torch.float16: 4.0, torch.bfloat16: 4.0}
ERROR_FLOOR = 8 * torch.finfo(torch.float32).eps


def check_attention(batch: Batch, *options: Any) -> None:
    exact = exact_attention(batch, *options)
    expected, got = both(lambda: ops.verify_attention(*batch.verify_args(), *options))
    limit = ERROR_FACTOR[batch.query.dtype] * largest_error(expected, exact) + ERROR_FLOOR
    assert largest_error(got, exact) <= limit
    assert got[int(batch.query_start_loc[-1]) :].eq(0).all()
    written = ops.paged_attention(*batch.paged_args(), *options)
    assert same_bits(got, written)


def random_batch(kind: str, **options: Any) -> Batch:
    draw = random.Random(SEED)
    if kind == "verify":  # 16 requests of 1 + 4 rows
        spans = [5] * 16
        drafts = [4] * 16
    elif kind == "ragged":
        drafts = [draw.randrange(0, 6) for _ in range(24)]
        spans = [d + draw.randrange(0, 2) for d in drafts]
    elif kind == "long":
        drafts, spans = [48, 48, 0], [49, 49, 0]
    elif kind == "single":
        drafts, spans = [4], [5]
    else:  # prefill chunks among spans and decodes
        spans = [700, 1, 5, 0, 130]
        drafts = [0, 0, 4, 0, 3]
    lengths = [s + draw.choice([0, 3, 500, 1900]) for s in spans]
    settings = {"heads": 32, "kv_heads": HEADS, "size": SIZE, "padding": 11} | options
    return make_batch(lengths, spans, drafts, device="cuda", seed=SEED, **settings)


@pytest.mark.parametrize("kind", ["verify", "ragged", "long", "single", "mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_of_every_kind_of_batch(kind: str, dtype: torch.dtype) -> None:
    check_attention(random_batch(kind, dtype=dtype), SIZE**-0.5)


@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("name", ["auto", "fp8_e4m3", "fp8_e5m2"])
def test_attention_in_every_layout(form: str, name: str, rng: torch.Generator) -> None:
    scales: tuple[Tensor | None, Tensor | None] = (None, None)
    if name != "auto":
        drawn = torch.rand(2, HEADS, generator=rng, device="cuda") + 0.1
        scales = (drawn[0], drawn[1])
    batch = random_batch(
        "ragged", layout=form, kv_cache_dtype=name, scales=scales, dtype=torch.float16
    )
    check_attention(batch, SIZE**-0.5, 0, 0.0, name, *scales)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "window", "softcap"),
    [
        (24, 8, 128, 0, 0.0),
        (16, 16, 64, 0, 30.0),
        (8, 1, 80, 100, 0.0),
        (32, 4, 256, 1024, 50.0),
    ],
)
@pytest.mark.parametrize("kind", ["ragged", "mixed"])
def test_attention_of_other_models(
    heads: int, kv_heads: int, size: int, window: int, softcap: float, kind: str
) -> None:
    batch = random_batch(kind, heads=heads, kv_heads=kv_heads, size=size, dtype=torch.bfloat16)
    check_attention(batch, size**-0.5, window, softcap)


def test_every_op_over_a_big_cache_of_more_than_2_31_elements(rng: torch.Generator) -> None:
    blocks = 2**31 // (BLOCK_SIZE * HEADS * SIZE) + 600
    shape = (blocks, BLOCK_SIZE, HEADS, SIZE)
    key_cache = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    value_cache = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    small = random_batch("verify", dtype=torch.bfloat16)
    first = blocks - small.key_cache.shape[0]  # all of it past element 2^31
    key_cache[first:], value_cache[first:] = small.key_cache, small.value_cache
    big = small._replace(
        key_cache=key_cache, value_cache=value_cache, block_table=small.block_table + first
    )
    got = ops.verify_attention(*big.verify_args(), 0.1)
    assert same_bits(got, ops.verify_attention(*small.verify_args(), 0.1))

    rows = torch.randn(3, HEADS, SIZE, generator=rng, device="cuda").to(torch.bfloat16)
    slots = blocks * BLOCK_SIZE - torch.tensor([1, 5, 18], device="cuda")
    ops.reshape_and_cache(rows, -rows, key_cache, value_cache, slots)
    flat = key_cache.view(-1, HEADS, SIZE), value_cache.view(-1, HEADS, SIZE)
    assert same_bits(flat[0][slots], rows)
    ops.commit_kv(
        [key_cache], [value_cache], [-rows], [rows], slots - 1,
        torch.ones(3, dtype=torch.bool, device="cuda"),
        torch.zeros(1, dtype=torch.int32, device="cuda"),
        torch.tensor([3], device="cuda"), torch.tensor([3], device="cuda"),
    )  # fmt: skip
    assert same_bits(flat[0][slots - 1], -rows)
    assert same_bits(flat[1][slots - 1], rows)
    assert not key_cache[:500].any()


# ---- CUDA graphs ----------------------------------------------------------------------------

REQUESTS, DRAFTS, LAYERS, COLUMNS = 8, 4, 2, 20
TOKENS = REQUESTS * (1 + DRAFTS)


class Step(NamedTuple):
    """The inputs of one window, at fixed addresses; everything that changes between replays."""

    key: Tensor
    value: Tensor
    query: Tensor
    slots: Tensor
    row_map: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    num_drafts: Tensor
    tail_start: Tensor
    draft_slots: Tensor
    draft_ids: Tensor
    cu_num_drafts: Tensor
    sampled_ids: Tensor


def random_step(draw: random.Random, rng: torch.Generator) -> Step:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device="cuda").to(torch.bfloat16)

    def ints(values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    table = [draw.sample(range(r * COLUMNS, (r + 1) * COLUMNS), COLUMNS) for r in range(REQUESTS)]
    lengths, starts, drafts, tails = [], [0], [], []
    slots, row_map, draft_slots = [-1] * TOKENS, [-1] * TOKENS, [-1] * (REQUESTS * DRAFTS)
    token = row = 0
    for r in range(REQUESTS):
        n = draw.randrange(DRAFTS + 1)
        length = 1 + n + draw.randrange(COLUMNS * BLOCK_SIZE - DRAFTS - 1)
        tails.append(row)
        for j in range(1 + n):
            position = length - 1 - n + j
            slot = table[r][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            slots[token] = slot
            if j:
                row_map[token], draft_slots[row] = row, slot
                row += 1
            token += 1
        lengths.append(length)
        starts.append(token)
        drafts.append(n)
    cumulative = [sum(drafts[: r + 1]) for r in range(REQUESTS)]
    ids = [[draw.randrange(2) for _ in range(DRAFTS + 1)] for _ in range(REQUESTS)]
    sampled = [[-1 if j > draw.randrange(9) else t for j, t in enumerate(i)] for i in ids]
    return Step(
        randn(LAYERS, TOKENS, HEADS, SIZE), randn(LAYERS, TOKENS, HEADS, SIZE),
        randn(LAYERS, TOKENS, 32, SIZE), ints(slots), ints(row_map), ints(table), ints(lengths),
        ints(starts), ints(drafts), ints(tails), ints(draft_slots),
        ints([draw.randrange(2) for _ in range(REQUESTS * DRAFTS)]), ints(cumulative),
        ints(sampled),
    )  # fmt: skip


class Pool:
    """Caches, staging and counters of a small model, and one window over them."""

    def __init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(SEED)
        shape = (LAYERS, REQUESTS * COLUMNS, BLOCK_SIZE, HEADS, SIZE)
        self.keys = torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)
        self.values = -self.keys
        rows = (LAYERS, REQUESTS * DRAFTS, HEADS, SIZE)
        self.staged_key, self.staged_value = (
            torch.zeros(rows, dtype=torch.bfloat16, device="cuda") for _ in range(2)
        )
        self.state = torch.zeros(LAYERS, 2, dtype=torch.int32, device="cuda")
        self.counters = torch.zeros(ops.counter_size(DRAFTS), dtype=torch.int64, device="cuda")
        self.lists = ([*self.keys], [*self.values], [*self.staged_key], [*self.staged_value])
        self.table = ops.cache_table(*self.lists)

    def window(self, s: Step) -> tuple[Tensor, ...]:
        outs = []
        for i in range(LAYERS):
            caches = self.keys[i], self.values[i]
            staged = self.staged_key[i], self.staged_value[i]
            ops.stage_kv(s.key[i], s.value[i], *caches, *staged, self.state[i], s.slots, s.row_map)
            outs.append(
                ops.verify_attention(
                    s.query[i], *caches, *staged, s.block_table, s.seq_lens, s.query_start_loc,
                    s.num_drafts, s.tail_start, SIZE**-0.5,
                )
            )  # fmt: skip
        mask, accepted, mismatch = ops.accept_mask(s.sampled_ids, s.draft_ids, s.cu_num_drafts)
        error = self.state[:, 1].amax().view(1)
        ops.commit_kv(
            *self.lists, s.draft_slots, mask, error, s.num_drafts, accepted, self.counters,
            self.table, LAYERS,
        )  # fmt: skip
        return (*outs, mask, accepted, mismatch)

    def contents(self) -> tuple[Tensor, ...]:
        staged = self.staged_key, self.staged_value
        return self.keys, self.values, *staged, self.state, self.counters


def test_a_replayed_window_equals_eager_with_changed_inputs(rng: torch.Generator) -> None:
    draw = random.Random(SEED)
    eager, replayed = Pool(), Pool()
    fixed = random_step(draw, rng)
    # Compile outside of the capture, on a pool of its own.
    Pool().window(fixed)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = replayed.window(fixed)
    for _ in range(6):
        step = random_step(draw, rng)
        for there, new in zip(fixed, step, strict=True):
            there.copy_(new)
        graph.replay()
        assert_same_bits(eager.window(step), outputs)
        assert_same_bits(eager.contents(), replayed.contents())
    counters = eager.counters.tolist()
    assert counters[ops.COUNTERS["staged"]] == int(eager.state[0, 0])
    assert counters[ops.COUNTERS["committed"]] > 0
