"""A few cases of the matrix as a test. Needs a GPU and vLLM; takes about two minutes."""

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
CASES = ("tiny.eagle", "tiny.eagle.auto", "tiny.draft", "gemma3.eagle")


def test_staged_engines_equal_stock_ones_and_leave_no_rejected_row(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    script = Path(__file__).with_name("matrix.py")
    command = [sys.executable, str(script), "--record", str(record), "--cases", *CASES]
    subprocess.run(command, check=True, timeout=600)
    rows = json.loads(record.read_text())["rows"]
    assert {row["case"]: row["state"] for row in rows} == dict.fromkeys(CASES, "tested")
