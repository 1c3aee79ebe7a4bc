"""Staging in tail blocks: any attention kernel reads prefix and tail by the redirected table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Batch, Geometry, Span, make_batch, paged_arguments, same_bits, write_arguments
from torch import Tensor
from window_support import ALL, MIXED, NONE, SOME, Rig, rig

from nwor_compile import Window, WindowInputError, WindowOrderError
from nwor_compile.ops import (
    cache_table,
    paged_attention,
    reshape_and_cache,
    stage_kv_window,
    verify_attention_window,
)
from nwor_compile.ops.kernels.redirect import pass_table, redirect
from nwor_compile.ops.library import implementation
from nwor_compile.routing import TailRows
from nwor_compile.tail_blocks import (
    RedirectPlan,
    TailBlocks,
    blocks_per_request,
    pass_reference,
    redirect_reference,
    tail_blocks_needed,
)

# Kernels run where they can: compiled on a GPU, else in Triton's interpreter.
F32 = Geometry(head_size=16, device="cuda" if torch.cuda.is_available() else "cpu")
BF16 = replace(F32, model_dtype=torch.bfloat16)
GEOMETRIES = {
    "float32": F32,
    "packed bf16": replace(BF16, layout="packed"),
    "blocks of 16": replace(BF16, layout="packed", block_size=16),
    "fp8": replace(BF16, layout="packed", kv_cache_dtype="fp8_e4m3", scale="tensor"),
    "fp8 as bytes": replace(BF16, kv_cache_dtype="fp8_e5m2", as_uint8=True, scale="head"),
    "one head": replace(F32, kv_heads=1, heads=2),
}


@pytest.fixture(params=["reference", "triton"])
def ops(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on the references and on the kernels, in Triton's interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with implementation(request.param):
        yield request.param


def attend(r: Rig, table: Tensor) -> list[Tensor]:
    """Attention that knows nothing of staging, over every layer."""
    return [
        paged_attention(
            **paged_arguments(layer, replace(r.batch, geometry=layer.cache.geometry))
            | {"block_table": table}
        )
        for layer in r.layers
    ]


def direct(r: Rig) -> list[Tensor]:
    """The same attention over clones of the caches into which every row was written."""
    outputs = []
    for layer in r.layers:
        written = replace(layer, cache=layer.cache.clone())
        reshape_and_cache(**write_arguments(written, r.batch))
        batch = replace(r.batch, geometry=layer.cache.geometry)
        outputs.append(paged_attention(**paged_arguments(written, batch)))
    return outputs


def stage(r: Rig) -> None:
    for layer in r.layers:
        stage_kv_window(**write_arguments(layer, r.batch))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_stock_attention_by_the_redirected_table_is_that_of_direct_writes(
    name: str, ops: str
) -> None:
    with rig(geometries=(GEOMETRIES[name],), tail=True) as r:
        wanted, before = direct(r), r.rows()
        r.begin()
        stage(r)
        table = r.window.block_tables["kv"][: len(MIXED)]
        for have, want in zip(attend(r, table), wanted, strict=True):
            assert same_bits(have, want)
        # And the caches hold the certain rows alone.
        assert r.holds(r.expected(before, NONE))
        result = r.commit(SOME)
        assert result.error.item() == 0
        assert result.accepted.tolist() == SOME
        assert r.holds(r.expected(before, SOME))


@pytest.mark.parametrize("name", GEOMETRIES)
def test_verify_attention_reads_the_same_tail(name: str, ops: str) -> None:
    with rig(geometries=(GEOMETRIES[name],), tail=True) as r:
        wanted = direct(r)
        r.begin()
        stage(r)
        for layer, want in zip(r.layers, wanted, strict=True):
            batch = replace(r.batch, geometry=layer.cache.geometry)
            have = verify_attention_window(**paged_arguments(layer, batch))
            assert same_bits(have, want)
        r.window.abort()


@pytest.mark.parametrize("context", range(3, 9))
def test_drafts_that_begin_anywhere_in_a_block_and_cross_into_the_next(
    context: int, ops: str
) -> None:
    spans = (Span(context, 1, 5), Span(context, 3, 1), Span(0, 2, 4))
    with rig(spans, geometries=(F32,), max_requests=3, tail=True) as r:
        wanted, before = direct(r), r.rows()
        r.begin()
        stage(r)
        for have, want in zip(attend(r, r.window.block_tables["kv"]), wanted, strict=True):
            assert same_bits(have, want)
        r.commit([5, 0, 2])
        assert r.holds(r.expected(before, [5, 0, 2]))


def test_windows_follow_each_other(ops: str) -> None:
    with rig(geometries=(F32,), tail=True) as r:
        for seed in range(3):
            r.new_rows(seed)
            before = r.rows()
            wanted = direct(r)
            r.begin()
            stage(r)
            for have, want in zip(
                attend(r, r.window.block_tables["kv"][: len(MIXED)]), wanted, strict=True
            ):
                assert same_bits(have, want)
            r.commit(ALL if seed else SOME)
            assert r.holds(r.expected(before, ALL if seed else SOME))
        counted = r.window.metrics()
        assert counted.nwor_total_committed == sum(SOME) + 2 * sum(ALL)
        assert counted.nwor_total_staged == 3 * sum(ALL)
        assert counted.nwor_error_windows == 0


def test_a_step_without_a_window_reads_the_engines_table(ops: str) -> None:
    with rig(geometries=(F32,), tail=True) as r:
        r.begin()
        stage(r)
        r.commit(SOME)
        r.window.pass_through(r.batch.block_table)
        rows, columns = r.batch.block_table.shape
        assert torch.equal(r.window.block_tables["kv"][:rows, :columns], r.batch.block_table)
        stage(r)  # outside a window every row is certain
        for have, want in zip(
            attend(r, r.window.block_tables["kv"][:rows]), direct(r), strict=True
        ):
            assert same_bits(have, want)


def test_impossible_counts_redirect_nothing_and_write_no_draft(ops: str) -> None:
    with rig(geometries=(F32,), tail=True) as r:
        before = r.rows()
        counts = r.batch.num_drafts.clone()
        counts[0] = 6  # of a span of 4 tokens
        r.begin(num_drafts=counts)
        stage(r)
        rows, columns = r.batch.block_table.shape
        assert torch.equal(r.window.block_tables["kv"][:rows, :columns], r.batch.block_table)
        result = r.commit(NONE)
        assert result.error.item() != 0
        changed = r.rows()
        for slot in r.rejected_slots(NONE)[MIXED[0].drafts :]:
            assert all(
                same_bits(a, b) for a, b in zip(changed[0][slot], before[0][slot], strict=True)
            )
        r.assert_next_window_is_clean()


def test_ids_that_begin_was_given_need_no_second_telling(ops: str) -> None:
    with rig(geometries=(F32,), tail=True) as r:
        ids = torch.zeros_like(r.batch.slot_mapping)
        ids[r.batch.draft_tokens] = r.batch.draft_ids.long()
        r.begin(token_ids=ids)
        stage(r)
        sampling = r.sampling(SOME)
        result = r.window.commit(sampling.sampled_ids, None, sampling.num_sampled)
        assert result.error.item() == 0
        assert result.accepted.tolist() == SOME


def test_no_ids_at_all_are_a_fallback() -> None:
    with rig(geometries=(F32,), tail=True) as r:
        r.begin()
        stage(r)
        result = r.window.commit(r.sampling(SOME).sampled_ids)
        assert result.accepted.tolist() == NONE
        assert r.window.metrics().nwor_fallback_count == 1


@pytest.mark.parametrize("epoch", [4, 5])
@pytest.mark.parametrize("write_table", [True, False])
@pytest.mark.parametrize("layout", ["nhd", "packed"])
def test_redirect_kernel_does_what_the_specification_says(
    layout: str, write_table: bool, epoch: int
) -> None:
    spans = (*MIXED, Span(30, 1, 5), Span(20, 1, 5), Span(31, 1, 5), Span(32, 1, 5))
    geometry = replace(BF16, layout=layout, block_size=16)
    batch = make_batch(spans, geometry)
    tail = TailRows(16, 32)
    first = batch.blocks
    batch = replace(batch, blocks=first + 2 * len(spans))
    results: list[tuple[Tensor, ...]] = []
    records = some_records(batch, epoch)
    for run in (redirect_reference, redirect):
        r = Rig(spans, geometries=(geometry,), max_requests=len(spans), tail=True)
        caches = [layer.cache for layer in r.layers]
        keys, values = [c.key for c in caches], [c.value for c in caches]
        shape = (len(spans) + 2, batch.block_table.shape[1] + 3)
        table = torch.full(shape, 7, dtype=torch.int32, device=F32.device)
        own_records = records.clone()
        plan = RedirectPlan(
            keys, values, cache_table(keys, values, keys, values), batch.num_drafts, table,
            own_records, torch.tensor([epoch], device=F32.device), tail, first, write_table,
        )  # fmt: skip
        run(plan, batch.block_table, batch.seq_lens.long(), batch.query_start_loc)
        results.append((table, own_records, *(tensor for c in caches for tensor in c.stored)))
        r.window.close()
    for want, have in zip(*results, strict=True):
        assert same_bits(have, want)
    assert torch.equal(results[0][1], records) != write_table


def some_records(batch: Batch, epoch: int) -> Tensor:
    """Records for every way to miss: row 0 is as it was, and each further row of a verify span
    differs from its step in one field of what counts now."""
    rows = batch.seq_lens.shape[0]
    records = torch.full((rows + 2, 2, 4), 77, dtype=torch.int64)
    field = 0
    for r in range(rows):
        if int(batch.num_drafts[r]) == 0:
            continue
        length = int(batch.seq_lens[r])
        block = (length - int(batch.num_drafts[r])) // 16
        span = int(batch.query_start_loc[r + 1] - batch.query_start_loc[r])
        was = torch.tensor([epoch, int(batch.block_table[r, block]), block, length - span])
        if field > 0:
            was[field - 1] -= 1
        records[r, (epoch + 1) % 2] = was
        field = (field + 1) % 5
    return records.to(F32.device)


def test_blocks_of_a_request() -> None:
    assert blocks_per_request(1, 16) == 1
    assert blocks_per_request(2, 16) == 2  # from the last row of a block into the next
    assert blocks_per_request(17, 16) == 2
    assert blocks_per_request(18, 16) == 3
    assert blocks_per_request(3, 1) == 3
    assert tail_blocks_needed(5, 4, 16) == 10


BAD_CACHES: dict[str, tuple[Any, str]] = {
    "too few blocks": (torch.zeros(5, 4, 2, 8), "expected at least 16 blocks"),
    "HND memory": (torch.zeros(20, 2, 4, 8).permute(0, 2, 1, 3), "NHD"),
}


@pytest.mark.parametrize("name", BAD_CACHES)
def test_caches_that_cannot_have_tail_blocks(name: str) -> None:
    cache, text = BAD_CACHES[name]
    with pytest.raises(WindowInputError, match=text):
        Window(
            {"a": (cache, cache.clone() if cache.is_contiguous() else cache + 0)},
            max_requests=4, max_drafts=2, max_tokens=8,
            tail_blocks=TailBlocks(first={"kv": 8}, columns=4),
        )  # fmt: skip


def test_layers_of_different_block_sizes() -> None:
    def cache(size: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(20, size, 2, 8), torch.zeros(20, size, 2, 8)

    with pytest.raises(WindowInputError, match=r"one block size, got \[4, 8\]"):
        Window(
            {"a": cache(4), "b": cache(8)}, max_requests=1, max_drafts=2, max_tokens=8,
            tail_blocks=TailBlocks(first={"kv": 8}, columns=4),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"block_table": None}, "needs one for each of"),
        ({"block_table": torch.zeros(5, 2, dtype=torch.int32)}, r"int32 \[6 to 6, at most"),
        ({"seq_lens": None}, "needs the lengths"),
        ({"seq_lens": torch.zeros(5, dtype=torch.int32)}, r"needs the lengths \[6\]"),
        ({"token_ids": torch.zeros(3, dtype=torch.int32)}, "token_ids: expected .at least"),
        ({"block_table": torch.zeros(6, 99, dtype=torch.int32)}, "expected int32"),
        ({"block_table": torch.zeros(6, 2, dtype=torch.int64)}, "expected int32"),
        ({"seq_lens": torch.zeros(6)}, "expected int32 or int64"),
    ],
)
def test_begin_without_what_tail_blocks_need(changed: dict[str, Any], text: str) -> None:
    with rig(geometries=(F32,), tail=True) as r:
        arguments = {
            name: value if value is None else value.to(F32.device)
            for name, value in changed.items()
        }
        with pytest.raises(WindowInputError, match=text):
            r.begin(**arguments)
        r.assert_next_window_is_clean()


@pytest.mark.parametrize("shape", [(3, 5), (2, 1030), (0, 4), (3, 0)])
def test_pass_kernel_does_what_the_specification_says(shape: tuple[int, int]) -> None:
    wide = torch.randint(1, 99, (shape[0], 2 * shape[1]), dtype=torch.int32, device=F32.device)
    with rig(geometries=(F32,), tail=True) as r:
        assert r.window.redirection is not None
        ((_, own),) = r.window.redirection.plans
        results = []
        for run in (pass_reference, pass_table):
            redirected = torch.full((4, 1100), 7, dtype=torch.int32, device=F32.device)
            epoch = torch.tensor([5], device=F32.device)
            plan = replace(own, redirected=redirected, epoch=epoch)
            run(plan, wide[:, ::2])
            results.append((redirected.tolist(), epoch.tolist()))
    assert results[0] == results[1]
    assert results[0][1] == [6]


@pytest.mark.parametrize("table", [torch.zeros(7, 1, dtype=torch.int32), torch.zeros(1, 1)])
def test_pass_through_takes_tables_that_fit(table: Tensor) -> None:
    with rig(geometries=(F32,), tail=True) as r:
        before = r.window.block_tables["kv"].clone()
        with pytest.raises(WindowInputError, match="block_table"):
            r.window.pass_through(table.to(F32.device))
        assert torch.equal(r.window.block_tables["kv"], before)


def test_mode_off_redirects_nothing(ops: str) -> None:
    """Every row is certain then, and is in the engine's blocks alone."""
    with rig(geometries=(F32,), tail=True, mode="off") as r:
        wanted = direct(r)
        r.begin()
        stage(r)
        table = r.window.block_tables["kv"][: len(MIXED)]
        assert torch.equal(table[:, : r.batch.block_table.shape[1]], r.batch.block_table)
        for have, want in zip(attend(r, table), wanted, strict=True):
            assert same_bits(have, want)
        r.window.abort()


def test_pass_through_is_for_idle_windows_with_tail_blocks() -> None:
    with rig(geometries=(F32,)) as r, pytest.raises(WindowInputError, match="no tail blocks"):
        r.window.pass_through(r.batch.block_table)
    with rig(geometries=(F32,), tail=True) as r:
        r.begin()
        with pytest.raises(WindowOrderError):
            r.window.pass_through(r.batch.block_table)
        r.window.abort()
