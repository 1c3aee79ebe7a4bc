"""What an engine would be made of: `python -m nwor_compile.vllm_adapter.probe REQUEST OUT`.

A process of its own for `nwor doctor --vllm`: making an engine's configuration changes the
environment and vLLM's global state. No weights are read: the model is built without them, or with
`start` a whole engine has random ones.

Both are JSON files. Request: `model`, `speculative_config`, `additional_config`, `llm` (further
arguments), `start`.
Answer: `refused` (an error at start, in words), or `device`, `worker`, `runner`, `compiled`, and
`layers`: name, backend, implementation, and why it stays direct (empty: staged).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

DRAFTERS = "a drafter's layer: written directly, never part of a window"


def examine(request: dict[str, Any]) -> dict[str, Any]:
    """Answer one request."""
    arguments = {
        "model": request["model"],
        "speculative_config": request["speculative_config"],
        "additional_config": request["additional_config"],
        **request["llm"],
    }
    try:
        return _started(arguments) if request["start"] else _configured(arguments)
    # Whatever refuses the engine is the finding.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        return {"refused": f"{type(error).__name__}: {error}"}


def _configured(arguments: dict[str, Any]) -> dict[str, Any]:
    """From the configuration, and the target's layers without weights."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    config = EngineArgs(**arguments).create_engine_config()
    found = _about(config)
    if "nwor_compile" in found["worker"] and found["device"] == "cpu":
        from nwor_compile.vllm_adapter.cpu_backend import use

        use()
    # One rank stands for all: they have the same layers.
    alone = config.parallel_config.world_size == 1
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        if alone:
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            ensure_model_parallel_initialized(1, 1)
            # Weights are allocated and never touched, so they take no memory. Not on the meta
            # device: some models compute constants and read them back.
            initialize_model(config)
    if not alone:
        return {**found, "layers": [], "note": "layers are listed for one rank only"}
    context = config.compilation_config.static_forward_context
    staging = found["stages"]
    layers = [
        _layer(name, layer, _why_direct(name, layer, staging)) for name, layer in context.items()
    ]
    return {**found, "layers": layers}


def _why_direct(name: str, layer: Any, staging: str) -> str:
    """Empty if this layer's drafts would be staged."""
    if staging:
        return staging
    from nwor_compile.vllm_adapter.refusals import layer_refusal

    shared = getattr(layer, "kv_sharing_target_layer_name", None)
    if shared is not None:
        return f"has no cache of its own: reads {shared}, staged rows included"
    return layer_refusal(name, layer)


def _started(arguments: dict[str, Any]) -> dict[str, Any]:
    """From an engine that started: what its window holds."""
    from vllm import LLM

    llm = LLM(**arguments, load_format="dummy")
    worker = llm.collective_rpc(lambda worker: worker)[0]
    config = worker.vllm_config
    window = getattr(getattr(worker, "nwor", None), "window", None)
    names = set(window.layer_names) if window is not None else set()
    target = getattr(getattr(worker, "nwor", None), "_target", None)
    layers = []
    for name, layer in config.compilation_config.static_forward_context.items():
        drafters = target is not None and name not in target
        why = DRAFTERS if drafters else _about(config)["stages"] or "not in the window"
        layers.append(_layer(name, layer, "" if name in names else why))
    runner = type(worker.model_runner)
    note = f"{runner.__module__}.{runner.__name__} ran"
    if window is not None:
        executions = worker.nwor.metrics().get("executions", {})
        note += f"; staged writes called {executions.get('calls', 0)} times in warm-up"
        note += f"; staging takes {window.staging_bytes} bytes"
    llm.llm_engine.engine_core.shutdown()
    return {**_about(config), "layers": layers, "note": note}


def _about(config: Any) -> dict[str, Any]:
    from nwor_compile.vllm_adapter.settings import requested

    settings = requested(config.additional_config)
    options = config.compilation_config.inductor_compile_config.values()
    passes = [type(p).__name__ for p in options if not isinstance(p, bool | int | str)]
    mode = config.compilation_config.mode.name
    worker = str(config.parallel_config.worker_cls)
    stages = ""
    if settings is None:
        stages = "the nwor flag is not set"
    elif settings.mode == "off":
        stages = "nwor mode is off"
    elif "nwor_compile" not in worker:
        stages = 'refused, and "strict": false lets the engine run without NWOR; see its log'
    return {
        "device": config.device_config.device_type,
        "worker": worker,
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "compiled": f"mode {mode}, passes: {', '.join(passes) or 'none'}",
        "stages": stages,
    }


def _layer(name: str, layer: Any, why: str) -> dict[str, str]:
    backend = layer.get_attn_backend() if hasattr(layer, "get_attn_backend") else None
    return {
        "name": name,
        "backend": backend.get_name() if backend is not None else "none",
        "implementation": type(getattr(layer, "impl", layer)).__name__,
        "direct": why,
    }


def main() -> None:
    """Read the request, write the answer; vLLM's log goes where the caller wants it."""
    request = json.loads(Path(sys.argv[1]).read_text())
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if Path(request["model"]).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    Path(sys.argv[2]).write_text(json.dumps(examine(request)))


if __name__ == "__main__":
    main()
