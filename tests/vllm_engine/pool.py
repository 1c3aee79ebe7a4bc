"""Runs the tests' engines, two at a time, each in a process forked from one that imported vLLM.

Importing vLLM takes longer than most engines run, so it is done once, in multiprocessing's fork
server. What an engine needs of its environment is set in its process before it starts.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engines import ENGINES

HERE = Path(__file__).parent
# An engine starts in half a minute on an idle core and in several on a crowded one.
LIMIT_SECONDS = 900
AT_A_TIME = 2

PRELOADED = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.v1.spec_decode.llm_base_proposer",
)

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc of a function
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    # vLLM pins an engine to the first core, and so does the engine beside it.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",  # the n-gram drafter; numba sets OpenMP's threads as well
    # Inductor else tries every vector extension with the compiler, in each new cache folder.
    "TORCHINDUCTOR_VEC_ISA_OK": "1",
}


def environment(cache: str, options: dict[str, Any]) -> dict[str, str]:
    """The environment of an engine with these options; `cache` is vLLM's compile cache."""
    kept = {key: text for key, text in os.environ.items() if not key.startswith("VLLM_")}
    return {
        **kept,
        **ENVIRONMENT,
        "VLLM_CACHE_ROOT": cache,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if options.get("multiprocess", False) else "0",
        **options.get("environment", {}),
    }


def child(options: dict[str, Any], out: str, log: str, variables: dict[str, str]) -> None:
    """The engine's process: output to `log`, report to `out`."""
    settle(log, variables)
    from engine import run

    run(options, Path(out))


def settle(log: str, variables: dict[str, str]) -> None:
    """Make a forked process an engine's: its output goes to `log`, `variables` are its environment.

    OMP_NUM_THREADS was read when torch was imported, before the fork. Two threads that spin at each
    other's barriers take ten times as long on cores that others use too.
    """
    import torch

    with open(log, "w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(int(variables["OMP_NUM_THREADS"]))


class EngineFailed(RuntimeError):
    """An engine ended without a report; the text is the end of its log."""


class Report(dict[str, Any]):
    """What an engine reported."""

    def phase(self, name: str) -> dict[str, Any]:
        """The report of one phase; a phase that raised fails the test."""
        result = self["phases"].get(name)
        if result is None or "error" in result:
            pytest.fail(f"phase {name}: {result}\n{self['log'][-4000:]}")
        return result


class Pool:
    """Engines by name; each runs once, and `report` waits for it.

    Args:
        folder: for logs and reports. cache: vLLM's compile cache, shared by all.
        kept: folder of earlier reports to use and to add to, for work on the tests themselves.
    """

    def __init__(self, folder: Path, cache: str, kept: str | None) -> None:
        self.folder, self.cache, self.kept = folder, cache, kept
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(PRELOADED))
        self._cores = threading.BoundedSemaphore(AT_A_TIME)
        self._threads = concurrent.futures.ThreadPoolExecutor(AT_A_TIME)
        self._reports: dict[str, concurrent.futures.Future[Report]] = {}
        self._processes: list[Any] = []
        self._closed = False

    def start(self, names: list[str]) -> None:
        """Queue these engines, in this order; those that have run or are queued are left alone."""
        for name in names:
            if name not in self._reports:
                self._reports[name] = self._threads.submit(self._run, name)

    def report(self, name: str) -> Report:
        """What the engine reported, and its output under `log`. Raises EngineFailed."""
        self.start([name])
        return self._reports[name].result()

    @contextmanager
    def core(self) -> Iterator[None]:
        """Hold one of the places, for engines that a test starts itself."""
        with self._cores:
            yield

    def close(self) -> None:
        """Forget what is queued and end what runs."""
        self._closed = True
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        self._threads.shutdown(wait=True)

    def _run(self, name: str) -> Report:
        options = ENGINES[name]
        earlier = Path(self.kept, f"{name}.json") if self.kept else None
        if earlier is not None and earlier.exists():
            return Report({"log": "", **json.loads(earlier.read_text())})
        out, log = self.folder / f"{name}.json", self.folder / f"{name}.log"
        with self._cores:
            if self._closed:
                raise EngineFailed(f"engine {name!r} was not started: the tests are over")
            process = self._context.Process(
                target=child, args=(options, str(out), str(log), environment(self.cache, options))
            )
            self._processes.append(process)
            process.start()
            process.join(LIMIT_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        text = log.read_text() if log.exists() else ""
        if not out.exists():
            raise EngineFailed(f"engine {name!r} did not finish:\n{text[-6000:]}")
        report = json.loads(out.read_text())
        if earlier is not None:
            earlier.parent.mkdir(parents=True, exist_ok=True)
            earlier.write_text(json.dumps(report))
        return Report({**report, "log": text})
