"""A target split over two GPUs, stock and staged: the same tokens, and one error flag.

    python tests/vllm_gpu/tensor_parallel.py --record OUT.json [--logs FOLDER] [--seconds 200]

Two engines side by side on the same GPUs, each with a process a rank (vLLM's multiprocess
executor): a Llama-2-7B-shaped target, an EAGLE drafter whose layer comes after the target's, 8
drafts, 16 requests. Sizes at which an earlier adapter took the drafter's layer for one of the
target's. Exit code 1 if `judge` finds a problem.

What is asked of both: the same prompts, audited step by step; sampled; 16 requests that decode
together, counted; and faults. For those the staged engine sees a fault on its last rank alone, in
every fourth window, and stock has its counts cut on all ranks in the same steps: ids, acceptance
and log probabilities must be equal then too. Last, the staged engine does that once more while its
ranks do not share their flag: the tokens must come out otherwise, or the test above shows nothing.

Both engines leave no memory uninitialised: without that stock's tokens are not those of stock's
next start, here as in some cases of `matrix_cases.py`, and can be nobody's reference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from matrix_cases import SETTLED, synthetic
from matrix_engine import EngineFailed, EngineProcess
from matrix_report import first_difference, this_machine

SCRIPT = Path(__file__).with_name("tensor_parallel_engine.py")
RANKS, REQUESTS, DRAFTS = 2, 16, 8
STEPS = 12  # that are counted while all requests decode
FAULT_EVERY = 4
AUDITED = ("rejected_present", "missing", "unexpected")
COMPARED = ("audited", "sampled", "steady", "fault")

# Dimensions by name. `toy` is for trying the script out.
MODELS: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "vocab_size": 32000,
    },
    "toy": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 512,
    },
}  # fmt: skip


def config_of(model: str, *, head: bool) -> dict[str, Any]:
    """config.json of the target or of its one-layer EAGLE drafter."""
    dims: dict[str, int] = dict(MODELS[model])
    if head:
        dims["num_hidden_layers"] = 1
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 0,
        "eos_token_id": 0, **dims,
    }  # fmt: skip


def options(
    model: str, *, staged: bool, custom_all_reduce: bool, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Of `tensor_parallel_engine.py`. settings: further ones of NWOR's."""
    return {
        "model": config_of(model, head=False),
        "head": config_of(model, head=True),
        "ranks": RANKS,
        "nwor": {"mode": "stage", "attention": "stock", **(settings or {})} if staged else None,
        "speculative": {
            "method": "eagle", "num_speculative_tokens": DRAFTS, **synthetic(DRAFTS),
        },
        "llm": {
            "dtype": "bfloat16",
            "max_model_len": 512,
            "max_num_seqs": REQUESTS,
            "max_num_batched_tokens": 2048,
            "num_gpu_blocks_override": 640,
            "kv_cache_memory_bytes": 4 << 30,
            "disable_custom_all_reduce": not custom_all_reduce,
            "compilation_config": {
                "cudagraph_capture_sizes": [9, 18, 36, 72, 144],
                "inductor_compile_config": dict(SETTLED),
            },
        },
    }  # fmt: skip


def prompts_of(count: int, vocabulary: int, *, equal: bool = False) -> list[list[int]]:
    """Ids by chance, 20 to 160 a prompt, or 33 each."""
    chance = random.Random(count + equal)
    lengths = [33 if equal else 20 + 37 * index % 141 for index in range(count)]
    return [[chance.randrange(1, vocabulary) for _ in range(length)] for length in lengths]


def commands(vocabulary: int, *, staged: bool) -> dict[str, dict[str, Any]]:
    """What an engine is asked, in this order."""
    prompts = prompts_of(REQUESTS, vocabulary)
    every = {"fault_every" if staged else "cut_every": FAULT_EVERY}
    return {
        "audited": {"op": "generate", "prompts": prompts, "max_tokens": 48, "audit": True},
        "sampled": {
            "op": "generate", "prompts": prompts[::-1], "max_tokens": 64, "temperature": 0.8,
        },
        "steady": {
            "op": "steady", "prompts": prompts_of(REQUESTS, vocabulary, equal=True),
            "max_tokens": 160, "steps": STEPS,
        },
        "fault": {
            "op": "generate", "prompts": prompts, "max_tokens": 48, "audit": True, **every,
        },
    }  # fmt: skip


def run_engine(
    name: str, given: Mapping[str, Any], folder: Path, logs: Path, deadline: float,
    quiet: Callable[[], None], *, filled: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Start an engine and let it work; `facts` and `results` by run, or `error`.

    quiet: called between what is compared and what is timed; comes back when no other engine works.
    filled: no memory is left uninitialised, see `engine_process.fill_uninitialised_memory`.
    """
    place = folder / name
    (place / "cache").mkdir(parents=True)
    (place / "options.json").write_text(json.dumps(given))
    environment = {
        "VLLM_CACHE_ROOT": str(place / "cache"), "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "PYTHONUNBUFFERED": "1", **({"TENSOR_PARALLEL_FILLED": "1"} if filled else {}),
    }  # fmt: skip
    start = time.monotonic()
    command = [sys.executable, str(SCRIPT), str(place / "options.json")]
    engine = EngineProcess(command, environment, place, logs / f"{name}.log")
    found: dict[str, Any] = {"results": {}}
    staged = (given["nwor"] or {}).get("mode") == "stage"
    asked = commands(given["model"]["vocab_size"], staged=staged)

    def ask(run: str, **command: Any) -> None:
        found["results"][run] = engine.ask(deadline - time.monotonic(), **command)
        print(f"{time.strftime('%X')} {name} {run}", flush=True)

    try:
        found["facts"] = engine.answer(deadline - time.monotonic())
        print(f"{time.strftime('%X')} {name} is up", flush=True)
        for run, command_of_run in asked.items():
            ask(run, **command_of_run)
        quiet()
        if staged:
            ask("cost", op="cost", requests=REQUESTS)
            ask("alone", **asked["fault"], alone=True)  # last: the ranks' caches differ after it
    except EngineFailed as failure:
        found["error"] = str(failure)
        quiet()
    finally:
        engine.close(1 if "error" in found else 20)
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


def run_both(
    model: str, logs: Path, seconds: float, *, custom_all_reduce: bool, filled: bool = True,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Both engines at the same time."""
    deadline = time.monotonic() + seconds
    engines: dict[str, dict[str, Any]] = {}
    all_quiet = threading.Barrier(2)

    def quiet() -> None:
        if not all_quiet.broken:
            all_quiet.wait(max(deadline - time.monotonic(), 1))

    def work(name: str, folder: Path) -> None:
        given = options(
            model, staged=name == "stage", custom_all_reduce=custom_all_reduce, settings=settings
        )
        engines[name] = run_engine(name, given, folder, logs, deadline, once(quiet), filled=filled)

    with tempfile.TemporaryDirectory() as folder:
        threads = [
            threading.Thread(target=work, args=(name, Path(folder))) for name in ("stock", "stage")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return engines


def once(call: Callable[[], None]) -> Callable[[], None]:
    """`call`, the first time alone."""
    left = [call]

    def called() -> None:
        if left:
            left.pop()()

    return called


def judge(engines: Mapping[str, Mapping[str, Any]], layers: int) -> list[str]:
    """What is wrong; empty if the two engines show what they should. layers: of the target."""
    problems = [
        f"{name}: {engines.get(name, {}).get('error', 'it was not started')}"
        for name in ("stock", "stage")
        if "error" in engines.get(name, {"error": ""})
    ]
    for name, engine in engines.items():
        if "facts" in engine:
            problems += _started(name, engine["facts"], layers)
    # What both have run is judged, also where one of them failed later.
    stock, stage = (engines.get(name, {}).get("results", {}) for name in ("stock", "stage"))
    for run in COMPARED:
        if run not in stock or run not in stage:
            problems.append(f"{run}: not run")
            continue
        problems += _compared(run, stage[run], stock[run])
        problems += _counters(run, stage[run])
        if run in ("audited", "fault"):
            problems += _audited(run, stage[run], stock[run])
        if run == "steady":
            problems += _counted(stage[run]["counted"])
        if run == "fault":
            problems += _faults(stage[run], stock[run])
    return problems + (_control(stage) if "alone" in stage else ["alone: not run"])


def _started(name: str, facts: Mapping[str, Any], layers: int) -> list[str]:
    problems = []
    if facts["executor"] != "MultiprocExecutor" or len(facts["ranks"]) != RANKS:
        problems.append(f"{name}: {facts['executor']} with {len(facts['ranks'])} ranks")
    for rank in facts["ranks"]:
        where = f"{name}, rank {rank['rank']}"
        if "v1.worker.gpu.model_runner" not in rank["runner"]:
            problems.append(f"{where}: served by {rank['runner']}, expected vLLM's V2 runner")
        if (rank["target_layers"], rank["drafter_layers"]) != (layers, 1):
            problems.append(
                f"{where}: {rank['target_layers']} layers of the target and "
                f"{rank['drafter_layers']} of the drafter, expected {layers} and 1"
            )
        if not rank["nccl"]:
            problems.append(f"{where}: vLLM's NCCL communicator is off, and the flag goes by torch")
    return problems


def _compared(run: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    problems = []
    place = first_difference(ours["ids"], theirs["ids"])
    if place is not None:
        problems.append(f"{run}: token ids differ from stock's, first at {place}")
    for name in ("accepted_per_position", "logprobs"):
        if place is None and ours.get(name) != theirs.get(name):
            problems.append(f"{run}: {name} differ from stock's")
    if not sum(theirs["accepted_per_position"]):
        problems.append(f"{run}: stock accepted no draft, so nothing was tested")
    return problems


def _audited(run: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    problems = []
    for rank, found in enumerate(ours["ranks"]):
        if not found["rows"].get("accepted"):
            problems.append(f"{run}, rank {rank}: the audit saw no accepted draft")
        if wrong := {what: found["rows"][what] for what in AUDITED if found["rows"].get(what)}:
            problems.append(f"{run}, rank {rank}: audit {wrong}")
    for rank, found in enumerate(theirs["ranks"]):
        if not found["rows"].get("rejected_present"):
            problems.append(f"{run}, rank {rank}: direct writes left no rejected row to be seen")
    return problems


def _counted(ranks: list[Mapping[str, int]]) -> list[str]:
    """While all requests decode: 128 rows staged and 16 certain ones direct a window."""
    problems = []
    for rank, count in enumerate(ranks):
        windows = count["nwor_windows"]
        staged = windows * REQUESTS * DRAFTS
        wanted = {"nwor_total_staged": staged, "nwor_certain_rows": windows * REQUESTS}
        found = {name: count[name] for name in wanted}
        if windows < STEPS - 1 or found != wanted:
            problems.append(f"steady, rank {rank}: {windows} windows, {found}, expected {wanted}")
    return problems


def _counters(run: str, ours: Mapping[str, Any]) -> list[str]:
    """Ranks count alike, and what is served is one rank's count."""
    problems = []
    first = ours["nwor"][0]
    if any(other != first for other in ours["nwor"]):
        problems.append(f"{run}: the ranks count differently: {ours['nwor']}")
    for name in ("nwor_fallback_count", "nwor_scv_vectorised"):
        if first[name]:
            problems.append(f"{run}: {name} is {first[name]}")
    if run != "fault" and first["nwor_error_windows"]:
        problems.append(f"{run}: {first['nwor_error_windows']} windows with an error")
    for name, values in ours["served"].items():
        total = ours["totals"][0].get(name.removeprefix("vllm:"))
        if total is not None and values not in ([total], total):
            problems.append(f"{run}: {name} is served as {values}, rank 0 counted {total}")
    if not ours["served"]:
        problems.append(f"{run}: none of NWOR's counters is served")
    return problems


def _faults(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """As many windows refused on every rank as one of them had faults."""
    problems = []
    injected = [rank["flagged"] for rank in ours["ranks"]]
    if injected[:-1] != [0] * (RANKS - 1) or injected[-1] < 2:
        problems.append(f"fault: {injected} faults by rank, expected some on the last alone")
    refused = [count["nwor_error_windows"] for count in ours["nwor"]]
    if refused != [injected[-1]] * RANKS:
        problems.append(f"fault: {refused} windows refused by rank, expected {injected[-1]} each")
    cut = [rank["flagged"] for rank in theirs["ranks"]]
    if cut != [injected[-1]] * RANKS:
        problems.append(f"fault: stock was cut {cut} times by rank, expected {injected[-1]} each")
    return problems


def _control(results: Mapping[str, Any]) -> list[str]:
    alone = results["alone"]
    refused = [count["nwor_error_windows"] for count in alone["nwor"]]
    if alone["ids"] == results["fault"]["ids"] or len(set(refused)) == 1:
        return [f"alone: without sharing nothing differs, windows refused by rank {refused}"]
    return []


def shortened(engine: Mapping[str, Any]) -> dict[str, Any]:
    """For the record: of ids their number and a hash, no log probabilities."""
    results = {
        run: {
            **{k: v for k, v in found.items() if k not in ("ids", "logprobs", "totals", "served")},
            **(_tokens(found["ids"]) if "ids" in found else {}),
        }
        for run, found in engine.get("results", {}).items()
    }
    return {**engine, "results": results}


def _tokens(ids: list[list[int]]) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return {"tokens": sum(map(len, ids)), "ids_sha256": digest}


def main() -> None:
    """Run both engines, judge, write the record."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--record", type=Path, default=Path("tensor_parallel.json"))
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--seconds", type=float, default=200, help="for everything")
    parser.add_argument("--model", choices=list(MODELS), default="7b")
    parser.add_argument("--no-custom-all-reduce", action="store_true")
    parser.add_argument("--settings", type=json.loads, default={}, help="of NWOR's, as JSON")
    parser.add_argument(
        "--filled", action=argparse.BooleanOptionalAction, default=True,
        help="leave no memory uninitialised",
    )  # fmt: skip
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logs = given.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        engines = run_both(
            given.model, logs, given.seconds, custom_all_reduce=not given.no_custom_all_reduce,
            filled=given.filled, settings=given.settings,
        )  # fmt: skip
    problems = judge(engines, MODELS[given.model]["num_hidden_layers"])
    record = {
        **this_machine(),
        "gpus": RANKS,
        "command": "python " + " ".join([Path(__file__).name, *sys.argv[1:]]),
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith("NCCL_")
        },
        "model": {"name": given.model, **MODELS[given.model]},
        "requests": REQUESTS,
        "drafts": DRAFTS,
        "problems": problems,
        "engines": {name: shortened(engine) for name, engine in engines.items()},
    }
    given.record.write_text(json.dumps(record, indent=1) + "\n")
    cost = engines.get("stage", {}).get("results", {}).get("cost", {})
    print("cost of the shared flag:", json.dumps(cost.get("ranks")))
    print("\n".join(problems) if problems else "no problem found")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
