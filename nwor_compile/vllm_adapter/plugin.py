"""The `vllm.general_plugins` entry point: one hook on the configuration, and no other.

vLLM calls `register` in every process. It wraps `EngineArgs.create_engine_config`; only when the
flag is set does the wrapper change the configuration it returns: the graph pass and the worker
class, which brings the attention backend along. The configuration travels to the workers, so they
need no hook of their own.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from nwor_compile.vllm_adapter.metrics_log import use_vllm_handlers

log = logging.getLogger("nwor_compile")

_WRAPPED = "_nwor_wrapped"


def register() -> None:
    """Install the hook; a second call does nothing."""
    from vllm.engine.arg_utils import EngineArgs

    use_vllm_handlers()
    create = EngineArgs.create_engine_config
    if getattr(create, _WRAPPED, False):
        return

    @functools.wraps(create)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        from nwor_compile.vllm_adapter.configure import configure
        from nwor_compile.vllm_adapter.metrics import serve

        _forget_backend()
        config = configure(create(self, *args, **kwargs))
        serve(config)
        return config

    setattr(create_engine_config, _WRAPPED, True)
    EngineArgs.create_engine_config = create_engine_config
    _announce_variables()


def _announce_variables() -> None:
    """Tell vLLM that these variables are known, or it warns of each.

    vLLM hashes every variable that it knows into its compile-cache key. What changes the graph gets
    there through `additional_config`; the rest must not. So all it ever reads here is None.
    """
    from vllm import envs

    from nwor_compile.config import ENVIRONMENT

    for variable in ENVIRONMENT.values():
        envs.environment_variables.setdefault(variable, _nothing)


def _forget_backend() -> None:
    """An earlier engine of this process may have replaced CPU_ATTN; this one may not want that."""
    backend = sys.modules.get("nwor_compile.vllm_adapter.cpu_backend")
    if backend is not None:
        backend.forget()


def _nothing() -> None:
    return None
