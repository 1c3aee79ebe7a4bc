"""The flag: what the user asked of NWOR, from vLLM's configuration or the environment.

Three forms say the same, and where two of them disagree start fails and names both:

- `--additional-config '{"nwor": {"mode": "stage"}}'`, which can carry the other settings too;
- `--compilation-config '{"inductor_passes": {"post_grad_custom_post_pass":
  "nwor_compile.vllm_pass"}}'`, which asks for mode `stage`;
- VLLM_NWOR_MODE=stage.
"""

from __future__ import annotations

import os
from typing import Any

from nwor_compile.config import ENVIRONMENT, NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.named_pass import NAME, vllm_pass

FIELD = "nwor"
PASS_SLOT = "post_grad_custom_post_pass"
"""Inductor's option for a pass after the others; vLLM keeps a user's pass there on all platforms
but one (`Platform.pass_key`, which the contract checks)."""


def requested(additional_config: Any, compilation_config: Any = None) -> NworConfig | None:
    """The settings in force, or None if NWOR was not asked for.

    A worker needs no `compilation_config`: `configure` has put into `additional_config` what was
    asked there. `strict` is on unless it is turned off: an engine that cannot stage is refused at
    start. Raises ConfigError for an unknown or conflicting setting, naming it and where it is.
    """
    refuse_unknown_variables()
    given = additional_config.get(FIELD) if isinstance(additional_config, dict) else None
    named = where_named(compilation_config)
    if given is None and not named and not os.environ.get(ENVIRONMENT["mode"], "").strip():
        return None
    if given is not None and not isinstance(given, dict):
        raise ConfigError(
            f"additional_config[{FIELD!r}]: expected settings like {{'mode': 'stage'}}, got "
            f"{given!r}"
        )
    settings = dict(given or {})
    if named:
        _agree(named, "stage", settings)
        settings["mode"] = "stage"
    for name, variable in ENVIRONMENT.items():
        from_environment = os.environ.get(variable, "").strip().lower()
        if name in settings and from_environment and not _same(settings[name], from_environment):
            place = named if named and name == "mode" else f"additional_config[{FIELD!r}][{name!r}]"
            raise ConfigError(
                f"conflicting switches: {place} is {settings[name]!r} and {variable} is "
                f"{os.environ[variable]!r}; drop one of them"
            )
    # Here, unlike in a graph of one's own, running direct without saying so is never wanted.
    settings.setdefault("strict", True)
    return NworConfig.load(**settings)


def where_named(compilation_config: Any) -> str:
    """Where a CompilationConfig names `nwor_compile.vllm_pass`; empty if it does not.

    Raises ConfigError where it is named for another slot than Inductor's: no pass runs from there.
    """
    for field in ("inductor_passes", "inductor_compile_config"):
        for slot, value in (getattr(compilation_config, field, None) or {}).items():
            if not _is_the_name(value):
                continue
            place = f"compilation_config.{field}[{slot!r}] ({NAME})"
            if slot != PASS_SLOT:
                raise ConfigError(f"{place}: expected under {PASS_SLOT!r}, where a pass runs")
            return place
    return ""


def take_name_out(compilation_config: Any) -> None:
    """Remove the name, which is no pass, from a CompilationConfig; `where_named` was asked."""
    for field in ("inductor_passes", "inductor_compile_config"):
        passes = getattr(compilation_config, field, None) or {}
        if _is_the_name(passes.get(PASS_SLOT)):
            del passes[PASS_SLOT]


def refuse_unknown_variables() -> None:
    """Raise ConfigError for a variable like VLLM_NWOR_MOD: vLLM would only warn of it."""
    known = ENVIRONMENT.values()
    for variable in os.environ:
        if variable.startswith(("VLLM_NWOR_", "VLLM_SCV_")) and variable not in known:
            raise ConfigError(
                f"unknown environment variable {variable}; expected {', '.join(known)}: correct "
                "its name or unset it"
            )


def _agree(named: str, mode: str, settings: dict[str, Any]) -> None:
    if str(settings.get("mode", mode)).lower() != mode:
        raise ConfigError(
            f"conflicting switches: {named} asks for {mode!r} and additional_config[{FIELD!r}]"
            f"['mode'] is {settings['mode']!r}; drop one of them"
        )


def _is_the_name(value: Any) -> bool:
    # vLLM wraps what it resolved in a CallableInductorPass.
    return value == NAME or getattr(value, "callable", value) is vllm_pass


def _same(setting: Any, text: str) -> bool:
    if isinstance(setting, bool):
        return setting == (text in ("1", "true", "yes", "on"))
    return str(setting).lower() == text
