"""The flag on real engine configurations, through vLLM's plugin mechanism; no engine is started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PASS_SLOT = "post_grad_custom_post_pass"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("configs") / "out.json"
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("configs.py")), str(out)],
        env={key: value for key, value in os.environ.items() if not key.startswith("VLLM_")},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {**json.loads(out.read_text()), "log": done.stdout + done.stderr}


FORMS = [
    "flag",
    "environment",
    "named",
    "named_as_option",
    "serve_flag",
    "serve_named",
    "serve_named_short",
]


@pytest.mark.parametrize("name", [*FORMS, "named_with_settings"])
def test_each_form_of_the_flag_alone_switches_on(outcomes: dict[str, Any], name: str) -> None:
    found = outcomes[name]
    assert "error" not in found
    assert PASS_SLOT in found["passes"]
    assert found["worker"].endswith("NworCPUWorker")
    assert found["named"] == {}
    assert found["additional"]["nwor"]["mode"] == "stage"


def test_all_forms_of_the_flag_have_one_cache_key(outcomes: dict[str, Any]) -> None:
    assert len({outcomes[name]["hash"] for name in FORMS}) == 1


def test_without_the_flag_the_engine_is_vllms_own(outcomes: dict[str, Any]) -> None:
    found = outcomes["none"]
    assert PASS_SLOT not in found["passes"]
    assert found["worker"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert found["additional"] == {}


def test_stage_and_off_and_none_have_three_cache_keys(outcomes: dict[str, Any]) -> None:
    assert len({outcomes[name]["hash"] for name in ("flag", "off", "none")}) == 3


def test_a_changed_pass_has_another_cache_key(outcomes: dict[str, Any]) -> None:
    """Through its uuid: the settings are the same."""
    assert outcomes["another_uuid"]["additional"] == outcomes["flag"]["additional"]
    assert outcomes["another_uuid"]["hash"] != outcomes["flag"]["hash"]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("enforce_eager", "enforce_eager"),
        ("no_speculation", "speculative_config"),
        ("pipeline", "pipeline parallelism"),
        ("kv_transfer", "kv_transfer_config"),
        ("fast_prefill", "kv_sharing_fast_prefill"),
        ("unknown_setting", "'modus'"),
        ("conflict", "VLLM_NWOR_MODE"),
        ("named_against_flag", "additional_config['nwor']['mode'] is 'off'"),
        ("named_against_flag", f"compilation_config.inductor_passes['{PASS_SLOT}']"),
        ("named_against_environment", "VLLM_NWOR_MODE is 'off'"),
        ("named_in_another_slot", f"expected under '{PASS_SLOT}'"),
        ("unknown_variable", "unknown environment variable VLLM_NWOR_MOD;"),
        ("breakable", "VLLM_USE_BREAKABLE_CUDAGRAPH=1"),
        ("no_compilation", "compilation mode NONE"),
    ],
)
def test_refusals(outcomes: dict[str, Any], name: str, named: str) -> None:
    assert outcomes[name]["error"].startswith("ConfigError")
    assert named in outcomes[name]["error"]


def test_not_strict_runs_vllms_own_engine_and_says_so(outcomes: dict[str, Any]) -> None:
    assert outcomes["not_strict"]["worker"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert "It runs without NWOR" in outcomes["log"]


def test_vllms_own_compile_mode_takes_the_pass() -> None:
    """Its backend asserts that the pass is an InductorPass, and asks it about each range."""
    from vllm.compilation.passes.inductor_pass import InductorPass

    from nwor_compile.passes.layer_ops import LayerOps
    from nwor_compile.vllm_adapter.graph_pass import VllmNworPass, register_with_vllm

    register_with_vllm()
    found = VllmNworPass(LayerOps(), strict=True)
    assert isinstance(found, InductorPass)
    assert found.is_applicable_for_range(None)
