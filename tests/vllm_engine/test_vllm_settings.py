"""The flag and what it refuses, on light fakes: no engine, and most of it without vLLM."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nwor_compile.config import ENVIRONMENT
from nwor_compile.errors import ConfigError
from nwor_compile.vllm_adapter import configure as module
from nwor_compile.vllm_adapter import contract
from nwor_compile.vllm_adapter.configure import PASS_SLOT, configure, refusals
from nwor_compile.vllm_adapter.settings import requested


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ENVIRONMENT.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(contract, "installed", lambda: ("0.32.0", Path("/nowhere")))
    monkeypatch.setattr(contract, "mismatches", lambda version, root: [])


def engine(additional: Any = None, **changes: Any) -> Any:
    """A VllmConfig's outline as the CPU platform leaves it; `section__field` changes one field."""
    config = SimpleNamespace(
        additional_config={} if additional is None else additional,
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(
            worker_cls=module.CPU_WORKER,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            ubatch_size=0,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        kv_transfer_config=None,
        speculative_config=SimpleNamespace(method="draft_model"),
        compilation_config=SimpleNamespace(mode=2, backend="inductor", inductor_compile_config={}),
    )
    for path, value in changes.items():
        owner, _, field = path.rpartition("__")
        setattr(getattr(config, owner) if owner else config, field, value)
    return config


STAGE = {"nwor": {"mode": "stage"}}


def test_without_the_flag_nothing_changes() -> None:
    config = engine()
    assert configure(config) is config
    assert config.parallel_config.worker_cls == module.CPU_WORKER
    assert config.compilation_config.inductor_compile_config == {}
    assert config.additional_config == {}


def test_the_flag_installs_the_pass_and_the_worker() -> None:
    config = configure(engine(STAGE))
    assert PASS_SLOT in config.compilation_config.inductor_compile_config
    assert config.parallel_config.worker_cls == module.NWOR_WORKER


def test_off_brings_the_backend_and_no_pass() -> None:
    config = configure(engine({"nwor": {"mode": "off"}}))
    assert config.compilation_config.inductor_compile_config == {}
    assert config.parallel_config.worker_cls == module.NWOR_WORKER


def test_off_needs_no_speculation() -> None:
    configure(engine({"nwor": {"mode": "off"}}, speculative_config=None))


def test_the_environment_switches_on_and_enters_the_cache_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", " Stage ")
    config = configure(engine())
    assert config.additional_config["nwor"] == {"mode": "stage", "strict": True}


def test_run_time_settings_stay_out_of_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SCV_MODE", "adaptive")
    monkeypatch.setenv("VLLM_NWOR_DEBUG", "1")
    config = configure(engine(STAGE))
    assert config.additional_config["nwor"] == {"mode": "stage", "strict": True}
    settings = requested(config.additional_config)
    assert settings is not None
    assert settings.scv == "adaptive"
    assert settings.debug


@pytest.mark.parametrize(
    ("setting", "value", "variable", "text"),
    [
        ("mode", "stage", "VLLM_NWOR_MODE", "off"),
        ("scv", "graph", "VLLM_SCV_MODE", "off"),
        ("debug", False, "VLLM_NWOR_DEBUG", "1"),
    ],
)
def test_conflicting_switches_name_both(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: Any, variable: str, text: str
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError) as raised:
        requested({"nwor": {setting: value}})
    assert variable in str(raised.value)
    assert f"additional_config['nwor']['{setting}']" in str(raised.value)


def test_switches_that_agree_are_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "stage")
    monkeypatch.setenv("VLLM_NWOR_DEBUG", "true")
    assert requested({"nwor": {"mode": "stage", "debug": True}}) is not None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mode": "always"}, "'mode'"),
        ({"modes": "stage"}, "'modes'"),
        ("stage", "expected settings like"),
    ],
)
def test_unknown_settings_are_named(given: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        requested({"nwor": given})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "enforce_eager": ({"compilation_config__mode": 0}, "enforce_eager"),
    "eager backend": ({"compilation_config__backend": "eager"}, "compile it"),
    "no speculation": ({"speculative_config": None}, "speculative_config"),
    "pipeline parallel": ({"parallel_config__pipeline_parallel_size": 2}, "use size 1"),
    "decode context parallel": (
        {"parallel_config__decode_context_parallel_size": 2},
        "decode_context_parallel_size",
    ),
    "prefill context parallel": (
        {"parallel_config__prefill_context_parallel_size": 2},
        "prefill_context_parallel_size",
    ),
    "micro-batches": ({"parallel_config__enable_dbo": True}, "turn ubatching off"),
    "KV connector": ({"kv_transfer_config": object()}, "remove kv_transfer_config"),
    "fast prefill": ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
    "drafter on the target's cache": (
        {"speculative_config": SimpleNamespace(method="gemma4_mtp")},
        "gemma4_mtp",
    ),
    "own worker": ({"parallel_config__worker_cls": "my.Worker"}, "my.Worker"),
    "another device": ({"device_config__device_type": "cuda"}, "unset the nwor flag"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_combinations_say_what_to_change(name: str) -> None:
    changes, named = REFUSED[name]
    with pytest.raises(ConfigError, match=named):
        configure(engine(STAGE, **changes))


@pytest.mark.parametrize("name", REFUSED)
def test_not_strict_runs_without_nwor_and_logs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    changes, named = REFUSED[name]
    config = engine({"nwor": {"mode": "stage", "strict": False}}, **changes)
    worker = config.parallel_config.worker_cls
    configure(config)
    assert named in caplog.text
    assert "runs without NWOR" in caplog.text
    assert config.parallel_config.worker_cls == worker
    assert config.compilation_config.inductor_compile_config == {}


def test_all_reasons_are_given_at_once() -> None:
    config = engine(STAGE, speculative_config=None, kv_transfer_config=object())
    assert len(refusals(config)) == 2


def test_a_taken_pass_slot_is_refused() -> None:
    config = engine(STAGE)
    config.compilation_config.inductor_compile_config[PASS_SLOT] = object()
    with pytest.raises(ConfigError, match=PASS_SLOT):
        configure(config)


def test_an_additional_config_that_is_no_dict_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "stage")
    with pytest.raises(ConfigError, match="use a dict"):
        configure(engine(object()))


def test_a_vllm_that_breaks_the_contract_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "mismatches", lambda version, root: [f"vLLM {version}: no _x"])
    with pytest.raises(ConfigError, match=r"vLLM 0\.32\.0: no _x"):
        configure(engine(STAGE))


def test_a_version_never_run_is_called_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(contract, "installed", lambda: ("0.30.1", Path("/nowhere")))
    configure(engine(STAGE))
    assert "never run with vLLM 0.30.1" in caplog.text


def test_the_package_imports_without_vllm() -> None:
    for name in ("configure", "settings", "graph_pass", "contract", "plugin"):
        assert importlib.util.find_spec(f"nwor_compile.vllm_adapter.{name}") is not None
