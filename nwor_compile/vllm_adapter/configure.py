"""What the flag changes in a VllmConfig, and the combinations that it refuses."""

from __future__ import annotations

import logging
from typing import Any

from nwor_compile.config import NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.passes.layer_ops import LayerOps
from nwor_compile.vllm_adapter import contract
from nwor_compile.vllm_adapter.graph_pass import VllmNworPass
from nwor_compile.vllm_adapter.settings import FIELD, requested

log = logging.getLogger("nwor_compile")

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
NWOR_WORKER = "nwor_compile.vllm_adapter.worker.NworCPUWorker"
READS_TARGET_CACHE = ("gemma4_mtp",)
PASS_SLOT = "post_grad_custom_post_pass"


def configure(config: Any) -> Any:
    """Set NWOR up in `config` (a VllmConfig) if it was asked for; return it.

    Raises ConfigError for what cannot be staged, naming what to change; with `"strict": false` in
    the settings such an engine runs direct instead, and says so.
    """
    settings = requested(config.additional_config)
    if settings is None:
        return config
    problems = backend_refusals(config)
    if settings.mode == "stage":
        problems += refusals(config)
    if problems:
        text = "NWOR cannot run in this engine: " + "; ".join(problems)
        if settings.strict:
            raise ConfigError(text)
        log.error("%s. It runs without NWOR.", text)
        return config
    _enter_cache_key(config, settings)
    if settings.mode == "stage":
        _install_pass(config, settings)
    config.parallel_config.worker_cls = NWOR_WORKER
    return config


def backend_refusals(config: Any) -> list[str]:
    """What stands against this package's worker and attention backend, in either mode."""
    found = []
    if config.device_config.device_type != "cpu":
        found.append("only the CPU engine is supported so far; unset the nwor flag")
    if config.parallel_config.worker_cls != CPU_WORKER:
        found.append(f"worker_cls is {config.parallel_config.worker_cls}; leave it at vLLM's own")
    if not isinstance(config.additional_config or {}, dict):
        found.append(
            f"additional_config is a {type(config.additional_config).__name__}, which cannot "
            "carry the nwor settings into the compile-cache key; use a dict"
        )
    version, root = contract.installed()
    broken = contract.mismatches(version, root)
    if not broken and not contract.was_run(version):
        log.warning("NWOR was never run with vLLM %s; its source fits what is needed", version)
    return found + broken


def refusals(config: Any) -> list[str]:
    """Why this configuration cannot be staged, each with what to change; empty if it can."""
    parallel, cache, compilation = (
        config.parallel_config, config.cache_config, config.compilation_config,
    )  # fmt: skip
    found = []
    if parallel.pipeline_parallel_size > 1:
        found.append("pipeline parallelism needs several windows in flight; use size 1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            found.append(f"{name} > 1 is not supported; use 1")
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 0:
        found.append("a step split into micro-batches has several windows; turn ubatching off")
    if config.kv_transfer_config is not None:
        found.append("KV connectors may save rows before the commit; remove kv_transfer_config")
    if getattr(cache, "kv_sharing_fast_prefill", False):
        found.append("kv_sharing_fast_prefill skips tokens; turn it off")
    if config.speculative_config is None:
        found.append(
            "there is no speculative_config, so nothing would ever be staged; set one, or unset "
            "the nwor flag"
        )
    elif config.speculative_config.method in READS_TARGET_CACHE:
        found.append(
            f"drafter {config.speculative_config.method} reads the target's cache past what is "
            "committed; use another method"
        )
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
