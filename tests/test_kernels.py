"""The Triton kernels in Triton's interpreter, against the references and against float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

triton = pytest.importorskip("triton")

from nwor_compile import ops  # noqa: E402
from nwor_compile.ops import layout  # noqa: E402
from nwor_compile.ops.kernels import attention as attention_kernels  # noqa: E402
from nwor_compile.ops.kernels.testing import (  # noqa: E402
    LAYOUTS,
    Batch,
    empty_cache,
    exact_attention,
    largest_error,
    make_batch,
    same_bits,
)

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="needs Triton's interpreter; GPUs have tests/gpu"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FP8 = ("fp8_e4m3", "fp8_e5m2")


def both(run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` returns with the reference and with the kernel."""
    with ops.implementation("reference"):
        expected = run()
    with ops.implementation("triton"):
        return expected, run()


def assert_same_bits(expected: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    for i, (left, right) in enumerate(zip(expected, got, strict=True)):
        assert left.shape == right.shape
        assert same_bits(left, right) if left.is_floating_point() else torch.equal(left, right), i


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scale_of(kind: str, heads: int) -> Tensor | None:
    """`none`, `tensor` or `head`; not powers of two, so that a wrong division shows."""
    return {
        "none": None,
        "tensor": torch.tensor([0.37]),
        "head": 0.1 + torch.arange(heads, dtype=torch.float32) / 7,
    }[kind]


# ---- fp8 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FP8)
def test_fp8_rounds_as_torch_does_for_every_float16(name: str) -> None:
    every = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.float16)
    rows = every.view(64, 4, 256)
    assert_encoded_alike(rows, name)


@pytest.mark.parametrize("name", FP8)
def test_fp8_rounds_as_torch_does_for_random_and_denormal_float32(name: str) -> None:
    rng = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (1 << 15,), generator=rng).to(torch.int32)
    # Around the smallest fp8 values, and exact ties, where carries and evenness matter.
    small = torch.randn(1 << 14, generator=rng) * 2.0**-9
    ties = (torch.arange(1 << 14) - (1 << 13)).float() * 2.0**-17 * 3
    rows = torch.cat([any_bits.view(torch.float32), small, ties]).view(64, 4, 256)
    assert_encoded_alike(rows, name)


def assert_encoded_alike(rows: Tensor, name: str) -> None:
    tokens, heads, size = rows.shape
    cache = empty_cache("NHD", tokens, 1, heads, size, layout.FP8_DTYPES[name])
    with ops.implementation("triton"):
        ops.reshape_and_cache(rows, rows, *cache, torch.arange(tokens), name)
    assert same_bits(cache[0].view(rows.shape), layout.encode(rows, name, None))


@pytest.mark.parametrize("name", FP8)
def test_attention_decodes_every_finite_fp8_code(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(layout.FP8_DTYPES[name])
    finite = codes[codes.float().isfinite()]
    values = finite[: finite.numel() // 8 * 8].view(-1, 1, 1, 8)
    key = torch.zeros(values.shape, dtype=values.dtype)
    rows = values.shape[0]
    # One request a row: a softmax over one position returns that row of V.
    with ops.implementation("triton"):
        out = ops.paged_attention(
            torch.zeros(rows, 1, 8), key, values, torch.arange(rows).view(-1, 1),
            torch.ones(rows, dtype=torch.int32), torch.arange(rows + 1), 1.0, 0, 0.0, name,
        )  # fmt: skip
    assert torch.equal(out, values.float().view(out.shape))


# ---- writes ---------------------------------------------------------------------------------

FORMATS = [
    *[(dtype, "auto", "none") for dtype in DTYPES],
    (torch.bfloat16, "fp8_e4m3", "tensor"),
    (torch.float16, "fp8_e4m3", "head"),
    (torch.float32, "fp8_e5m2", "none"),
    (torch.bfloat16, "fp8_e5m2", "head"),
]


# Slots and row map of 13 tokens: drafts out of order, the seventh too far; mirrored rows from the
# ninth on, to rows 5, 7 (too far), 6 (without a slot) and 2^31 - 3.
MIXED_ROWS = (
    torch.tensor([3, 4, 5, 6, -1, 12, 13, 14, 7, 8, -1, 9, 2**31 - 1], dtype=torch.int32),
    torch.tensor([-1, 4, 0, -1, -1, 2, 7, 1, -7, -9, -8, -(2**31) + 1, -1, 3, 3]),
)


def qkv_views(tokens: int, heads: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V as a fused projection leaves them: strided views of one tensor."""
    fused = randn(tokens, 3 * heads * size, dtype=dtype)
    _, key, value = fused.view(tokens, 3, heads, size).unbind(1)
    return key, value


@pytest.mark.parametrize(("dtype", "name", "scale"), FORMATS)
@pytest.mark.parametrize("form", LAYOUTS)
def test_reshape_and_cache_equals_the_reference(
    form: str, dtype: torch.dtype, name: str, scale: str
) -> None:
    heads, size, blocks, block_size = 3, 40, 5, 4
    key, value = qkv_views(9, heads, size, dtype)
    slots = torch.tensor([19, 0, -1, 7, 20, 2**40, 6, 8])  # the ninth row is padding

    def run() -> tuple[Tensor, Tensor]:
        cache = empty_cache(form, blocks, block_size, heads, size, layout.cache_dtype(name, dtype))
        scales = scale_of(scale, heads), scale_of(scale, heads)
        ops.reshape_and_cache(key, value, *cache, slots, name, *scales)
        return cache

    assert_same_bits(*both(run))


@pytest.mark.parametrize(("dtype", "name", "scale"), FORMATS)
@pytest.mark.parametrize("form", LAYOUTS)
def test_stage_kv_equals_the_reference(
    form: str, dtype: torch.dtype, name: str, scale: str
) -> None:
    heads, size, blocks, block_size = 3, 24, 5, 4
    key, value = qkv_views(14, heads, size, dtype)
    stored = layout.cache_dtype(name, dtype)

    def run() -> tuple[Tensor, ...]:
        cache = empty_cache(form, blocks, block_size, heads, size, stored)
        staged_key, staged_value = (r[0] for r in empty_cache("NHD", 1, 7, heads, size, stored))
        state = torch.tensor([10, 0], dtype=torch.int32)
        ops.stage_kv(
            key, value, *cache, staged_key, staged_value, state, *MIXED_ROWS, name,
            scale_of(scale, heads), scale_of(scale, heads),
        )  # fmt: skip
        return (*cache, staged_key, staged_value, state)

    expected, got = both(run)
    assert_same_bits(expected, got)
    assert got[-1].tolist() == [14, 1]  # a draft row counts once, whatever its heads


@pytest.mark.parametrize(("dtype", "name", "scale"), FORMATS)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_stage_kv_into_blocks_of_the_cache_itself(
    packed: bool, heads: int, dtype: torch.dtype, name: str, scale: str
) -> None:
    """Staging rows are the last blocks of an NHD cache, which no slot is in."""
    size, blocks, block_size = 24, 5, 4
    key, value = qkv_views(14, heads, size, dtype)
    stored = layout.cache_dtype(name, dtype)

    def run() -> tuple[Tensor, Tensor]:
        if packed:
            whole, _ = empty_cache("NHD", blocks + 2, block_size, heads, 2 * size, stored)
            cache = whole[..., :size], whole[..., size:]
        else:
            cache = empty_cache("NHD", blocks + 2, block_size, heads, size, stored)
        staged = [
            rows.as_strided((7, heads, size), rows.stride()[1:], rows[blocks].storage_offset())
            for rows in cache
        ]
        state = torch.tensor([10, 0], dtype=torch.int32)
        ops.stage_kv(
            key, value, cache[0][:blocks], cache[1][:blocks], staged[0], staged[1], state,
            *MIXED_ROWS, name, scale_of(scale, heads), scale_of(scale, heads),
        )  # fmt: skip
        assert state.tolist() == [14, 1]
        return cache

    expected, got = both(run)
    assert_same_bits(expected, got)
    assert same_bits(got[0][1, 3], got[0][blocks + 1, 1])  # slot 7, mirrored to row 5


def test_fp8_kept_as_uint8_is_written_alike() -> None:
    key, value = qkv_views(4, 2, 16, torch.bfloat16)

    def run() -> tuple[Tensor, Tensor]:
        cache = empty_cache("HND", 2, 4, 2, 16, torch.uint8)
        ops.reshape_and_cache(key, value, *cache, torch.tensor([1, 0, 7, 5]), "fp8")
        return cache

    assert_same_bits(*both(run))


@pytest.mark.parametrize("tokens", [0, 1])
def test_writes_of_no_row_and_of_one(tokens: int) -> None:
    key, value = qkv_views(tokens, 1, 8, torch.float32)
    index = torch.zeros(tokens, dtype=torch.int64)

    def run() -> tuple[Tensor, ...]:
        cache = empty_cache("NHD", 1, 1, 1, 8, torch.float32)
        staged = torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)
        state = torch.zeros(2, dtype=torch.int32)
        ops.reshape_and_cache(key, value, *cache, index)
        ops.stage_kv(key, value, *cache, *staged, state, index, index)
        return (*cache, *staged, state)

    assert_same_bits(*both(run))


def test_an_error_of_stage_kv_is_sticky() -> None:
    key, value = qkv_views(1, 1, 8, torch.float32)
    cache = empty_cache("NHD", 1, 1, 1, 8, torch.float32)
    staged, state = torch.zeros(1, 1, 8), torch.tensor([0, 1], dtype=torch.int32)
    index = torch.zeros(1, dtype=torch.int64)
    with ops.implementation("triton"):
        ops.stage_kv(key, value, *cache, staged, staged.clone(), state, index, index)
    assert state.tolist() == [1, 1]


# ---- acceptance -----------------------------------------------------------------------------


@st.composite
def samplers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    requests, columns = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    drafts = draw(st.lists(st.integers(0, 7), min_size=requests, max_size=requests))
    rows = sum(drafts) + draw(st.integers(0, 3))
    token = st.integers(-1, 2)
    row = st.lists(token, min_size=columns, max_size=columns)
    ids = [draw(row) for _ in range(requests)]
    draft_ids = draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows))
    counts = st.lists(st.integers(-1, 8), min_size=requests, max_size=requests)
    count = draw(st.none() | counts)
    kind = draw(st.sampled_from([torch.int32, torch.int64]))
    return (
        torch.tensor(ids, dtype=kind).view(requests, columns),
        torch.tensor(draft_ids, dtype=torch.int32),
        torch.tensor(drafts, dtype=torch.int64).cumsum(0).to(kind),
        None if count is None else torch.tensor(count, dtype=kind),
    )


@given(samplers())
def test_accept_mask_equals_the_reference(
    sampler: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    assert_same_bits(*both(lambda: ops.accept_mask(*sampler)))


@pytest.mark.parametrize("with_count", [False, True])
def test_accept_mask_of_more_requests_and_drafts_than_one_pass(with_count: bool) -> None:
    rng = torch.Generator().manual_seed(1)
    drafts = torch.randint(0, 50, (300,), generator=rng)
    ends = drafts.cumsum(0)
    draft_ids = torch.randint(0, 9, (int(ends[-1]) + 5000,), generator=rng)
    ids = torch.full((300, 2 * 50), -1)[:, ::2]  # strided
    count = torch.randint(0, 51, (300,), generator=rng)
    for r in range(300):
        n = min(int(count[r]), int(drafts[r]))
        ids[r, :n] = draft_ids[ends[r] - drafts[r] :][:n]
        ids[r, n : int(count[r])] = 3
    counts = count if with_count else None
    assert_same_bits(*both(lambda: ops.accept_mask(ids, draft_ids, ends, counts)))


# ---- commit ---------------------------------------------------------------------------------


def commit_inputs(
    form: str, rows: int, dtype: torch.dtype, layers: int = 3, heads: int = 3, size: int = 24
) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor, Tensor, Tensor]:
    """Caches of every layer, staged K and V, slots (some outside), a mask."""
    rng = torch.Generator().manual_seed(rows)
    caches = [empty_cache(form, rows + 4, 3, heads, size, dtype) for _ in range(layers)]
    wide = torch.float32 if dtype.itemsize == 1 else dtype
    key, value = (
        torch.randn(layers, rows + 2, heads, size, generator=rng).to(wide).to(dtype)
        for _ in range(2)
    )
    slots = torch.randperm(3 * (rows + 4) + 5, generator=rng)[: rows + 1] - 3
    mask = torch.rand(rows, generator=rng) < 0.6
    return caches, key, value, slots, mask


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("form", LAYOUTS)
@pytest.mark.parametrize("error", [0, 1])
def test_commit_kv_equals_the_reference(form: str, dtype: torch.dtype, error: int) -> None:
    drafts, accepted = torch.tensor([4, 0, 2, 9]), torch.tensor([3, 0, 0, 6])

    def run() -> tuple[Tensor, ...]:
        caches, key, value, slots, mask = commit_inputs(form, 7, dtype)
        keys, values = [k for k, _ in caches], [v for _, v in caches]
        counters = torch.arange(ops.counter_size(5))
        flag = torch.tensor([error], dtype=torch.int32)
        staged = list(key), list(value)
        ops.commit_kv(
            keys, values, *staged, slots, mask, flag, drafts, accepted, counters,
            ops.cache_table(keys, values, *staged), 7,
        )  # fmt: skip
        return (*keys, *values, counters)

    assert_same_bits(*both(run))


@pytest.mark.parametrize("rows", [0, 1, 131])
@pytest.mark.parametrize("requests", [0, 300])
@pytest.mark.parametrize("counted", [False, True])
def test_commit_kv_of_any_number_of_rows_and_requests(
    rows: int, requests: int, counted: bool
) -> None:
    drafts = torch.arange(requests, dtype=torch.int32) % 21
    accepted = drafts // 2

    def run() -> tuple[Tensor, ...]:
        caches, key, value, slots, mask = commit_inputs("NHD", rows, torch.float16, 1, 1, 8)
        counters = torch.zeros(ops.counter_size(18), dtype=torch.int64) if counted else None
        flag = torch.zeros(1, dtype=torch.int32)
        ops.commit_kv(
            [caches[0][0]], [caches[0][1]], [*key], [*value], slots, mask, flag, drafts, accepted,
            counters, None, 1,
        )  # fmt: skip
        return (*caches[0], *([] if counters is None else [counters]))

    assert_same_bits(*both(run))


def test_commit_kv_moves_nothing_into_unaligned_neighbours() -> None:
    """Caches at odd addresses: no vector store may spill over."""

    def run() -> tuple[Tensor, ...]:
        store = torch.zeros(2, 1 + 4 * 2 * 8, dtype=torch.float16)
        key, value = (row[1:].view(4, 1, 2, 8) for row in store)
        staged = randn(1, 4, 2, 8, dtype=torch.float16)
        ops.commit_kv(
            [key], [value], [*staged], [*-staged], torch.tensor([2, 0, 1, 3]),
            torch.tensor([True, False, True, True]), torch.zeros(1, dtype=torch.int32),
            torch.tensor([4]), torch.tensor([3]),
        )  # fmt: skip
        return (store,)

    assert_same_bits(*both(run))


# ---- attention ------------------------------------------------------------------------------

# Lengths, spans and drafts of a batch's requests; a span of 49 is a certain row and 48 drafts.
VERIFY = ((40, 7, 0, 33, 18), (4, 2, 0, 1, 5), (3, 1, 0, 0, 4))
LONG_SPANS = ((60, 49), (49, 49), (48, 48))
MIXED = ((30, 1, 17, 21), (30, 1, 5, 1), (0, 0, 4, 0))  # a prefill, a first token, a span, a decode
SHAPES = {"verify": VERIFY, "long": LONG_SPANS, "mixed": MIXED}

# The interpreter computes in float32 (see `attention.UPCAST`), so what separates kernel and float64
# is what separates the reference and float64: float32 sums in some order, then one rounding to the
# query's dtype. The order differs (tiles), so the largest error may, by a small factor: 2 where
# rounding the output dominates (16 bits), 8 for float32. The floor is 4 ulp of values near 1.
ERROR_FACTOR = {torch.float32: 8.0, torch.float16: 2.0, torch.bfloat16: 2.0}
ERROR_FLOOR = 4 * torch.finfo(torch.float32).eps


def check_attention(batch: Batch, *options: Any) -> None:
    """The kernel is as exact as the reference, and does not know where the tail came from."""
    exact = exact_attention(batch, *options)
    expected, got = both(lambda: ops.verify_attention(*batch.verify_args(), *options))
    factor = ERROR_FACTOR[batch.query.dtype]
    limit = factor * largest_error(expected, exact) + ERROR_FLOOR
    assert largest_error(got, exact) <= limit
    used = int(batch.query_start_loc[-1])
    assert got[used:].eq(0).all()
    assert got.is_contiguous()
    with ops.implementation("triton"):
        written = ops.paged_attention(*batch.paged_args(), *options)
    assert same_bits(got, written)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", LAYOUTS)
def test_attention_in_every_layout(form: str, dtype: torch.dtype) -> None:
    batch = make_batch(*VERIFY, layout=form, dtype=dtype, block_size=5, size=24)
    check_attention(batch, 24**-0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_every_kind_of_batch(shape: str, dtype: torch.dtype) -> None:
    check_attention(make_batch(*SHAPES[shape], dtype=dtype, block_size=5, size=24), 24**-0.5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (8, 1), (20, 1)])
@pytest.mark.parametrize("shape", ["verify", "mixed"])
def test_attention_of_every_group_size(shape: str, heads: int, kv_heads: int) -> None:
    batch = make_batch(*SHAPES[shape], heads=heads, kv_heads=kv_heads, size=16)
    check_attention(batch, 0.25)


@pytest.mark.parametrize("size", [8, 80, 128, 256])
def test_attention_of_every_head_size(size: int) -> None:
    check_attention(make_batch(*VERIFY, size=size, index_dtype=torch.int64), size**-0.5)


@pytest.mark.parametrize("window", [1, 7, 40])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_with_window_and_softcap(shape: str, window: int, softcap: float) -> None:
    check_attention(make_batch(*SHAPES[shape], size=16), 0.5, window, softcap)


def test_attention_with_softcap_alone() -> None:
    check_attention(make_batch(*VERIFY, size=16), 0.5, 0, 5.0)


@pytest.mark.parametrize("name", FP8)
@pytest.mark.parametrize("scale", ["none", "tensor", "head"])
@pytest.mark.parametrize("form", LAYOUTS)
def test_attention_over_fp8(form: str, scale: str, name: str) -> None:
    scales = scale_of(scale, 2), scale_of(scale, 2)
    batch = make_batch(
        *VERIFY, size=16, layout=form, kv_cache_dtype=name, scales=scales, dtype=torch.bfloat16
    )
    check_attention(batch, 0.25, 0, 0.0, name, *scales)


@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize("window", [0, 30])
def test_attention_is_the_same_however_it_is_split(
    processors: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "_processors", lambda index: processors)
    check_attention(make_batch((130, 3, 0, 70), (5, 2, 0, 1), (4, 1, 0, 0), size=16), 0.25, window)


@pytest.mark.parametrize("requests", [0, 1, 17])
def test_attention_of_any_number_of_requests(requests: int) -> None:
    spans = [r % 3 for r in range(requests)]
    lengths = [r % 9 + s for r, s in enumerate(spans)]
    batch = make_batch(lengths, spans, [max(0, s - 1) for s in spans], size=8, padding=3)
    check_attention(batch, 0.3)


def test_attention_of_no_token() -> None:
    batch = make_batch((4, 9), (0, 0), (0, 0), padding=0)
    assert both(lambda: ops.verify_attention(*batch.verify_args(), 1.0))[1].shape == (0, 4, 32)


def test_attention_of_a_strided_query_and_wide_routing_buffers() -> None:
    batch = make_batch(*VERIFY)
    fused = torch.cat([batch.query, batch.query, batch.query], dim=1)
    past_the_last = torch.full((9,), 77)
    strided = batch._replace(
        query=fused[:, 4:8],
        num_drafts=torch.cat([batch.num_drafts, past_the_last]),
        tail_start=torch.cat([batch.tail_start, past_the_last]),
    )
    check_attention(strided, 0.2)


def test_attention_of_tokens_before_the_first_position_is_zero() -> None:
    """A length below the span: padding requests of a replayed graph look like this."""
    batch = make_batch((6,), (4,), (0,), padding=0)
    short = batch._replace(seq_lens=torch.tensor([2], dtype=torch.int32))
    expected, got = both(lambda: ops.verify_attention(*short.verify_args(), 0.2))
    assert got[:2].eq(0).all()
    torch.testing.assert_close(got, expected)


# ---- registration ---------------------------------------------------------------------------


def test_opcheck_with_the_kernels() -> None:
    batch = make_batch((9, 5), (3, 1), (2, 0), size=8, heads=2, kv_heads=1)
    caches = batch.key_cache, batch.value_cache
    staged = batch.staged_key, batch.staged_value
    key, value = qkv_views(4, 1, 8, torch.float32)
    slots, row_map = torch.tensor([3, 4, -1, 6]), torch.tensor([-1, 0, 1, -1])
    state = torch.zeros(2, dtype=torch.int32)
    error, counters = torch.zeros(1, dtype=torch.int32), torch.zeros(14, dtype=torch.int64)
    drafts, accepted = batch.num_drafts, torch.tensor([1, 0])
    mask = torch.tensor([True, False])
    calls: dict[str, tuple[Any, ...]] = {
        "reshape_and_cache": (key, value, *caches, slots),
        "stage_kv": (key, value, *caches, *staged, state, slots, row_map),
        "accept_mask": (torch.tensor([[1, 2]]), torch.tensor([1, 1]), torch.tensor([2])),
        "commit_kv": (
            [caches[0]], [caches[1]], [staged[0]], [staged[1]], slots, mask, error, drafts,
            accepted, counters,
        ),
        "paged_attention": (*batch.paged_args(), 0.3),
        "verify_attention": (*batch.verify_args(), 0.3),
    }  # fmt: skip
    with ops.implementation("triton"):
        for name, arguments in calls.items():
            torch.library.opcheck(getattr(torch.ops.nwor, name).default, arguments)
