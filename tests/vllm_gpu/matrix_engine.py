"""One engine of the matrix: its process, what it is asked, and what became of it."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matrix_cases import KINDS, Case

SCRIPT = Path(__file__).with_name("engine_process.py")
WEIGHTS = Path(__file__).resolve().parents[2] / "nwor_compile" / "demo" / "weights"
TEXT, TOKENIZER = WEIGHTS / "heldout.txt", WEIGHTS / "target" / "tokenizer.json"
REFUSAL = re.compile(r"(?:NWOR cannot|NWOR does not|tail blocks:) [^\n]*")
# The first line of an exception at the end of a traceback.
RAISED = re.compile(r"^(?:\[rank\d\]: )?((?:\w+\.)*\w*(?:Error|Exception|Unsupported)\b.*)$", re.M)
REQUESTS, TOKENS = 12, 64


class EngineFailed(Exception):
    """The engine ended, or did not answer in time."""


class EngineProcess:
    """A process that answers lines of JSON, as `engine_process.py` does."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path
    ) -> None:
        self.log = log
        self._answers: queue.Queue[str | None] = queue.Queue()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **environment}, cwd=folder,
            )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next answer. Raises EngineFailed with the end of the log."""
        try:
            line = self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise EngineFailed(f"no answer in {seconds:.0f} s\n{self.tail()}") from None
        if line is None:
            raise self._ended()
        return dict(json.loads(line))

    def ask(self, seconds: float, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises EngineFailed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        return self.answer(seconds)

    def _ended(self) -> EngineFailed:
        raised = RAISED.findall(self.log.read_text(errors="replace"))
        said = f": {raised[-1]}" if raised else ""
        return EngineFailed(f"the engine ended{said}\n{self.tail()}")

    def tail(self, lines: int = 25) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def close(self, seconds: float = 15) -> None:
        """End the process; kill it if it does not end."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(seconds)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()


def text_prompts(count: int) -> list[list[int]]:
    """Prompts of 20 to 170 ids from text that the tiny target was not trained on."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(TOKENIZER)).encode(TEXT.read_text()).ids
    return [ids[97 * i : 97 * i + 20 + 37 * i % 151] for i in range(count)]


def prompts_of(case: Case) -> list[list[int]]:
    """Of different lengths, some longer than a step's budget; repetitive where drafts are looked
    up in the prompt."""
    prompts = text_prompts(REQUESTS)
    if case.method == "ngram":
        return [(ids[:40] * 4)[: 60 + len(ids) // 2] for ids in prompts]
    return prompts


def work(case: Case, kind: str, ask: Any) -> dict[str, dict[str, Any]]:
    """All runs of an engine, in an order that is the same for every kind. ask(**command).

    audited: greedy, every step looked at. greedy: the same prompts, found in the prefix cache; with
    log probabilities. sampled: at temperature 0.8. follow: earlier prompts with part of what was
    generated, so that blocks are found that were speculated into; audited, with log probabilities.

    Poison is not audited: the audit's noise would be taken for a row that touched it.
    """
    audit = "poison" not in (KINDS[kind] or {})
    prompts = prompts_of(case)
    tokens = TOKENS if not case.small_cache else 3 * TOKENS // 2
    results = {"audited": ask(prompts=prompts, max_tokens=tokens, audit=audit)}
    results["greedy"] = ask(prompts=prompts, max_tokens=tokens, logprobs=True)
    results["sampled"] = ask(prompts=prompts[::-1], max_tokens=tokens, temperature=0.8, seed=1)
    longer = [
        prompt + ids[: TOKENS // 2]
        for prompt, ids in zip(prompts, results["greedy"]["ids"], strict=True)
    ]
    results["follow"] = ask(prompts=longer, max_tokens=tokens, audit=audit, seed=2, logprobs=True)
    return results


def run(
    case: Case, kind: str, scratch: Path, logs: Path, limit: float, script: Path = SCRIPT
) -> dict[str, Any]:
    """Start an engine of this kind and let it work. limit: seconds for all of it.

    Returns `facts`, `results` by run, `seconds`; or `error`, and `refused` with NWOR's own words.
    """
    name = f"{case.name}.{kind.replace(' ', '_')}"
    folder = scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    options = folder / "options.json"
    options.write_text(json.dumps(case.options(kind, folder)))
    # What vLLM finds out about a model's class takes a process of its own; all engines share it.
    (scratch / "modelinfos").mkdir(exist_ok=True)
    (folder / "cache").mkdir(exist_ok=True)
    if not (folder / "cache" / "modelinfos").exists():
        (folder / "cache" / "modelinfos").symlink_to(scratch / "modelinfos")
    environment = {
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "OMP_NUM_THREADS": "2",
        "NUMBA_NUM_THREADS": "1",  # of the n-gram drafter; more of them spin
        "PYTHONUNBUFFERED": "1",
        **({"VLLM_KV_CACHE_LAYOUT": case.layout} if case.layout != "NHD" else {}),
        **case.environment,
    }
    start = time.monotonic()
    engine = EngineProcess(
        [sys.executable, str(script), str(options)], environment, folder, logs / f"{name}.log"
    )
    found: dict[str, Any] = {}

    def left() -> float:
        return limit - (time.monotonic() - start)

    try:
        found["facts"] = engine.answer(left())
        found["results"] = work(case, kind, lambda **command: engine.ask(left(), **command))
    except EngineFailed as failure:
        found["error"] = str(failure)
    finally:
        engine.close(1 if "error" in found else 15)
    if "error" in found and (refusals := REFUSAL.findall(engine.log.read_text(errors="replace"))):
        found["refused"] = refusals[-1]
    found["seconds"] = round(time.monotonic() - start, 1)
    return found
