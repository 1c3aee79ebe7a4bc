"""`--gpu-record FILE`: the outcome of the GPU tests with device, versions, date and command."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", type=Path, help="write the outcome of the GPU tests here")
    parser.addoption("--gpu-record-note", default="", help="a remark kept in the record")


def arguments() -> list[str]:
    """pytest's arguments without those of this file."""
    given, kept = iter(sys.argv[1:]), []
    for argument in given:
        if argument in ("--gpu-record", "--gpu-record-note"):
            next(given, None)
        else:
            kept.append(argument)
    return kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    path: Path | None = terminalreporter.config.getoption("--gpu-record")
    if path is None or not torch.cuda.is_available():
        return
    import triton

    outcomes = {
        report.nodeid: outcome
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
    }
    record = {
        "device": torch.cuda.get_device_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python -m pytest " + " ".join(arguments()),
        "note": terminalreporter.config.getoption("--gpu-record-note"),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("NWOR_")},
        "counts": dict(Counter(outcomes.values())),
        "not_passed": sorted(name for name, outcome in outcomes.items() if outcome != "passed"),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


@pytest.fixture
def graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window is decided in one launch: graphs are captured for few requests too."""
    monkeypatch.setattr("nwor_compile.validator.fits", lambda requests, ids: False)


@pytest.fixture(params=["one launch", "graph"])
def deciding(request: pytest.FixtureRequest) -> str:
    """How windows of few requests are decided; by graphs only if `warm_up` was called."""
    if request.param == "graph":
        request.getfixturevalue("graphs_alone")
    return str(request.param)
