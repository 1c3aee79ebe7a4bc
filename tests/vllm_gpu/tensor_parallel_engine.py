"""One tensor-parallel engine, driven by JSON lines: `tensor_parallel_engine.py OPTIONS.json`.

As `engine_process.py`, but the target is split over ranks that are processes of their own, and each
answer has what every rank says. Options: model, head: a config.json each; nwor: settings, or null
for stock vLLM; ranks; llm: further arguments of LLM; speculative: of speculative_config.

Command: op and its arguments; see the methods of `Engine` called `do_...`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_USE_FLASHINFER_SAMPLER="0",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine's core is here, its workers are not
    VLLM_NO_USAGE_STATS="1",
)
for name, value in (
    # NVLink multicast: no part of this test, and not everywhere allowed.
    ("NCCL_NVLS_ENABLE", "0"),
    ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1"),
    ("NVSHMEM_DISABLE_NVLS", "1"),
    ("VLLM_ALLREDUCE_USE_SYMM_MEM", "0"),
    # Machines without a network have no other interface.
    ("GLOO_SOCKET_IFNAME", "lo"),
    ("NCCL_SOCKET_IFNAME", "lo"),
):
    os.environ.setdefault(name, value)

ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"
COUNTED = {
    "vllm:spec_decode_num_drafts": "drafts",
    "vllm:spec_decode_num_draft_tokens": "draft_tokens",
    "vllm:prefix_cache_hits": "prefix_hits",
}
SETTLING = 50  # steps in which all requests of a batch must have begun to decode


class Engine:
    """The LLM, and what is read from it and from its ranks."""

    def __init__(self, options: dict[str, Any], folder: Path) -> None:
        import tensor_parallel_worker
        from vllm import LLM

        start = time.perf_counter()
        for name in ("model", "head"):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(options[name]))
        arguments = {
            "model": str(folder / "model"),
            "load_format": tensor_parallel_worker.FORMAT,
            "worker_extension_cls": "tensor_parallel_worker.RankProbe",
            "tensor_parallel_size": options["ranks"],
            "distributed_executor_backend": "mp",
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "seed": 0,
            # Another engine starts beside this one, so no profiling of what is free.
            "gpu_memory_utilization": 0.1,
            **options["llm"],
            "speculative_config": {"model": str(folder / "head"), **options["speculative"]},
        }
        if options["nwor"] is not None:
            arguments["additional_config"] = {"nwor": options["nwor"]}
        self.drafts = arguments["speculative_config"]["num_speculative_tokens"]
        self.staged = (options["nwor"] or {}).get("mode") == "stage"
        self.llm = LLM(**arguments)
        self.seconds = time.perf_counter() - start
        self.core = self.llm.llm_engine.engine_core.engine_core
        blocks = self.core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks
        self.ranks = self.rpc("probe_install", blocks)
        self.blocks = int(blocks)

    def rpc(self, name: str, *args: Any) -> list[Any]:
        """What every rank says, in their order."""
        return list(self.llm.collective_rpc(name, args=args))

    def facts(self) -> dict[str, Any]:
        """What was started."""
        config = self.llm.llm_engine.vllm_config
        return {
            "start_seconds": round(self.seconds, 1),
            "blocks": self.blocks,
            "executor": type(self.core.model_executor).__name__,
            "worker_cls": config.parallel_config.worker_cls,
            "cudagraph_mode": str(config.compilation_config.cudagraph_mode),
            "async_scheduling": config.scheduler_config.async_scheduling,
            "ranks": self.ranks,
        }

    def do_generate(
        self,
        prompts: list[list[int]],
        max_tokens: int,
        temperature: float = 0.0,
        audit: bool = False,
        cut_every: int = 0,
        fault_every: int = 0,
        alone: bool = False,
    ) -> dict[str, Any]:
        """Generate. cut_every: for stock, see `probe_begin`; fault_every, alone: for a staged
        engine, see `probe_fault`."""
        return self._watched(
            lambda: self._generate(prompts, max_tokens, temperature),
            audit=audit, cut_every=cut_every, fault_every=fault_every, alone=alone,
        )  # fmt: skip

    def _generate(
        self, prompts: list[list[int]], max_tokens: int, temperature: float
    ) -> dict[str, Any]:
        from vllm import TokensPrompt

        given = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        sampling = [
            self._sampling(index, max_tokens, temperature, logprobs=0)
            for index in range(len(prompts))
        ]
        outputs = [out.outputs[0] for out in self.llm.generate(given, sampling, use_tqdm=False)]
        return {
            "ids": [list(out.token_ids) for out in outputs],
            "logprobs": [
                [at[token].logprob for token, at in zip(out.token_ids, out.logprobs, strict=True)]
                for out in outputs
            ],
        }

    def do_steady(self, prompts: list[list[int]], max_tokens: int, steps: int) -> dict[str, Any]:
        """Let the requests decode together, and count over `steps` steps what a step does."""
        return self._watched(lambda: self._steady(prompts, max_tokens, steps))

    def _steady(self, prompts: list[list[int]], max_tokens: int, steps: int) -> dict[str, Any]:
        from vllm import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        for index, ids in enumerate(prompts):
            sampling = self._sampling(index, max_tokens, 0.0, None)
            sampling.output_kind = RequestOutputKind.FINAL_ONLY
            engine.add_request(str(index), TokensPrompt(prompt_token_ids=ids), sampling)
        requests = list(self.core.scheduler.requests.values())
        done: dict[str, list[int]] = {}

        def step() -> None:
            for out in engine.step():
                if out.finished:
                    done[out.request_id] = list(out.outputs[0].token_ids)

        for _ in range(SETTLING):
            if all(request.num_output_tokens for request in requests):
                break
            step()
        else:
            raise RuntimeError(f"the requests did not decode together after {SETTLING} steps")
        before = self._nwor()
        for _ in range(steps):
            step()
        counted = [
            {name: now[name] - then[name] for name in now if isinstance(now[name], int)}
            for then, now in zip(before, self._nwor(), strict=True)
        ]
        if done:
            raise RuntimeError(f"{len(done)} requests ended within the {steps} steps that count")
        while engine.has_unfinished_requests():
            step()
        return {"ids": [done[str(index)] for index in range(len(prompts))], "counted": counted}

    def do_cost(self, requests: int) -> dict[str, Any]:
        """What sharing the flag costs a commit; one answer a rank."""
        return {"ranks": self.rpc("probe_cost", requests)}

    def _watched(self, run: Any, **how: Any) -> dict[str, Any]:
        before, nwor = self._counters(), self._nwor()
        self.rpc("probe_begin", how.get("audit", False), how.get("cut_every", 0))
        if how.get("fault_every"):
            self.rpc("probe_fault", how["fault_every"], how.get("alone", False))
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        ranks = self.rpc("probe_end")
        if how.get("fault_every"):
            self.rpc("probe_heal")
        after = self._counters()
        positions = zip(before.pop("positions"), after.pop("positions"), strict=True)
        return {
            **result,
            "seconds": round(seconds, 2),
            "accepted_per_position": [b - a for a, b in positions],
            **{name: after[name] - before[name] for name in COUNTED.values()},
            "ranks": ranks,
            "nwor": [
                {
                    name: value - then[name] if isinstance(value, int) else value
                    for name, value in now.items()
                }
                for then, now in zip(nwor, self._nwor(), strict=True)
            ],
            "served": after["served"],
            "totals": self._nwor(),
        }

    def _nwor(self) -> list[dict[str, Any]]:
        """NWOR's counters, one a rank."""
        return self.rpc("nwor_metrics") if self.staged else [{} for _ in self.ranks]

    def _counters(self) -> dict[str, Any]:
        """What vLLM serves; NWOR's metrics, where there are any, are among it."""
        found: dict[str, Any] = {"positions": [0] * self.drafts, "served": {}}
        found |= dict.fromkeys(COUNTED.values(), 0)
        for metric in self.llm.get_metrics():
            if metric.name in COUNTED:
                found[COUNTED[metric.name]] = metric.value
            elif metric.name == ACCEPTED:
                found["positions"] = list(metric.values)
            elif metric.name.startswith("vllm:nwor_") and hasattr(metric, "value"):
                found["served"].setdefault(metric.name, []).append(metric.value)
        return found

    @staticmethod
    def _sampling(index: int, tokens: int, temperature: float, logprobs: int | None) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=temperature, max_tokens=tokens, ignore_eos=True, seed=index,
            detokenize=False, logprobs=logprobs,
        )  # fmt: skip


def main() -> None:
    """Keep the answers' pipe to ourselves; file descriptor 1 becomes stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    options = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(options, Path(folder))
        print(json.dumps(engine.facts()), file=answers, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            operation = getattr(engine, f"do_{command.pop('op')}")
            print(json.dumps(operation(**command)), file=answers, flush=True)
        engine.llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
