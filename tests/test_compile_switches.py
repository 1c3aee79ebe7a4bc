"""Switching the pass on and off: options, backend, environment; what conflicts and what is bad."""

from __future__ import annotations

import importlib.metadata

import graphs
import pytest
import torch
from graphs import layer

import nwor_compile
from nwor_compile import ConfigError, NworConfig, VisibilityError
from nwor_compile.backend import nwor
from nwor_compile.passes import NworPass


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VLLM_NWOR_MODE", "VLLM_SCV_MODE", "VLLM_NWOR_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    torch._dynamo.reset()


def test_the_options_hold_the_pass_by_default() -> None:
    options = nwor_compile.compile_options()
    assert list(options) == ["post_grad_custom_pre_pass"]
    assert isinstance(options["post_grad_custom_pre_pass"], NworPass)
    assert not options["post_grad_custom_pre_pass"].strict


def test_other_options_are_kept() -> None:
    options = nwor_compile.compile_options(NworConfig(strict=True), max_autotune=False)
    assert options["max_autotune"] is False
    assert options["post_grad_custom_pre_pass"].strict


def test_mode_off_leaves_no_trace_in_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nwor_compile.compile_options(NworConfig(mode="off"), epilogue_fusion=True) == {
        "epilogue_fusion": True
    }
    monkeypatch.setenv("VLLM_NWOR_MODE", "OFF")
    assert nwor_compile.compile_options() == {}


def test_an_option_that_is_taken_raises() -> None:
    mine = NworPass()
    with pytest.raises(ConfigError, match="post_grad_custom_pre_pass is taken"):
        nwor_compile.compile_options(post_grad_custom_pre_pass=mine)
    off = nwor_compile.compile_options(NworConfig(mode="off"), post_grad_custom_pre_pass=mine)
    assert off == {"post_grad_custom_pre_pass": mine}


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("VLLM_NWOR_MODE", "on", "stage"),
        ("VLLM_SCV_MODE", "fast", "adaptive"),
        ("VLLM_NWOR_DEBUG", "maybe", "true"),
    ],
)
def test_a_bad_environment_variable_is_named(
    variable: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    for use in (NworConfig.load, nwor_compile.compile_options):
        with pytest.raises(ConfigError) as error:
            use()
        assert variable in str(error.value)
        assert repr(value) in str(error.value)
        assert allowed in str(error.value)


def test_the_environment_is_read_and_arguments_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "off")
    monkeypatch.setenv("VLLM_SCV_MODE", "adaptive")
    monkeypatch.setenv("VLLM_NWOR_DEBUG", "1")
    config = NworConfig.load()
    assert (config.mode, config.scv, config.debug) == ("off", "adaptive", True)
    config = NworConfig.load(mode="stage", scv="off", debug=False)
    assert (config.mode, config.scv, config.debug) == ("stage", "off", False)


def test_the_backend_is_found_through_its_entry_point() -> None:
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="nwor")
    assert entry.load() is nwor
    assert "nwor" in torch._dynamo.list_backends()


def test_the_backend_rejects_inductors_modes_and_unknown_settings() -> None:
    module = torch.fx.symbolic_trace(lambda x: x + 1)
    with pytest.raises(ConfigError, match="mode='max-autotune'"):
        nwor(module, [torch.ones(2)], mode="max-autotune")
    with pytest.raises(ConfigError, match=r"nwor setting 'mode' \(argument\): got 'loud'"):
        nwor(module, [torch.ones(2)], options={"mode": "loud"})


def reads_more(step: graphs.Step, *caches: torch.Tensor) -> torch.Tensor:
    return layer(step, *caches) + caches[0].sum()


@pytest.mark.parametrize("kind", ["options", "backend"])
def test_strict_raises_while_compiling(kind: str) -> None:
    if kind == "options":
        options = nwor_compile.compile_options(NworConfig(strict=True))
        compiled = torch.compile(reads_more, options=options)
    else:
        compiled = torch.compile(reads_more, backend="nwor", options={"strict": True})
    with pytest.raises(Exception, match=r"stays direct|cannot be staged") as error:
        compiled(graphs.verify_step(), *graphs.make_caches())
    chain = [error.value, error.value.__cause__, getattr(error.value, "inner_exception", None)]
    assert any(isinstance(link, VisibilityError) for link in chain)


def test_a_refusal_is_logged_by_the_pass_and_kept_as_a_report(
    caplog: pytest.LogCaptureFixture,
) -> None:
    graph = graphs.trace(reads_more, graphs.verify_step(), *graphs.make_caches(), form="v2")
    pass_ = NworPass()
    with caplog.at_level("WARNING", logger="nwor_compile"):
        pass_(graph)
    assert "stays direct" in caplog.text
    assert "sum" in caplog.text
    assert nwor_compile.last_reports()[-1] is pass_.reports[0]
    assert "0 staged, 1 direct" in str(pass_.reports[0])


def test_graphs_are_dumped_before_and_after(tmp_path) -> None:  # type: ignore[no-untyped-def]
    pass_ = NworPass(dump_dir=tmp_path / "dumps")
    graph = graphs.canonical("v2")
    before = str(graph)
    pass_(graph)
    pass_(graphs.canonical("v2"))
    dumps = tmp_path / "dumps"
    assert (dumps / "graph_0.before.txt").read_text() == before
    assert (dumps / "graph_0.after.txt").read_text() == str(graph)
    assert "1 staged, 0 direct" in (dumps / "graph_1.report.txt").read_text()
