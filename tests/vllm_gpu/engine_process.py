"""One engine on the GPU, driven by JSON lines: `engine_process.py OPTIONS.json`.

A process of its own, since vLLM keeps global state; several may live at once and take turns. First
answer: what was started. Then one answer a command; the end of the commands ends the process.

Options: model: `tiny`, or the arguments of a LlamaConfig, or the folders `{"target": PATH,
"drafter": PATH or null}`; nwor: settings, or null for stock vLLM; speculative: further arguments of
speculative_config; llm: further arguments of LLM; kv_scales: scales of K and V in an fp8 cache;
soft_cap: of the attention's logits; filled: no tensor is left uninitialised.
Command: prompts (lists of ids), max_tokens, temperature, audit; seed: of what is drawn for requests
without one; logprobs: report those of the tokens.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matrix_weights

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
COUNTED = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:prefix_cache_hits": "prefix_hits",
    "vllm:num_preemptions": "preemptions",
}


def models(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of LLM that name the model and its drafter."""
    speculation = {"num_speculative_tokens": DRAFTS, "method": "eagle", **options["speculative"]}
    if options["model"] == "tiny":
        drafters = {"eagle": TINY_HEAD, "draft_model": TINY / "draft"}
        return _named(TINY / "target", drafters.get(speculation["method"]), speculation)
    if "target" in options["model"]:
        return _named(options["model"]["target"], options["model"]["drafter"], speculation)
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


def _named(target: Path | str, drafter: Path | str | None, speculation: Any) -> dict[str, Any]:
    named = {} if drafter is None else {"model": str(drafter)}
    return {"model": str(target), "speculative_config": {**named, **speculation}}


def fill_uninitialised_memory() -> None:
    """Fill what `empty` allocates, in C++ as well, so that no kernel reads what was there before.

    What an earlier kernel left in the same memory depends on all allocations before it, so engines
    that differ in any allocation may differ in what such a read gives.
    """
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


class Engine:
    """The LLM and what is read from it."""

    counted = COUNTED

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
        if arguments.get("load_format") == matrix_weights.FORMAT:
            matrix_weights.register()
        if options.get("filled"):
            fill_uninitialised_memory()
        if options.get("kv_scales"):
            matrix_weights.scale_caches(*options["kv_scales"])
        if options.get("soft_cap"):
            matrix_weights.cap_logits(options["soft_cap"])
        self.drafts = arguments["speculative_config"]["num_speculative_tokens"]
        self.llm = LLM(**arguments)
        self.staged = (options["nwor"] or {}).get("mode") == "stage"
        self.seconds = time.perf_counter() - start
        self.audit = self.llm.collective_rpc(_watch, args=(_blocks(self.llm),))[0]

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
            "blocks": _blocks(self.llm),
            **self.llm.collective_rpc(_cache_facts)[0],
        }

    def generate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Generate, and what it took."""
        import torch
        from vllm import SamplingParams, TokensPrompt

        before = self._counters()
        self.audit.begin(audit=command.get("audit", False))
        torch.manual_seed(command.get("seed", 0))
        temperature = command.get("temperature", 0.0)
        parameters = [
            SamplingParams(
                temperature=temperature, max_tokens=command["max_tokens"], ignore_eos=True,
                seed=index, detokenize=False, logprobs=0 if command.get("logprobs") else None,
            )
            for index in range(len(command["prompts"]))
        ]  # fmt: skip
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in command["prompts"]]
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - start
        after = self._counters()
        result = {
            "seconds": seconds,
            "ids": [list(output.outputs[0].token_ids) for output in outputs],
            "accepted_per_position": [
                b - a for a, b in zip(before["positions"], after["positions"], strict=True)
            ],
            **{name: after[name] - before[name] for name in COUNTED.values()},
            "nwor": _difference(before["nwor"], after["nwor"]),
            **({"logprobs": _logprobs(outputs)} if command.get("logprobs") else {}),
        }
        return {**result, **self.audit.end()}

    def _counters(self) -> dict[str, Any]:
        found: dict[str, Any] = {"positions": [0] * self.drafts}
        found |= dict.fromkeys(self.counted.values(), 0)
        for metric in self.llm.get_metrics():
            if metric.name in self.counted:
                found[self.counted[metric.name]] = metric.value
            if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
                found["positions"] = list(metric.values)
        found["nwor"] = self.llm.collective_rpc("nwor_metrics")[0] if self.staged else {}
        return found


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value - before[name] if isinstance(value, int) else value
        for name, value in after.items()
    }


def _logprobs(outputs: Any) -> list[list[float]]:
    """The log probability of each token, request after request."""
    chosen = [output.outputs[0] for output in outputs]
    return [
        [at[token].logprob for token, at in zip(c.token_ids, c.logprobs, strict=True)]
        for c in chosen
    ]


def _blocks(llm: Any) -> int:
    """The cache blocks that the scheduler hands out."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:  # another process: what it reported
        return int(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
    return int(core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks)


def _watch(worker: Any, blocks: int) -> Any:
    from step_audit import StepAudit

    return StepAudit(worker, blocks)


def _cache_facts(worker: Any) -> dict[str, Any]:
    """The target's cache: groups, windows, and shape, strides and type of the first layer's."""
    from step_audit import audited_layers

    layers = audited_layers(worker.model_runner)
    context = worker.vllm_config.compilation_config.static_forward_context
    first = context[layers[0].name].kv_cache
    return {
        "layers": len(layers),
        "backend": type(context[layers[0].name].impl).__name__,
        "groups": len({layer.group for layer in layers}),
        "windows": sorted({_window(context[layer.name].impl) for layer in layers}),
        "block_size": layers[0].block_size,
        "cache": {
            "shape": list(first.shape), "stride": list(first.stride()), "dtype": str(first.dtype),
        },
    }  # fmt: skip


def _window(impl: Any) -> int:
    """Of an attention layer, in tokens; 0: it sees all."""
    window = getattr(impl, "sliding_window", None) or (-1, -1)
    return int(window if isinstance(window, int) else window[0]) + 1  # an int in the CPU engine


def _runner_name(worker: Any) -> str:
    runner = type(worker.model_runner)
    return f"{runner.__module__}.{runner.__name__}"


def _attention_name(worker: Any) -> list[str]:
    layers = worker.vllm_config.compilation_config.static_forward_context
    # Experts are among these layers too, without one.
    return sorted({type(x.impl).__name__ for x in layers.values() if hasattr(x, "impl")})


def main(kind: type[Engine] = Engine) -> None:
    """Keep the answers' pipe to ourselves; file descriptor 1 becomes stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        engine = kind(options, Path(folder))
        print(json.dumps(engine.facts()), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(engine.generate(json.loads(line))), file=answers, flush=True)
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
