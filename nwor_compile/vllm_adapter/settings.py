"""The flag: what the user asked of NWOR, from vLLM's configuration or the environment."""

from __future__ import annotations

import os
from typing import Any

from nwor_compile.config import ENVIRONMENT, NworConfig
from nwor_compile.errors import ConfigError

FIELD = "nwor"


def requested(additional_config: Any) -> NworConfig | None:
    """The settings in force, or None if NWOR was not asked for.

    `--additional-config '{"nwor": {"mode": "stage"}}'`, or VLLM_NWOR_MODE=stage. Where both name a
    setting and disagree, ConfigError names both. `strict` is on unless it is turned off: an engine
    that cannot stage is refused at start.
    """
    given = additional_config.get(FIELD) if isinstance(additional_config, dict) else None
    if given is None and not os.environ.get(ENVIRONMENT["mode"], "").strip():
        return None
    if given is not None and not isinstance(given, dict):
        raise ConfigError(
            f"additional_config[{FIELD!r}]: expected settings like {{'mode': 'stage'}}, got "
            f"{given!r}"
        )
    settings = dict(given or {})
    for name, variable in ENVIRONMENT.items():
        from_environment = os.environ.get(variable, "").strip().lower()
        if name in settings and from_environment and not _same(settings[name], from_environment):
            raise ConfigError(
                f"conflicting switches: additional_config[{FIELD!r}][{name!r}] is "
                f"{settings[name]!r} and {variable} is {os.environ[variable]!r}; drop one of them"
            )
    # Here, unlike in a graph of one's own, running direct without saying so is never wanted.
    settings.setdefault("strict", True)
    return NworConfig.load(**settings)


def _same(setting: Any, text: str) -> bool:
    if isinstance(setting, bool):
        return setting == (text in ("1", "true", "yes", "on"))
    return str(setting).lower() == text
