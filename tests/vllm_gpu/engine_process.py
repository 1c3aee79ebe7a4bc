"""One engine on the GPU, driven by JSON lines: `engine_process.py OPTIONS.json`.

A process of its own, since vLLM keeps global state; several may live at once and take turns. First
answer: what was started. Then one answer a command; the end of the commands ends the process.

Options: model: `tiny`, or the arguments of a LlamaConfig; nwor: settings, or null for stock vLLM;
speculative: further arguments of speculative_config; llm: further arguments of LLM.
Command: prompts (lists of ids), max_tokens, temperature, audit, timing; profile: time by kernel.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_USE_FLASHINFER_SAMPLER="0",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
)

TESTS = Path(__file__).resolve().parents[1]
TINY = TESTS.parent / "nwor_compile" / "demo" / "weights"
TINY_HEAD = TESTS / "vllm_engine" / "eagle"
DRAFTS = 4


def models(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of LLM that name the model and its drafter."""
    speculation = {"num_speculative_tokens": DRAFTS, "method": "eagle", **options["speculative"]}
    if options["model"] == "tiny":
        drafter = TINY_HEAD if speculation["method"] == "eagle" else TINY / "draft"
        return {
            "model": str(TINY / "target"),
            "speculative_config": {"model": str(drafter), **speculation},
        }
    from transformers import LlamaConfig

    dims = dict(options["model"])
    for name, layers in (("target", dims["num_hidden_layers"]), ("head", 1)):
        config = LlamaConfig(**{**dims, "num_hidden_layers": layers})
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder / name)
    return {
        "model": str(folder / "target"),
        "load_format": "dummy",
        "speculative_config": {"model": str(folder / "head"), **speculation},
    }


class Engine:
    """The LLM and what is read from it."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        from vllm import LLM

        start = time.perf_counter()
        arguments = {
            "dtype": "bfloat16",
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "seed": 0,
            # Other engines start beside this one, so no profiling of what is free.
            "gpu_memory_utilization": 0.1,
            "kv_cache_memory_bytes": 4 << 30,
            **models(options, folder),
            **options["llm"],
        }
        if options["nwor"] is not None:
            arguments["additional_config"] = {"nwor": options["nwor"]}
        self.llm = LLM(**arguments)
        self.staged = (options["nwor"] or {}).get("mode") == "stage"
        self.seconds = time.perf_counter() - start
        self.audit = self.llm.collective_rpc(_watch)[0] if _is_v2(self.llm) else None

    def facts(self) -> dict[str, Any]:
        """What was started."""
        config = self.llm.llm_engine.vllm_config
        compilation = config.compilation_config
        return {
            "start_seconds": self.seconds,
            "runner": self.llm.collective_rpc(_runner_name)[0],
            "worker": config.parallel_config.worker_cls,
            "attention": self.llm.collective_rpc(_attention_name)[0],
            "cudagraph_mode": str(compilation.cudagraph_mode),
            "async_scheduling": config.scheduler_config.async_scheduling,
            "inductor_partition": compilation.use_inductor_graph_partition,
            "blocks": config.cache_config.num_gpu_blocks,
        }

    def generate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Generate, and what it took."""
        from vllm import SamplingParams, TokensPrompt

        before = self._counters()
        if self.audit is not None:
            self.audit.begin(audit=command.get("audit", False), timing=command.get("timing", False))
        temperature = command.get("temperature", 0.0)
        parameters = [
            SamplingParams(
                temperature=temperature, max_tokens=command["max_tokens"], ignore_eos=True,
                seed=index, detokenize=False,
            )
            for index in range(len(command["prompts"]))
        ]  # fmt: skip
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in command["prompts"]]
        start = time.perf_counter()
        with profiled(command.get("profile", False)) as kernels:
            outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = self._counters()
        result = {
            "seconds": seconds,
            "ids": [list(output.outputs[0].token_ids) for output in outputs],
            "accepted_per_position": [
                b - a for a, b in zip(before["positions"], after["positions"], strict=True)
            ],
            "drafts": after["drafts"] - before["drafts"],
            "nwor": _difference(before["nwor"], after["nwor"]),
            **({"kernels": kernels} if kernels else {}),
        }
        return {**result, **(self.audit.end() if self.audit is not None else {})}

    def _counters(self) -> dict[str, Any]:
        found: dict[str, Any] = {"positions": [0] * DRAFTS, "drafts": 0}
        for metric in self.llm.get_metrics():
            if metric.name == "vllm:spec_decode_num_drafts":
                found["drafts"] = metric.value
            if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
                found["positions"] = list(metric.values)
        found["nwor"] = self.llm.collective_rpc("nwor_metrics")[0] if self.staged else {}
        return found


@contextlib.contextmanager
def profiled(wanted: bool) -> Iterator[dict[str, list[float]]]:
    """Fills what it yields with the launches and GPU microseconds of each kernel."""
    found: dict[str, list[float]] = {}
    if not wanted:
        yield found
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield found
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            found[event.key[:100]] = [event.count, round(event.self_device_time_total, 1)]


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value - before[name] if isinstance(value, int) else value
        for name, value in after.items()
    }


def _is_v2(llm: Any) -> bool:
    return bool(llm.llm_engine.vllm_config.use_v2_model_runner)


def _watch(worker: Any) -> Any:
    from step_audit import StepAudit

    return StepAudit(worker)


def _runner_name(worker: Any) -> str:
    runner = type(worker.model_runner)
    return f"{runner.__module__}.{runner.__name__}"


def _attention_name(worker: Any) -> list[str]:
    layers = worker.vllm_config.compilation_config.static_forward_context
    return sorted({type(layer.impl).__name__ for layer in layers.values()})


def main() -> None:
    """Keep the answers' pipe to ourselves; file descriptor 1 becomes stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(options, Path(folder))
        print(json.dumps(engine.facts()), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(engine.generate(json.loads(line))), file=answers, flush=True)
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
