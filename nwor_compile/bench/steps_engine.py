"""One vLLM engine of `nwor bench steps`: `python -m nwor_compile.bench.steps_engine`.

Commands and answers are those of `engine_worker.serve`:

| op | arguments | answer |
|---|---|---|
| `start` | `model`, `head`: their config.json; `llm`: vLLM's arguments; `staged` | `EngineReport` |
| `fill` | `batch`, `context` | seconds; the prompts are in the prefix cache then |
| `window` | `batch`, `context`, `warm`, `steps`, `profile` | `Window` |
| `stop` | | none, then the process ends |

The engine is stepped here, not by `LLM.generate`: a point's requests are put into the scheduler
with prompts that are in the prefix cache, decode together, and are aborted after the window. So
each window begins at the same context. VLLM_CACHE_ROOT must be set: it says what was compiled.

On one GPU the thread that steps is bound to the last core allowed, which all engines of a run
share: they take turns, and a neighbour who slows this core then slows them alike. With several
GPUs steps are taken in processes of vLLM's, which are not bound.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nwor_compile.bench import steps_meter
from nwor_compile.bench.engine_rows import NworFigures
from nwor_compile.bench.engine_worker import prepare_cpu, serve
from nwor_compile.bench.steps_record import EngineReport, Profile, Window

# Steps in which an engine must come to a state; more means that requests do not fit together.
PATIENCE = 20_000


class StepsWorker:
    """The engine, stepped one by one."""

    def __init__(self) -> None:
        self.vllm: Any = None
        self.llm: Any = None
        self.staged = False
        self.verify_tokens = 0
        self.vocabulary = 0
        self.longest = 0
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.prompts: dict[tuple[int, int], list[int]] = {}

    def start(self, command: dict[str, Any]) -> dict[str, Any]:
        """Start the engine with dummy weights."""
        begin = time.perf_counter()
        cold = not Path(os.environ["VLLM_CACHE_ROOT"], "torch_compile_cache").exists()
        self.vllm = importlib.import_module("vllm")
        imported = time.perf_counter()
        arguments = dict(command["llm"])
        self._write_models(command, arguments)
        platform = importlib.import_module("vllm.platforms").current_platform
        notes = []
        if platform.is_cpu():
            shapes = {"temperature": 0.0, "shapes": []}
            notes = prepare_cpu(self.vllm.__version__, arguments, shapes)
        self.staged = command["staged"]
        self.verify_tokens = 1 + arguments["speculative_config"]["num_speculative_tokens"]
        self.llm = self.vllm.LLM(**arguments)
        seconds = time.perf_counter() - imported
        alone = arguments["tensor_parallel_size"] == 1
        core = _bind_this_thread() if alone and not platform.is_cpu() else None
        config = self.llm.llm_engine.vllm_config
        self.longest = config.model_config.max_model_len
        return EngineReport(
            cold=cold,
            start_seconds=round(seconds, 2),
            import_seconds=round(imported - begin, 2),
            device=platform.get_device_name(),
            vllm=self.vllm.__version__,
            torch=torch.__version__,
            worker=config.parallel_config.worker_cls,
            cudagraph_mode=str(config.compilation_config.cudagraph_mode),
            async_scheduling=bool(config.scheduler_config.async_scheduling),
            inductor_partition=bool(config.compilation_config.use_inductor_graph_partition),
            blocks=config.cache_config.num_gpu_blocks,
            block_size=config.cache_config.block_size,
            core=core,
            notes=notes,
            **self.llm.collective_rpc(steps_meter.install)[0],
        ).model_dump()

    def _write_models(self, command: dict[str, Any], arguments: dict[str, Any]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        for name in ("model", "head"):
            folder = Path(self.folder.name) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(command[name]))
        self.vocabulary = command["model"]["vocab_size"]
        arguments["model"] = str(Path(self.folder.name) / "model")
        arguments["speculative_config"]["model"] = str(Path(self.folder.name) / "head")

    def fill(self, command: dict[str, Any]) -> dict[str, Any]:
        """Compute the prompts of a point, so that its windows find them in the prefix cache."""
        begin = time.perf_counter()
        self._clear()
        self._add(command["batch"], command["context"], tokens=1)
        engine = self.llm.llm_engine
        self._step_until(lambda: not engine.has_unfinished_requests(), "fill the prefix cache")
        self._clear()
        return {"seconds": round(time.perf_counter() - begin, 3)}

    def window(self, command: dict[str, Any]) -> dict[str, Any]:
        """Decode the point's requests: `warm` steps, then `steps` that count.

        Raises RuntimeError if a measured step was not the whole batch's verification.
        """
        batch, warm, steps = command["batch"], command["warm"], command["steps"]
        engine, before = self.llm.llm_engine, self._nwor()
        self._clear()
        requests = self._add(batch, command["context"], tokens=None)
        self._step_until(lambda: all(r.num_output_tokens for r in requests), "decode together")
        self.llm.collective_rpc(steps_meter.begin, args=(command["profile"],))
        for _ in range(warm):
            engine.step()
        emitted, start = self._emitted(requests), time.perf_counter()
        for _ in range(steps):
            engine.step()
        seconds, tokens = time.perf_counter() - start, self._emitted(requests) - emitted
        engine.step()  # sets the mark that ends the last span
        preempted = sum(r.num_preemptions for r in requests)
        metered = self.llm.collective_rpc(steps_meter.end)[0]
        nwor = NworFigures.between(before, self._nwor()) if self.staged else None
        self._clear()
        times = self._steady(metered["spans"], batch, warm, steps, preempted)
        kernels = metered.get("kernels")
        return Window(
            step_ms=statistics.median(times),
            mean_ms=statistics.mean(times),
            p90_ms=sorted(times)[int(0.9 * len(times))],
            wall_ms=1000 * seconds / steps,
            tokens_per_second=tokens / seconds,
            tokens_per_step=tokens / steps / batch,
            context=command["context"] + (emitted + tokens / 2) / batch,
            graphs=metered["graphs"],
            nwor=nwor,
            profile=None if kernels is None else Profile.of(kernels, len(metered["spans"]) + 1),
        ).model_dump()

    def _steady(
        self, spans: list[Any], batch: int, warm: int, steps: int, preempted: int
    ) -> list[float]:
        """Milliseconds of the measured steps; all of them verify every request."""
        measured = spans[warm : warm + steps]
        shapes = {(requests, tokens) for requests, tokens, _ in measured}
        wanted = {(batch, batch * self.verify_tokens)}
        if len(measured) != steps or shapes != wanted or preempted:
            raise RuntimeError(
                f"{len(measured)} of {steps} steps, of (requests, tokens) {sorted(shapes)}, "
                f"{preempted} preemptions; expected steps of {sorted(wanted)} only"
            )
        return [ms for _, _, ms in measured]

    def _step_until(self, condition: Callable[[], bool], purpose: str) -> None:
        for _ in range(PATIENCE):
            if condition():
                return
            self.llm.llm_engine.step()
        raise RuntimeError(f"the engine did not {purpose} in {PATIENCE} steps")

    def _add(self, batch: int, context: int, tokens: int | None) -> list[Any]:
        """Put requests into the scheduler; its own objects of them.

        Seeds are those of every engine: synthetic acceptance draws from seed and position, so
        engines accept alike.
        """
        for index in range(batch):
            parameters = self.vllm.SamplingParams(
                temperature=0.0, max_tokens=tokens or self.longest - context, ignore_eos=True,
                seed=index, detokenize=False, output_kind=_final_only(),
            )  # fmt: skip
            prompt = self.vllm.TokensPrompt(prompt_token_ids=self._prompt(index, context))
            self.llm.llm_engine.add_request(str(index), prompt, parameters)
        return list(self._scheduler.requests.values())

    def _prompt(self, index: int, context: int) -> list[int]:
        """Ids by chance, which no two requests share."""
        if (index, context) not in self.prompts:
            generator = torch.Generator().manual_seed(context * 4096 + index)
            ids = torch.randint(self.vocabulary, (context,), generator=generator)
            self.prompts[index, context] = ids.tolist()
        return self.prompts[index, context]

    def _clear(self) -> None:
        """Abort what runs, and step until nothing is under way."""
        engine, core = self.llm.llm_engine, self._core
        engine.abort_request([request.external_req_id for request in self._running()])
        self._step_until(
            lambda: not (core.batch_queue or core.scheduler.has_requests()), "come to rest"
        )

    def _running(self) -> list[Any]:
        return list(self.llm.llm_engine.output_processor.request_states.values())

    @staticmethod
    def _emitted(requests: list[Any]) -> int:
        return sum(request.num_output_tokens for request in requests)

    @property
    def _core(self) -> Any:
        """The engine's core, which is in this process: VLLM_ENABLE_V1_MULTIPROCESSING is 0."""
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def _scheduler(self) -> Any:
        return self._core.scheduler

    def _nwor(self) -> dict[str, Any]:
        if not self.staged:
            return {}
        found: dict[str, Any] = self.llm.collective_rpc("nwor_metrics")[0]
        return found

    def stop(self, command: dict[str, Any]) -> dict[str, Any]:
        """Shut the engine down in order."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
        if self.folder is not None:
            self.folder.cleanup()
        return {}


def _bind_this_thread() -> int:
    """Bind the calling thread, and no other, to the last core allowed; its number. Threads that it
    starts later inherit this, so an engine must be up."""
    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    return core


def _final_only() -> Any:
    """What `LLM.generate` asks for: no output is built until a request ends."""
    return importlib.import_module("vllm.sampling_params").RequestOutputKind.FINAL_ONLY


def main(worker: StepsWorker | None = None) -> None:
    """Keep the answers' pipe to ourselves; file descriptor 1 becomes stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers, worker or StepsWorker())
    answers.close()


if __name__ == "__main__":
    main()
