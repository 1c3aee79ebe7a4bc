"""What the flag changes in a VllmConfig."""

from __future__ import annotations

import logging
from typing import Any

from nwor_compile.config import NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.passes.layer_ops import LayerOps
from nwor_compile.vllm_adapter.cuda_configure import NWOR_CUDA_WORKER, cut_at_twins, fuses_rope
from nwor_compile.vllm_adapter.graph_pass import VllmNworPass
from nwor_compile.vllm_adapter.offload_configure import use_connector
from nwor_compile.vllm_adapter.refusals import backend_refusals, refusals
from nwor_compile.vllm_adapter.settings import FIELD, PASS_SLOT, requested, take_name_out

log = logging.getLogger("nwor_compile")

NWOR_WORKER = "nwor_compile.vllm_adapter.worker.NworCPUWorker"


def configure(config: Any) -> list[str]:
    """Set NWOR up in `config` (a VllmConfig) if it was asked for.

    Raises ConfigError for what cannot be staged, naming what to change. With `"strict": false` in
    the settings such an engine runs direct instead, says so, and the reasons are returned.
    """
    settings = requested(config.additional_config, config.compilation_config)
    take_name_out(config.compilation_config)
    if settings is None:
        return []
    problems = backend_refusals(config)
    if settings.mode == "stage":
        problems += refusals(config) + _slot_taken(config)
    if problems:
        text = "NWOR cannot run in this engine: " + "; ".join(problems)
        if settings.strict:
            raise ConfigError(text)
        log.error("%s. It runs without NWOR.", text)
        return problems
    _enter_cache_key(config, settings)
    if settings.mode == "stage":
        options = config.compilation_config.inductor_compile_config
        rope = fuses_rope(config, settings.rope)
        options[PASS_SLOT] = VllmNworPass(LayerOps(), strict=settings.strict, rope=rope)
        use_connector(config)
    if config.device_config.device_type == "cuda":
        if settings.mode == "stage":
            cut_at_twins(config.compilation_config)
        config.parallel_config.worker_cls = NWOR_CUDA_WORKER
    else:
        config.parallel_config.worker_cls = NWOR_WORKER
    return []


def _enter_cache_key(config: Any, settings: NworConfig) -> None:
    """vLLM hashes `additional_config`, not our variables: put there what changes the graph."""
    given = dict(config.additional_config or {})
    given[FIELD] = {**given.get(FIELD, {}), **settings.compile_key()}
    config.additional_config = given


def _slot_taken(config: Any) -> list[str]:
    present = config.compilation_config.inductor_compile_config.get(PASS_SLOT)
    if present is None or isinstance(present, VllmNworPass):
        return []
    return [
        f"inductor_compile_config[{PASS_SLOT!r}] is taken by {type(present).__name__}, and NWOR "
        "needs that place; remove that pass"
    ]
