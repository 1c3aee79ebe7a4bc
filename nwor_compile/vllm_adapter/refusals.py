"""The combinations that NWOR refuses, each with what to change.

What a configuration shows is refused before the engine starts; what only a layer shows, when the
caches exist (`layer_refusal`); and that a staged write ran at all is checked after warm-up, see
`RunnerHooks.warmed_up`.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from nwor_compile.vllm_adapter import contract
from nwor_compile.vllm_adapter.cuda_configure import BACKENDS, CUDA_WORKER, cuda_refusals
from nwor_compile.vllm_adapter.offload_configure import connector_refusals
from nwor_compile.vllm_adapter.stored_rows import FP8, PLAIN

log = logging.getLogger("nwor_compile")

CPU_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
READS_TARGET_CACHE = ("gemma4_mtp",)
# Fusions of vLLM's that put another op in the place of the cache write or of the attention.
SWALLOWS_THE_OP = (
    "fuse_rope_kvcache",
    "fuse_qk_norm_rope_kvcache",
    "fuse_attn_quant",
)


def backend_refusals(config: Any) -> list[str]:
    """What stands against this package's worker and attention backend, in either mode."""
    found = []
    device = config.device_config.device_type
    if device == "cuda":
        found += cuda_refusals(config, contract.installed()[0])
    elif device != "cpu":
        found.append(f"device {device} is not supported; unset the nwor flag")
    if config.parallel_config.worker_cls != (CUDA_WORKER if device == "cuda" else CPU_WORKER):
        found.append(f"worker_cls is {config.parallel_config.worker_cls}; leave it at vLLM's own")
    if not isinstance(config.additional_config or {}, dict):
        found.append(
            f"additional_config is a {type(config.additional_config).__name__}, which cannot "
            "carry the nwor settings into the compile-cache key; use a dict"
        )
    version, root = contract.installed()
    broken = contract.mismatches(version, root)
    if not broken and device == "cpu" and not contract.was_run(version):
        log.warning("NWOR was never run with vLLM %s; its source fits what is needed", version)
    return found + broken


def refusals(config: Any) -> list[str]:
    """Why this configuration cannot be staged, each with what to change; empty if it can."""
    return [*_parallelism(config), *_cache_use(config), *_speculation(config), *_no_pass(config)]


def layer_refusal(name: str, layer: Any) -> str:
    """Why this attention layer of the target cannot be staged; empty if it can."""
    impl = getattr(layer, "impl", layer)
    if getattr(getattr(layer, "attn_backend", None), "forward_includes_kv_cache_update", False):
        return (
            f"layer {name}: {type(impl).__name__} writes the cache inside its forward, where no "
            "pass sees the write; choose another attention backend"
        )
    if getattr(layer, "kv_cache_update_bypass", False):
        return (
            f"layer {name}: its model writes the cache in a fused op (kv_cache_update_bypass); "
            "unset the nwor flag for this model"
        )
    named = getattr(getattr(layer, "attn_backend", None), "get_name", None)
    known = type(impl).__name__ if named is None else named()
    if known not in BACKENDS:
        return (
            f"layer {name}: attention backend {known} was never seen to read staged rows; use "
            f"{' or '.join(BACKENDS)}, or unset the nwor flag for this model"
        )
    stored = getattr(impl, "kv_cache_dtype", "auto")
    if stored not in (*PLAIN, *FP8):
        return (
            f"layer {name}: rows cannot be staged for a {stored} cache; use auto or "
            f"{' or '.join(FP8)}"
        )
    kind = getattr(impl, "attn_type", "decoder")
    if kind != "decoder":
        return (
            f"layer {name}: NWOR is for decoders, this layer's attention is {kind}; unset the "
            "nwor flag for this model"
        )
    if getattr(impl, "alibi_slopes", None) is not None:
        return f"layer {name}: ALiBi never ran with staged rows; unset the nwor flag for this model"
    return ""


def _parallelism(config: Any) -> list[str]:
    parallel, found = config.parallel_config, []
    if parallel.pipeline_parallel_size > 1:
        found.append("pipeline parallelism needs several windows in flight; use size 1")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            found.append(f"{name} > 1 splits a request's rows over ranks; use 1")
    if getattr(parallel, "enable_dbo", False) or getattr(parallel, "ubatch_size", 0) > 1:
        found.append(
            "a step split into micro-batches has several windows; turn ubatching off (enable_dbo, "
            "ubatch_size)"
        )
    return found


def _cache_use(config: Any) -> list[str]:
    found = connector_refusals(config)
    if getattr(config.cache_config, "kv_sharing_fast_prefill", False):
        found.append("kv_sharing_fast_prefill skips tokens; turn it off")
    # Gone after 0.26, where the option has no effect any more.
    if not getattr(config.model_config, "disable_cascade_attn", True):
        found.append("cascade attention reads rows of several requests; set disable_cascade_attn")
    if getattr(config.model_config, "enable_sleep_mode", False):
        found.append(
            "sleep mode drops the window's own tensors with the caches and wakes up without them; "
            "turn enable_sleep_mode off"
        )
    if getattr(config.model_config, "use_mla", False):
        found.append(
            "MLA layers have cache ops of their own and no staged reader; unset the nwor flag for "
            "this model"
        )
    fusions = config.compilation_config.pass_config
    for name in SWALLOWS_THE_OP:
        if getattr(fusions, name, False):
            found.append(
                f"pass_config.{name} replaces the cache write or the attention by a fused op; set "
                "it to false"
            )
    return found


def _speculation(config: Any) -> list[str]:
    speculative = config.speculative_config
    if speculative is None:
        return [
            "there is no speculative_config, so nothing would ever be staged; set one, or unset "
            "the nwor flag"
        ]
    if speculative.method in READS_TARGET_CACHE:
        return [
            f"drafter {speculative.method} reads the target's cache past what is committed; use "
            "another method"
        ]
    v2 = getattr(config, "use_v2_model_runner", False)
    if v2 and config.device_config.device_type != "cuda":
        return ["the V2 model runner is hooked on CUDA alone; set VLLM_USE_V2_MODEL_RUNNER=0"]
    return []


def _no_pass(config: Any) -> list[str]:
    """The model is not compiled, so no pass would run and nothing would be staged."""
    compilation = config.compilation_config
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1":
        why = "VLLM_USE_BREAKABLE_CUDAGRAPH=1"
        change = "set it to 0"
    elif getattr(config.model_config, "enforce_eager", False):
        why, change = "enforce_eager", "turn it off"
    elif compilation.mode is None or int(compilation.mode) == 0:
        why = "compilation mode NONE: -O0, TORCH_COMPILE_DISABLE, or LoRA on CPU"
        change = "compile it"
    elif compilation.backend == "eager":
        why, change = "compilation backend 'eager'", "use 'inductor'"
    else:
        return []
    return [f"the model is not compiled ({why}), so no pass runs; {change}"]
