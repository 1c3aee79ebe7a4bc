"""Settings: argument over environment over default; errors that say what to do."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from nwor_compile import ConfigError, NworConfig
from nwor_compile.config import ENVIRONMENT


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)


def test_the_defaults() -> None:
    config = NworConfig.load()
    assert config.model_dump() == {
        "mode": "stage", "scv": "graph", "strict": False, "debug": False, "poison": "off",
        "attention": "auto", "rope": "fused",
    }  # fmt: skip


CASES = [
    ("mode", "VLLM_NWOR_MODE", "off", "off", "stage"),
    ("scv", "VLLM_SCV_MODE", "adaptive", "adaptive", "off"),
    ("debug", "VLLM_NWOR_DEBUG", "1", True, False),
]


@pytest.mark.parametrize(("name", "variable", "text", "value", "argument"), CASES)
def test_the_environment_wins_over_the_default_and_an_argument_over_both(
    name: str,
    variable: str,
    text: str,
    value: object,
    argument: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    default = getattr(NworConfig(), name)
    assert default != value
    monkeypatch.setenv(variable, text)
    assert getattr(NworConfig.load(), name) == value
    assert getattr(NworConfig.load(**{name: argument}), name) == argument


@pytest.mark.parametrize("text", ["OFF", "Off", " off ", "off\n"])
def test_the_environment_may_be_written_in_any_case(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", text)
    assert NworConfig.load().mode == "off"


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_variable_is_no_setting(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ENVIRONMENT.values():
        monkeypatch.setenv(variable, text)
    assert NworConfig.load() == NworConfig()


def test_a_bad_variable_does_not_matter_where_an_argument_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "maybe")
    assert NworConfig.load(mode="off").mode == "off"


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("VLLM_NWOR_MODE", r"'mode' \(environment variable VLLM_NWOR_MODE\): got 'maybe'; "
                           r"expected off or stage$"),
        ("VLLM_SCV_MODE", r"'scv' \(environment variable VLLM_SCV_MODE\): got 'maybe'; "
                          r"expected off, graph or adaptive$"),
        ("VLLM_NWOR_DEBUG", r"'debug' \(environment variable VLLM_NWOR_DEBUG\): got 'maybe'; "
                            r"expected true, 1, false or 0$"),
    ],
)  # fmt: skip
def test_a_bad_variable_is_named_with_the_values_it_may_have(
    variable: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(ConfigError, match=message):
        NworConfig.load()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "fast"}, r"'mode' \(argument\): got 'fast'; expected off or stage$"),
        ({"poison": "inf"}, r"'poison' \(argument\): got 'inf'; expected off, nan or large$"),
        ({"strict": "perhaps"}, r"'strict' \(argument\): got 'perhaps'; expected true, 1, false"),
        ({"modes": "off"}, r"'modes' \(argument\): got 'off'; the settings are mode, scv, strict"),
    ],
)
def test_a_bad_argument_is_named_with_the_values_it_may_have(
    setting: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        NworConfig.load(**setting)
    assert issubclass(ConfigError, ValueError)


def test_settings_cannot_change_under_a_window() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        NworConfig().mode = "off"


def test_run_time_settings_stay_out_of_the_compile_key() -> None:
    key = NworConfig().compile_key()
    assert key == {"mode": "stage", "strict": False, "rope": "fused"}
    assert NworConfig(scv="off", debug=True, poison="large").compile_key() == key
    assert NworConfig(mode="off").compile_key() != key
    assert NworConfig(strict=True).compile_key() != key
