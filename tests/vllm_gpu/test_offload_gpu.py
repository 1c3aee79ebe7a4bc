"""Offloading as a test. Needs a GPU and vLLM; takes about two minutes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


@pytest.mark.timeout(600)
def test_stored_blocks_are_what_their_tokens_make(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    script = Path(__file__).with_name("offload.py")
    command = [sys.executable, str(script), "--record", str(record)]
    subprocess.run(command, check=False, timeout=590)
    rows = json.loads(record.read_text())["rows"]
    assert {row["case"]: row["problems"] for row in rows} == {
        name: [] for name in ("eagle", "eagle.sync", "draft", "eagle.v1")
    }
