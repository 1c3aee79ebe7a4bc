"""What the flag changes in a VllmConfig, and the combinations that it refuses."""

from __future__ import annotations

import logging
from typing import Any

from nwor_compile.config import NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.passes.layer_ops import LayerOps
from nwor_compile.vllm_adapter.graph_pass import VllmNworPass
from nwor_compile.vllm_adapter.settings import FIELD, requested

log = logging.getLogger("nwor_compile")

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
PASS_SLOT = "post_grad_custom_post_pass"


def configure(config: Any) -> Any:
    """Set NWOR up in `config` (a VllmConfig) if it was asked for; return it.

    Raises ConfigError for what cannot be staged, naming what to change; with `"strict": false` in
    the settings such an engine runs direct instead, and says so.
    """
    settings = requested(config.additional_config)
    if settings is None:
        return config
    _enter_cache_key(config, settings)
    _use_reference_backend(config)
    if settings.mode == "off":
        return config
    problems = refusals(config)
    if problems:
        text = "NWOR cannot stage in this engine: " + "; ".join(problems)
        if settings.strict:
            raise ConfigError(text)
        log.error("%s. It runs direct.", text)
        return config
    _install_pass(config, settings)
    config.parallel_config.worker_cls = "nwor_compile.vllm_adapter.worker.NworCPUWorker"
    return config


def refusals(config: Any) -> list[str]:
    """Why this configuration cannot be staged, each with what to change; empty if it can."""
    parallel, cache, compilation = (
        config.parallel_config, config.cache_config, config.compilation_config,
    )  # fmt: skip
    found = []
    if config.device_config.device_type != "cpu":
        found.append("only the CPU engine is supported so far; unset the nwor flag")
    if parallel.worker_cls != CPU_WORKER:
        found.append(f"worker_cls is {parallel.worker_cls}; leave it at vLLM's own")
    if parallel.pipeline_parallel_size > 1:
        found.append("pipeline parallelism needs several windows in flight; use size 1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            found.append(f"{name} > 1 is not supported; use 1")
    if config.kv_transfer_config is not None:
        found.append("KV connectors may save rows before the commit; remove kv_transfer_config")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        found.append("kv_sharing_fast_prefill skips tokens; turn it off")
    if config.speculative_config is None:
        found.append("there is no speculative_config, so nothing would ever be staged")
    if compilation.mode is None or int(compilation.mode) == 0 or compilation.backend == "eager":
        found.append("the model is not compiled (enforce_eager?), so no pass runs; compile it")
    return found


def _enter_cache_key(config: Any, settings: NworConfig) -> None:
    """vLLM hashes `additional_config`, not our variables: put there what changes the graph."""
    given = dict(config.additional_config or {})
    given[FIELD] = {**given.get(FIELD, {}), **settings.compile_key()}
    config.additional_config = given


def _install_pass(config: Any, settings: NworConfig) -> None:
    options = config.compilation_config.inductor_compile_config
    present = options.get(PASS_SLOT)
    if present is not None and not isinstance(present, VllmNworPass):
        raise ConfigError(
            f"inductor_compile_config[{PASS_SLOT!r}] is taken by {type(present).__name__}; NWOR "
            "needs that place"
        )
    options[PASS_SLOT] = VllmNworPass(LayerOps(), strict=settings.strict)


def _use_reference_backend(config: Any) -> None:
    """On CPU, both modes run this package's attention: CPU_ATTN cannot read staged rows."""
    if config.device_config.device_type != "cpu":
        return
    from nwor_compile.vllm_adapter.cpu_backend import use

    use()
