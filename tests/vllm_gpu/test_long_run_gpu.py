"""A short long run as a test. Needs a GPU and vLLM; takes about four minutes."""

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
    pytest.mark.timeout(700),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]


def test_staged_engines_lose_nothing_in_a_long_run(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    script = Path(__file__).with_name("long_run.py")
    command = [sys.executable, str(script), "--record", str(record), "--tokens", "10000"]
    # The soak's memory is judged from its second minute on.
    done = subprocess.run([*command, "--minutes", "2.5"], timeout=650, check=False)
    assert json.loads(record.read_text())["problems"] == []
    assert done.returncode == 0
