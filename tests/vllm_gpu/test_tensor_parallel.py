"""The judgement of `tensor_parallel.py` on results made by hand: each fault is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from tensor_parallel import (
    DRAFTS,
    MODELS,
    REQUESTS,
    STEPS,
    commands,
    config_of,
    judge,
    once,
    options,
    shortened,
)

LAYERS = 32
COUNTS = {
    "nwor_windows": 20, "nwor_total_staged": 9, "nwor_error_windows": 0, "nwor_fallback_count": 0,
    "nwor_scv_vectorised": 0,
}  # fmt: skip


def rank_facts(rank: int) -> dict[str, Any]:
    return {
        "rank": rank, "runner": "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
        "target_layers": LAYERS, "drafter_layers": 1, "nccl": True,
    }  # fmt: skip


def answer(*, staged: bool, errors: int = 0) -> dict[str, Any]:
    counts = {**COUNTS, "nwor_error_windows": errors} if staged else {}
    rows = {"accepted": 5} if staged else {"accepted": 5, "rejected_present": 7}
    return {
        "ids": [[1, 2, 3], [4, 5]],
        "logprobs": [[-0.5, -0.25, -1.0], [-2.0, -3.0]],
        "accepted_per_position": [3, 1],
        "ranks": [{"rows": dict(rows), "flagged": 0} for _ in range(2)],
        "nwor": [dict(counts) for _ in range(2)],
        "totals": [{"nwor_windows": 44} for _ in range(2)],
        "served": {"vllm:nwor_windows": [44]} if staged else {},
    }


def engines() -> dict[str, Any]:
    """Both as they should be."""
    found: dict[str, Any] = {}
    for name in ("stock", "stage"):
        staged = name == "stage"
        results = {run: answer(staged=staged) for run in ("audited", "sampled", "steady")}
        results["steady"]["counted"] = [
            {
                "nwor_windows": STEPS, "nwor_total_staged": STEPS * REQUESTS * DRAFTS,
                "nwor_certain_rows": STEPS * REQUESTS,
            }
            for _ in range(2)
        ]  # fmt: skip
        results["fault"] = answer(staged=staged, errors=6)
        for rank, flagged in enumerate((0, 6) if staged else (6, 6)):
            results["fault"]["ranks"][rank]["flagged"] = flagged
        found[name] = {
            "facts": {
                "executor": "MultiprocExecutor", "ranks": [rank_facts(rank) for rank in range(2)]
            },
            "results": results,
        }  # fmt: skip
    alone = answer(staged=True, errors=0)
    alone["ids"][1][1] = 9
    alone["nwor"][1]["nwor_error_windows"] = 6
    found["stage"]["results"]["alone"] = alone
    return found


def test_what_should_be_is_no_problem() -> None:
    assert judge(engines(), LAYERS) == []


def drafter_counted(found: Any) -> None:
    for rank in found["stage"]["facts"]["ranks"]:
        rank["target_layers"] = LAYERS + 1


def other_runner(found: Any) -> None:
    found["stock"]["facts"]["ranks"][1]["runner"] = "vllm.v1.worker.gpu_model_runner.GPUModelRunner"


def other_token(found: Any) -> None:
    found["stage"]["results"]["sampled"]["ids"][0][2] = 8


def other_logprob(found: Any) -> None:
    found["stage"]["results"]["fault"]["logprobs"][0][2] = -1.5


def other_acceptance(found: Any) -> None:
    found["stage"]["results"]["steady"]["accepted_per_position"] = [3, 2]


def rejected_row_on_rank_1(found: Any) -> None:
    found["stage"]["results"]["fault"]["ranks"][1]["rows"]["rejected_present"] = 2


def blind_audit(found: Any) -> None:
    found["stock"]["results"]["audited"]["ranks"][0]["rows"].pop("rejected_present")


def fewer_staged(found: Any) -> None:
    found["stage"]["results"]["steady"]["counted"][1]["nwor_total_staged"] -= DRAFTS


def uneven_ranks(found: Any) -> None:
    found["stage"]["results"]["audited"]["nwor"][1]["nwor_total_staged"] += 1


def not_captured(found: Any) -> None:
    for counts in found["stage"]["results"]["sampled"]["nwor"]:
        counts["nwor_scv_vectorised"] = 3


def multiplied(found: Any) -> None:
    found["stage"]["results"]["steady"]["served"]["vllm:nwor_windows"] = [88]


def refused_on_one_rank(found: Any) -> None:
    found["stage"]["results"]["fault"]["nwor"][0]["nwor_error_windows"] = 0


def no_fault(found: Any) -> None:
    found["stage"]["results"]["fault"]["ranks"][1]["flagged"] = 0


def sharing_not_needed(found: Any) -> None:
    found["stage"]["results"]["alone"] = copy.deepcopy(found["stage"]["results"]["fault"])


def torch_shares(found: Any) -> None:
    found["stage"]["facts"]["ranks"][0]["nccl"] = False


def lost(found: Any) -> None:
    found["stock"] = {"error": "the engine ended", "results": {}}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (drafter_counted, "33 layers of the target"),
        (other_runner, "stock, rank 1: served by vllm.v1.worker.gpu_model_runner"),
        (other_token, "sampled: token ids differ"),
        (other_logprob, "fault: logprobs differ"),
        (other_acceptance, "steady: accepted_per_position differ"),
        (rejected_row_on_rank_1, "fault, rank 1: audit {'rejected_present': 2}"),
        (blind_audit, "audited, rank 0: direct writes left no rejected row"),
        (fewer_staged, "steady, rank 1"),
        (uneven_ranks, "audited: the ranks count differently"),
        (not_captured, "sampled: nwor_scv_vectorised is 3"),
        (multiplied, "steady: vllm:nwor_windows is served as [88], rank 0 counted 44"),
        (refused_on_one_rank, "fault: [0, 6] windows refused by rank, expected 6 each"),
        (no_fault, "fault: [0, 0] faults by rank"),
        (sharing_not_needed, "alone: without sharing nothing differs"),
        (torch_shares, "stage, rank 0: vLLM's NCCL communicator is off"),
        (lost, "stock: the engine ended"),
    ],
)
def test_each_fault_is_named(spoil: Callable[[Any], None], said: str) -> None:
    found = engines()
    spoil(found)
    assert any(said in problem for problem in judge(found, LAYERS))


def test_an_engine_that_never_started_is_a_problem() -> None:
    found = judge({"stage": engines()["stage"]}, LAYERS)
    assert found[0] == "stock: it was not started"
    assert found[1:] == [f"{run}: not run" for run in ("audited", "sampled", "steady", "fault")]


def test_what_ran_before_an_engine_ended_is_judged() -> None:
    found = engines()
    found["stage"]["error"] = "it ended"
    del found["stage"]["results"]["alone"]
    assert judge(found, LAYERS) == ["stage: it ended", "alone: not run"]
    other_token(found)
    assert any("sampled: token ids differ" in problem for problem in judge(found, LAYERS))


def test_the_record_has_no_ids() -> None:
    results = shortened(engines()["stage"])["results"]
    assert results["audited"]["tokens"] == 5
    assert "ids" not in results["audited"]
    assert "logprobs" not in results["audited"]


def test_both_engines_are_asked_alike_and_configured_alike() -> None:
    stock, stage = commands(512, staged=False), commands(512, staged=True)
    stock["fault"]["fault_every"] = stock["fault"].pop("cut_every")
    assert stock == stage
    assert list(stock) == ["audited", "sampled", "steady", "fault"]
    made = [options("7b", staged=staged, custom_all_reduce=True) for staged in (False, True)]
    assert made[0].pop("nwor") is None
    assert made[1].pop("nwor") == {"mode": "stage", "attention": "stock"}
    assert made[0] == made[1]


def test_the_shape_is_that_of_the_old_failure() -> None:
    target, head = (config_of("7b", head=head) for head in (False, True))
    assert (target["num_hidden_layers"], head["num_hidden_layers"]) == (32, 1)
    assert (target["num_attention_heads"], target["num_key_value_heads"]) == (32, 32)
    assert (REQUESTS * DRAFTS, REQUESTS, MODELS["7b"]["hidden_size"]) == (128, 16, 4096)


def test_once_calls_once() -> None:
    called: list[int] = []
    call = once(lambda: called.append(1))
    call()
    call()
    assert called == [1]
