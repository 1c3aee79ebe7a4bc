"""What a CUDA engine needs of its configuration beside the pass and the worker class."""

from __future__ import annotations

import logging
import os
from typing import Any

from nwor_compile.vllm_adapter.stored_rows import PLAIN
from nwor_compile.vllm_adapter.versions import RUN_ON_CUDA

log = logging.getLogger("nwor_compile")

CUDA_WORKER = "vllm.v1.worker.gpu_worker.Worker"
NWOR_CUDA_WORKER = "nwor_compile.vllm_adapter.cuda_worker.NworGPUWorker"
STAGE_OP, VERIFY_OP = "nwor::vllm_stage", "nwor::vllm_verify"
ROPE_STAGE_OP = "nwor::vllm_rope_stage"
METHODS = ("eagle", "eagle3", "draft_model", "ngram", "mtp")
# Backends of vLLM's whose cache is packed as `packed_cache.py` says and whose metadata has a block
# table, so that they read tail blocks.
CUDA_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")
BACKENDS = (*CUDA_BACKENDS, "CPU_ATTN")
# Cache dtypes that engines ran with; e5m2 does not start in vLLM 0.26 on a GPU without NWOR either.
CUDA_FP8 = ("fp8", "fp8_e4m3")


def cuda_refusals(config: Any, version: str) -> list[str]:
    """What of a CUDA engine's configuration was never seen to work; empty if nothing.

    See `tests/vllm_gpu`: a row leaves this list when an engine has run there.
    """
    found = []
    if version not in RUN_ON_CUDA:
        found.append(
            f"on CUDA NWOR ran with vLLM {', '.join(RUN_ON_CUDA)} alone, this is {version}"
        )
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in METHODS:
        found.append(
            f"method {speculative.method} on CUDA is not supported yet; use {' or '.join(METHODS)}"
        )
    backend = getattr(config.attention_config, "backend", None)
    if backend is not None and backend.name not in CUDA_BACKENDS:
        found.append(
            f"attention backend {backend.name} was never seen to read staged rows; use "
            f"{' or '.join(CUDA_BACKENDS)}"
        )
    dtype = str(config.model_config.dtype).removeprefix("torch.")
    if dtype not in ("bfloat16", "float16"):
        found.append(f"a {dtype} model on CUDA is not supported yet; use bfloat16 or float16")
    cache = config.cache_config.cache_dtype
    if cache not in (*PLAIN, *CUDA_FP8):
        found.append(
            f"a {cache} cache on CUDA is not supported; use auto or {' or '.join(CUDA_FP8)}"
        )
    if config.lora_config is not None:
        found.append("LoRA on CUDA is not supported yet; turn it off")
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        found.append("NWOR's own attention is not batch-invariant; unset VLLM_BATCH_INVARIANT")
    if getattr(config.parallel_config, "data_parallel_size", 1) > 1:
        found.append("data parallelism on CUDA is not supported yet; use size 1")
    return found


def cut_at_twins(compilation: Any) -> None:
    """Have vLLM cut the graph at the twins as it does at its own ops.

    Where Inductor cuts it instead (`use_inductor_graph_partition`), the staged write is compiled
    and captured with the piece before the attention, and no cut is wanted there.
    """
    twins = [VERIFY_OP]
    if not compilation.use_inductor_graph_partition:
        twins = [STAGE_OP, ROPE_STAGE_OP, VERIFY_OP]
    present = compilation.splitting_ops or []
    compilation.splitting_ops = [*present, *(op for op in twins if op not in present)]


def fuses_rope(config: Any, rope: str) -> bool:
    """Whether the pass fuses RoPE with the staged write, given the setting of this name.

    It does so on the graph before vLLM's cut. Where Inductor cuts it, or nobody, an op that rotates
    in place would be functionalized, with copies of q and k.
    """
    if rope != "fused":
        return False
    why = ""
    if config.device_config.device_type != "cuda":
        why = f"the device is {config.device_config.device_type}, not cuda"
    elif config.compilation_config.use_inductor_graph_partition:
        why = "use_inductor_graph_partition is on"
    if why:
        log.warning("NWOR: RoPE stays apart from the staged write: %s", why)
    return not why
