"""Offloading with NWOR in vLLM 0.26 on a GPU: small engines whose every stored block is recomputed.

    python tests/vllm_gpu/offload.py --record OUT.json [--cases eagle draft eagle.sync] \
        [--jobs 11] [--seconds 400] [--logs FOLDER]

Each case has engines of several kinds: `plain`, stock vLLM without a connector; `stock`, with
vLLM's OffloadingConnector; `stage`, with NWOR too; and staged ones with a change of
`offload_faults.py`. All get more text than the GPU's blocks hold, then each text again with a part
of its answer, which is loaded from the host; then long texts at once, so that requests are
preempted. Ids of `stage` must be those of `stock`, or of `plain` where rows that stock stored are
wrong, and no row that `stage` stored may be wrong.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matrix_cases import V1
from matrix_engine import REFUSAL, EngineFailed, EngineProcess, text_prompts
from matrix_report import RUNNERS, this_machine

SCRIPT = Path(__file__).with_name("offload_engine.py")
REQUESTS, TOKENS, AGAIN, BLOCK = 24, 64, 48, 16
CONNECTOR = {
    "kv_connector": "OffloadingConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 256 << 20, "offload_prompt_only": False},
}
STAGE = {"mode": "stage", "attention": "stock"}
FAULTY = ("uncommitted", "early", "unclamped")


@dataclass(frozen=True)
class Case:
    """One configuration. runner: that serves it by default in 0.26, which is asserted."""

    method: str
    runner: str
    kinds: tuple[str, ...]
    llm: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


CASES = {
    "eagle": Case("eagle", "v2", ("plain", "stock", "stage", "before_commit", "uncommitted")),
    "eagle.sync": Case("eagle", "v2", ("stage", "early"), {"async_scheduling": False}),
    "draft": Case("draft_model", "v1", ("plain", "stock", "stage", "unclamped")),
    "eagle.v1": Case("eagle", "v1", ("stock", "stage"), environment=V1),
}


def options(case: Case, kind: str) -> dict[str, Any]:
    """Of `offload_engine.py`. fp16: its rounding is small beside what a wrong row differs by."""
    llm: dict[str, Any] = {
        "dtype": "float16", "attention_backend": "FLASH_ATTN", "block_size": BLOCK,
        "max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 128,
        "num_gpu_blocks_override": 112, "kv_cache_memory_bytes": 1 << 30, **case.llm,
    }  # fmt: skip
    if kind != "plain":
        llm["kv_transfer_config"] = CONNECTOR
    return {
        "model": "tiny",
        "nwor": None if kind in ("plain", "stock") else STAGE,
        "speculative": {"method": case.method},
        "llm": llm,
        "fault": kind if kind not in ("plain", "stock", "stage") else None,
    }


def prompts() -> list[list[int]]:
    """Every second one fills its blocks, so that its request ends with a block."""
    found = text_prompts(REQUESTS)
    return [ids[: len(ids) // BLOCK * BLOCK] if i % 2 else ids for i, ids in enumerate(found)]


def work(kind: str, ask: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """All runs of an engine. fill: all texts, four at a time. again: each with what was generated,
    one after the other, so that the same batches run in every engine. storm: long ones."""
    texts = prompts()
    fill = ask(prompts=texts, max_tokens=TOKENS)
    longer = [text + ids[:AGAIN] for text, ids in zip(texts, fill["ids"], strict=True)]
    runs = [ask(prompts=[text], max_tokens=AGAIN) for text in longer]
    found = {"fill": fill, "again": _joined(runs)}
    if kind != "plain":
        long = [(texts[i] + texts[i - 1] + texts[i - 2] + texts[i - 3])[:380] for i in range(12)]
        found["storm"] = ask(prompts=long, max_tokens=96, temperature=0.8, seed=1)
        found["stores"] = ask(compare=True)
    return found


def _joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    counts = ("loaded_blocks", "prefix_hits", "preemptions", "drafts")
    return {
        "ids": [run["ids"][0] for run in runs],
        **{name: sum(run[name] for run in runs) for name in counts},
        "hits": [[run["prefix_hits"], run["loaded_blocks"]] for run in runs],
        "nwor": runs[-1]["nwor"],
    }


def run(name: str, kind: str, scratch: Path, logs: Path, limit: float) -> dict[str, Any]:
    """Start an engine and let it work. Returns `facts`, `results`, `seconds`; or `error`."""
    folder = scratch / f"{name}.{kind}"
    (folder / "cache").mkdir(parents=True, exist_ok=True)
    (folder / "options.json").write_text(json.dumps(options(CASES[name], kind)))
    environment = {
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "OMP_NUM_THREADS": "2",
        "PYTHONUNBUFFERED": "1",
        **CASES[name].environment,
    }
    start = time.monotonic()
    log = logs / f"{name}.{kind}.log"
    command = [sys.executable, str(SCRIPT), str(folder / "options.json")]
    engine = EngineProcess(command, environment, folder, log)
    found: dict[str, Any] = {}

    def left() -> float:
        return limit - (time.monotonic() - start)

    try:
        found["facts"] = engine.answer(left())
        found["results"] = work(kind, lambda **command: engine.ask(left(), **command))
    except EngineFailed as failure:
        found["error"] = str(failure)
    finally:
        engine.close(1 if "error" in found else 15)
    if "error" in found and (said := REFUSAL.findall(log.read_text(errors="replace"))):
        found["refused"] = said[-1]
    found["seconds"] = round(time.monotonic() - start, 1)
    return found


def row(name: str, engines: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """State (`tested` or `failed`) and evidence of a case."""
    case, problems, notes = CASES[name], [], []
    up = {kind: engine for kind, engine in engines.items() if "results" in engine}
    for kind in case.kinds:
        if kind not in up:
            why = engines.get(kind, {"error": "it never ran"})
            problems.append(f"{kind}: {why.get('refused', why['error'].splitlines()[0])}")
            continue
        if RUNNERS[case.runner] not in up[kind]["facts"]["runner"]:
            problems.append(f"{kind}: served by {up[kind]['facts']['runner']}")
        if kind != "plain":
            problems += [f"{kind}: {text}" for text in _stores(kind, up[kind]["results"])]
    if "stock" in up and (last := up["stock"]["results"]["stores"]["wrong_last"]):
        notes.append(f"stock: {last} blocks end with a row that was never computed (issue 54193)")
    if "stock" in up and "stage" in up:
        problems += _differences(up, notes)
        hits = [up[kind]["results"]["again"]["hits"] for kind in ("stock", "stage")]
        if hits[0] != hits[1]:
            notes.append("stage: other numbers of loaded blocks than stock")
    return {
        "case": name, "method": case.method, "runner": case.runner,
        "state": "failed" if problems else "tested", "problems": problems, "notes": notes,
        "kinds": {kind: _evidence(engine) for kind, engine in up.items()},
    }  # fmt: skip


def _stores(kind: str, results: Mapping[str, Any]) -> list[str]:
    """What is wrong with one engine's stores."""
    stores, problems = results["stores"], []
    wrong, last, behind = (stores[name] for name in ("wrong_rows", "wrong_last", "wrong_behind"))
    if kind in FAULTY and not wrong:
        problems.append("the audit missed the fault")
    if kind in ("stage", "before_commit") and wrong:
        problems.append(f"{wrong} wrong rows: {stores['wrong']}")
    # Where nothing is clamped, a last row may be missing, and what was computed from it is wrong.
    if kind in ("stock", "unclamped") and wrong != last + behind:
        problems.append(
            f"{wrong} wrong rows, of them {last} never computed and {behind} behind those: "
            f"{stores['wrong']}"
        )
    for what in ("compared_generated", "loaded_blocks"):
        if not stores.get(what):
            problems.append(f"no {what}, so nothing was tested")
    if stores.get("unknown_tokens") or stores["waiting"]:
        problems.append(f"{stores.get('unknown_tokens', 0)} blocks of unknown tokens, "
                        f"{stores['waiting']} jobs that never ended")  # fmt: skip
    if not results["again"]["loaded_blocks"]:
        problems.append("no prefix was reloaded")
    nwor = results["storm"]["nwor"]
    if kind != "stock" and not nwor.get("nwor_total_committed"):
        problems.append("nothing was committed")
    if kind in ("stage", "before_commit") and nwor.get("nwor_error_windows"):
        problems.append(f"{nwor['nwor_error_windows']} error windows")
    return problems


def _differences(engines: Mapping[str, dict[str, Any]], notes: list[str]) -> list[str]:
    """Where ids of `stage` are not stock's, request by request.

    A note, where they are `plain`'s and stock's stores are wrong; and where they are stock's but
    not `plain`'s: with a reload the prefill is shorter than without, and its rounding another.
    """
    problems = []
    results = {kind: engine["results"] for kind, engine in engines.items()}
    for name in ("fill", "again"):
        mine, stock = results["stage"][name]["ids"], results["stock"][name]["ids"]
        plain = results["plain"][name]["ids"] if "plain" in results else [None] * len(mine)
        from_stock = [index for index, ids in enumerate(mine) if ids != stock[index]]
        wrong = results["stock"]["stores"]["wrong_rows"]
        excused = [index for index in from_stock if wrong and mine[index] == plain[index]]
        if excused:
            notes.append(f"stage, {name}: plain's ids in requests {excused}, stock has others")
        if left := [index for index in from_stock if index not in excused]:
            problems.append(f"stage, {name}: differs from stock in requests {left}")
        both = [
            index
            for index, ids in enumerate(mine)
            if ids == stock[index] and plain[index] not in (None, ids)
        ]
        if both:
            notes.append(f"stage, {name}: differs from plain in requests {both}, and so does stock")
    return problems


def _evidence(engine: Mapping[str, Any]) -> dict[str, Any]:
    results = engine["results"]
    return {
        "seconds": engine["seconds"],
        "connector": engine["facts"]["connector"],
        "async_scheduling": engine["facts"]["async_scheduling"],
        "cache": engine["facts"]["cache"],
        "stores": results.get("stores"),
        "loaded_again": results["again"]["loaded_blocks"],
        "preemptions": {name: results[name]["preemptions"] for name in results if name != "stores"},
        "tokens": sum(map(len, results["fill"]["ids"] + results["again"]["ids"])),
        "nwor": {k: v for k, v in results["again"]["nwor"].items() if isinstance(v, int)},
    }


def main() -> None:
    """Run all engines, some at a time, and write the record as cases finish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--jobs", type=int, default=13, help="engines at a time")
    parser.add_argument("--seconds", type=float, default=400, help="for everything")
    parser.add_argument("--record", type=Path, default=Path("offload.json"))
    parser.add_argument("--logs", type=Path)
    given = parser.parse_args()
    command = f"python tests/vllm_gpu/offload.py --record OUT.json --cases {' '.join(given.cases)}"
    record: dict[str, Any] = {**this_machine(), "command": command, "rows": []}
    engines: dict[str, dict[str, Any]] = {name: {} for name in given.cases}
    deadline, lock = time.monotonic() + given.seconds, threading.Lock()
    with tempfile.TemporaryDirectory() as folder:
        logs = given.logs or Path(folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)

        def one(name: str, kind: str) -> None:
            engine = run(name, kind, Path(folder), logs, deadline - time.monotonic())
            with lock:
                engines[name][kind] = engine
                state = "up" if "results" in engine else engine["error"].splitlines()[0]
                print(f"{time.strftime('%X')} {name} {kind}: {state}, {engine['seconds']} s")
                done = [
                    name for name in given.cases if set(CASES[name].kinds) <= set(engines[name])
                ]
                record["rows"] = [row(name, engines[name]) for name in done]
                given.record.write_text(json.dumps(record, indent=1) + "\n")

        with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
            # The kinds that others are compared with come first.
            tasks = [(name, kind) for name in given.cases for kind in CASES[name].kinds]
            for outcome in [pool.submit(one, *task) for task in tasks]:
                outcome.result()
    for found in record["rows"]:
        print(f"{found['case']}: {found['state']}", *found["problems"], *found["notes"], sep="\n  ")
        for kind, evidence in found["kinds"].items():
            stores = evidence["stores"] or {}
            print(f"  {kind}: loaded {evidence['loaded_again']} blocks again;", {
                name: value for name, value in stores.items() if name != "wrong"
            })  # fmt: skip
    sys.exit(any(found["state"] != "tested" for found in record["rows"]))


if __name__ == "__main__":
    main()
