"""NWOR in the real CPU engine, on this repository's tiny models.

Each engine is a process that runs several phases; `conftest.ENGINES` lists them, `engine.py` says
what a phase does. Requests are greedy unless a phase says otherwise. The budget of a step is 64
tokens and a batch holds four requests, so prompts are split and mixed with verify spans.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Engine = Callable[[str], dict[str, Any]]
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1000)]

# float32 and another order of summation; the rows are of order 1.
RECOMPUTED_WITHIN = 1e-3


def phase(engine: Engine, name: str, which: str) -> dict[str, Any]:
    """The report of one phase; a phase that raised fails the test."""
    report = engine(name)
    result = report["phases"].get(which)
    if result is None or "error" in result:
        pytest.fail(f"{name}/{which}: {result}\n{report['log'][-4000:]}")
    return result


def accepted(result: dict[str, Any]) -> list[int]:
    return result["vllm"]["vllm:spec_decode_num_accepted_tokens_per_pos"]


# Off and stage, two processes, one attention kernel. "off" runs first: the compile cache holds its
# graph when "stage" starts.


def test_the_v1_runner_is_what_runs(engine: Engine) -> None:
    phase(engine, "off", "greedy")
    assert engine("stage")["runner"] == "GPUModelRunner"


@pytest.mark.parametrize("which", ["greedy", "temperature", "logprobs"])
def test_token_ids_equal_the_direct_runs(engine: Engine, which: str) -> None:
    off, stage = phase(engine, "off", which), phase(engine, "stage", which)
    assert stage["ids"] == off["ids"]


@pytest.mark.parametrize("which", ["greedy", "temperature", "logprobs"])
def test_vllms_own_metrics_equal_the_direct_runs(engine: Engine, which: str) -> None:
    off, stage = phase(engine, "off", which), phase(engine, "stage", which)
    assert stage["vllm"] == off["vllm"]
    assert sum(accepted(stage)) > 0


def test_greedy_ids_equal_decoding_without_speculation(engine: Engine) -> None:
    assert phase(engine, "stage", "greedy")["ids"] == phase(engine, "plain", "greedy")["ids"]


def test_logprobs_equal_the_direct_runs(engine: Engine) -> None:
    off, stage = phase(engine, "off", "logprobs"), phase(engine, "stage", "logprobs")
    assert len(stage["logprobs"]) == len(stage["ids"])
    for ours, theirs in zip(stage["logprobs"], off["logprobs"], strict=True):
        for one, two in zip(ours, theirs, strict=True):
            assert [t for t, _ in one] == [t for t, _ in two]
            assert [p for _, p in one] == pytest.approx([p for _, p in two], abs=1e-4)


def test_the_cache_never_holds_a_rejected_row(engine: Engine) -> None:
    audit = phase(engine, "stage", "greedy")["audit"]
    assert audit["rejected_present"] == 0
    assert audit["drafts"] > audit["accepted"] > 0


def test_the_direct_runs_cache_holds_every_rejected_row(engine: Engine) -> None:
    for name, which in (("off", "greedy"), ("stage", "direct")):
        audit = phase(engine, name, which)["audit"]
        assert audit["rejected_present"] == audit["drafts"] - audit["accepted"] > 0


@pytest.mark.parametrize(
    ("name", "which"), [("stage", "greedy"), ("stage", "direct"), ("off", "greedy")]
)
def test_no_other_row_changes_and_all_layers_agree(engine: Engine, name: str, which: str) -> None:
    audit = phase(engine, name, which)["audit"]
    assert audit["unexpected"] == 0
    assert audit["layers_disagree"] == 0


def test_rows_per_emitted_token(engine: Engine) -> None:
    """One staged, more than one direct; by the audit of the cache and by the counters."""
    stage, direct = phase(engine, "stage", "greedy"), phase(engine, "off", "greedy")
    assert stage["audit"]["decode_rows"] == stage["audit"]["decode_tokens"] > 0
    assert direct["audit"]["decode_rows"] > 1.3 * direct["audit"]["decode_tokens"]


def test_the_counters_equal_vllms_and_the_audits(engine: Engine) -> None:
    # Phase logprobs runs the workload alone; `greedy` also recomputes it.
    stage = phase(engine, "stage", "logprobs")
    nwor, vllm = stage["nwor"], stage["vllm"]
    assert nwor["nwor_total_staged"] == vllm["vllm:spec_decode_num_draft_tokens"]
    assert nwor["nwor_total_committed"] == vllm["vllm:spec_decode_num_accepted_tokens"]
    assert nwor["nwor_accepted_per_position"] == accepted(stage)
    assert nwor["nwor_stage_operations"] == 4 * nwor["nwor_total_staged"]
    rows = nwor["nwor_certain_rows"] + nwor["nwor_total_committed"]
    prompts = sum(stage["prompts"]) - sum(stage["cached"])
    emitted = sum(len(ids) for ids in stage["ids"])
    # The last token of a request has no row, and drafts accepted past its end have one.
    assert rows - prompts == pytest.approx(emitted, rel=0.15)
    assert nwor["nwor_certain_rows"] + nwor["nwor_total_staged"] - prompts > 1.3 * emitted


@pytest.mark.parametrize("which", ["greedy", "prefix_hits", "temperature", "logprobs", "aborts"])
def test_no_fallbacks_and_no_error_windows(engine: Engine, which: str) -> None:
    nwor = phase(engine, "stage", which)["nwor"]
    assert nwor["nwor_windows"] > 0
    assert nwor["nwor_fallback_count"] == 0
    assert nwor["nwor_error_windows"] == 0


def test_what_the_scheduler_believes_computed_is_there(engine: Engine) -> None:
    greedy = phase(engine, "stage", "greedy")
    assert greedy["audit"]["checked"] > 0
    assert greedy["audit"]["lost"] == 0
    assert greedy["recomputed"]["rows"] > 0
    assert greedy["recomputed"]["worst"] < RECOMPUTED_WITHIN < greedy["recomputed"]["distinct"]


def test_prompts_are_split_and_mixed_with_verify_spans(engine: Engine) -> None:
    greedy = phase(engine, "stage", "greedy")
    assert greedy["audit"]["mixed_steps"] > 0
    assert max(greedy["prompts"]) > 64


def test_prefix_cache_hits_change_nothing(engine: Engine) -> None:
    hits = phase(engine, "stage", "prefix_hits")
    assert sum(hits["cached"]) > 0
    assert hits["ids"] == phase(engine, "stage", "greedy")["ids"]


def test_poison_changes_nothing(engine: Engine) -> None:
    poison, logged = phase(engine, "stage", "poison"), phase(engine, "stage", "logprobs")
    assert poison["ids"] == logged["ids"]
    assert accepted(poison) == accepted(logged)
    assert poison["nwor"]["nwor_error_windows"] == 0


def test_aborted_requests_leave_the_others_alone(engine: Engine) -> None:
    """a and c are aborted after some steps; requests that repeat prompts c and a take over."""
    aborts = phase(engine, "stage", "aborts")
    ids = dict(zip(aborts["names"], aborts["ids"], strict=True))
    greedy = phase(engine, "stage", "greedy")["ids"]
    assert set(ids) == {"after6", "after8", "b", "d"}
    for name, prompt in (("b", 1), ("d", 3), ("after6", 2), ("after8", 0)):
        shared = min(len(ids[name]), len(greedy[prompt]))
        assert ids[name][:shared] == greedy[prompt][:shared]


def test_structured_output(engine: Engine) -> None:
    structured = phase(engine, "stage", "structured")
    assert structured["nwor"]["nwor_error_windows"] == 0
    assert all(structured["ids"])


def test_the_graph_without_windows_equals_the_unrewritten_one(engine: Engine) -> None:
    direct, off = phase(engine, "stage", "direct"), phase(engine, "off", "greedy")
    assert direct["ids"] == off["ids"]
    assert direct["vllm"] == off["vllm"]


def test_seeded_sampling_equals_the_same_graph_without_windows(engine: Engine) -> None:
    staged = phase(engine, "stage", "temperature")
    direct = phase(engine, "stage", "direct_temperature")
    assert staged["ids"] == direct["ids"]
    assert staged["vllm"] == direct["vllm"]


def test_staging_without_visible_rows_fails_these_tests(engine: Engine) -> None:
    """The naive variant: the same comparison must be able to fail."""
    naive, staged = phase(engine, "stage", "naive"), phase(engine, "stage", "logprobs")
    assert naive["ids"] != staged["ids"]
    assert accepted(naive) != accepted(staged)
    assert naive["vllm"] != staged["vllm"]


@pytest.mark.parametrize("which", ["error_flag", "one_layer_fails"])
def test_a_fault_costs_drafts_and_no_tokens(engine: Engine, which: str) -> None:
    fault, clean = phase(engine, "stage", which), phase(engine, "stage", "logprobs")
    assert fault["ids"] == clean["ids"]
    assert fault["nwor"]["nwor_error_windows"] > 0
    assert fault["nwor"]["nwor_total_committed"] < clean["nwor"]["nwor_total_committed"]
    assert fault["audit"]["rejected_present"] == 0
    assert fault["audit"]["lost"] == 0


def test_a_layer_that_fails_always_commits_nothing_anywhere(engine: Engine) -> None:
    fault = phase(engine, "stage", "one_layer_fails")
    assert fault["nwor"]["nwor_total_committed"] == 0
    assert sum(accepted(fault)) == 0


# Cache keys. All engines share one cache folder, and the order is off, stage, off.


def test_switching_over_a_warm_cache_never_serves_the_other_graph(engine: Engine) -> None:
    """Across processes. The unrewritten graph never calls a twin, the rewritten one always does."""
    phase(engine, "off", "greedy")
    staged = phase(engine, "stage", "logprobs")["nwor"]
    assert staged["executions"]["staged"] > 0
    assert staged["nwor_total_staged"] > 0
    again = phase(engine, "off_again", "short")
    assert again["twins"]["calls"] == 0
    assert again["nwor"] == {}


# The engine and its worker in processes of their own, as `vllm serve` has them.


def test_stage_equals_off_across_worker_processes(engine: Engine) -> None:
    off, stage = phase(engine, "off_worker", "short"), phase(engine, "stage_worker", "short")
    assert stage["ids"] == off["ids"]
    assert stage["vllm"] == off["vllm"]
    assert off["twins"]["calls"] == 0
    assert off["nwor"] == {}
    assert stage["nwor"]["executions"]["staged"] > 0
    assert stage["nwor"]["nwor_total_committed"] == sum(accepted(stage)) > 0
    assert stage["nwor"]["nwor_error_windows"] == 0


@pytest.mark.parametrize("name", ["off_worker", "stage_worker"])
def test_both_modes_run_this_packages_attention(engine: Engine, name: str) -> None:
    """A worker process knows what the configuration carries, and nothing else of its parent."""
    assert phase(engine, name, "short")["backends"] == ["NworCPUImpl"]


# n-gram drafts, and a cache too small for the batch.


def test_ngram_equals_the_same_graph_without_windows(engine: Engine) -> None:
    staged, direct = phase(engine, "ngram", "greedy"), phase(engine, "ngram", "direct")
    assert staged["ids"] == direct["ids"]
    assert staged["vllm"] == direct["vllm"]
    assert sum(accepted(staged)) > 0
    assert staged["audit"]["rejected_present"] == 0 < direct["audit"]["rejected_present"]
    assert staged["nwor"]["nwor_error_windows"] == 0
    assert staged["nwor"]["nwor_fallback_count"] == 0


def test_ngram_equals_decoding_without_speculation(engine: Engine) -> None:
    ngram, plain = phase(engine, "ngram", "greedy")["ids"], phase(engine, "plain", "greedy")["ids"]
    assert [ids[: len(other)] for ids, other in zip(ngram, plain, strict=True)] == plain


def test_preempted_requests_lose_nothing(engine: Engine) -> None:
    staged = phase(engine, "ngram", "greedy")
    assert staged["vllm"]["vllm:num_preemptions"] > 0
    assert staged["audit"]["lost"] == 0
    assert staged["recomputed"]["worst"] < RECOMPUTED_WITHIN
