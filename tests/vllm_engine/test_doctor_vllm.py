"""`nwor doctor --vllm` beside the installed vLLM: what an engine would be made of, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pool import environment

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.usefixtures("a_core"),
]

# A model whose attention has ALiBi biases; its weights are never asked for.
BLOOM = {
    "architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": 64, "n_head": 4,
    "n_layer": 2, "vocab_size": 256, "torch_dtype": "float32",
}  # fmt: skip


def doctor(cache: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and diagnosis."""
    done = subprocess.run(
        [sys.executable, "-m", "nwor_compile.cli", "doctor", "--quick", "--json", *arguments],
        env=environment(cache, {}), capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def checks_of(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in found["checks"]}


def test_the_installed_vllm_is_known_and_an_engine_is_judged_without_starting(
    compile_cache: str,
) -> None:
    code, found = doctor(compile_cache, "--vllm", "tiny")
    checks = checks_of(found)
    engine = checks["vLLM engine of tiny"]
    assert code == 0, engine
    assert checks["vLLM"]["status"] in ("ok", "info")
    assert checks["vLLM plugin 'vllm.general_plugins: nwor'"]["status"] == "ok"
    for wanted in ("4 layers staged, 0 direct", "V1 runner", "NworCPUWorker", "VllmNworPass"):
        assert wanted in engine["detail"]
    layers = [each for each in found["decisions"] if each["graph"] == "vLLM tiny"]
    assert [each["write"] for each in layers] == [
        f"model.layers.{k}.self_attn.attn" for k in range(4)
    ]
    assert all(each["staged"] and "NworCPUImpl" in each["readers"][0] for each in layers)


def test_a_started_engine_shows_the_drafters_layer_too(compile_cache: str) -> None:
    _, found = doctor(compile_cache, "--vllm", "tiny", "--start-engine")
    checks = checks_of(found)
    assert "4 layers staged, 1 direct" in checks["vLLM engine of tiny"]["detail"]
    assert "CPUModelRunner ran; staged writes called" in checks["vLLM engine"]["detail"]
    (direct,) = [e for e in found["decisions"] if e["graph"] == "vLLM tiny" and not e["staged"]]
    assert direct["write"].startswith("draft_model.")
    assert "drafter's layer" in direct["reason"]


def test_a_model_that_cannot_be_staged_is_refused_by_name(
    compile_cache: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BLOOM))
    code, found = doctor(compile_cache, "--vllm", str(tmp_path))
    engine = checks_of(found)[f"vLLM engine of {tmp_path}"]
    assert (code, engine["status"]) == (1, "fail")
    assert "no ALiBi" in engine["detail"]
    assert "unset the nwor flag for this model" in engine["detail"]
