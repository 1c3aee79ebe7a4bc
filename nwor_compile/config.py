"""Settings, from arguments or the environment. Arguments win."""

from __future__ import annotations

import os
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from nwor_compile.errors import ConfigError

ENVIRONMENT = {
    "mode": "VLLM_NWOR_MODE",
    "scv": "VLLM_SCV_MODE",
    "debug": "VLLM_NWOR_DEBUG",
}


class NworConfig(BaseModel):
    """What NWOR does.

    mode: `stage` keeps draft rows out of the cache until they are accepted; `off` writes directly.
    scv: how acceptance is validated. `off` is a loop on the host (it synchronises; the oracle),
        `graph` one CUDA graph of mask, commit and counters a size, `adaptive` the faster of graph
        and plain launches by size, timed at warm-up.
    strict: a cache write that cannot be staged safely raises instead of staying direct.
    debug: log every window, one step late.
    attention: which kernel verifies in vLLM on a GPU. `stock` is vLLM's own, which reads staged
        rows by a redirected block table and gives what it gives on direct writes, bit for bit;
        `fused` this package's; `auto` the fused one for the few steps where it is faster.
    rope: in vLLM on a GPU, `fused` lets a staged write rotate q and k as well, in one launch, where
        that gives the same bits; `separate` leaves the rotation to the compiled code before it.
    poison: fill open draft slots of the cache until commit: `nan`, or `large` (a large finite
        value) for kernels that multiply masked values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["off", "stage"] = "stage"
    scv: Literal["off", "graph", "adaptive"] = "graph"
    strict: bool = False
    debug: bool = False
    attention: Literal["auto", "stock", "fused"] = "auto"
    rope: Literal["fused", "separate"] = "fused"
    poison: Literal["off", "nan", "large"] = "off"

    @classmethod
    def load(cls, **settings: Any) -> NworConfig:
        """Settings from the arguments, then `VLLM_NWOR_MODE`, `VLLM_SCV_MODE` and
        `VLLM_NWOR_DEBUG`, then the defaults.

        Raises ConfigError naming the setting, where it came from and what is allowed.
        """
        source = dict.fromkeys(settings, "argument")
        merged = dict(settings)
        for name, variable in ENVIRONMENT.items():
            if name not in merged and os.environ.get(variable, "").strip() != "":
                merged[name] = os.environ[variable].strip().lower()
                source[name] = f"environment variable {variable}"
        try:
            return cls(**merged)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            where = source.get(name, "argument")
            raise ConfigError(
                f"nwor setting {name!r} ({where}): got {first.get('input')!r}; {cls._allowed(name)}"
            ) from None

    @classmethod
    def _allowed(cls, name: str) -> str:
        if name not in cls.model_fields:
            return f"the settings are {', '.join(cls.model_fields)}"
        values = get_args(cls.model_fields[name].annotation) or ("true", "1", "false", "0")
        return f"expected {', '.join(values[:-1])} or {values[-1]}"

    def compile_key(self) -> dict[str, Any]:
        """The settings that change the compiled graph; the others never cause a recompile."""
        return {"mode": self.mode, "strict": self.strict, "rope": self.rope}
