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


@pytest.mark.parametrize("name", ["flag", "environment"])
def test_the_flag_alone_switches_on(outcomes: dict[str, Any], name: str) -> None:
    found = outcomes[name]
    assert "error" not in found
    assert PASS_SLOT in found["passes"]
    assert found["worker"].endswith("NworCPUWorker")


def test_without_the_flag_the_engine_is_vllms_own(outcomes: dict[str, Any]) -> None:
    found = outcomes["none"]
    assert PASS_SLOT not in found["passes"]
    assert found["worker"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert found["additional"] == {}


def test_stage_and_off_and_none_have_three_cache_keys(outcomes: dict[str, Any]) -> None:
    assert len({outcomes[name]["hash"] for name in ("flag", "off", "none")}) == 3
    assert outcomes["flag"]["hash"] == outcomes["environment"]["hash"]


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
    ],
)
def test_refusals(outcomes: dict[str, Any], name: str, named: str) -> None:
    assert outcomes[name]["error"].startswith("ConfigError")
    assert named in outcomes[name]["error"]


def test_not_strict_runs_vllms_own_engine_and_says_so(outcomes: dict[str, Any]) -> None:
    assert outcomes["not_strict"]["worker"] == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert "It runs without NWOR" in outcomes["log"]
