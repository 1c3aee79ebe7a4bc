"""The offload test without a GPU: reading stored blocks, comparing rows, and judging engines."""

from __future__ import annotations

from typing import Any

import offload
import pytest
import torch
from offload_audit import LIMIT, StoredBlock, _Found, differences, longest, page_rows
from row_audit import AuditedLayer, rows_of

BLOCKS, BLOCK, HEADS, SIZE = 5, 4, 2, 8


def layer(layout: str) -> AuditedLayer:
    order = (
        (BLOCKS, BLOCK, HEADS, 2 * SIZE) if layout == "NHD" else (BLOCKS, HEADS, BLOCK, 2 * SIZE)
    )
    cache = torch.randn(order, dtype=torch.float16)
    return AuditedLayer("a", 0, rows_of(cache.transpose(1, 2) if layout == "NHD" else cache), BLOCK)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("before", [0, 64])
def test_a_stored_block_is_read_as_the_cache_is_laid_out(layout: str, before: int) -> None:
    watched = layer(layout)
    size = BLOCK * HEADS * 2 * SIZE * 2
    raw = torch.empty(0, dtype=torch.int8).set_(watched.cache.untyped_storage()).view(BLOCKS, size)
    page = torch.cat([torch.zeros(before, dtype=torch.int8), raw[3]])
    assert torch.equal(page_rows(page, watched, before), watched.cache[3].float())


def test_a_row_of_another_token_is_far_and_rounding_is_near() -> None:
    rows = layer("NHD").cache[1].float()
    assert differences(rows, rows).max() == 0
    assert differences((rows * 1.001).half().float(), rows).max() < LIMIT / 10
    stale = rows.clone()
    stale[2, :, SIZE:] = rows[1, :, SIZE:]  # V alone
    found = differences(stale, rows)
    assert (found > LIMIT).nonzero().tolist() == [[2, 1]]
    stale[0, 0, 0] = float("nan")
    assert differences(stale, rows)[0, 0] == float("inf")


@pytest.mark.parametrize(("row", "last"), [(3, 1), (1, 0)])
def test_a_last_row_that_is_missing_is_told_apart(row: int, last: int) -> None:
    rows = layer("NHD").cache[1].float()
    stored = rows.clone()
    stored[row] = 0
    found = _Found()
    block = StoredBlock(0, 0, (1, 2, 3, 4), generated=4, finished=True)
    found.add(block, {"a": stored}, {"a": rows})
    said = found.result()
    assert (said["wrong_rows"], said["wrong_last"]) == (1, last)
    assert said["wrong"][0]["rows"] == [row]
    assert said["another"] > LIMIT


@pytest.mark.parametrize(("first", "behind"), [((1, 2, 3, 4), 2), ((1, 2, 3, 5), 0)])
def test_rows_behind_a_missing_last_one_are_told_apart(first: tuple[int, ...], behind: int) -> None:
    rows = layer("NHD").cache[1].float()
    without_last, two_wrong = rows.clone(), rows.clone()
    without_last[3] = two_wrong[:2] = 0
    found = _Found()
    later = StoredBlock(0, 1, (*first, 6, 7, 8, 9), generated=4, finished=False)
    found.add(later, {"a": two_wrong}, {"a": rows})
    last = StoredBlock(0, 0, (1, 2, 3, 4), generated=4, finished=True)
    found.add(last, {"a": without_last}, {"a": rows})
    said = found.result()
    assert (said["wrong_rows"], said["wrong_last"], said["wrong_behind"]) == (3, 1, behind)


def test_only_texts_that_are_no_beginning_of_another_are_prefilled_again() -> None:
    assert longest([(1, 2), (1, 2, 3, 4), (5, 6), (1, 2)]) == [(1, 2, 3, 4), (5, 6)]


def engine(kind: str, **stores: Any) -> dict[str, Any]:
    counts = {"wrong_rows": 0, "wrong_last": 0, "wrong_behind": 0, "wrong": [], "waiting": 0}
    counts |= {"compared_generated": 9, "loaded_blocks": 9, **stores}
    nwor = {} if kind in ("plain", "stock") else {"nwor_total_committed": 5}
    run = {"ids": [[1, 2]], "loaded_blocks": 1, "preemptions": 0, "nwor": nwor, "hits": [[0, 1]]}
    results: dict[str, Any] = {"fill": run, "again": run}
    if kind != "plain":
        results |= {"storm": run, "stores": counts}
    facts: dict[str, Any] = {
        "runner": "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
        "connector": None,
    }
    facts |= {"async_scheduling": True, "cache": {}}
    return {"facts": facts, "results": results, "seconds": 1.0}


def engines(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {kind: engine(kind) for kind in offload.CASES["eagle"].kinds}
    return {**found, "uncommitted": engine("uncommitted", wrong_rows=7), **changes}


def test_engines_that_agree_are_tested() -> None:
    found = offload.row("eagle", engines())
    assert (found["state"], found["problems"]) == ("tested", [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": engine("stage", wrong_rows=1)}, "stage: 1 wrong rows"),
        ({"stage": engine("stage", loaded_blocks=0)}, "stage: no loaded_blocks"),
        ({"stage": engine("stage", waiting=2)}, "2 jobs that never ended"),
        ({"stock": engine("stock", wrong_rows=2, wrong_last=1)}, "stock: 2 wrong rows"),
        (
            {"stock": engine("stock", wrong_rows=5, wrong_last=1, wrong_behind=3)},
            "stock: 5 wrong rows",
        ),
        ({"uncommitted": engine("uncommitted")}, "the audit missed the fault"),
        ({"stage": {"error": "no answer in 3 s\nlog", "seconds": 3}}, "stage: no answer in 3 s"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], said: str) -> None:
    found = offload.row("eagle", engines(**changes))
    assert found["state"] == "failed"
    assert any(said in problem for problem in found["problems"])


def test_other_tokens_are_a_problem_unless_stock_has_them_too() -> None:
    other = engine("plain")
    other["results"]["again"] = {**other["results"]["again"], "ids": [[1, 3]]}
    found = offload.row("eagle", engines(plain=other))
    assert found["state"] == "tested"
    assert "so does stock" in found["notes"][0]
    unlike = engine("stage")
    unlike["results"]["fill"] = {**unlike["results"]["fill"], "ids": [[4]]}
    assert offload.row("eagle", engines(stage=unlike))["state"] == "failed"


@pytest.mark.parametrize(("wrong", "state"), [(3, "tested"), (0, "failed")])
def test_stock_may_have_other_tokens_only_where_its_own_rows_are_wrong(
    wrong: int, state: str
) -> None:
    stock = engine("stock", wrong_rows=wrong, wrong_last=wrong)
    stock["results"]["again"] = {**stock["results"]["again"], "ids": [[1, 3]]}
    found = offload.row("eagle", engines(stock=stock))
    assert found["state"] == state
