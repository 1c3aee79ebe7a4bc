"""`paged_attention` and `verify_attention` against float64, and against each other bit for bit."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from cases import (
    FORMATS,
    LAYOUTS,
    Batch,
    Geometry,
    Layer,
    Span,
    attend_exactly,
    commit_exactly,
    make_batch,
    make_step,
    paged_arguments,
    same_bits,
    stage_exactly,
    verify_arguments,
)
from torch import Tensor

from nwor_compile import ops
from nwor_compile.ops import attention

MIXED = [Span(6, 1, 3), Span(0, 9), Span(0, 0), Span(13, 1), Span(7, 5), Span(3, 1, 6)]
WINDOWED: list[dict[str, Any]] = [
    {},
    {"sliding_window": 1},
    {"sliding_window": 5},
    {"softcap": 0.7},
    {"sliding_window": 3, "softcap": 30.0},
]


def prepared(
    spans: list[Span], geometry: Geometry | None = None, **options: Any
) -> tuple[Batch, Layer, oracle.Rows, oracle.Rows]:
    batch = make_batch(spans, geometry or Geometry(), **options)
    layer = make_step(batch).layers[0]
    rows, staging = stage_exactly(layer, batch)
    return batch, layer, rows, staging


def assert_close(got: Tensor, want: oracle.Attention) -> None:
    assert want.units(got) <= oracle.ERROR_UNITS


def not_in_use(batch: Batch, rows: oracle.Rows, with_drafts: bool) -> list[int]:
    """Slots that no token may see: free blocks, ends of blocks, and, staged, the draft slots."""
    used: set[int] = set()
    for r, span in enumerate(batch.spans):
        used |= set(batch.used_slots(r, 0, span.length - (0 if with_drafts else span.drafts)))
    return [slot for slot in rows if slot not in used]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mixed_batch_matches_float64(layout: str, form: tuple[torch.dtype, str, bool]) -> None:
    dtype, name, as_uint8 = form
    scale = "none" if name == "auto" else "head"
    geometry = Geometry(layout, dtype, name, as_uint8, scale)
    batch, layer, rows, staging = prepared(MIXED, geometry, padding=2)
    want = attend_exactly(layer, batch, rows, staging)
    got = ops.verify_attention(**verify_arguments(layer, batch))
    assert (got.dtype, got.is_contiguous()) == (dtype, True)
    assert_close(got, want)


@pytest.mark.parametrize("options", WINDOWED, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tail_from_staging_equals_tail_from_the_cache_bit_for_bit(
    layout: str, options: dict[str, Any]
) -> None:
    geometry = Geometry(layout, torch.bfloat16)
    batch, layer, _, staging = prepared(MIXED, geometry)
    staged = ops.verify_attention(**verify_arguments(layer, batch, **options))
    commit_exactly(layer, batch, staging)
    assert same_bits(staged, ops.paged_attention(**paged_arguments(layer, batch, **options)))


@pytest.mark.parametrize("options", WINDOWED, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (1, 4), (3, 3), (2, 6)], ids=str)
def test_windows_soft_caps_and_grouped_heads_match_float64(
    heads: tuple[int, int], options: dict[str, Any]
) -> None:
    geometry = Geometry(kv_heads=heads[0], heads=heads[1])
    batch, layer, rows, staging = prepared(MIXED, geometry)
    want = attend_exactly(layer, batch, rows, staging, **options)
    assert_close(ops.verify_attention(**verify_arguments(layer, batch, **options)), want)
    commit_exactly(layer, batch, staging)
    assert_close(ops.paged_attention(**paged_arguments(layer, batch, **options)), want)


@pytest.mark.parametrize("scale", ["none", "scalar", "tensor", "head"])
@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_rows_are_multiplied_by_their_scale(name: str, scale: str) -> None:
    geometry = Geometry(kv_cache_dtype=name, scale=scale, kv_heads=3, heads=6)
    batch, layer, rows, staging = prepared(MIXED, geometry)
    want = attend_exactly(layer, batch, rows, staging)
    assert_close(ops.verify_attention(**verify_arguments(layer, batch)), want)


@pytest.mark.parametrize("tokens", [1, 3, 32])
@pytest.mark.parametrize("layout", ["nhd", "5d"])
def test_the_reference_gathers_for_a_few_tokens_at_a_time(
    layout: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, layer, rows, staging = prepared([*MIXED, Span(0, 40)], Geometry(layout))
    want = attend_exactly(layer, batch, rows, staging)
    positions = batch.block_table.shape[1] * batch.geometry.block_size
    limit = tokens * positions * batch.geometry.kv_heads * batch.geometry.head_size
    sizes: list[tuple[int, int]] = []

    def gather(*args: Any) -> tuple[Tensor, Tensor]:
        key, value = real(*args)
        sizes.append((key.numel(), value.numel()))
        return key, value

    real = attention._gather
    monkeypatch.setattr(attention, "_gather", gather)
    monkeypatch.setattr(attention, "_CHUNK_ELEMENTS", limit + tokens)
    with ops.implementation("reference"):
        staged = ops.verify_attention(**verify_arguments(layer, batch))
        assert max(sizes) == (limit, limit)
        assert len(sizes) == -(-batch.slot_mapping.shape[0] // tokens)
        commit_exactly(layer, batch, staging)
        assert same_bits(staged, ops.paged_attention(**paged_arguments(layer, batch)))
        # A limit below one token's rows: one token at a time.
        monkeypatch.setattr(attention, "_CHUNK_ELEMENTS", 1)
        assert_close(ops.paged_attention(**paged_arguments(layer, batch)), want)
    assert sizes[-1][0] == positions * batch.geometry.kv_heads * batch.geometry.head_size
    assert_close(staged, want)


def test_a_span_of_49_rows() -> None:
    batch, layer, rows, staging = prepared([Span(20, 1, 48), Span(0, 1, 48), Span(4, 1)])
    want = attend_exactly(layer, batch, rows, staging)
    staged = ops.verify_attention(**verify_arguments(layer, batch))
    assert_close(staged, want)
    commit_exactly(layer, batch, staging)
    assert same_bits(staged, ops.paged_attention(**paged_arguments(layer, batch)))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_both_index_dtypes(index_dtype: torch.dtype) -> None:
    batch, layer, rows, staging = prepared(MIXED, index_dtype=index_dtype)
    want = attend_exactly(layer, batch, rows, staging)
    assert_close(ops.verify_attention(**verify_arguments(layer, batch)), want)


def test_reading_only_the_cache_gives_another_answer() -> None:
    """The mistake this project exists to avoid: 15.9 % acceptance fell to 0.6 % that way."""
    batch, layer, _, _ = prepared([Span(6, 1, 3)])
    naive = ops.paged_attention(**paged_arguments(layer, batch))
    right = ops.verify_attention(**verify_arguments(layer, batch))
    assert torch.equal(naive[0], right[0])  # the certain token sees no draft
    assert not (naive[1:] - right[1:]).abs().amax(dim=(1, 2)).lt(1e-3).any()


@pytest.mark.parametrize("options", WINDOWED, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_nan_in_rows_that_no_token_sees_changes_nothing(
    form: tuple[torch.dtype, str, bool], options: dict[str, Any]
) -> None:
    """Free blocks, ends of blocks, open draft slots, staging rows not in use."""
    batch, layer, rows, _ = prepared(MIXED, Geometry("nhd", *form))
    before = ops.verify_attention(**verify_arguments(layer, batch, **options))
    layer.cache.poison(not_in_use(batch, rows, with_drafts=False))
    after = ops.verify_attention(**verify_arguments(layer, batch, **options))
    assert before.isfinite().all()
    assert same_bits(before, after)


def test_nan_past_the_end_of_each_request_changes_nothing_for_the_cache_route() -> None:
    batch, layer, rows, staging = prepared(MIXED)
    commit_exactly(layer, batch, staging)
    before = ops.paged_attention(**paged_arguments(layer, batch))
    layer.cache.poison(not_in_use(batch, rows, with_drafts=True))
    assert same_bits(before, ops.paged_attention(**paged_arguments(layer, batch)))


def test_nan_left_of_the_sliding_window_changes_nothing() -> None:
    batch, layer, _, _ = prepared([Span(20, 1, 2), Span(11, 1)])
    before = ops.verify_attention(**verify_arguments(layer, batch, sliding_window=4))
    # The certain tokens are at 20 and 11 and see (16, 20] and (7, 11].
    layer.cache.poison(batch.used_slots(0, 0, 17) + batch.used_slots(1, 0, 8))
    after = ops.verify_attention(**verify_arguments(layer, batch, sliding_window=4))
    assert same_bits(before, after)
    layer.cache.poison(batch.used_slots(0, 17, 18))
    seen = ops.verify_attention(**verify_arguments(layer, batch, sliding_window=4))
    assert seen[0].isnan().all()
    assert same_bits(seen[1:], before[1:])


def test_nan_in_a_row_that_is_seen_is_not_hidden() -> None:
    """Poison that a token does read must show."""
    batch, layer, _, _ = prepared([Span(6, 1, 3), Span(5, 1)])
    layer.cache.poison(batch.used_slots(0, 2, 3))
    out = ops.verify_attention(**verify_arguments(layer, batch))
    assert out[:4].isnan().all()
    assert out[4:].isfinite().all()


@pytest.mark.parametrize("draft", range(3))
def test_a_draft_is_seen_by_itself_and_later_tokens_of_its_request_only(draft: int) -> None:
    batch, layer, _, _ = prepared([Span(5, 1, 2), Span(6, 1, 3), Span(4, 1, 2)])
    before = ops.verify_attention(**verify_arguments(layer, batch))
    layer.staged_key[2 + draft] = float("nan")
    after = ops.verify_attention(**verify_arguments(layer, batch))
    changed = after.isnan().all(dim=2).all(dim=1).tolist()
    assert changed == [False] * (4 + draft) + [True] * (3 - draft) + [False] * 3
    untouched = [t for t, c in enumerate(changed) if not c]
    assert same_bits(after[untouched], before[untouched])


def test_prefill_tokens_do_not_see_the_future_of_their_chunk() -> None:
    batch, layer, _, _ = prepared([Span(3, 6)])
    before = ops.paged_attention(**paged_arguments(layer, batch))
    layer.cache.poison(batch.used_slots(0, 7, 9))
    after = ops.paged_attention(**paged_arguments(layer, batch))
    assert same_bits(after[:4], before[:4])
    assert after[4:].isnan().all()


def test_the_tail_is_read_from_the_rows_that_tail_start_names() -> None:
    batch, layer, _, _ = prepared([Span(5, 1, 2), Span(6, 1, 3)])
    before = ops.verify_attention(**verify_arguments(layer, batch))
    order = torch.tensor([3, 4, 0, 1, 2, 5, 6])  # request 1 first, then request 0
    moved = verify_arguments(layer, batch) | {
        "staged_key": layer.staged_key[torch.argsort(order)].contiguous(),
        "staged_value": layer.staged_value[torch.argsort(order)].contiguous(),
        "tail_start": torch.tensor([3, 0], dtype=torch.int32),
    }
    assert same_bits(before, ops.verify_attention(**moved))


def test_persistent_buffers_may_be_longer_than_the_batch() -> None:
    batch, layer, _, _ = prepared([Span(5, 1, 2), Span(6, 1, 3)])
    before = ops.verify_attention(**verify_arguments(layer, batch))
    tail = torch.tensor([77, 10**6], dtype=torch.int32)
    longer = {
        name: torch.cat([getattr(batch, name), tail]) for name in ("num_drafts", "tail_start")
    }
    assert same_bits(before, ops.verify_attention(**verify_arguments(layer, batch) | longer))


def test_without_drafts_verify_is_paged_attention() -> None:
    batch, layer, rows, _ = prepared([Span(0, 40), Span(9, 1), Span(0, 0), Span(3, 7)])
    out = ops.verify_attention(**verify_arguments(layer, batch))
    assert same_bits(out, ops.paged_attention(**paged_arguments(layer, batch)))
    assert_close(out, attend_exactly(layer, batch, rows, None))


def test_padding_tokens_and_empty_requests_come_back_zero() -> None:
    batch, layer, _, _ = prepared([Span(0, 0), Span(4, 1, 2), Span(0, 0)], padding=4)
    layer.query[3:] = float("nan")
    out = ops.verify_attention(**verify_arguments(layer, batch))
    assert out[:3].isfinite().all()
    assert out[:3].abs().amax(dim=(1, 2)).gt(0).all()
    assert same_bits(out[3:], torch.zeros_like(out[3:]))


@pytest.mark.parametrize("spans", [[], [Span(0, 0)], [Span(0, 0), Span(0, 0)]], ids=str)
@pytest.mark.parametrize("padding", [0, 3])
def test_a_batch_without_tokens(spans: list[Span], padding: int) -> None:
    batch, layer, _, _ = prepared(spans, padding=padding)
    query = layer.query.transpose(0, 1).contiguous().transpose(0, 1)  # strided, as from a qkv
    out = ops.verify_attention(**verify_arguments(layer, batch) | {"query": query})
    assert out.is_contiguous()
    assert same_bits(out, torch.zeros_like(out))
    assert out.shape == layer.query.shape


def test_the_query_may_be_a_strided_slice_of_a_fused_qkv() -> None:
    batch, layer, _, _ = prepared(MIXED)
    qkv = torch.randn(layer.query.shape[0], 8, 8)
    query = qkv[:, :4]
    expected = ops.verify_attention(**verify_arguments(layer, batch) | {"query": query.clone()})
    out = ops.verify_attention(**verify_arguments(layer, batch) | {"query": query})
    assert out.is_contiguous()
    assert same_bits(out, expected)


def test_the_order_of_requests_does_not_matter() -> None:
    """Batches are not reliably decode-first."""
    batch, layer, _, _ = prepared([Span(0, 6), Span(8, 1, 2)])
    out = ops.verify_attention(**verify_arguments(layer, batch))
    swapped = ops.verify_attention(
        **verify_arguments(layer, batch)
        | {
            "query": layer.query[[6, 7, 8, 0, 1, 2, 3, 4, 5]],
            "block_table": batch.block_table.flip(0),
            "seq_lens": batch.seq_lens.flip(0),
            "query_start_loc": torch.tensor([0, 3, 9], dtype=torch.int32),
            "num_drafts": batch.num_drafts.flip(0),
            "tail_start": batch.tail_start.flip(0),
        }
    )
    assert torch.allclose(swapped[[3, 4, 5, 6, 7, 8, 0, 1, 2]], out, rtol=0, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    batch, layer, rows, staging = prepared([Span(6, 1, 3)])
    layer.query.mul_(1e4)
    want = attend_exactly(layer, batch, rows, staging)
    assert_close(ops.verify_attention(**verify_arguments(layer, batch)), want)


def test_the_arguments_are_left_alone() -> None:
    batch, layer, rows, _ = prepared(MIXED)
    arguments = verify_arguments(layer, batch)
    copies = {n: t.clone() for n, t in arguments.items() if isinstance(t, torch.Tensor)}
    ops.verify_attention(**arguments)
    assert layer.cache.holds(rows)
    assert all(same_bits(arguments[name], copy) for name, copy in copies.items())
