"""`tensor_parallel.py` as a test. Needs two GPUs and vLLM; takes about three minutes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks need two GPUs"),
]


def test_two_ranks_equal_stock_and_refuse_a_window_together(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    script = Path(__file__).with_name("tensor_parallel.py")
    command = [sys.executable, str(script), "--record", str(record), "--seconds", "360"]
    subprocess.run(command, check=False, timeout=390)
    assert json.loads(record.read_text())["problems"] == []
