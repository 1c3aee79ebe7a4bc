"""The switch in real engines: each form of the flag, on and off over one cache, and what refuses.

Engines run one after the other over one cache folder, in the order of `ENGINES`; each test asks for
those that it compares.
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
    "named": {"llm": NAMED},
    "plain": {},
    "plain_uncached": UNCACHED,
    "stage_uncached": {"llm": STAGE, **UNCACHED},
    "plain_uncached_again": UNCACHED,
    "stage_uncached_again": {"llm": STAGE, **UNCACHED},
    "eager_loose": {"llm": {**LOOSE, "enforce_eager": True}},
    "swallowed": {"llm": STAGE, "swallowed": True, **UNCACHED},
    "swallowed_loose": {"llm": LOOSE, "swallowed": True, **UNCACHED},
}


@pytest.fixture(scope="module")
def engine(
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


def artifact(report: Report) -> str:
    """Where vLLM saved what it compiled: the folder's name is the cache key."""
    (path,) = set(re.findall(r"saved AOT compiled function to (\S+)", report["log"]))
    return path


def test_naming_the_pass_stages(engine: Engine) -> None:
    """`--compilation-config`, in an unmodified vLLM."""
    named, plain = running(engine("named")), running(engine("plain"))
    assert named["passes_run"] == 1
    assert named["twins"]["staged"] > 0
    assert named["metrics"]["vllm:nwor_active"] == 1
    drafts = named["metrics"]["vllm:spec_decode_num_draft_tokens"]
    assert named["metrics"]["vllm:nwor_total_staged"] == drafts > 0
    assert named["ids"] == plain["ids"]


def test_without_the_flag_nothing_of_it_is_left(engine: Engine) -> None:
    """In the next process, over the cache that the staged engine filled; nothing was purged."""
    plain = running(engine("plain"))
    assert plain["twins"]["calls"] == 0
    assert plain["backends"] == ["CPUAttentionBackendImpl"]
    assert not [name for name in plain["metrics"] if name.startswith("vllm:nwor")]


def test_vllms_artifacts_of_both_have_different_keys(engine: Engine) -> None:
    named, plain = running(engine("named")), running(engine("plain"))
    assert named["hash"] != plain["hash"]
    assert artifact(named) != artifact(plain)
    assert artifact(named) not in plain["log"]


def test_the_forms_of_the_flag_share_a_key(engine: Engine) -> None:
    assert running(engine("named"))["hash"] == running(engine("stage_uncached"))["hash"]


@pytest.mark.parametrize("name", ["plain_uncached", "stage_uncached"])
def test_torchs_caches_serve_each_its_own_graph(engine: Engine, name: str) -> None:
    """Off, stage, off, stage over one folder. The first of each compiles, though the other's graph
    is there; the second is served by the cache, so no pass runs, and still runs the right ops."""
    first, again = running(engine(name)), running(engine(f"{name}_again"))
    assert first["caches"]["aot_autograd"].get("autograd_cache_hit", 0) == 0
    assert first["caches"]["aot_autograd"]["autograd_cache_miss"] > 0
    assert again["caches"]["aot_autograd"]["autograd_cache_hit"] > 0
    assert again["caches"]["aot_autograd"].get("autograd_cache_miss", 0) == 0
    assert again["passes_run"] == 0
    assert again["ids"] == first["ids"]
    assert again["twins"] == first["twins"]
    assert (again["twins"]["staged"] > 0) == name.startswith("stage")


def test_what_cannot_stage_runs_direct_if_it_may(engine: Engine) -> None:
    """Logged and counted; refused, were it strict: `test_vllm_configs.py`."""
    loose = running(engine("eager_loose"))
    assert loose["ids"] == running(engine("plain"))["ids"]
    assert loose["twins"]["calls"] == 0
    assert "the model is not compiled (enforce_eager)" in loose["log"]
    assert "It runs without NWOR" in loose["log"]
    assert loose["metrics"]["vllm:nwor_active"] == 0
    assert loose["metrics"]["vllm:nwor_refused"] == 1


def test_a_graph_without_a_staged_write_does_not_start(engine: Engine) -> None:
    report = engine("swallowed")
    assert "no staged write ran in warm-up" in report["error"]
    assert report["error"].startswith("ConfigError")


def test_a_graph_without_a_staged_write_runs_direct_if_it_may(engine: Engine) -> None:
    loose = running(engine("swallowed_loose"))
    assert loose["ids"] == running(engine("plain"))["ids"]
    assert loose["twins"]["calls"] == 0
    assert "no staged write ran in warm-up" in loose["log"]
    assert loose["metrics"]["vllm:nwor_active"] == 0
    assert loose["metrics"]["vllm:nwor_refused"] == 1
