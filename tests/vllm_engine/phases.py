"""What an engine is put through. Each phase runs requests and returns what the tests compare."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from cache_audit import Audit
from engine import WEIGHTS
from faults import Faults
from ranks import Ranks, no_window
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from nwor_compile.vllm_adapter import cpu_sampling

MAX_TOKENS = (14, 5, 1, 18, 2, 11)
REGEX = "[a-f ]{40}"


def prompts() -> list[str]:
    """Six pieces of held-out text of unequal length; most exceed one step's token budget."""
    text = (WEIGHTS / "heldout.txt").read_text()
    return [text[i * 700 : i * 700 + 90 + 61 * (i % 5)] for i in range(len(MAX_TOKENS))]


class Phases(Faults, Ranks):
    """One LLM, its worker where it lives in this process, and the phases that run on it."""

    def __init__(self, llm: Any, options: dict[str, Any]) -> None:
        self.llm, self.options = llm, options
        self.worker: Any = None
        self.audit: Any = None
        if options.get("ranks", 1) == 1 and not options.get("multiprocess", False):
            cpu_sampling.repair()  # no two seeded runs are equal without, NWOR or not
            self.worker = llm.collective_rpc(lambda worker: worker)[0]
            self.audit = Audit(self.worker.model_runner)

    def facts(self) -> dict[str, Any]:
        """What the engine is made of."""
        config = self.llm.llm_engine.vllm_config
        found = {"async_scheduling": config.scheduler_config.async_scheduling}
        if self.worker is None:
            return found
        runner = self.worker.model_runner
        return {
            **found,
            "runner": type(runner).__mro__[1].__name__,
            "layers": list(self.context),
            "kv_cache_groups": len(runner.kv_cache_config.kv_cache_groups),
            "cache_dtypes": sorted({str(each.kv_cache.dtype) for each in self.context.values()}),
            "sliding_windows": self.audit.windows,
            "shared_memory": any(len(groups) > 1 for groups in self.audit.sharing),
            "window_layers": [] if self.hooks is None else list(self.hooks.window.layer_names),
        }

    def run(self, name: str) -> dict[str, Any]:
        """Run the phase of this name."""
        before, counted = self._vllm_counters(), self._nwor_counters()
        if name != "prefix_hits":
            self.llm.reset_prefix_cache()
        result = getattr(self, f"phase_{name}")()
        after, now = self._vllm_counters(), self._nwor_counters()
        result["vllm"] = {key: _minus(after[key], before.get(key)) for key in after}
        result.setdefault(
            "nwor",
            {
                key: _minus(now[key], counted.get(key))
                for key in now
                if not key.startswith("nwor_acceptance")
            },
        )
        return result

    def _vllm_counters(self) -> dict[str, Any]:
        wanted = ("vllm:spec_decode", "vllm:num_preemptions")
        found = {
            metric.name: getattr(metric, "value", getattr(metric, "values", None))
            for metric in self.llm.get_metrics()
            if metric.name.startswith(wanted)
        }
        return {name: value for name, value in found.items() if value is not None}

    def _nwor_counters(self) -> dict[str, Any]:
        if self.options.get("nwor") is None:
            return {}
        return dict(self.llm.collective_rpc("nwor_metrics")[0])

    def generate(self, texts: list[Any] | None = None, **sampling: Any) -> dict[str, Any]:
        """Run requests, greedy unless `sampling` says otherwise."""
        texts = list(prompts()) if texts is None else texts
        limits = sampling.pop("limits", self.options.get("limits", MAX_TOKENS))
        sampling.setdefault("temperature", 0.0)
        seeds = sampling.pop("seeds", [None] * len(texts))
        params = [
            SamplingParams(max_tokens=limit, seed=seed, ignore_eos=True, **sampling)
            for limit, seed in zip(limits, seeds, strict=True)
        ]
        outputs = self.llm.generate(texts, params, use_tqdm=False)
        return {
            "ids": [list(out.outputs[0].token_ids) for out in outputs],
            "texts": [out.outputs[0].text for out in outputs],
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
    def audited(self, *, fresh: bool = True) -> Iterator[dict[str, Any]]:
        """Audit the steps inside; fresh: over caches full of noise."""
        found: dict[str, Any] = {}
        if fresh:
            self.audit.reset()
        self.audit.forget()
        self.audit.on = True
        try:
            yield found
        finally:
            self.audit.on = False
            found.update(self.audit.result())

    def phase_greedy(self) -> dict[str, Any]:
        with self.audited() as audit:
            result = self.generate()
        rows = dict(self.audit.rows)
        return {**result, "audit": audit, "recomputed": self.recompute(result, rows)}

    def recompute(self, result: dict[str, Any], rows: dict[Any, Any]) -> dict[str, float]:
        """Prefill each request's whole text again and compare its rows with the ones kept."""
        texts = [p + ids for p, ids in zip(result["prompt_ids"], result["ids"], strict=True)]
        self.llm.reset_prefix_cache()
        with self.audited():
            again = self.generate(
                [{"prompt_token_ids": text} for text in texts], limits=[1] * len(texts)
            )
        one, two = (_of_request(rows, name) for name in result["request_ids"][:2])
        compared, worst = 0, 0.0
        for index, text in enumerate(texts):
            mine = _of_request(rows, result["request_ids"][index])
            theirs = _of_request(self.audit.rows, again["request_ids"][index])
            for position in range(len(text) - 1):
                if position in mine:
                    compared += 1
                    worst = max(worst, self.audit.distance(mine[position], theirs[position]))
        return {
            "rows": compared,
            "worst": worst,
            "distinct": self.audit.distance(one[5], two[5]),
        }

    def phase_prefix_hits(self) -> dict[str, Any]:
        """The requests again, on the blocks that phase `greedy` left when it recomputed them."""
        with self.audited(fresh=False) as audit:
            result = self.generate()
        return {**result, "audit": audit}

    def phase_temperature(self) -> dict[str, Any]:
        """Seeded requests, short enough for one step: vLLM 0.32's own CPU engine raises "CPU
        Generator does not use offset" for a seeded request whose prompt is split."""
        torch.manual_seed(0)  # the drafter samples from the global generator
        return self.generate(
            [text[:28] for text in prompts()[:4]],
            limits=[12] * 4, temperature=0.8, top_p=0.9, seeds=[11, 12, 13, 14],
        )  # fmt: skip

    def phase_logprobs(self) -> dict[str, Any]:
        return self.generate(logprobs=2)

    def phase_structured(self) -> dict[str, Any]:
        return self.generate(structured_outputs=StructuredOutputsParams(regex=REGEX))

    @contextlib.contextmanager
    def _no_window(self) -> Iterator[None]:
        """Steps with drafts open no window: they write as steps without drafts do."""
        with self.replaced(self.hooks, "_begin", no_window):
            yield

    def phase_direct(self) -> dict[str, Any]:
        """The rewritten graph without a window: every row is certain."""
        with self._no_window():
            return self.phase_greedy()

    def phase_direct_temperature(self) -> dict[str, Any]:
        with self._no_window():
            return self.phase_temperature()

    def phase_direct_structured(self) -> dict[str, Any]:
        with self._no_window():
            return self.phase_structured()

    def phase_scv_off(self) -> dict[str, Any]:
        return self._with_scv("off")

    def phase_scv_adaptive(self) -> dict[str, Any]:
        return self._with_scv("adaptive")

    def _with_scv(self, mode: str) -> dict[str, Any]:
        """A window of another SCV mode on the same caches, made as the hooks make it at start."""
        settings = self.hooks.settings
        changed = settings.model_copy(update={"scv": mode})
        try:
            self._reopen(changed)
            found = {"mode": self.hooks.window.config.scv, **self.generate()}
            return {**found, "nwor": dict(self.hooks.metrics())}  # a new window counts from zero
        finally:
            self._reopen(settings)

    def _reopen(self, settings: Any) -> None:
        self.hooks.settings = settings
        self.hooks._open(self.worker.model_runner.kv_cache_config)
        self.hooks.window.warm_up()

    def phase_profiled(self) -> dict[str, Any]:
        """Under torch.profiler: how often each range of ours was seen, and where. And what windows
        are opened with, beside what the hooks open them with in warm-up."""
        window, forms = self.hooks.window, []
        begin, signature = window.begin, inspect.signature(window.begin)

        def noted(*args: Any, **kwargs: Any) -> None:
            given = signature.bind(*args, **kwargs).arguments
            requests = given["query_start_loc"].shape[0] - 1
            rehearsed = self.hooks._empty_step(window, requests)
            forms.append([_form(given), _form(rehearsed)])
            begin(*args, **kwargs)

        window.begin = noted
        try:
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                result = self.generate()
        finally:
            del window.begin
        counts: dict[str, int] = {}
        for event in profile.events():
            if event.name.startswith("nwor."):
                counts[event.name] = counts.get(event.name, 0) + 1
        return {**result, "ranges": counts, "forms": forms}


def _form(given: Mapping[str, Any]) -> dict[str, Any]:
    """Of tensors, what their number of entries does not decide."""
    return {
        name: _form(value) if isinstance(value, Mapping) else [str(value.dtype), value.stride()]
        for name, value in sorted(given.items())
        if value is not None
    }


def _minus(after: Any, before: Any) -> Any:
    if isinstance(after, list):
        return [a - b for a, b in zip(after, before or [0] * len(after), strict=True)]
    if isinstance(after, dict):
        return {key: value - (before or {}).get(key, 0) for key, value in after.items()}
    return after - (before or 0)


def _of_request(rows: dict[Any, Any], request: str) -> dict[int, Any]:
    """Rows of one request by position; vLLM appends to the id that the caller knows."""
    return {
        position: row
        for (name, position), row in rows.items()
        if name == request or name.startswith(f"{request}-")
    }
