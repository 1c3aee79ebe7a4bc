"""The switch in real engines: each form of the flag, on and off over one cache, and what refuses.

Engines run one after the other over one cache folder, in the order of `ENGINES`; each test asks for
those that it compares. vLLM's own artifacts are off in most of them, so that torch's caches are
what can serve a graph; `test_vllm_engine.py` has engines with both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import switching
from pool import Pool

Report = dict[str, Any]
Engine = Callable[[str], Report]
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.usefixtures("a_core"),
]

NAMED = {
    "compilation_config": {
        "inductor_passes": {"post_grad_custom_post_pass": "nwor_compile.vllm_pass"}
    }
}
STAGE = {"additional_config": {"nwor": {"mode": "stage"}}}
LOOSE = {"additional_config": {"nwor": {"mode": "stage", "strict": False}}}
# vLLM then keeps no artifacts of its own, and torch's caches stay on.
UNCACHED = {"environment": {"VLLM_DISABLE_COMPILE_CACHE": "1"}}

ENGINES: dict[str, dict[str, Any]] = {
    "plain": UNCACHED,
    "named": {"llm": NAMED, **UNCACHED},
    "plain_again": UNCACHED,
    "stage_again": {"llm": STAGE, **UNCACHED},
    "eager_loose": {"llm": {**LOOSE, "enforce_eager": True}},
    "swallowed": {"llm": STAGE, "swallowed": True, **UNCACHED},
    "swallowed_loose": {"llm": LOOSE, "swallowed": True, **UNCACHED},
}


@pytest.fixture(scope="module")
def switched(
    pool: Pool, a_core: None, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Report]:
    """The report of an engine; those before it in `ENGINES` have run."""
    del pool, a_core
    cache = str(tmp_path_factory.mktemp("switch-cache"))
    reports: dict[str, Report] = {}

    def report(name: str) -> Report:
        for each, options in ENGINES.items():
            if each not in reports:
                reports[each] = switching.run(options, tmp_path_factory.mktemp(each), cache)
            if each == name:
                break
        return reports[name]

    return report


def running(report: Report) -> Report:
    assert "error" not in report, report["log"][-4000:]
    return report


def test_naming_the_pass_stages(switched: Engine) -> None:
    """`--compilation-config`, in an unmodified vLLM."""
    named, plain = running(switched("named")), running(switched("plain"))
    assert named["passes_run"] == 1
    assert named["twins"]["staged"] > 0
    assert named["metrics"]["vllm:nwor_active"] == 1
    drafts = named["metrics"]["vllm:spec_decode_num_draft_tokens"]
    assert named["metrics"]["vllm:nwor_total_staged"] == drafts > 0
    assert named["ids"] == plain["ids"]


def test_without_the_flag_nothing_of_it_is_left(switched: Engine) -> None:
    """In the next process, over the cache that the staged engine filled; nothing was purged."""
    plain = running(switched("plain_again"))
    assert plain["twins"]["calls"] == 0
    assert plain["backends"] == ["CPUAttentionBackendImpl"]
    assert not [name for name in plain["metrics"] if name.startswith("vllm:nwor")]


def test_the_forms_of_the_flag_share_a_key(switched: Engine) -> None:
    named, stage = running(switched("named")), running(switched("stage_again"))
    assert named["hash"] == stage["hash"] != running(switched("plain"))["hash"]


@pytest.mark.parametrize(("one", "other"), [("plain", "plain_again"), ("named", "stage_again")])
def test_torchs_caches_serve_each_its_own_graph(switched: Engine, one: str, other: str) -> None:
    """Off, stage, off, stage over one folder. The first of each compiles, though the other's graph
    is there; the second is served by the cache, so no pass runs, and still runs the right ops."""
    first, again = running(switched(one)), running(switched(other))
    assert first["caches"]["aot_autograd"].get("autograd_cache_hit", 0) == 0
    assert first["caches"]["aot_autograd"]["autograd_cache_miss"] > 0
    assert again["caches"]["aot_autograd"]["autograd_cache_hit"] > 0
    assert again["caches"]["aot_autograd"].get("autograd_cache_miss", 0) == 0
    assert again["passes_run"] == 0
    assert again["ids"] == first["ids"]
    assert again["twins"] == first["twins"]
    assert (again["twins"]["staged"] > 0) == (one == "named")


def artifacts(report: Report) -> set[str]:
    """What vLLM's ahead-of-time compiler saved; a folder's name is the key."""
    return set(re.findall(r"saved AOT compiled function to (\S+)", report["log"]))


def test_vllms_artifacts_of_both_modes_have_different_keys(off: Report, stage: Report) -> None:
    """The engines of `test_vllm_engine.py`, with all caches on. That vLLM 0.32 cannot load such an
    artifact on a CPU is no reason to trust it: elsewhere it can."""
    if not off["log"] or not stage["log"]:
        pytest.skip("reports of earlier engines, kept without their logs")
    assert artifacts(off)
    assert len(artifacts(stage)) == len(artifacts(off))
    assert not artifacts(stage) & artifacts(off)


def test_what_cannot_stage_runs_direct_if_it_may(switched: Engine) -> None:
    """Logged and counted; refused, were it strict: `test_vllm_configs.py`."""
    loose = running(switched("eager_loose"))
    assert loose["ids"] == running(switched("plain"))["ids"]
    assert loose["twins"]["calls"] == 0
    assert "the model is not compiled (enforce_eager)" in loose["log"]
    assert "It runs without NWOR" in loose["log"]
    assert loose["metrics"]["vllm:nwor_active"] == 0
    assert loose["metrics"]["vllm:nwor_refused"] == 1


def test_a_graph_without_a_staged_write_does_not_start(switched: Engine) -> None:
    report = switched("swallowed")
    assert "no staged write ran in warm-up" in report["error"]
    assert report["error"].startswith("ConfigError")


def test_a_graph_without_a_staged_write_runs_direct_if_it_may(switched: Engine) -> None:
    loose = running(switched("swallowed_loose"))
    assert loose["ids"] == running(switched("plain"))["ids"]
    assert loose["twins"]["calls"] == 0
    assert "no staged write ran in warm-up" in loose["log"]
    assert loose["metrics"]["vllm:nwor_active"] == 0
    assert loose["metrics"]["vllm:nwor_refused"] == 1
