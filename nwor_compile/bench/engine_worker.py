"""One vLLM engine of `nwor bench engine`: `python -m nwor_compile.bench.engine_worker`.

Reads commands and writes answers, one JSON object a line; whatever vLLM prints goes to stderr.

| op | arguments | answer |
|---|---|---|
| `start` | `llm`: vLLM's; `gpu_share`, `text`, `warm_up`: a batch | versions, seconds, memory |
| `batch` | `seed`, `batch`, `shapes`: `[[prompt, output], ...]`, `temperature` | `Figures` |
| `stop` | | none, then the process ends |

An answer has `"ok": true`, or `"ok": false` with `error` and `kind` (the exception's type).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch

from nwor_compile.bench.engine_rows import Figures, NworFigures
from nwor_compile.bench.record import Spread, this_machine
from nwor_compile.vllm_adapter import cpu_sampling

SPEC = "vllm:spec_decode_num_"
# Versions whose CPU sampler is repaired, and vLLM's own token budget of a step.
REPAIRED = "0.32."
SMALLEST_BUDGET = 2048
# Requests of one batch begin this many tokens apart in the text.
STRIDE = 97


class Worker:
    """The engine and what is read from it."""

    def __init__(self) -> None:
        # Imported when an engine starts: only the adapter depends on vLLM.
        self.vllm: Any = None
        self.llm: Any = None
        self.staged = False
        self.text_ids: list[int] = []
        self.step_seconds: list[float] = []
        self.scheduled: int | None = None

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Start the engine and run one batch that is not measured."""
        begin = time.perf_counter()
        self.vllm = importlib.import_module("vllm")
        platform = importlib.import_module("vllm.platforms").current_platform

        arguments = dict(command["llm"])
        notes = []
        if platform.is_cpu():
            notes += prepare_cpu(self.vllm.__version__, arguments, command["warm_up"])
        else:
            arguments["gpu_memory_utilization"] = command["gpu_share"]
        self.llm = self.vllm.LLM(**arguments)
        nwor = (arguments.get("additional_config") or {}).get("nwor", {})
        self.staged = nwor.get("mode") == "stage"
        self.text_ids = self.llm.get_tokenizer().encode(
            Path(command["text"]).read_text(), add_special_tokens=False
        )
        self._time_steps()
        self._count_scheduled()
        started = time.perf_counter() - begin
        self.batch(command["warm_up"])
        return {
            "vllm": self.vllm.__version__,
            "device": platform.device_name,
            "runner": self._rpc(_runner_name),
            "startup_seconds": round(started, 3),
            "warm_up_seconds": round(time.perf_counter() - begin - started, 3),
            "resident_bytes": resident_bytes(),
            "staging_memory_bytes": self._rpc(_staging_memory) if self.staged else 0,
            "notes": notes,
            "machine": this_machine().model_dump(),
        }

    def batch(self, command: dict[str, Any]) -> dict[str, Any]:
        """Generate one batch; figures are differences of counters read before and after it."""
        seed, temperature = command["seed"], command["temperature"]
        prompts, parameters = [], []
        for index, (prompt, output) in enumerate(command["shapes"]):
            position = (command["batch"] * len(command["shapes"]) + index + 31 * seed) * STRIDE
            ids = cut(self.text_ids, position, prompt)
            prompts.append(self.vllm.TokensPrompt(prompt_token_ids=ids))
            own_seed = 1000 * seed + index if temperature else None
            parameters.append(
                self.vllm.SamplingParams(
                    temperature=temperature, max_tokens=output, ignore_eos=True, seed=own_seed
                )
            )
        # What draws without a seed of its own, drafters and synthetic acceptance, draws alike in
        # every engine and repeat: the engine runs in this process.
        torch.manual_seed(1000 * seed + command["batch"])
        before = self._counters()
        self.step_seconds.clear()
        begin = time.perf_counter()
        outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return self._figures(outputs, seconds, before).model_dump()

    def stop(self, command: dict[str, Any]) -> dict[str, Any]:
        """Shut the engine down in order; whoever waits too long for this ends the process."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        return {}

    def _figures(self, outputs: Any, seconds: float, before: dict[str, Any]) -> Figures:
        after = self._counters()
        spec = {name: after["spec"][name] - before["spec"][name] for name in before["spec"]}
        nwor = None
        if self.staged:
            then, now = before["nwor"], after["nwor"]
            nwor = NworFigures.between(then, now)
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        token_ms, first_ms = request_times(outputs)
        return Figures(
            seconds=seconds,
            requests=len(ids),
            tokens=sum(map(len, ids)),
            tokens_hash=hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16],
            steps=len(self.step_seconds),
            step_ms=Spread.of([1000 * s for s in self.step_seconds]),
            token_ms=Spread.of(token_ms) if token_ms else None,
            first_token_ms=Spread.of(first_ms) if first_ms else None,
            scheduled_rows=None if self.scheduled is None else self.scheduled - before["rows"],
            drafts=spec["drafts"],
            draft_tokens=spec["draft_tokens"],
            accepted_tokens=spec["accepted_tokens"],
            accepted_per_position=[
                b - a for a, b in zip(before["positions"], after["positions"], strict=True)
            ],
            nwor=nwor,
        )

    def _counters(self) -> dict[str, Any]:
        """vLLM's spec-decode counters and NWOR's, now."""
        spec = dict.fromkeys(("drafts", "draft_tokens", "accepted_tokens"), 0)
        positions: list[int] = []
        for metric in self.llm.get_metrics():
            name = metric.name.removeprefix(SPEC)
            if name in spec:
                spec[name] += metric.value
            elif name == "accepted_tokens_per_pos":
                positions = list(metric.values)
        nwor = self.llm.collective_rpc("nwor_metrics")[0] if self.staged else {}
        return {"spec": spec, "positions": positions, "nwor": nwor, "rows": self.scheduled}

    def _rpc(self, function: Callable[[Any], Any]) -> Any:
        """Rank 0's answer: counters are the same on every rank."""
        return self.llm.collective_rpc(function)[0]

    def _time_steps(self) -> None:
        step = self.llm.llm_engine.step

        def timed() -> Any:
            begin = time.perf_counter()
            try:
                return step()
            finally:
                self.step_seconds.append(time.perf_counter() - begin)

        self.llm.llm_engine.step = timed

    def _count_scheduled(self) -> None:
        """Count the rows that direct writes put into the cache: all tokens that are scheduled.

        The scheduler is within reach because the engine runs in this process; elsewhere it is not,
        and the count stays None.
        """
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        scheduler = getattr(core, "scheduler", None)
        if scheduler is None:
            return
        schedule, self.scheduled = scheduler.schedule, 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self.scheduled = (self.scheduled or 0) + output.total_num_scheduled_tokens
            return output

        scheduler.schedule = counted


def _staging_memory(worker: Any) -> int | None:
    window = getattr(getattr(worker, "nwor", None), "window", None)
    return getattr(window, "staging_bytes", None)


def _runner_name(worker: Any) -> str:
    runner = type(worker.model_runner)
    return f"{runner.__module__}.{runner.__name__}"


def prepare_cpu(version: str, arguments: dict[str, Any], batch: dict[str, Any]) -> list[str]:
    """Go round vLLM's faults on a CPU, in this process and in `arguments`; say what was done."""
    speculation = arguments["speculative_config"]
    if not batch["temperature"] and "rejection_sample_method" not in speculation:
        return []
    notes = []
    if version.startswith(REPAIRED):
        cpu_sampling.repair()
        notes.append(cpu_sampling.NOTE.format(version=version))
    if batch["temperature"]:
        # A seeded request whose prompt is split over steps: "CPU Generator does not use offset".
        prompts = sum(prompt for prompt, _ in batch["shapes"])
        rows = prompts + len(batch["shapes"]) * (1 + speculation["num_speculative_tokens"])
        arguments["max_num_batched_tokens"] = max(rows, SMALLEST_BUDGET)
    return notes


def cut(ids: list[int], start: int, count: int) -> list[int]:
    """`count` ids from `start` on; the text begins again where it ends."""
    return [ids[(start + i) % len(ids)] for i in range(count)]


def request_times(outputs: Any) -> tuple[list[float], list[float]]:
    """Milliseconds per token after the first, and to the first token, of each request.

    From vLLM's own time stamps; empty where it keeps none.
    """
    per_token, first = [], []
    for output in outputs:
        stats = getattr(output, "metrics", None)
        tokens = len(output.outputs[0].token_ids)
        if stats is None or not stats.first_token_ts or tokens < 2:
            continue
        per_token.append(1000 * (stats.last_token_ts - stats.first_token_ts) / (tokens - 1))
        first.append(1000 * (stats.first_token_ts - stats.queued_ts))
    return per_token, first


def resident_bytes() -> int | None:
    """Memory that this process holds now; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def serve(commands: TextIO, answers: TextIO, worker: Any) -> None:
    """Answer until `stop` or the end of the commands (the parent is gone)."""
    for line in commands:
        command = json.loads(line)
        operation = command.pop("op")
        try:
            answer = {"ok": True, **getattr(worker, operation)(command)}
        # Every failure is the answer: the parent reports it and goes on with the other engines.
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            answer = {"ok": False, "kind": type(error).__name__, "error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)
        if operation == "stop":
            return


def main() -> None:
    """Keep the answers' pipe to ourselves; file descriptor 1 becomes stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers, Worker())
    answers.close()


if __name__ == "__main__":
    main()
