"""The flag and what it refuses, on light fakes: no engine, and most of it without vLLM."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import nwor_compile
from nwor_compile.config import ENVIRONMENT
from nwor_compile.errors import ConfigError
from nwor_compile.vllm_adapter import configure as module
from nwor_compile.vllm_adapter import contract
from nwor_compile.vllm_adapter.configure import configure
from nwor_compile.vllm_adapter.graph_pass import VllmNworPass
from nwor_compile.vllm_adapter.refusals import CPU_WORKER, layer_refusal, refusals
from nwor_compile.vllm_adapter.settings import PASS_SLOT, requested


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*ENVIRONMENT.values(), "VLLM_USE_BREAKABLE_CUDAGRAPH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(contract, "installed", lambda: ("0.32.0", Path("/nowhere")))
    monkeypatch.setattr(contract, "mismatches", lambda version, root: [])


def engine(additional: Any = None, **changes: Any) -> Any:
    """A VllmConfig's outline as the CPU platform leaves it; `section__field` changes one field."""
    config = SimpleNamespace(
        additional_config={} if additional is None else additional,
        device_config=SimpleNamespace(device_type="cpu"),
        parallel_config=SimpleNamespace(
            worker_cls=CPU_WORKER,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            enable_dbo=False,
            ubatch_size=0,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        model_config=SimpleNamespace(disable_cascade_attn=True, enforce_eager=False, use_mla=False),
        use_v2_model_runner=False,
        kv_transfer_config=None,
        speculative_config=SimpleNamespace(method="draft_model"),
        compilation_config=SimpleNamespace(
            mode=2,
            backend="inductor",
            inductor_compile_config={},
            inductor_passes={},
            pass_config=SimpleNamespace(),
        ),
    )
    for path, value in changes.items():
        *owners, field = path.split("__")
        owner = config
        for name in owners:
            owner = getattr(owner, name)
        setattr(owner, field, value)
    return config


def configured(*args: Any, **changes: Any) -> Any:
    config = engine(*args, **changes)
    assert configure(config) == []
    return config


def named(field: str = "inductor_passes", slot: str = PASS_SLOT, value: Any = None) -> Any:
    """As vLLM leaves a CompilationConfig that names the pass."""
    value = "nwor_compile.vllm_pass" if value is None else value
    compilation = SimpleNamespace(
        mode=2, backend="inductor", inductor_passes={}, inductor_compile_config={},
        pass_config=SimpleNamespace(),
    )  # fmt: skip
    getattr(compilation, field)[slot] = value
    if field == "inductor_passes":
        wrapped = SimpleNamespace(callable=nwor_compile.vllm_pass)
        compilation.inductor_compile_config[slot] = wrapped
    return compilation


STAGE = {"nwor": {"mode": "stage"}}
NAMED = f"compilation_config.inductor_passes['{PASS_SLOT}']"


def test_without_the_flag_nothing_changes() -> None:
    config = engine()
    assert configure(config) == []
    assert config.parallel_config.worker_cls == CPU_WORKER
    assert config.compilation_config.inductor_compile_config == {}
    assert config.additional_config == {}


def test_the_flag_installs_the_pass_and_the_worker() -> None:
    config = configured(STAGE)
    assert PASS_SLOT in config.compilation_config.inductor_compile_config
    assert config.parallel_config.worker_cls == module.NWOR_WORKER


def test_off_brings_the_backend_and_no_pass() -> None:
    config = configured({"nwor": {"mode": "off"}})
    assert config.compilation_config.inductor_compile_config == {}
    assert config.parallel_config.worker_cls == module.NWOR_WORKER


def test_off_needs_no_speculation() -> None:
    configure(engine({"nwor": {"mode": "off"}}, speculative_config=None))


def test_the_environment_switches_on_and_enters_the_cache_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", " Stage ")
    config = configured()
    assert config.additional_config["nwor"] == {"mode": "stage", "strict": True, "rope": "fused"}


def test_run_time_settings_stay_out_of_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_SCV_MODE", "adaptive")
    monkeypatch.setenv("VLLM_NWOR_DEBUG", "1")
    config = configured(STAGE)
    assert config.additional_config["nwor"] == {"mode": "stage", "strict": True, "rope": "fused"}
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


@pytest.mark.parametrize("field", ["inductor_passes", "inductor_compile_config"])
def test_naming_the_pass_asks_for_stage(field: str) -> None:
    by_name = configured(compilation_config=named(field))
    by_flag = configured(STAGE)
    compilation = by_name.compilation_config
    assert isinstance(compilation.inductor_compile_config[PASS_SLOT], VllmNworPass)
    assert compilation.inductor_passes == {}, "vLLM would resolve the name again"
    assert by_name.additional_config == by_flag.additional_config
    assert by_name.parallel_config.worker_cls == module.NWOR_WORKER


def test_additional_config_may_add_settings_to_the_name() -> None:
    config = configured({"nwor": {"scv": "adaptive"}}, compilation_config=named())
    settings = requested(config.additional_config)
    assert settings is not None
    assert (settings.mode, settings.scv) == ("stage", "adaptive")


def test_the_name_against_additional_config_names_both() -> None:
    config = engine({"nwor": {"mode": "off"}}, compilation_config=named())
    with pytest.raises(ConfigError, match="conflicting switches") as raised:
        configure(config)
    assert NAMED in str(raised.value)
    assert "additional_config['nwor']['mode'] is 'off'" in str(raised.value)


def test_the_name_against_the_environment_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_NWOR_MODE", "off")
    with pytest.raises(ConfigError, match="conflicting switches") as raised:
        configure(engine(compilation_config=named()))
    assert NAMED in str(raised.value)
    assert "VLLM_NWOR_MODE is 'off'" in str(raised.value)


def test_the_name_in_another_slot_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"'nwor'.*expected under '{PASS_SLOT}'"):
        configure(engine(compilation_config=named(slot="nwor")))


def test_a_refused_engine_that_is_not_strict_keeps_no_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = engine(
        {"nwor": {"strict": False}}, compilation_config=named(), speculative_config=None
    )
    assert len(configure(config)) == 1
    assert "runs without NWOR" in caplog.text
    assert config.compilation_config.inductor_compile_config == {}
    assert config.compilation_config.inductor_passes == {}


def test_another_pass_by_name_is_left_alone() -> None:
    config = engine(compilation_config=named(value="my.other_pass"))
    config.compilation_config.inductor_compile_config[PASS_SLOT] = SimpleNamespace(callable=print)
    assert configure(config) == []
    assert config.compilation_config.inductor_passes == {PASS_SLOT: "my.other_pass"}


def test_the_name_without_the_plugin_is_an_error() -> None:
    """vLLM resolves and calls it, if it is told not to load the plugin."""
    with pytest.raises(ConfigError, match="VLLM_PLUGINS"):
        nwor_compile.vllm_pass(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("variable", ["VLLM_NWOR_MOD", "VLLM_SCV_MODES"])
def test_a_misspelt_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "stage")
    with pytest.raises(ConfigError, match=f"{variable}; expected VLLM_NWOR_MODE"):
        requested({})


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
    "enforce_eager": ({"model_config__enforce_eager": True}, "enforce_eager.*turn it off"),
    "not compiled": ({"compilation_config__mode": 0}, "TORCH_COMPILE_DISABLE.*compile it"),
    "eager backend": ({"compilation_config__backend": "eager"}, "use 'inductor'"),
    "fused rope and write": (
        {"compilation_config__pass_config__fuse_rope_kvcache": True},
        "fuse_rope_kvcache.*set it to false",
    ),
    "fused norm, rope and write": (
        {"compilation_config__pass_config__fuse_qk_norm_rope_kvcache": True},
        "fuse_qk_norm_rope_kvcache",
    ),
    "fused quantised output": (
        {"compilation_config__pass_config__fuse_attn_quant": True},
        "fuse_attn_quant",
    ),
    "MLA": ({"model_config__use_mla": True}, "MLA layers"),
    "sleep mode": ({"model_config__enable_sleep_mode": True}, "enable_sleep_mode"),
    "cascade attention": ({"model_config__disable_cascade_attn": False}, "disable_cascade_attn"),
    "V2 runner": ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
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
    "dual batch overlap": ({"parallel_config__enable_dbo": True}, "turn ubatching off"),
    "micro-batches": ({"parallel_config__ubatch_size": 2}, "turn ubatching off"),
    "taken slot": (
        {"compilation_config__inductor_compile_config": {PASS_SLOT: object()}},
        PASS_SLOT,
    ),
    "KV connector": ({"kv_transfer_config": object()}, "remove kv_transfer_config"),
    "fast prefill": ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
    "drafter on the target's cache": (
        {"speculative_config": SimpleNamespace(method="gemma4_mtp")},
        "gemma4_mtp",
    ),
    "own worker": ({"parallel_config__worker_cls": "my.Worker"}, "my.Worker"),
    "another device": ({"device_config__device_type": "xpu"}, "unset the nwor flag"),
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
    before = dict(config.compilation_config.inductor_compile_config)
    (reason,) = configure(config)
    assert re.search(named, reason)
    assert re.search(named, caplog.text)
    assert "runs without NWOR" in caplog.text
    assert config.parallel_config.worker_cls == worker
    assert config.compilation_config.inductor_compile_config == before


def test_all_reasons_are_given_at_once() -> None:
    config = engine(STAGE, speculative_config=None, kv_transfer_config=object())
    assert len(refusals(config)) == 2


def test_breakable_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They run the model without compiling it; vLLM sets the variable itself for some models."""
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ConfigError, match=r"VLLM_USE_BREAKABLE_CUDAGRAPH=1.*set it to 0"):
        configure(engine(STAGE))


def layer(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "impl": SimpleNamespace(),
        "attn_backend": SimpleNamespace(
            forward_includes_kv_cache_update=False, get_name=lambda: "CPU_ATTN"
        ),
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"attn_backend": SimpleNamespace(get_name=lambda: "FLEX_ATTENTION")},
            "attention backend FLEX_ATTENTION was never seen to read staged rows",
        ),
        (
            {"attn_backend": SimpleNamespace(forward_includes_kv_cache_update=True)},
            "inside its forward.*choose another attention backend",
        ),
        ({"kv_cache_update_bypass": True}, "kv_cache_update_bypass"),
    ],
)
def test_layers_that_cannot_be_staged(changes: dict[str, Any], named: str) -> None:
    assert layer_refusal("a.0", layer()) == ""
    assert re.search(f"layer a.0: .*{named}", layer_refusal("a.0", layer(**changes)))


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
    configured(STAGE)
    assert "never run with vLLM 0.30.1" in caplog.text


def test_the_modules_of_the_switch_import_without_vllm() -> None:
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "import nwor_compile\n"
        "for name in ('configure', 'contract', 'graph_pass', 'metrics', 'patches', 'plugin'):\n"
        "    __import__('nwor_compile.vllm_adapter.' + name)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ}, timeout=120)
