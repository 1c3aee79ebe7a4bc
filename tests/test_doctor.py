"""What `nwor doctor` finds, and that it says what to do when something is missing."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._inductor import cpp_builder, exc
from typer.testing import CliRunner

from nwor_compile.cli import app
from nwor_compile.doctor import Diagnosis, checks, diagnose, show, trial
from nwor_compile.doctor.diagnosis import Check
from nwor_compile.doctor.probes import arguments_of, probe_ops
from nwor_compile.ops import OP_NAMES

runner = CliRunner()

FACTORY = """
import torch
from nwor_compile.doctor.sample import sample

def good():
    return sample()

def broken():
    raise RuntimeError("no such checkpoint")

def breaks():
    model, inputs = sample()
    def run(*args):
        out = model(*args)
        torch._dynamo.graph_break()
        return out[0] + 1
    return run, inputs

def plain():
    return torch.nn.Linear(4, 4), (torch.zeros(1, 4),)
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "doctor_factory.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return "doctor_factory"


def status_of(found: Diagnosis, name: str) -> Check:
    return next(check for check in found.checks if check.name == name)


def test_this_installation_is_healthy() -> None:
    found = diagnose(compile_sample=False)
    assert found.healthy, [check for check in found.checks if check.status == "fail"]


def test_every_op_has_a_probe() -> None:
    own = [n for n in OP_NAMES if not n.startswith("vllm_")]
    for name in own:
        arguments_of(name)
    rows = {row.op: row for row in probe_ops()}
    for name in own:
        assert rows[name].reference == "ok"
        assert rows[name].fake == "ok"
        assert not rows[name].failed
        assert rows[name].triton != "no kernel"


def test_the_sample_shows_staged_and_refused_with_a_reason() -> None:
    check, reports = trial.try_sample(compiled=False)
    assert check.status == "ok", check.detail
    decisions = [d for report in reports for d in trial.decisions(report)]
    assert [d.staged for d in decisions] == [True, True, False]
    assert all(d.readers for d in decisions[:2])
    assert "does not read staging" in decisions[2].reason


def test_the_sample_compiles_with_inductor() -> None:
    check, _ = trial.try_sample(compiled=True)
    assert check.status == "ok", check.detail
    assert "compiled by Inductor" in check.detail


def test_json_is_the_whole_diagnosis() -> None:
    result = runner.invoke(app, ["doctor", "--json", "--quick"])
    assert result.exit_code == 0, result.output
    found = Diagnosis.model_validate(json.loads(result.stdout))
    assert {check.name for check in found.checks} >= {"Python", "torch", "C++ compiler", "ops"}


def test_tables_name_ops_settings_and_decisions() -> None:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(diagnose(compile_sample=False), console)
    text = console.export_text()
    for wanted in ("torch.ops.nwor", "verify_attention.window", "settings in force", "staged"):
        assert wanted in text


def test_a_missing_compiler_fails_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_found() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none_found)
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "apt install g++" in result.output
    # The pass is still tried, on Dynamo's graph.
    assert "not compiled" in " ".join(result.output.split())


def test_settings_say_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SCV_MODE", "adaptive")
    _, settings = checks.check_settings()
    sources = {setting.name: (setting.value, setting.source) for setting in settings}
    assert sources["scv"] == ("adaptive", "environment variable VLLM_SCV_MODE")
    assert sources["strict"][1] == "default"


def test_a_wrong_setting_fails_and_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "sometimes")
    check, settings = checks.check_settings()
    assert (check.status, settings) == ("fail", [])
    assert "VLLM_NWOR_MODE" in check.detail


def test_mode_off_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "off")
    assert checks.check_settings()[0].status == "warn"


def test_an_old_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    check = checks.check_torch()
    assert check.status == "fail"
    assert "2.11" in check.advice


def test_a_missing_entry_point_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    check = checks.check_entry_point()
    assert check.status == "fail"
    assert "pip install" in check.advice


def test_a_gpu_that_torch_cannot_use_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(checks, "_nvidia_smi", lambda: "NVIDIA H200, driver 570.1")
    gpu = checks.check_devices()[-1]
    assert gpu.status == "warn"
    assert "CUDA" in gpu.advice


def test_triton_is_needed_with_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_version", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.check_triton().status == "info"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert checks.check_triton().status == "fail"


def test_a_model_of_the_users_is_judged(factory: str) -> None:
    found = diagnose(f"{factory}:good", compile_sample=False)
    check = status_of(found, f"pass on {factory}:good")
    assert check.status == "warn"  # one write of the sample stays direct
    mine = [d for d in found.decisions if d.graph == f"{factory}:good"]
    assert [d.staged for d in mine] == [True, True, False]


def test_a_graph_break_is_named_and_the_pieces_are_judged(factory: str) -> None:
    check, reports = trial.try_model(f"{factory}:breaks")
    assert check.status == "warn"
    assert "not one full graph" in check.detail
    assert sum(len(report.rewritten) for report in reports) == 2


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("doctor_factory:broken", "no such checkpoint"),
        ("doctor_factory:nothing", "nothing"),
        ("no_such_module:f", "no_such_module"),
        ("doctor_factory", "module:function"),
    ],
)
def test_a_factory_that_fails_is_reported(factory: str, path: str, expected: str) -> None:
    check, reports = trial.try_model(path)
    assert (check.status, reports) == ("fail", [])
    assert expected in check.detail
    assert "(model, example_inputs)" in check.advice


def test_a_model_without_cache_writes_points_to_the_table(factory: str) -> None:
    check, _ = trial.try_model(f"{factory}:plain")
    assert check.status == "warn"
    assert "register_write" in check.advice
