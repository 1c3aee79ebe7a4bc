"""`first_light.py` with the tiny models, as a test. Needs a GPU and vLLM; takes two minutes."""

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


def test_staged_engines_equal_direct_ones_and_leave_no_rejected_row(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    script = Path(__file__).with_name("first_light.py")
    command = [sys.executable, str(script), "--record", str(record), "--engines", "tiny,v1"]
    subprocess.run(command, check=True, timeout=600)
    assert json.loads(record.read_text())["failures"] == []
