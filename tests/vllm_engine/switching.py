"""An engine for the tests of the switch, in a process of its own: what it was made of and did.

Options: `llm` (further arguments of LLM), `environment`, and `swallowed` (the pass finds nothing,
as after a fusion that put another op in the place of the write). Speculation is by n-gram, and the
engine and its worker share the process, so that what ran can be looked at.
"""

from __future__ import annotations

import json
import multiprocessing
import traceback
from pathlib import Path
from typing import Any

from pool import environment, settle

WEIGHTS = Path(__file__).parents[2] / "nwor_compile" / "demo" / "weights"
LIMIT_SECONDS = 600
REPEATING = "one two three one two three one two three one two"


def run(options: dict[str, Any], folder: Path, cache: str) -> dict[str, Any]:
    """Start the engine, generate, and return its report; `error` says why it did not start.

    cache: both vLLM's and Inductor's compile caches.
    """
    out, log = folder / "report.json", folder / "log.txt"
    variables = {
        **environment(cache, options),
        "TORCHINDUCTOR_CACHE_DIR": str(Path(cache, "inductor")),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    }
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=_child, args=(options, str(out), str(log), variables))
    process.start()
    process.join(LIMIT_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    text = log.read_text() if log.exists() else ""
    if not out.exists():
        raise RuntimeError(f"the engine did not finish:\n{text[-6000:]}")
    return {**json.loads(out.read_text()), "log": text}


def _child(options: dict[str, Any], out: str, log: str, variables: dict[str, str]) -> None:
    settle(log, variables)
    try:
        report = _generate(options)
    # Whatever refuses the engine is the finding.
    except Exception as error:  # noqa: BLE001
        traceback.print_exc()
        report = {"error": f"{type(error).__name__}: {error}"}
    Path(out).write_text(json.dumps(report))


def _generate(options: dict[str, Any]) -> dict[str, Any]:
    from torch._dynamo.utils import counters
    from vllm import LLM, SamplingParams

    if options.get("swallowed"):
        _swallow()
    llm = LLM(
        str(WEIGHTS / "target"),
        **{
            "dtype": "float32",
            "max_model_len": 128,
            "max_num_seqs": 2,
            "max_num_batched_tokens": 64,
            "block_size": 32,
            "num_gpu_blocks_override": 16,
            "disable_log_stats": False,
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 4,
                "prompt_lookup_max": 4,
                "prompt_lookup_min": 2,
            },
            **options.get("llm", {}),
        },
    )
    limits = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    (answer,) = llm.generate([REPEATING], limits, use_tqdm=False)
    (inside,) = llm.collective_rpc(_inside)
    config = llm.llm_engine.vllm_config
    served = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {
        **inside,
        "ids": list(answer.outputs[0].token_ids),
        "hash": config.compute_hash(),
        "caches": {
            name: dict(counters[name]) for name in ("inductor", "aot_autograd") if name in counters
        },
        "metrics": {
            name: value
            for name, value in served.items()
            if name.startswith(("vllm:nwor", "vllm:spec_decode"))
        },
    }


def _inside(worker: Any) -> dict[str, Any]:
    """Runs in the worker."""
    from nwor_compile.passes import last_reports
    from nwor_compile.vllm_adapter import ops

    context = worker.model_runner.compilation_config.static_forward_context
    return {
        "worker": type(worker).__name__,
        "twins": ops.executions(),
        "passes_run": len(last_reports()),
        "backends": sorted({type(layer.impl).__name__ for layer in context.values()}),
    }


def _swallow() -> None:
    from nwor_compile.vllm_adapter.graph_pass import VllmNworPass

    VllmNworPass.__call__ = lambda self, graph: None  # type: ignore[method-assign]
    VllmNworPass.uuid = lambda self: "finds nothing"  # type: ignore[method-assign]
