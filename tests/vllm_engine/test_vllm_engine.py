"""NWOR in the real CPU engine, on this repository's tiny models: `stage` against `off`.

`engines.py` lists the engines and `phases.py` says what each phase does. Requests are greedy unless
a phase says otherwise. The budget of a step is 64 tokens and a batch holds four requests, so
prompts are split and mixed with verify spans.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from pool import Report

Engine = Callable[[str], Report]
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1000)]

# float32 and another order of summation; the rows are of order 1.
RECOMPUTED_WITHIN = 1e-3


def accepted(result: dict[str, Any]) -> list[int]:
    return result["vllm"]["vllm:spec_decode_num_accepted_tokens_per_pos"]


# Off and stage, two processes, one attention kernel.


def test_the_v1_runner_is_what_runs(stage: Report) -> None:
    assert stage["runner"] == "GPUModelRunner"


@pytest.mark.parametrize("which", ["greedy", "temperature", "logprobs"])
def test_token_ids_equal_the_direct_runs(off: Report, stage: Report, which: str) -> None:
    assert stage.phase(which)["ids"] == off.phase(which)["ids"]


@pytest.mark.parametrize("which", ["greedy", "temperature", "logprobs"])
def test_vllms_own_metrics_equal_the_direct_runs(off: Report, stage: Report, which: str) -> None:
    assert stage.phase(which)["vllm"] == off.phase(which)["vllm"]
    assert sum(accepted(stage.phase(which))) > 0


def test_greedy_ids_equal_decoding_without_speculation(stage: Report, plain: Report) -> None:
    alone = plain.phase("greedy")
    assert stage.phase("greedy")["ids"] == alone["ids"]
    assert "vllm:spec_decode_num_draft_tokens" not in alone["vllm"]


def test_logprobs_equal_the_direct_runs(off: Report, stage: Report) -> None:
    ours, theirs = stage.phase("logprobs"), off.phase("logprobs")
    assert len(ours["logprobs"]) == len(ours["ids"])
    for mine, other in zip(ours["logprobs"], theirs["logprobs"], strict=True):
        for one, two in zip(mine, other, strict=True):
            assert [t for t, _ in one] == [t for t, _ in two]
            assert [p for _, p in one] == pytest.approx([p for _, p in two], abs=1e-4)


def test_the_cache_never_holds_a_rejected_row(stage: Report) -> None:
    audit = stage.phase("greedy")["audit"]
    assert audit["rejected_present"] == 0
    assert audit["drafts"] > audit["accepted"] > 0


def test_the_direct_runs_cache_holds_every_rejected_row(off: Report, stage: Report) -> None:
    for result in (off.phase("greedy"), stage.phase("direct")):
        audit = result["audit"]
        assert audit["rejected_present"] == audit["drafts"] - audit["accepted"] > 0


@pytest.mark.parametrize(
    ("name", "which"), [("stage", "greedy"), ("stage", "direct"), ("off", "greedy")]
)
def test_no_other_row_changes_and_all_layers_agree(engine: Engine, name: str, which: str) -> None:
    audit = engine(name).phase(which)["audit"]
    assert audit["unexpected"] == 0
    assert audit["layers_disagree"] == 0


def test_rows_per_emitted_token(off: Report, stage: Report) -> None:
    """One staged, more than one direct; by the audit of the cache and by the counters."""
    staged, direct = stage.phase("greedy")["audit"], off.phase("greedy")["audit"]
    assert staged["decode_rows"] == staged["decode_tokens"] > 0
    assert direct["decode_rows"] > 1.3 * direct["decode_tokens"]


def test_the_counters_equal_vllms_and_the_audits(stage: Report) -> None:
    # Phase logprobs runs the workload alone; `greedy` also recomputes it.
    result = stage.phase("logprobs")
    nwor, vllm = result["nwor"], result["vllm"]
    assert nwor["nwor_total_staged"] == vllm["vllm:spec_decode_num_draft_tokens"]
    assert nwor["nwor_total_committed"] == vllm["vllm:spec_decode_num_accepted_tokens"]
    assert nwor["nwor_accepted_per_position"] == accepted(result)
    assert nwor["nwor_stage_operations"] == 4 * nwor["nwor_total_staged"]
    rows = nwor["nwor_certain_rows"] + nwor["nwor_total_committed"]
    prompts = sum(result["prompts"]) - sum(result["cached"])
    emitted = sum(len(ids) for ids in result["ids"])
    # The last token of a request has no row, and drafts accepted past its end have one.
    assert rows - prompts == pytest.approx(emitted, rel=0.15)
    assert nwor["nwor_certain_rows"] + nwor["nwor_total_staged"] - prompts > 1.3 * emitted


@pytest.mark.parametrize(
    "which", ["greedy", "prefix_hits", "temperature", "logprobs", "aborts", "structured"]
)
def test_no_fallbacks_and_no_error_windows(stage: Report, which: str) -> None:
    nwor = stage.phase(which)["nwor"]
    assert nwor["nwor_windows"] > 0
    assert nwor["nwor_fallback_count"] == 0
    assert nwor["nwor_error_windows"] == 0


def test_what_the_scheduler_believes_computed_is_there(stage: Report) -> None:
    greedy = stage.phase("greedy")
    assert greedy["audit"]["checked"] > 0
    assert greedy["audit"]["lost"] == 0
    assert greedy["recomputed"]["rows"] > 0
    assert greedy["recomputed"]["worst"] < RECOMPUTED_WITHIN < greedy["recomputed"]["distinct"]


def test_prompts_are_split_and_mixed_with_verify_spans(stage: Report) -> None:
    greedy = stage.phase("greedy")
    assert greedy["audit"]["mixed_steps"] > 0
    assert max(greedy["prompts"]) > 64


def test_windows_follow_one_another(stage: Report) -> None:
    """Several verifications of one request, step after step, each on what the last committed."""
    greedy = stage.phase("logprobs")
    assert greedy["nwor"]["nwor_windows"] > 8
    longest = max(len(ids) for ids in greedy["ids"])
    assert longest > 3 * (4 + 1)  # four drafts a window


def test_prefix_cache_hits_change_nothing(stage: Report) -> None:
    hits = stage.phase("prefix_hits")
    assert sum(hits["cached"]) > 0
    assert hits["ids"] == stage.phase("greedy")["ids"]
    assert hits["audit"]["checked_hits"] > 0
    assert hits["audit"]["lost"] == hits["audit"]["rejected_present"] == 0


def test_poison_changes_nothing(stage: Report) -> None:
    poison, clean = stage.phase("poison"), stage.phase("logprobs")
    assert poison["ids"] == clean["ids"]
    assert poison["vllm"] == clean["vllm"]
    assert poison["nwor"]["nwor_error_windows"] == 0


def test_aborted_requests_leave_the_others_alone(stage: Report) -> None:
    """a is aborted between steps and c inside its window; requests that repeat prompts c and a take
    over. Staged rows are NaN from one window to the next unless they were committed, so none is
    read or committed late."""
    aborts = stage.phase("aborts")
    assert aborts["inside_windows"] == 1
    ids = dict(zip(aborts["names"], aborts["ids"], strict=True))
    greedy = stage.phase("greedy")["ids"]
    assert set(ids) == {"after_a", "after_c", "b", "d"}
    for name, prompt in (("b", 1), ("d", 3), ("after_a", 2), ("after_c", 0)):
        shared = min(len(ids[name]), len(greedy[prompt]))
        assert shared > 0
        assert ids[name][:shared] == greedy[prompt][:shared]
    audit = aborts["audit"]
    assert audit["drafts"] > audit["accepted"] > 0
    assert audit["rejected_present"] == audit["unexpected"] == audit["lost"] == 0
    assert audit["layers_disagree"] == 0


def test_structured_output(stage: Report) -> None:
    structured, direct = stage.phase("structured"), stage.phase("direct_structured")
    assert structured["ids"] == direct["ids"]
    assert structured["vllm"] == direct["vllm"]
    assert sum(accepted(structured)) > 0
    # Every request ends before the 40th character that the grammar asks for.
    assert all(re.fullmatch("[a-f ]{1,40}", text) for text in structured["texts"])


@pytest.mark.parametrize("mode", ["off", "adaptive"])
def test_every_scv_mode_gives_the_same_tokens(stage: Report, mode: str) -> None:
    scv, clean = stage.phase(f"scv_{mode}"), stage.phase("logprobs")
    assert scv["mode"] == mode
    assert scv["ids"] == clean["ids"]
    assert scv["vllm"] == clean["vllm"]
    for name in ("nwor_windows", "nwor_total_staged", "nwor_total_committed"):
        assert scv["nwor"][name] == clean["nwor"][name] > 0
    assert scv["nwor"]["nwor_fallback_count"] == scv["nwor"]["nwor_error_windows"] == 0


def test_the_graph_without_windows_equals_the_unrewritten_one(off: Report, stage: Report) -> None:
    assert stage.phase("direct")["ids"] == off.phase("greedy")["ids"]
    assert stage.phase("direct")["vllm"] == off.phase("greedy")["vllm"]


def test_seeded_sampling_equals_the_same_graph_without_windows(stage: Report) -> None:
    staged, direct = stage.phase("temperature"), stage.phase("direct_temperature")
    assert staged["ids"] == direct["ids"]
    assert staged["vllm"] == direct["vllm"]


def test_profilers_see_begin_stage_accept_and_commit(stage: Report) -> None:
    """Each once a window, `stage` once a layer; none is part of a compiled graph."""
    ranges = stage.phase("profiled")["ranges"]
    windows = ranges["nwor.begin"]
    assert windows >= stage.phase("profiled")["nwor"]["nwor_windows"] > 0
    assert ranges == {
        "nwor.begin": windows,
        "nwor.stage": 4 * windows,
        "nwor.accept": windows,
        "nwor.commit": windows,
    }


def test_windows_are_opened_in_warm_up_as_they_are_in_steps(stage: Report) -> None:
    """Or the first real one would wait for kernels of another form to be compiled."""
    forms = stage.phase("profiled")["forms"]
    assert len(forms) > 3
    for real, rehearsed in forms:
        assert real == rehearsed


# Faults that cost drafts and no tokens.


@pytest.mark.parametrize("which", ["error_flag", "one_layer_fails"])
def test_a_fault_costs_drafts_and_no_tokens(stage: Report, which: str) -> None:
    fault, clean = stage.phase(which), stage.phase("logprobs")
    assert fault["ids"] == clean["ids"]
    assert fault["nwor"]["nwor_error_windows"] > 0
    assert fault["nwor"]["nwor_total_committed"] < clean["nwor"]["nwor_total_committed"]
    assert fault["audit"]["rejected_present"] == 0
    assert fault["audit"]["lost"] == 0


def test_a_layer_that_fails_always_commits_nothing_anywhere(stage: Report) -> None:
    fault = stage.phase("one_layer_fails")
    assert fault["nwor"]["nwor_total_committed"] == 0
    assert sum(accepted(fault)) == 0


# These tests can fail: what is wrong on purpose is seen.


def test_staging_without_visible_rows_fails_these_tests(stage: Report) -> None:
    """The naive variant."""
    naive, staged = stage.phase("naive"), stage.phase("logprobs")
    assert naive["ids"] != staged["ids"]
    assert accepted(naive) != accepted(staged)
    assert naive["vllm"] != staged["vllm"]


def test_the_audit_sees_one_layer_that_writes_its_drafts_early(stage: Report) -> None:
    audit = stage.phase("early_write")["audit"]
    assert audit["rejected_present"] == audit["drafts"] - audit["accepted"] > 0
    assert audit["layers_disagree"] > 0


def test_poison_sees_it_too_and_no_token_is_lost(stage: Report) -> None:
    early = stage.phase("early_write_poisoned")
    assert early["nwor"]["nwor_error_windows"] == early["nwor"]["nwor_windows"] > 0
    assert early["ids"] == stage.phase("logprobs")["ids"]


def test_the_audit_sees_what_somebody_else_writes_and_what_is_not_committed(stage: Report) -> None:
    tampered = stage.phase("tampered")
    assert tampered["audit"]["unexpected"] > 0
    assert tampered["audit"]["lost"] > 0
    assert tampered["recomputed"]["worst"] > RECOMPUTED_WITHIN
