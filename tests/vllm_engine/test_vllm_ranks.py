"""A target split over two tensor-parallel ranks, two processes: equal tokens, and one error flag.

Ranks sample independently. A fault that one of them alone sees must keep all from committing, or
their caches would differ from then on.
"""

from __future__ import annotations

import os

import pytest
from pool import Report

from nwor_compile.metrics import Metrics

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1000),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two ranks need two cores"),
]

RANKS = 2


def test_two_ranks_stage_and_commit_alike(stage_ranks: Report) -> None:
    workers = stage_ranks.phase("split")["workers"]
    assert [worker["rank"] for worker in workers] == list(range(RANKS))
    assert all(worker["backends"] == ["NworCPUImpl"] for worker in workers)
    assert all(worker["twins"]["staged"] > 0 for worker in workers)
    first = workers[0]["counters"]
    assert first["nwor_total_staged"] > first["nwor_total_committed"] > 0
    assert first["nwor_error_windows"] == first["nwor_fallback_count"] == 0
    assert all(worker["counters"] == first for worker in workers)


def test_token_ids_equal_the_direct_runs(off_ranks: Report, stage_ranks: Report) -> None:
    """The unrewritten graph in another engine, and the rewritten one without a window."""
    staged, off = stage_ranks.phase("split"), off_ranks.phase("split")
    assert staged["ids"] == off["ids"]
    assert staged["vllm"] == off["vllm"]
    assert staged["ids"] == stage_ranks.phase("split_direct")["ids"]
    assert all(worker["twins"]["calls"] == 0 for worker in off["workers"])
    assert all(worker["backends"] == ["NworCPUImpl"] for worker in off["workers"])
    assert off["nwor"] == {}


def test_counters_equal_vllms_and_are_not_multiplied(stage_ranks: Report) -> None:
    result = stage_ranks.phase("split")
    vllm, nwor = result["vllm"], result["nwor"]
    assert nwor["nwor_total_staged"] == vllm["vllm:spec_decode_num_draft_tokens"]
    assert nwor["nwor_total_committed"] == vllm["vllm:spec_decode_num_accepted_tokens"]


def test_what_is_served_is_one_ranks_counters(stage_ranks: Report) -> None:
    """In LLM.get_metrics(), and so on /metrics: every sample is there once, and not summed."""
    result = stage_ranks.phase("split")
    counters = result["workers"][0]["counters"]
    served: dict[str, list[float]] = {}
    for name, value in result["served"]:
        served.setdefault(name, []).append(value)
    assert served.pop("vllm:nwor_active") == [1]
    wanted = {f"vllm:{name}": counters[name] for name in Metrics.model_fields}
    assert served == {k: v if isinstance(v, list) else [v] for k, v in wanted.items()}


def test_the_scv_mode_of_the_environment_reaches_the_workers(stage_ranks: Report) -> None:
    workers = stage_ranks.phase("split")["workers"]
    assert [worker["scv"] for worker in workers] == ["adaptive"] * RANKS


def test_an_error_flag_on_one_rank_stops_the_commit_on_all(stage_ranks: Report) -> None:
    fault, clean = stage_ranks.phase("split_error"), stage_ranks.phase("split")
    assert fault["ids"] == clean["ids"]
    errors = [
        after["counters"]["nwor_error_windows"] - before["counters"]["nwor_error_windows"]
        for after, before in zip(fault["workers"], fault["workers_before"], strict=True)
    ]
    assert errors[0] == errors[1] > 0
    assert 0 < fault["nwor"]["nwor_total_committed"] < clean["nwor"]["nwor_total_committed"]


def test_without_sharing_the_flag_the_ranks_diverge(stage_ranks: Report) -> None:
    """So the test above can fail."""
    alone, clean = stage_ranks.phase("split_error_alone"), stage_ranks.phase("split")
    assert alone["ids"] != clean["ids"]
    counters = [worker["counters"]["nwor_error_windows"] for worker in alone["workers"]]
    assert counters[0] != counters[1]
