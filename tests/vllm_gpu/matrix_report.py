"""What the engines of a case prove, as a row of the matrix; and the rows as a table."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from matrix_cases import CONTROLS, EQUAL_TO, KINDS, Case

IMPLEMENTATIONS = {"FLASH_ATTN": "Flash", "TRITON_ATTN": "Triton"}
RUNNERS = {"v1": "v1.worker.gpu_model_runner", "v2": "v1.worker.gpu.model_runner"}
AUDITED = ("rejected_present", "missing", "unexpected")
Engine = Mapping[str, Any]


def row(case: Case, engines: Mapping[str, Engine]) -> dict[str, Any]:
    """State and evidence of a case.

    state: `tested`; `refused`, as the case expects; `failed`, with `problems`; `untested`, where
    stock vLLM itself does not run it, or gives other tokens at its next start.
    """
    found: dict[str, Any] = {"case": case.name, **_said(case), "problems": [], "notes": []}
    if case.expects:
        return _refusal(case, engines, found)
    baseline = engines.get("stock", {})
    if "results" not in baseline:
        return {**found, "state": "untested", "why": f"stock: {_why(baseline)}"}
    facts = baseline["facts"]
    found["runner"] = facts["runner"].rsplit(".", 1)[0]
    found |= {name: facts.get(name) for name in ("groups", "windows", "block_size", "cache")}
    for kind in case.kinds:
        found["problems"] += _alone(case, kind, engines.get(kind, {}))
    found["problems"] += _empty(case, baseline)
    found["kinds"] = {kind: _evidence(kind, engines) for kind in engines}
    for kind in case.kinds:
        other = EQUAL_TO.get(kind, "")
        if "results" in engines.get(kind, {}) and "results" in engines.get(other, {}):
            found["problems"] += _differences(kind, other, found["kinds"][kind]["against"][other])
        if kind == "auto" and "results" in engines.get(kind, {}):
            found["problems"] += _acceptance(engines[kind], baseline)
    found["notes"] += _notes(case, engines, found)
    if "results" in engines.get("again", {}) and not _same(_compare(engines["again"], baseline)):
        return {**found, "state": "untested", "why": "stock: two starts give different tokens"}
    return {**found, "state": "failed" if found["problems"] else "tested"}


def differs(case: Case, engines: Mapping[str, Engine]) -> bool:
    """Whether a staged engine's ids are not those of stock: controls can tell why."""
    return not all(
        _same(_compare(engines[kind], engines["stock"]))
        for kind in case.kinds
        if EQUAL_TO.get(kind) == "stock" and "results" in engines.get(kind, {})
    )


def _said(case: Case) -> dict[str, Any]:
    return {
        "model": case.model, "method": case.method, "k": case.k, "backend": case.backend,
        "kv_cache_dtype": case.cache, "dtype": case.dtype, "layout": case.layout,
    }  # fmt: skip


def _refusal(case: Case, engines: Mapping[str, Engine], found: dict[str, Any]) -> dict[str, Any]:
    engine = next(iter(engines.values()), {})
    text = engine.get("refused", "")
    if case.expects in text:
        return {**found, "state": "refused", "why": text}
    ended = "it ran" if "results" in engine else _why(engine)
    problem = f"expected a refusal that says {case.expects!r}, got: {ended}"
    return {**found, "state": "failed", "problems": [problem]}


def _alone(case: Case, kind: str, engine: Engine) -> list[str]:
    """What is wrong with one engine."""
    if "results" not in engine:
        return [f"{kind}: {_why(engine)}"]
    problems = []
    if RUNNERS[case.runner] not in engine["facts"]["runner"]:
        problems.append(f"{kind}: served by {engine['facts']['runner']}, expected {case.runner}")
    if IMPLEMENTATIONS[case.backend] not in engine["facts"]["backend"]:
        problems.append(f"{kind}: attention is {engine['facts']['backend']}, not {case.backend}")
    staged = (KINDS[kind] or {}).get("mode") == "stage"
    for name, answer in engine["results"].items():
        rows, nwor = answer.get("rows") or {}, answer["nwor"]
        wrong = AUDITED if staged else AUDITED[1:]
        if found := {what: rows[what] for what in wrong if rows.get(what)}:
            problems.append(f"{kind}, {name}: audit {found}")
        if not staged:
            continue
        if nwor.get("nwor_error_windows") or nwor.get("nwor_fallback_count"):
            problems.append(f"{kind}, {name}: error windows {_counts(nwor)}")
        if not nwor.get("nwor_total_staged") or not nwor.get("nwor_total_committed"):
            problems.append(f"{kind}, {name}: nothing staged or committed {_counts(nwor)}")
    return problems


def _empty(case: Case, stock: Engine) -> list[str]:
    """Where the runs could not have shown a fault."""
    problems, results = [], stock["results"]
    if not any(sum(answer["accepted_per_position"]) for answer in results.values()):
        problems.append("stock accepted no draft, so nothing was tested")
    if not any((answer.get("rows") or {}).get("rejected_present") for answer in results.values()):
        problems.append("direct writes left no rejected row, so the audit saw nothing")
    if case.small_cache and not any(answer["preemptions"] for answer in results.values()):
        problems.append("no request was preempted")
    return problems


def _differences(kind: str, other: str, compared: Mapping[str, Any]) -> list[str]:
    return [
        f"{kind}, {name}: differs from {other}"
        + (
            f" in {what['requests']} requests, first at {what['first_difference']}"
            if what["first_difference"]
            else " in acceptance"
        )
        for name, what in compared.items()
        if not what["equal"]
    ]


def _acceptance(auto: Engine, stock: Engine) -> list[str]:
    """Positions at which another kernel's acceptance is not that of stock within 4 deviations."""
    problems = []
    totals = []
    for engine in (auto, stock):
        answers = engine["results"].values()
        positions = [a["accepted_per_position"] for a in answers]
        totals.append((list(map(sum, zip(*positions, strict=True))), _sum(engine, "drafts")))
    (ours, n), (theirs, m) = totals
    for position, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        rate = (a + b) / max(n + m, 1)
        deviation = math.sqrt(max(rate * (1 - rate), 1e-9) * (1 / max(n, 1) + 1 / max(m, 1)))
        if abs(a / max(n, 1) - b / max(m, 1)) > 4 * deviation:
            problems.append(f"auto: acceptance at position {position} is {a}/{n}, stock {b}/{m}")
    return problems


def _sum(engine: Engine, name: str) -> int:
    return sum(int(answer[name]) for answer in engine["results"].values())


def _evidence(kind: str, engines: Mapping[str, Engine]) -> dict[str, Any]:
    """Of one engine: totals over its runs, and what it was compared with."""
    engine = engines[kind]
    if "results" not in engine:
        return {"error": _why(engine)}
    answers = engine["results"].values()
    rows = [answer.get("rows") or {} for answer in answers]
    others = {EQUAL_TO.get(kind, ""), "stock", *CONTROLS} - {kind}
    return {
        "accepted_per_position": list(
            map(sum, zip(*(a["accepted_per_position"] for a in answers), strict=True))
        ),
        "drafts": _sum(engine, "drafts"),
        "preemptions": _sum(engine, "preemptions"),
        "prefix_hits": _sum(engine, "prefix_hits"),
        "rejected_rows": sum(found.get("rejected_present", 0) for found in rows),
        "audited_steps": sum(found.get("steps", 0) for found in rows),
        "graphs": _total_of(answer.get("graphs") or {} for answer in answers),
        "blocks": engine["facts"]["blocks"],
        "start_seconds": round(engine["facts"]["start_seconds"], 1),
        "nwor": _total_of(_counts(answer["nwor"]) for answer in answers),
        "against": {
            other: _compare(engine, engines[other])
            for other in sorted(others)
            if "results" in engines.get(other, {})
        },
    }


def _compare(ours: Engine, theirs: Engine) -> dict[str, Any]:
    """Run by run: ids, acceptance and log probabilities."""
    found = {}
    for name, answer in ours["results"].items():
        other = theirs["results"][name]
        place = first_difference(answer["ids"], other["ids"])
        accepted = answer["accepted_per_position"] == other["accepted_per_position"]
        unlike = sum(a != b for a, b in zip(answer["ids"], other["ids"], strict=True))
        found[name] = {
            "equal": place is None and accepted, "first_difference": place, "requests": unlike,
        }  # fmt: skip
        if "logprobs" in answer and "logprobs" in other and place is None:
            found[name]["logprob_difference"] = max(
                abs(a - b)
                for one, two in zip(answer["logprobs"], other["logprobs"], strict=True)
                for a, b in zip(one, two, strict=True)
            )
    return found


def _same(compared: Mapping[str, Any]) -> bool:
    return all(what["equal"] for what in compared.values())


def first_difference(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, int] | None:
    """Request and position of the earliest token that differs, and the two tokens; None if none."""
    found = None
    for request, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        for position, (a, b) in enumerate(zip(one, two, strict=True)):
            if a != b:
                if found is None or position < found["position"]:
                    found = {"request": request, "position": position, "ours": a, "theirs": b}
                break
    return found


def _notes(case: Case, engines: Mapping[str, Engine], found: Mapping[str, Any]) -> list[str]:
    notes = []
    blocks = {e["facts"]["blocks"] for e in engines.values() if "facts" in e}
    if len(blocks) > 1:
        notes.append(f"the engines had different numbers of cache blocks: {sorted(blocks)}")
    if not engines["stock"]["results"]["follow"]["prefix_hits"]:
        notes.append("no prefix was found in the cache")
    told: set[frozenset[str]] = set()
    for kind, evidence in found["kinds"].items():
        for other, compared in evidence.get("against", {}).items():
            pair = frozenset((kind, other))
            if pair & set(CONTROLS) and pair not in told:
                told.add(pair)
                notes.append(f"{kind} {'equals' if _same(compared) else 'is unlike'} {other}")
    return notes


def _total_of(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counters over the runs."""
    found: Counter[str] = Counter()
    for count in counts:
        found.update(count)
    return dict(found)


def _counts(nwor: Mapping[str, Any]) -> dict[str, int]:
    wanted = (
        "nwor_windows", "nwor_total_staged", "nwor_total_committed", "nwor_total_rejected",
        "nwor_error_windows", "nwor_fallback_count",
    )  # fmt: skip
    return {name.removeprefix("nwor_"): nwor[name] for name in wanted if name in nwor}


def _why(engine: Engine) -> str:
    """Why an engine has no results, in one line: a refusal, or how it ended."""
    if "refused" in engine:
        return str(engine["refused"])
    return str(engine.get("error", "it was not started")).splitlines()[0][:400]


def shortened(engine: Engine) -> dict[str, Any]:
    """An engine for the record: ids and log probabilities as their number and hash, of an error
    its first line."""
    error = {"error": _why(engine)} if "error" in engine else {}
    results = {}
    for name, answer in engine.get("results", {}).items():
        rest = {k: v for k, v in answer.items() if k not in ("ids", "logprobs", "step_ms")}
        digest = hashlib.sha256(json.dumps(answer["ids"]).encode()).hexdigest()[:16]
        results[name] = {
            **rest, "nwor": _counts(answer["nwor"]), "tokens": sum(map(len, answer["ids"])),
            "ids_hash": digest,
        }  # fmt: skip
    return {**engine, **error, **({"results": results} if results else {})}


def table(record: Mapping[str, Any]) -> str:
    """The rows as markdown."""
    lines = [
        "| case | model, method | runner | backend | cache, model dtype | block, windows | state | "
        "accepted / drafts | rejected rows: direct, staged |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(found, record) for found in record["rows"]),
    ]
    return "\n".join(lines) + "\n"


def _line(found: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    kinds = found.get("kinds", {})
    stock = kinds.get("stock", {})
    staged = [e for kind, e in kinds.items() if (KINDS[kind] or {}).get("mode") == "stage"]
    state = {
        "tested": f"tested on {record.get('device', 'no device')}",
        "refused": f"refused: {found.get('why', '')}",
        "untested": f"untested ({found.get('why', '')})",
        "failed": "FAILS: " + "; ".join(found["problems"]),
    }[found["state"]]
    windows = [str(w) if w else "full" for w in found.get("windows") or []]
    cells = [
        found["case"],
        f"{found['model']}, {found['method']} k={found['k']}",
        {"gpu_model_runner": "V1", "model_runner": "V2"}.get(
            found.get("runner", "").rsplit(".", 1)[-1], "-"
        ),
        found["backend"] + ("" if found["layout"] == "NHD" else f" {found['layout']}"),
        f"{found['kv_cache_dtype']}, {found['dtype']}",
        f"{found.get('block_size') or '-'}, {'+'.join(windows) or '-'}",
        state,
        f"{sum(stock.get('accepted_per_position', []))} / {stock.get('drafts', 0)}"
        if "drafts" in stock
        else "-",
        f"{stock['rejected_rows']}, {max((e.get('rejected_rows', 0) for e in staged), default=0)}"
        if "rejected_rows" in stock
        else "-",
    ]
    return (
        "| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in cells) + " |"
    )


def this_machine() -> dict[str, Any]:
    """Device, versions and date."""
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
    }
