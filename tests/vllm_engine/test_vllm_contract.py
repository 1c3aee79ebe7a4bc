"""The contract check itself, on small packages, and on the installed vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nwor_compile.vllm_adapter import contract
from nwor_compile.vllm_adapter.contract import CustomOp, Function, Names, mismatches

SOURCE = """
class Runner:
    field: int = 0

    def step(self, logits, metadata=None): ...


def write(key, layer): ...


direct_register_custom_op(op_name="write", op_func=write, mutates_args=["key"])
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "runner.py").write_text(SOURCE)
    return tmp_path


def broken(monkeypatch: pytest.MonkeyPatch, root: Path, *entries: object) -> list[str]:
    monkeypatch.setattr(contract, "CONTRACT", entries)
    return mismatches("0.32.0", root)


def test_a_kept_contract_is_silent(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    assert not broken(
        monkeypatch,
        package,
        Function("runner.py", "Runner.step", ("self", "logits")),
        Function("runner.py", "write", ("key", "layer"), exact=True),
        Names("runner.py", "Runner", ("field",)),
        CustomOp("runner.py", "write", ("key",)),
    )


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (Function("runner.py", "Runner.step", ("self", "x")), r"takes \(self, logits, metadata\)"),
        (Function("runner.py", "Runner.step", ("self", "logits"), exact=True), "expected"),
        (Function("runner.py", "Runner.gone", ("self",)), "Runner.gone is missing"),
        (Function("gone.py", "f", ()), "the file is missing"),
        (Names("runner.py", "Runner", ("field", "other")), "Runner has no other"),
        (CustomOp("runner.py", "write", ()), "op write mutates"),
        (CustomOp("runner.py", "read", ()), "op read is not registered"),
    ],
)
def test_a_mismatch_names_version_and_what(
    monkeypatch: pytest.MonkeyPatch, package: Path, entry: object, named: str
) -> None:
    (problem,) = broken(monkeypatch, package, entry)
    assert re.search(named, problem)
    assert "vLLM 0.32.0" in problem
    assert getattr(entry, "path", "") in problem


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0"])
def test_versions_outside_the_range_are_refused(
    monkeypatch: pytest.MonkeyPatch, package: Path, version: str
) -> None:
    monkeypatch.setattr(contract, "CONTRACT", ())
    (problem,) = mismatches(version, package)
    assert "supported are 0.26" in problem


@pytest.mark.vllm
def test_the_installed_vllm_keeps_the_contract() -> None:
    version, root = contract.installed()
    assert mismatches(version, root) == []
    assert contract.was_run(version)
