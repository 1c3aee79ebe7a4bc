"""The command line: help without heavy imports, exit codes, files."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import nwor_compile
from nwor_compile.bench.core import CompileCost, CoreRecord, window_cost
from nwor_compile.bench.record import Spread, this_machine
from nwor_compile.cli import app

runner = CliRunner()


def test_version() -> None:
    result = runner.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.strip() == f"nwor-compile {nwor_compile.__version__}"


def test_help_names_the_commands() -> None:
    result = runner.invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "doctor", "bench"):
        assert command in result.output


def test_help_imports_neither_demo_nor_doctor_nor_benchmarks() -> None:
    code = (
        "import sys\n"
        "from nwor_compile.cli import app\n"
        "try:\n"
        "    app(['doctor', '--help'])\n"
        "except SystemExit as end:\n"
        "    assert not end.code\n"
        "heavy = ('nwor_compile.demo', 'nwor_compile.doctor', 'nwor_compile.bench', 'matplotlib',\n"
        "         'torch._dynamo', 'torch._inductor')\n"
        "loaded = [m for m in sys.modules if m.startswith(heavy)]\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--model" in done.stdout


def test_demo_help_is_the_demos_own() -> None:
    result = runner.invoke(app, ["demo", "--help"])
    assert result.exit_code == 0
    assert "--show-stale" in result.output


def test_demo_with_a_missing_dependency_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "nwor_compile.demo.run":
            raise ImportError("No module named 'tokenizers'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    result = runner.invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "tokenizers" in result.output
    assert "pip install" in result.output


def test_bench_core_writes_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Compiling 32 layers is the benchmark's business, not a test's: only the windows are real.
    def no_compile(layers: int, compiles: int) -> CompileCost:
        one = Spread.of([1.0] * compiles)
        return CompileCost(
            layers=layers, staged=layers, total_seconds=one, pass_seconds=one, share=one
        )

    monkeypatch.setattr("nwor_compile.bench.core.compile_cost", no_compile)
    target = tmp_path / "records" / "core.json"
    arguments = ["bench", "core", "--layers", "2", "--repeats", "3", "--json", str(target)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    record = CoreRecord.model_validate_json(target.read_text())
    assert record.compile.target == 0.02
    assert [w.requests for w in record.windows] == [1, 8, 32]
    assert json.loads(target.read_text())["machine"]["torch"].startswith(record.machine.torch)


def test_a_window_benchmark_counts_what_it_committed() -> None:
    cost = window_cost(requests=2, drafts=4, layers=2, repeats=3)
    assert cost.acceptance == 0.5
    assert cost.ratio.repeats == 3
    assert cost.ratio.smallest > 0


def test_spread_orders_its_values() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert (spread.smallest, spread.median, spread.largest) == (1.0, 2.0, 3.0)
    assert f"{Spread.of([5.0]):.0f}" == "5 [5, 5]"


def test_a_record_says_where_it_was_made() -> None:
    machine = this_machine()
    assert machine.cpu
    assert machine.torch
    assert machine.date.endswith("+00:00")
