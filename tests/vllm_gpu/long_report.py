"""What the engines of a long run prove: what is wrong with one, what two of them compare to."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import long_memory
from long_parts import BASELINE, Part
from long_plan import Plan
from long_shadow import COLUMNS, FAULTS
from matrix_cases import KINDS

Run = Mapping[str, Any]
Decode = Callable[[Sequence[int]], str]
NWOR = {
    "nwor_total_staged": "drafts", "nwor_total_committed": "accepted",
    "nwor_drafted_per_position": "drafted_per_position",
    "nwor_accepted_per_position": "accepted_per_position",
}  # fmt: skip
DEVIATIONS = 4.0


def part_report(
    part: Part,
    engines: Mapping[str, Mapping[str, Any]],
    decode: Decode,
    others_until: float = 0.0,
) -> dict[str, Any]:
    """Evidence and problems of one part.

    engines: `facts` and `runs`, or `error`, by kind. others_until: when the last engine of a part
    that is not endless ended, on the clock of the runs' `began`.
    """
    problems: list[str] = []
    found: dict[str, Any] = {"kinds": {}, "against": {}, "problems": problems}
    for kind in part.kinds:
        engine = engines.get(kind, {})
        if "error" in engine or "facts" not in engine:
            problems.append(f"{kind}: {engine.get('error', 'it was not started')}")
        runs = engine.get("runs", {})
        problems += [f"{kind}: {name} was not run" for name in part.runs if name not in runs]
        for name, run in runs.items():
            problems += [f"{kind}, {name}: {text}" for text in alone(kind, part.runs[name], run)]
        found["kinds"][kind] = {
            "facts": engine.get("facts"),
            "runs": {name: shortened(run) for name, run in runs.items()},
        }
    for kind in part.kinds:
        base = BASELINE.get(kind, "")
        for name, run in engines.get(kind, {}).get("runs", {}).items():
            other = engines.get(base, {}).get("runs", {}).get(name)
            if other is None:
                continue
            compared = compare(run, other, decode)
            found["against"].setdefault(f"{kind} = {base}", {})[name] = compared
            problems += [f"{kind}, {name}: {text}" for text in compared["problems"]]
            if part.endless and kind == "stage":
                found["memory"], wrong = long_memory.judged(run["memory"], other["memory"])
                problems += wrong
                since = others_until - run["began"]
                found["memory"]["device"], wrong = long_memory.alone(run["memory"], since)
                problems += wrong
    if "auto" in part.kinds and "stock" in part.kinds:
        found["kernels"], wrong = _kernels(part, engines)
        problems += wrong
    problems += empty(part, engines)
    return found


def alone(kind: str, plan: Mapping[str, Any], run: Run) -> list[str]:
    """What is wrong with one run: its rows, its counters, its length."""
    settings = KINDS[kind] or {}
    staged = settings.get("mode") == "stage"
    seen = faults(run)
    if not staged:
        seen["rejected"] = 0  # direct writes leave them; `empty` asks for that
    if "poison" in settings:
        seen["marked"] = 0
    problems = [f"{count} rows {name} in looks" for name, count in seen.items() if count]
    if not run["watched"]["looked"]:
        problems.append("the cache was not looked at")
    if run["watched"]["looked"] > len(run["watched"]["looks"]):
        problems.append("more looks than are kept")
    if staged:
        problems += _counters(run)
    values = Plan.of(dict(plan))
    if run["cut"] and (values.tokens or values.follow):
        problems.append(f"ended by the time after {run['tokens']} tokens")
    if not (values.chance or values.storm) and run["tokens"] < values.tokens:
        problems.append(f"{run['tokens']} tokens instead of {values.tokens}")
    return problems


def _counters(run: Run) -> list[str]:
    """NWOR's counters against those of the watch, which counts vLLM's own tensors."""
    nwor, watched, problems = run["nwor"], run["watched"], []
    for name, theirs in NWOR.items():
        if nwor[name] != watched[theirs]:
            problems.append(f"{name} is {nwor[name]}, of the step's own tensors {watched[theirs]}")
    staged, committed = nwor["nwor_total_staged"], nwor["nwor_total_committed"]
    if staged != committed + nwor["nwor_total_rejected"]:
        problems.append("staged rows are not committed and rejected ones")
    problems += [
        f"{name} is {nwor[name]}"
        for name in ("nwor_error_windows", "nwor_fallback_count", "nwor_unique_tokens")
        if nwor.get(name)
    ]
    if not committed or not nwor["nwor_total_rejected"]:
        problems.append("no row was committed, or none rejected")
    return problems


def faults(run: Run) -> dict[str, int]:
    """Rows of each fault, over all looks."""
    return {
        name: sum(look[COLUMNS.index(name)] for look in run["watched"]["looks"]) for name in FAULTS
    }


def compare(ours: Run, theirs: Run, decode: Decode) -> dict[str, Any]:
    """Ids, ends, acceptance and cached rows of two engines under one plan.

    As far as both went: an engine that the time ended is compared up to there.
    """
    problems: list[str] = []
    cut = ours["cut"] or theirs["cut"]
    found: dict[str, Any] = {"problems": problems}
    place = None
    found["tokens"], place = _same_ids(ours, theirs, cut)
    found["ended"] = _same_ends(ours, theirs, problems, cut)
    if place is not None:
        found["first_difference"] = _context(place, ours, decode)
        problems.append(f"ids differ: {found['first_difference']}")
    acceptance = ("verified", "drafted_per_position", "accepted_per_position", "steps", "certain")
    if not cut:
        unlike = [n for n in acceptance if ours["watched"][n] != theirs["watched"][n]]
        unlike += ["positions"] if ours["positions"] != theirs["positions"] else []
        problems += [f"{name} differs" for name in unlike]
    found["looks"] = _same_rows(ours, theirs, problems)
    return found


def _same_ids(ours: Run, theirs: Run, cut: bool) -> tuple[int, dict[str, Any] | None]:
    """Tokens compared, and the earliest difference in a request."""
    compared, first = 0, None
    if not cut and len(ours["ids"]) != len(theirs["ids"]):
        return 0, {"request": min(len(ours["ids"]), len(theirs["ids"])), "position": 0}
    for request, (one, two) in enumerate(zip(ours["ids"], theirs["ids"], strict=not cut)):
        length = min(len(one), len(two))
        place = next((i for i in range(length) if one[i] != two[i]), None)
        if place is None and not cut and len(one) != len(two):
            place = length
        compared += length if place is None else place
        if place is not None and (first is None or place < first["position"]):
            first = {"request": request, "position": place}
    return compared, first


def _context(place: dict[str, Any], run: Run, decode: Decode) -> dict[str, Any]:
    request, position = place["request"], place["position"]
    if request >= len(run["ids"]):
        return place
    ids = run["ids"][request]
    before = (run["prompts"][request] + ids[:position])[-40:]
    return {**place, "after": decode(before), "ours": decode(ids[position : position + 8])}


def _same_ends(ours: Run, theirs: Run, problems: list[str], cut: bool) -> dict[str, int]:
    """Index, how, step, tokens and hash of every request that ended, in order, as far as both
    went."""
    one = [tuple(end) for end in ours["ended"] if end[1] != "cut"]
    two = [tuple(end) for end in theirs["ended"] if end[1] != "cut"]
    for number, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            problems.append(f"request number {number} ended as {a}, theirs as {b}")
            break
    if not cut and len(one) != len(two):
        problems.append(f"{len(one)} requests ended, {len(two)} of theirs")
    common = one[: min(len(one), len(two))]
    return {
        "requests": len(common),
        "finished": sum(end[1] == "finished" for end in common),
        "aborted": sum(end[1] == "aborted" for end in common),
        "tokens": sum(end[3] for end in common),
    }


def _same_rows(ours: Run, theirs: Run, problems: list[str]) -> dict[str, Any]:
    """Looks at the same step: number of accepted rows, of computed rows, hash of their bits."""
    step, computed = COLUMNS.index("step"), COLUMNS.index("computed")
    columns = [COLUMNS.index(name) for name in ("rows", "computed", "digest")]
    # The last look of a run sees no requests.
    two = {(look[step], look[computed] > 0): look for look in theirs["watched"]["looks"]}
    compared = rows = 0
    for look in ours["watched"]["looks"]:
        other = two.get((look[step], look[computed] > 0))
        if other is None:
            continue
        if [look[c] for c in columns] != [other[c] for c in columns]:
            problems.append(f"accepted rows differ from theirs at step {look[step]}")
            break
        compared += 1
        rows += look[COLUMNS.index("rows")]
    if not compared:
        problems.append("no look of both engines at one step")
    return {"compared": compared, "rows": rows}


def empty(part: Part, engines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the part could not have shown a fault."""
    runs = {kind: engines.get(kind, {}).get("runs", {}) for kind in part.kinds}
    base = runs.get("stock") or runs.get("auto off") or {}
    problems = []
    if base and not any(faults(run)["rejected"] for run in base.values()):
        problems.append("direct writes left no rejected row, so the looks saw nothing")
    for kind, found in runs.items():
        poisoned = "poison" in (KINDS[kind] or {}) and bool(found)
        if poisoned and not any(faults(run)["marked"] for run in found.values()):
            problems.append(f"{kind}: no poisoned row was seen")
        if "follow" in found and not found["follow"]["prefix_hits"]:
            problems.append(f"{kind}: no block was found in the prefix cache")
        ends = [end[1] for end in found.get("storm", {}).get("ended", [])]
        if "storm" in found and not {"finished", "aborted"} <= set(ends):
            problems.append(f"{kind}: the storm left nobody, or aborted nobody")
        if part.name == "small" and found and not any(r["preemptions"] for r in found.values()):
            problems.append(f"{kind}: no request was preempted")
    return problems


def _kernels(
    part: Part, engines: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], list[str]]:
    """The package's own kernel against vLLM's: acceptance within sampling error, and greedy ids
    that part only where two tokens lead by less than the kernels' rounding moves them."""
    found: dict[str, Any] = {}
    problems = []
    for name, plan in part.runs.items():
        runs = [engines.get(kind, {}).get("runs", {}).get(name) for kind in ("auto", "stock")]
        if runs[0] is None or runs[1] is None:
            continue
        ours, theirs = runs
        found[name] = {"acceptance": acceptance(ours["watched"], theirs["watched"])}
        if found[name]["acceptance"]["deviations"] > DEVIATIONS:
            problems.append(f"auto, {name}: acceptance is not stock's: {found[name]['acceptance']}")
        if Plan.of(dict(plan)).logprobs and not plan.get("temperature"):
            found[name]["greedy"] = parted = divergences(ours, theirs)
            if parted["unexplained"]:
                problems.append(f"auto, {name}: ids part where one token leads: {parted}")
    return found, problems


def acceptance(ours: Run, theirs: Run) -> dict[str, Any]:
    """Per position, and the largest difference in standard deviations."""
    worst = 0.0
    counts = [(w["accepted_per_position"], w["drafted_per_position"]) for w in (ours, theirs)]
    (a, n), (b, m) = counts
    for one, of, two, others in zip(a, n, b, m, strict=True):
        rate = (one + two) / max(of + others, 1)
        error = math.sqrt(max(rate * (1 - rate), 1e-9) * (1 / max(of, 1) + 1 / max(others, 1)))
        worst = max(worst, abs(one / max(of, 1) - two / max(others, 1)) / error)
    return {"ours": counts[0], "theirs": counts[1], "deviations": round(worst, 2)}


def divergences(ours: Run, theirs: Run) -> dict[str, Any]:
    """Where greedy ids of two kernels part, and how far their scores are apart before that.

    A score is the log probability of the token that came, and its lead over the next best. Two
    tokens can change places only if their log probabilities moved by the lead together; so a
    place is explained if the lead is at most twice the largest move seen where the ids are equal.
    """
    moves, places = [0.0], []
    equal = 0
    pairs = zip(ours["ids"], theirs["ids"], ours["scores"], theirs["scores"], strict=False)
    for request, (one, two, first, second) in enumerate(pairs):
        length = min(len(one), len(two), len(first), len(second))
        end = next((i for i in range(length) if one[i] != two[i]), None)
        until = length if end is None else end
        equal += until
        moves += [abs(first[i][0] - second[i][0]) for i in range(until)]
        if end is not None:
            lead = min(first[end][1], second[end][1])
            places.append({"request": request, "position": end, "lead": lead})
    largest = max(moves)
    return {
        "equal_tokens": equal,
        "largest_move": round(largest, 5),
        "mean_move": round(sum(moves) / len(moves), 6),
        "requests": len(ours["ids"]),
        "parted": len(places),
        "largest_lead": max((place["lead"] for place in places), default=0.0),
        "unexplained": [place for place in places if place["lead"] > 2 * largest],
    }


def shortened(run: Run) -> dict[str, Any]:
    """A run for the record: ids, ends and looks as their number and hash."""
    left_out = ("ids", "prompts", "scores", "ended", "memory", "watched", "began")
    watched = {name: value for name, value in run["watched"].items() if name != "looks"}
    looks = run["watched"]["looks"]
    rows = COLUMNS.index("rows")
    bad = next((look for look in looks if any(look[1 : 1 + len(FAULTS)])), None)
    return {
        **{name: value for name, value in run.items() if name not in left_out},
        "requests": {
            how: sum(end[1] == how for end in run["ended"])
            for how in ("finished", "aborted", "cut")
        },
        "ids_hash": _hash(run["ended"]),
        "watched": {
            **watched, **faults(run), "rows_looked_at": sum(look[rows] for look in looks),
            "looks_hash": _hash(looks),
            "first_fault": dict(zip(COLUMNS, bad, strict=True)) if bad else None,
        },
        "memory": run["memory"][:: max(1, len(run["memory"]) // 24)] + run["memory"][-1:],
    }  # fmt: skip


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def lines(record: Mapping[str, Any]) -> list[str]:
    """The record in a few lines."""
    told = []
    for name, part in record["parts"].items():
        told.append(f"{name}: {'FAILED' if part['problems'] else 'passed'}")
        for pair, compared in part["against"].items():
            for run, what in compared.items():
                tokens = what["tokens"] or what["ended"]["tokens"]
                told.append(
                    f"  {pair}, {run}: {tokens} tokens, {what['ended']['requests']} requests "
                    f"({what['ended']['aborted']} aborted), {what['looks']['compared']} looks "
                    f"{'equal' if not what['problems'] else 'NOT EQUAL'}"
                )
        for kernel, what in part.get("kernels", {}).items():
            told.append(f"  auto ~ stock, {kernel}: {what}")
        if "memory" in part:
            told.append(f"  memory: {part['memory']}")
        told += [f"  PROBLEM {problem}" for problem in part["problems"]]
    return told
