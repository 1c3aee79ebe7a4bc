"""One engine: makes the LLM that the options ask for, runs its phases and writes a report.

`pool.py` runs it in a process of its own, since vLLM keeps global state and a failed engine may not
exit cleanly. Options, all but `method` and `phases` optional:

nwor: settings for additional_config. method: draft_model, eagle, ngram or none. phases: methods of
`phases.Phases`. llm: further arguments of LLM. ranks: tensor-parallel size. multiprocess: scheduler
and worker in a process of their own. blocks: KV-cache blocks. limits: tokens a request.
drafter_layers: of the EAGLE head.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).parents[2] / "nwor_compile" / "demo" / "weights"
DRAFT_TOKENS = 4


def speculation(options: dict[str, Any]) -> dict[str, Any] | None:
    """vLLM's speculative_config for the engine's method."""
    method = options["method"]
    if method == "none":
        return None
    if method == "ngram":
        lookup = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
        return {"method": "ngram", "num_speculative_tokens": DRAFT_TOKENS, **lookup}
    model = WEIGHTS / "draft"
    if method == "eagle":
        from eagle_head import grow

        layers = options["drafter_layers"]
        model = grow(layers, Path(os.environ["VLLM_CACHE_ROOT"], f"eagle-{layers}-layers"))
    return {
        "model": str(model),
        "method": method,
        "num_speculative_tokens": DRAFT_TOKENS,
        "draft_tensor_parallel_size": options.get("ranks", 1),
    }


def make(options: dict[str, Any]) -> Any:
    """The LLM."""
    from vllm import LLM

    arguments: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "num_gpu_blocks_override": options.get("blocks", 48),
        "seed": 0,
        "disable_log_stats": False,
        "tensor_parallel_size": options.get("ranks", 1),
        "speculative_config": speculation(options),
        **options.get("llm", {}),
    }
    if options.get("nwor") is not None:
        arguments["additional_config"] = {"nwor": options["nwor"]}
    return LLM(str(WEIGHTS / "target"), **arguments)


def run(options: dict[str, Any], out: Path) -> None:
    """Run all phases; a phase that raises is reported and ends the run."""
    from phases import Phases

    start = time.perf_counter()
    phases = Phases(make(options), options)
    report: dict[str, Any] = {"phases": {}, "start_seconds": time.perf_counter() - start}
    print(f"start: {report['start_seconds']:.1f} s", flush=True)
    for name in options["phases"]:
        begin = time.perf_counter()
        try:
            report["phases"][name] = phases.run(name)
        except Exception as error:  # noqa: BLE001  the test of this phase reports it
            traceback.print_exc()
            report["phases"][name] = {"error": repr(error)}
            break  # the engine is in no state to go on
        print(f"phase {name}: {time.perf_counter() - begin:.1f} s", flush=True)
    report["cpu_seconds"] = sum(os.times()[:4])
    out.write_text(json.dumps({**report, **phases.facts()}))
