"""Runs one engine and prints what the tests compare, as JSON: `engine.py OPTIONS.json OUT.json`.

A process of its own, since vLLM keeps global state and a failed engine may not exit cleanly. An
engine takes half a minute to start, so many phases share one: a phase changes what the hooks do
(poison, faults, no window at all), runs the same requests and reports.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTIONS: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text()) if len(sys.argv) > 2 else {}
IN_PROCESS = not OPTIONS.get("multiprocess", False)
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0" if IN_PROCESS else "1",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # collective_rpc of a function
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
)

WEIGHTS = Path(__file__).parents[2] / "nwor_compile" / "demo" / "weights"
MAX_TOKENS = (14, 5, 1, 18, 2, 11)
DRAFT_TOKENS = 4


def speculation(method: str) -> dict[str, Any] | None:
    if method == "none":
        return None
    if method == "ngram":
        return {
            "method": "ngram",
            "num_speculative_tokens": DRAFT_TOKENS,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
    return {
        "model": str(WEIGHTS / "draft"),
        "method": "draft_model",
        "num_speculative_tokens": DRAFT_TOKENS,
        "draft_tensor_parallel_size": 1,
    }


def prompts() -> list[str]:
    """Six pieces of held-out text of unequal length; most exceed one step's token budget."""
    text = (WEIGHTS / "heldout.txt").read_text()
    return [text[i * 700 : i * 700 + 90 + 61 * (i % 5)] for i in range(len(MAX_TOKENS))]


def repair_expand() -> None:
    """vLLM 0.32's CPU engine loses the temperatures of verify spans: its `expand_batch_to_tokens`
    writes to a converted copy unless the dtype is int64, and returns memory that nobody filled. No
    two runs are equal with that, NWOR or not."""
    import torch
    from vllm.v1.sample import rejection_sampler

    def expand(
        x: Any, ends: Any, num_tokens: int, replace_from: Any = 0, replace_to: Any = 0
    ) -> Any:
        counts = torch.diff(ends, prepend=ends.new_zeros(1)).long()
        filled = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return filled.repeat_interleave(counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand


class Harness:
    """One LLM, its worker where it lives in this process, and the phases that run on it."""

    def __init__(self) -> None:
        from vllm import LLM

        options: dict[str, Any] = {
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 4,
            "max_num_batched_tokens": 64,
            "block_size": 32,
            "num_gpu_blocks_override": OPTIONS.get("blocks", 48),
            "seed": 0,
            "disable_log_stats": False,
            "speculative_config": speculation(OPTIONS["method"]),
        }
        if OPTIONS.get("nwor") is not None:
            options["additional_config"] = {"nwor": OPTIONS["nwor"]}
        if IN_PROCESS:
            repair_expand()
        self.llm = LLM(str(WEIGHTS / "target"), **options)
        self.worker: Any = None
        self.audit: Any = None
        if IN_PROCESS:
            from cache_audit import Audit

            self.worker = self.llm.collective_rpc(lambda worker: worker)[0]
            self.audit = Audit(self.worker.model_runner)
        self.report: dict[str, Any] = {"phases": {}}

    @property
    def hooks(self) -> Any:
        return getattr(self.worker, "nwor", None)

    def run_phase(self, name: str) -> None:
        """Run the phase of this name; its report is kept under it."""
        start = time.perf_counter()
        before, counted = self.vllm_counters(), self.nwor_counters()
        if name != "prefix_hits":
            self.llm.reset_prefix_cache()
        result = getattr(self, f"phase_{name.partition(':')[0]}")()  # "temperature:2" is a repeat
        after, now = self.vllm_counters(), self.nwor_counters()
        result["vllm"] = {key: _minus(after[key], before.get(key)) for key in after}
        result["nwor"] = {
            key: _minus(now[key], counted.get(key))
            for key in now
            if not key.startswith("nwor_acceptance")
        }
        result["seconds"] = time.perf_counter() - start
        self.report["phases"][name] = result
        print(f"phase {name}: {result['seconds']:.1f} s", flush=True)

    def vllm_counters(self) -> dict[str, Any]:
        wanted = ("vllm:spec_decode", "vllm:num_preemptions")
        found = {
            metric.name: getattr(metric, "value", getattr(metric, "values", None))
            for metric in self.llm.get_metrics()
            if metric.name.startswith(wanted)
        }
        return {name: value for name, value in found.items() if value is not None}

    def nwor_counters(self) -> dict[str, Any]:
        if OPTIONS.get("nwor") is None:
            return {}
        return dict(self.llm.collective_rpc("nwor_metrics")[0])

    def generate(self, texts: list[Any] | None = None, **sampling: Any) -> dict[str, Any]:
        from vllm import SamplingParams

        texts = list(prompts()) if texts is None else texts
        limits = sampling.pop("limits", OPTIONS.get("limits", MAX_TOKENS))
        sampling.setdefault("temperature", 0.0)
        seeds = sampling.pop("seeds", [None] * len(texts))
        params = [
            SamplingParams(max_tokens=limit, seed=seed, ignore_eos=True, **sampling)
            for limit, seed in zip(limits, seeds, strict=True)
        ]
        outputs = self.llm.generate(texts, params, use_tqdm=False)
        return {
            "ids": [list(out.outputs[0].token_ids) for out in outputs],
            "prompts": [len(out.prompt_token_ids) for out in outputs],
            "prompt_ids": [list(out.prompt_token_ids) for out in outputs],
            "request_ids": [out.request_id for out in outputs],
            "cached": [out.num_cached_tokens for out in outputs],
            "logprobs": [
                [
                    sorted((t, p.logprob) for t, p in step.items())
                    for step in out.outputs[0].logprobs
                ]
                for out in outputs
                if out.outputs[0].logprobs
            ],
        }

    @contextlib.contextmanager
    def audited(self) -> Iterator[dict[str, Any]]:
        found: dict[str, Any] = {}
        self.audit.reset()
        self.audit.on = True
        try:
            yield found
        finally:
            self.audit.on = False
            found.update(self.audit.result())

    @contextlib.contextmanager
    def replaced(self, owner: Any, name: str, value: Any) -> Iterator[None]:
        original = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def phase_greedy(self) -> dict[str, Any]:
        with self.audited() as audit:
            result = self.generate()
        rows = dict(self.audit.rows)
        return {**result, "audit": audit, "recomputed": self.recompute(result, rows)}

    def recompute(self, result: dict[str, Any], rows: dict[Any, Any]) -> dict[str, float]:
        """Prefill each request's whole text again and compare its rows with the ones kept."""
        import torch

        worst, compared = 0.0, 0
        texts = [p + ids for p, ids in zip(result["prompt_ids"], result["ids"], strict=True)]
        self.llm.reset_prefix_cache()
        with self.audited():
            again = self.generate(
                [{"prompt_token_ids": text} for text in texts], limits=[1] * len(texts)
            )
        one, two = (_internal(rows, name) for name in result["request_ids"][:2])
        distinct = float((one[5].view(torch.float32) - two[5].view(torch.float32)).abs().max())
        for index, text in enumerate(texts):
            mine = _internal(rows, result["request_ids"][index])
            theirs = _internal(self.audit.rows, again["request_ids"][index])
            for position in range(len(text) - 1):
                a, b = mine.get(position), theirs[position].view(torch.float32)
                if a is not None:
                    compared += 1
                    worst = max(worst, float((a.view(torch.float32) - b).abs().max()))
        return {"rows": compared, "worst": worst, "distinct": distinct}

    def phase_prefix_hits(self) -> dict[str, Any]:
        """The requests again, on the blocks that phase `greedy` left."""
        return self.generate()

    def phase_short(self) -> dict[str, Any]:
        """Two requests, and what the worker is made of; works across processes."""
        (found,) = self.llm.collective_rpc(_inside)
        return {**self.generate(prompts()[:2], limits=[8, 8]), **found}

    def phase_temperature(self) -> dict[str, Any]:
        """Seeded requests, short enough for one step: vLLM 0.32's own CPU engine raises "CPU
        Generator does not use offset" for a seeded request whose prompt is split."""
        import torch

        torch.manual_seed(0)  # the drafter samples from the global generator
        return self.generate(
            [text[:28] for text in prompts()[:4]],
            limits=[12] * 4, temperature=0.8, top_p=0.9, seeds=[11, 12, 13, 14],
        )  # fmt: skip

    def phase_logprobs(self) -> dict[str, Any]:
        return self.generate(logprobs=2)

    def phase_structured(self) -> dict[str, Any]:
        from vllm.sampling_params import StructuredOutputsParams

        return self.generate(structured_outputs=StructuredOutputsParams(regex="[a-f ]{40}"))

    def phase_aborts(self) -> dict[str, Any]:
        """Two requests are aborted between steps, their last drafts never verified; a third takes
        their blocks."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        texts = prompts()[:4]
        for name, text in zip("abcd", texts, strict=True):
            limit = 12 if name in "bd" else 90  # a and c would go on for long
            engine.add_request(
                name, text, SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True)
            )
        done: dict[str, list[int]] = {}
        for step in range(200):
            if step in (6, 8):
                engine.abort_request(["a" if step == 6 else "c"])
                engine.add_request(
                    f"after{step}",
                    texts[step % 4],
                    SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
                )
            if not engine.has_unfinished_requests():
                break
            for out in engine.step():
                if out.finished:
                    done[out.request_id] = list(out.outputs[0].token_ids)
        return {"ids": [done[name] for name in sorted(done)], "names": sorted(done)}

    def phase_direct(self) -> dict[str, Any]:
        """The rewritten graph without a window: every row is certain."""
        with self.replaced(self.hooks, "window", None):
            return self.phase_greedy()

    def phase_direct_temperature(self) -> dict[str, Any]:
        with self.replaced(self.hooks, "window", None):
            return self.phase_temperature()

    def phase_naive(self) -> dict[str, Any]:
        """Staged, but attention reads the cache alone: what everybody tries first."""
        window = self.hooks.window
        begin, commit, routing = window.begin, window.commit, window.tensors.routing
        kept = routing.num_drafts.clone()

        def blind(*args: Any) -> None:
            begin(*args)
            kept.copy_(routing.num_drafts)
            routing.num_drafts.zero_()

        def seeing(*args: Any) -> Any:
            routing.num_drafts.copy_(kept)
            return commit(*args)

        with self.replaced(window, "begin", blind), self.replaced(window, "commit", seeing):
            return self.generate()

    def phase_poison(self) -> dict[str, Any]:
        window = self.hooks.window
        config = window.config.model_copy(update={"poison": "nan"})
        with self.replaced(window, "config", config):
            return self.generate()

    def phase_error_flag(self) -> dict[str, Any]:
        """The error flag is up in every second window."""
        window = self.hooks.window
        commit, calls = window.commit, [0]

        def faulty(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] % 2:
                window.tensors.error.fill_(1)
            return commit(*args)

        with self.replaced(window, "commit", faulty), self.audited() as audit:
            return {**self.generate(), "audit": audit}

    def phase_one_layer_fails(self) -> dict[str, Any]:
        """One layer of four loses its drafts: nothing may be committed in any."""
        name = self.hooks.window.layer_names[2]
        layer = self.worker.model_runner.compilation_config.static_forward_context[name]
        stage = layer.impl.stage_kv

        def lossy(layer: Any, key: Any, value: Any, cache: Any, slots: Any, staging: Any) -> None:
            certain = staging.routing.row_map[: slots.shape[0]] < 0
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots.where(certain, -1))

        with self.replaced(layer.impl, "stage_kv", lossy), self.audited() as audit:
            result = self.generate()
        del stage
        return {**result, "audit": audit}


def _inside(worker: Any) -> dict[str, Any]:
    """Runs in the worker's process."""
    from nwor_compile.vllm_adapter import ops

    context = worker.model_runner.compilation_config.static_forward_context
    return {
        "twins": ops.executions(),
        "backends": sorted({type(layer.impl).__name__ for layer in context.values()}),
    }


def _minus(after: Any, before: Any) -> Any:
    if isinstance(after, list):
        return [a - b for a, b in zip(after, before or [0] * len(after), strict=True)]
    if isinstance(after, dict):
        return {key: value - (before or {}).get(key, 0) for key, value in after.items()}
    return after - (before or 0)


def _internal(rows: dict[Any, Any], request: str) -> dict[int, Any]:
    """Rows of one request by position; vLLM appends to the id that the caller knows."""
    return {
        position: row
        for (name, position), row in rows.items()
        if name == request or name.startswith(f"{request}-")
    }


def main() -> None:
    start = time.perf_counter()
    harness = Harness()
    harness.report["start_seconds"] = time.perf_counter() - start
    print(f"start: {harness.report['start_seconds']:.1f} s", flush=True)
    for name in OPTIONS["phases"]:
        try:
            harness.run_phase(name)
        except Exception as error:  # noqa: BLE001  the test of this phase reports it
            traceback.print_exc()
            harness.report["phases"][name] = {"error": repr(error)}
            break  # the engine is in no state to go on
    if harness.worker is not None:
        harness.report["runner"] = type(harness.worker.model_runner).__mro__[1].__name__
        context = harness.worker.model_runner.compilation_config.static_forward_context
        harness.report["layers"] = list(context)
    Path(sys.argv[2]).write_text(json.dumps(harness.report))


if __name__ == "__main__":
    main()
