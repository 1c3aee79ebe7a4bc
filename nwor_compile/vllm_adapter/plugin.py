"""The `vllm.general_plugins` entry point: one hook on the configuration, and no other.

vLLM calls `register` in every process. It wraps `EngineArgs.create_engine_config`; only when the
flag is set does the wrapper change the configuration it returns: the graph pass and the worker
class, which brings the attention backend along. The configuration travels to the workers, so they
need no hook of their own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from nwor_compile.vllm_adapter import patches
from nwor_compile.vllm_adapter.metrics_log import use_vllm_handlers


def register() -> None:
    """Install the hook; a second call does nothing."""
    from vllm.engine.arg_utils import EngineArgs

    from nwor_compile.config import ENVIRONMENT
    from nwor_compile.vllm_adapter.graph_pass import register_with_vllm

    use_vllm_handlers()
    register_with_vllm()
    patches.wrap(EngineArgs, "EngineArgs.create_engine_config", _create_engine_config)
    patches.announce_variables(ENVIRONMENT.values())


def _create_engine_config(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    from nwor_compile.vllm_adapter.configure import configure
    from nwor_compile.vllm_adapter.metrics import serve

    _forget_backend()
    config = original(*args, **kwargs)
    serve(config, refused=configure(config))
    return config


def _forget_backend() -> None:
    """An earlier engine of this process may have replaced an attention backend, or rewritten
    graphs; this one may not want that."""
    for name in ("cpu_backend", "cuda_backend", "graph_split"):
        backend = sys.modules.get(f"nwor_compile.vllm_adapter.{name}")
        if backend is not None:
            backend.forget()
