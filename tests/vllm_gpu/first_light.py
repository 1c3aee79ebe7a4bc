"""vLLM 0.26 on a GPU, with NWOR and without: equal tokens, equal acceptance, no rejected row.

    python tests/vllm_gpu/first_light.py --record OUT.json [--engines tiny,large,v1] [--rounds 3]

Starts all engines at once (compiling is what takes time) and lets them take turns. The package and
vLLM must be installed, for the plugin comes in by its entry point. `failures` says what is wrong
with a record; `test_first_light.py` runs this.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEXT = HERE.parents[1] / "nwor_compile" / "demo" / "weights" / "heldout.txt"
TOKENIZER = HERE.parents[1] / "nwor_compile" / "demo" / "weights" / "target" / "tokenizer.json"

STAGE, OFF = {"mode": "stage"}, {"mode": "off"}
# vLLM's own kernels throughout: what comes out must be what stock vLLM gives, bit for bit.
EXACT = {"mode": "stage", "attention": "stock"}
SMALL = {
    "max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 128,
    "num_gpu_blocks_override": 400,
}  # fmt: skip
# The dimensions of a 3B Llama, dummy weights.
THREE_B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
WIDE = {"max_model_len": 4096, "max_num_seqs": 16, "max_num_batched_tokens": 2048}
SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.5}
POINTS = ((1, 512), (4, 512), (16, 512), (4, 2048))  # batch x context


def case(model: Any, nwor: Any, llm: dict[str, Any], **speculative: Any) -> dict[str, Any]:
    """Options of one engine; see `engine_process.py`."""
    return {"model": model, "nwor": nwor, "llm": llm, "speculative": speculative}


CASES: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "tiny stock": case("tiny", None, SMALL),
        "tiny off": case("tiny", OFF, SMALL),
        "tiny stage": case("tiny", STAGE, SMALL),
        "tiny stage exact": case("tiny", EXACT, SMALL),
        "tiny poison": case("tiny", {**STAGE, "poison": "nan"}, SMALL),
    },
    "v1": {
        "v1 stock": case("tiny", None, SMALL, method="draft_model"),
        "v1 stage exact": case("tiny", EXACT, SMALL, method="draft_model"),
        "v1 off": case("tiny", OFF, SMALL, method="draft_model"),
        "v1 stage": case("tiny", STAGE, SMALL, method="draft_model"),
    },
    "large": {
        "large stock": case(THREE_B, None, WIDE, **SYNTHETIC),
        "large off": case(THREE_B, OFF, WIDE, **SYNTHETIC),
        "large stage": case(THREE_B, STAGE, WIDE, **SYNTHETIC),
        "large stage exact": case(THREE_B, EXACT, WIDE, **SYNTHETIC),
    },
}


class Process:
    """One `engine_process.py`."""

    def __init__(self, name: str, options: dict[str, Any], logs: Path, scratch: Path) -> None:
        self.name, self.log = name, logs / f"{name.replace(' ', '_')}.log"
        file = scratch / f"{name}.json"
        file.write_text(json.dumps(options))
        environment = {
            **os.environ,
            "VLLM_CACHE_ROOT": str(scratch / name.replace(" ", "_")),
            "TORCHINDUCTOR_COMPILE_THREADS": "2",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "engine_process.py"), str(file)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
            env=environment, cwd=scratch,
        )  # fmt: skip
        self.error = ""

    def answer(self) -> dict[str, Any]:
        """The next answer; raises RuntimeError with the end of the log if there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.error = _tail(self.log)
            raise RuntimeError(f"{self.name}: the engine ended\n{self.error}")
        return dict(json.loads(line))

    def ask(self, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the engine; kill it if it does not end."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(20)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def start(names: dict[str, dict[str, Any]], logs: Path, scratch: Path) -> dict[str, Any]:
    """Start all engines at once; those that fail are reported by their error."""
    processes = {name: Process(name, options, logs, scratch) for name, options in names.items()}
    facts: dict[str, Any] = {}

    def wait(name: str) -> None:
        try:
            facts[name] = {"process": processes[name], **processes[name].answer()}
        except RuntimeError as error:
            facts[name] = {"error": str(error)}
        print(f"{time.strftime('%X')} {name}: {'failed' if 'error' in facts[name] else 'up'}")

    threads = [threading.Thread(target=wait, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return facts


def text_prompts(count: int) -> list[list[int]]:
    """Prompts of 20 to 170 ids from text that the tiny target was not trained on."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(TOKENIZER)).encode(TEXT.read_text()).ids
    return [ids[97 * i : 97 * i + 20 + 37 * i % 151] for i in range(count)]


def random_prompts(batch: int, context: int) -> list[list[int]]:
    """Ids that no two requests share, so nothing is found in the prefix cache."""
    return [
        [(7919 * (r + 1) * (i + 1) + 31 * context) % 128000 for i in range(context)]
        for r in range(batch)
    ]


def tiny(engine: Process) -> dict[str, Any]:
    """Real text: audited and greedy, then greedy and sampled without the audit.

    The audit puts noise where poison is, and poison would be found touched: its engine goes
    without. All engines have the same run before each, so the same rows in the prefix cache.
    """
    results = {}
    for name, audit, temperature in (
        ("audited", True, 0.0), ("greedy", False, 0.0), ("sampled", False, 0.8)
    ):  # fmt: skip
        results[name] = engine.ask(
            prompts=text_prompts(24),
            max_tokens=200,
            temperature=temperature,
            audit=audit and engine.name != "tiny poison",
        )
    return results


def large(engines: dict[str, Process], rounds: int) -> dict[str, dict[str, Any]]:
    """Step times; engines take turns at every point, in another order each round."""
    results: dict[str, dict[str, Any]] = {name: {} for name in engines}
    if not engines:
        return results
    for batch, context in POINTS:
        command = {"prompts": random_prompts(batch, context), "max_tokens": 128}
        for name, engine in engines.items():  # a first time, not measured
            results[name][f"{batch}x{context} first"] = engine.ask(**command)
        for number in range(rounds):
            order = list(engines)[number % len(engines) :] + list(engines)[: number % len(engines)]
            for name in order:
                answer = engines[name].ask(**command, timing=True)
                results[name][f"{batch}x{context} round {number}"] = answer
    for name, engine in engines.items():
        results[name]["16x512 profile"] = engine.ask(
            prompts=random_prompts(16, 512), max_tokens=64, profile=True
        )
    return results


def shorten(results: dict[str, Any]) -> None:
    """Replace ids by their number and hash: a record needs no more."""
    for answer in results.values():
        ids = answer.pop("ids")
        if "kernels" in answer:
            answer["kernels_launches"] = sum(count for count, _ in answer["kernels"].values())
            answer["kernels_us"] = round(sum(us for _, us in answer["kernels"].values()))
        answer["tokens"] = sum(map(len, ids))
        answer["ids_hash"] = hash_of(ids)


def hash_of(ids: list[list[int]]) -> str:
    """A short hash of token ids."""
    import hashlib

    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def failures(record: dict[str, Any]) -> list[str]:
    """What of a record contradicts NWOR's promises; empty if nothing."""
    engines, found = record["engines"], []
    for name, engine in engines.items():
        if "error" in engine:
            found.append(f"{name}: {engine['error'].splitlines()[-1]}")
            continue
        wanted = "v1.worker.gpu_model_runner" if name.startswith("v1") else "v1.worker.gpu.model"
        if wanted not in engine["runner"]:
            found.append(f"{name}: ran on {engine['runner']}")
        found += _engine_failures(name, engine)
    for one, other in (
        ("tiny off", "tiny stage"), ("tiny off", "tiny poison"), ("v1 off", "v1 stage"),
        ("large off", "large stage"), ("tiny stock", "tiny stage exact"),
        ("v1 stock", "v1 stage exact"), ("large stock", "large stage exact"),
    ):  # fmt: skip
        if "results" not in engines.get(one, {}) or "results" not in engines.get(other, {}):
            continue
        for run, answer in engines[one]["results"].items():
            for what in ("ids_hash", "accepted_per_position"):
                if answer[what] != engines[other]["results"][run][what]:
                    found.append(f"{other}, {run}: {what} differs from {one}")
    return found


def _engine_failures(name: str, engine: dict[str, Any]) -> list[str]:
    found = []
    staged = "stage" in name or "poison" in name
    for run, answer in engine.get("results", {}).items():
        rows, nwor = answer.get("rows") or {}, answer["nwor"]
        if name.startswith("tiny stage") and run == "audited" and not rows:
            found.append(f"{name}, {run}: not audited")
        if rows and staged and any(rows.get(k) for k in ("rejected_present", "missing")):
            found.append(f"{name}, {run}: {rows}")
        if rows and (rows.get("unexpected") or not rows.get("mixed_steps")):
            found.append(f"{name}, {run}: {rows}")
        if rows and not staged and not rows.get("rejected_present"):
            found.append(f"{name}, {run}: direct writes left no rejected row, so this saw nothing")
        if staged and (nwor["nwor_error_windows"] or not nwor["nwor_total_committed"]):
            found.append(f"{name}, {run}: {nwor}")
        graphs = answer.get("graphs") or {}
        wanted = {"FULL"} if name.startswith("large") else {"FULL", "PIECEWISE"}
        if graphs and not wanted <= set(graphs):
            found.append(f"{name}, {run}: graphs {graphs}")
    return found


def main() -> None:
    """Run and write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--engines", default="tiny,v1,large")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--logs", type=Path)
    given = parser.parse_args()
    names = {name: c for kind in given.engines.split(",") for name, c in CASES[kind].items()}
    with tempfile.TemporaryDirectory() as folder:
        logs = given.logs or Path(folder)
        facts = start(names, logs, Path(folder))
        up = {name: f.pop("process") for name, f in facts.items() if "process" in f}
        for name, engine in up.items():
            if not name.startswith("large"):
                _keep(facts[name], lambda engine=engine: tiny(engine))
        for name, results in large(
            {n: e for n, e in up.items() if n.startswith("large")}, given.rounds
        ).items():
            facts[name]["results"] = results
        for engine in up.values():
            engine.close()
    for engine in facts.values():
        shorten(engine.get("results", {}))
    arguments = f"--engines {given.engines} --rounds {given.rounds}"
    record = {**this_machine(arguments), "cases": names, "engines": facts}
    record["failures"] = failures(record)
    given.record.write_text(json.dumps(record, indent=1) + "\n")
    print("failures:", json.dumps(record["failures"], indent=1))


def _keep(facts: dict[str, Any], run: Any) -> None:
    try:
        facts["results"] = run()
    except RuntimeError as error:
        facts["error"] = str(error)


def this_machine(arguments: str) -> dict[str, Any]:
    """Device, versions, date and command; `arguments` without those that are paths."""
    import importlib.metadata

    import torch

    return {
        "device": torch.cuda.get_device_name(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("nwor-compile", "vllm", "torch", "triton")
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python tests/vllm_gpu/first_light.py --record OUT.json " + arguments,
    }


if __name__ == "__main__":
    main()
