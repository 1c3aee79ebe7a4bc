"""A long run without a GPU: what its watch sees on CPU tensors, its plans, its report, and its
driver with stand-in engines."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
import types
from pathlib import Path
from typing import Any

import long_memory
import long_report
import long_run
import pytest
import torch
from long_parts import Part, parts
from long_plan import Aborts, Plan
from long_shadow import COLUMNS, FAULTS, CacheShadow, Step
from long_watch import LongWatch
from torch import Tensor

BLOCKS, BLOCK, HEADS, SIZE, K = 6, 4, 2, 8, 4


class Cache:
    """Two layers of a paged cache with a spare block, and a request in blocks 1 and 3."""

    def __init__(self) -> None:
        self.layers = [
            torch.zeros(BLOCKS + 1, BLOCK, HEADS, 2 * SIZE, dtype=torch.bfloat16) for _ in range(2)
        ]
        self.shadow = CacheShadow(self.layers, BLOCKS, K, looks=8)
        self.ids = torch.arange(100, 100 + 2 * BLOCK)[None]
        self.table = torch.tensor([[1, 3]])

    def slots(self, first: int, count: int) -> Tensor:
        place = torch.arange(first, first + count)
        return self.table[0, place // BLOCK] * BLOCK + place % BLOCK

    def write(self, slots: Tensor, value: float) -> None:
        for index, layer in enumerate(self.layers):
            layer[slots // BLOCK, slots % BLOCK] = value + index

    def step(self, first: int, count: int, drafts: int, sampled: int, written: int) -> Step:
        """Tokens from position `first`, of which `written` reach the cache."""
        slots = self.slots(first, count)
        self.write(slots[:written], 1 + first)
        step = Step(
            slots=slots,
            starts=torch.tensor([0, count]),
            drafts=torch.tensor([drafts]),
            tokens=self.ids[0, first : first + count],
            positions=torch.arange(first, first + count),
            lengths=torch.tensor([first + count]),
            table=self.table,
        )
        self.shadow.follow(step, torch.tensor([sampled]))
        return step

    def look(self, step: Step) -> dict[str, int]:
        self.shadow.look(step, self.ids)
        row = self.shadow.result()["looks"][-1]
        return dict(zip(COLUMNS, row, strict=True))


def prefilled() -> Cache:
    cache = Cache()
    cache.step(0, 3, 0, 1, 3)
    return cache


def only(found: dict[str, int], **expected: int) -> None:
    assert {name: found[name] for name in FAULTS} == {**dict.fromkeys(FAULTS, 0), **expected}


def test_staged_writes_leave_nothing_to_see() -> None:
    cache = prefilled()
    found = cache.look(cache.step(3, 5, 4, 3, written=3))  # a certain token and two of four drafts
    only(found)
    assert (found["rows"], found["computed"], found["step"]) == (6, 6, 2)
    counted = cache.shadow.result()
    assert (counted["drafts"], counted["accepted"], counted["certain"]) == (4, 2, 4)
    assert counted["drafted_per_position"] == [1, 1, 1, 1]
    assert counted["accepted_per_position"] == [1, 1, 0, 0]


def test_direct_writes_are_seen_at_any_later_step() -> None:
    cache = prefilled()
    cache.step(3, 5, 4, 1, written=5)
    only(cache.look(cache.step(4, 1, 0, 1, written=1)), rejected=3)


def test_poison_in_rejected_rows_is_told_from_rows() -> None:
    cache = prefilled()
    step = cache.step(3, 5, 4, 3, written=3)
    cache.write(step.slots[3:], float("nan"))
    only(cache.look(step), marked=2)
    cache.layers[1][step.slots[4] // BLOCK, step.slots[4] % BLOCK, 0, 0] = 1
    only(cache.look(step), marked=1, rejected=1)


def test_poison_in_an_accepted_row_is_seen() -> None:
    cache = prefilled()
    cache.write(cache.slots(4, 1), float("nan"))
    step = cache.step(3, 1, 0, 1, written=1)
    only(cache.look(step), changed=1)  # the row after it, which no step was to write
    cache.write(cache.slots(3, 1), float("nan"))
    cache.shadow.follow(step, torch.tensor([1]))  # as if the step itself had written it
    only(cache.look(step), changed=1, not_a_number=1)


@pytest.mark.parametrize("place", [(0, 2, 0, 0), (3, 3, 1, 5)])
def test_a_row_that_changes_later_or_was_never_written_is_seen(place: tuple[int, ...]) -> None:
    cache = prefilled()
    step = cache.step(3, 5, 4, 3, written=3)
    cache.layers[1][place] = 9
    # Slot (3, 3) is that of the last draft, which was rejected.
    only(cache.look(step), **{"rejected" if place[0] == 3 else "changed": 1})


def test_spare_blocks_are_not_looked_at() -> None:
    cache = prefilled()
    step = cache.step(3, 1, 0, 1, written=1)
    cache.layers[0][BLOCKS] = 5
    only(cache.look(step))


def test_a_request_that_reads_rejected_or_foreign_rows_is_seen() -> None:
    cache = prefilled()
    cache.step(3, 5, 4, 1, written=1)  # positions 4 to 7 were rejected
    step = cache.step(7, 1, 0, 1, written=1)  # and the next step believes them computed
    only(cache.look(step), uncommitted=3, misplaced=3)
    other = prefilled()
    step = other.step(3, 1, 0, 1, written=1)
    other.ids = other.ids + 1  # another request's block
    only(other.look(step), misplaced=3)


def test_a_digest_is_of_accepted_rows_alone() -> None:
    staged, direct, other = prefilled(), prefilled(), prefilled()
    looks = [
        staged.look(staged.step(3, 5, 4, 3, written=3)),
        direct.look(direct.step(3, 5, 4, 3, written=5)),
    ]
    other.layers[0][1, 2, 1, 3] += 0.5
    other.step(0, 3, 0, 1, written=0)
    looks.append(other.look(other.step(3, 5, 4, 3, written=3)))
    assert looks[0]["digest"] == looks[1]["digest"] != looks[2]["digest"]


def test_a_last_look_needs_no_step() -> None:
    cache = prefilled()
    cache.layers[0][1, 1] = 4
    cache.shadow.look()
    assert dict(zip(COLUMNS, cache.shadow.result()["looks"][0], strict=True))["changed"] == 1


class Runner:
    """As much of vLLM's V2 runner as the watch sees: two requests, the second one's prompt goes on.

    direct: rejected drafts are written too.
    """

    def __init__(self, direct: bool) -> None:
        self.direct = direct
        cache = torch.zeros(BLOCKS, BLOCK, HEADS, 2 * SIZE, dtype=torch.bfloat16)
        self.layer = types.SimpleNamespace(kv_cache=cache.transpose(1, 2), kv_cache_dtype="auto")
        self.compilation_config = types.SimpleNamespace(
            static_forward_context={"layer": self.layer, "drafter": None}
        )
        spec = types.SimpleNamespace(block_size=BLOCK)
        group = types.SimpleNamespace(layer_names=["layer", "drafter"], kv_cache_spec=spec)
        self.kv_cache_config = types.SimpleNamespace(kv_cache_groups=[group])
        self.speculator = types.SimpleNamespace(draft_attn_layer_names={"drafter"})
        known = torch.arange(3 * 16, dtype=torch.int32).reshape(3, 16)
        self.req_states = types.SimpleNamespace(all_token_ids=types.SimpleNamespace(gpu=known))
        # Requests at places 2 and 0 of the states, padded to four.
        self.table = torch.tensor([[1, 2], [3, 4], [0, 0], [0, 0]], dtype=torch.int32)
        self.places = torch.tensor([2, 0], dtype=torch.int32)
        self.slots = torch.zeros(1, 16, dtype=torch.int64)

    def prepare_attn(self, batch: Any) -> Any:
        return (self.table,), self.slots

    def sample(self, hidden: Any, batch: Any, grammar: Any) -> Any:
        written = [batch.spans[0] - (0 if self.direct else batch.rejected), batch.spans[1]]
        starts = batch.query_start_loc.tolist()
        for request in range(2):
            slots = self.slots[0, starts[request] : starts[request] + written[request]]
            rows = self.layer.kv_cache.transpose(1, 2)
            rows[slots // BLOCK, slots % BLOCK] = 3.0
        self.slots = self.slots.clone().fill_(-7)  # as a drafter leaves it
        return None, batch.sampled, None

    def step(self, spans: list[int], computed: list[int], drafts: int, sampled: int) -> None:
        positions = [range(c, c + n) for c, n in zip(computed, spans, strict=True)]
        flat = [(request, p) for request in range(2) for p in positions[request]]
        count = len(flat)
        ids = [int(self.req_states.all_token_ids.gpu[self.places[r], p]) for r, p in flat]
        slots = [int(self.table[r, p // BLOCK]) * BLOCK + p % BLOCK for r, p in flat]
        self.slots = torch.tensor([[*slots, -1, -1]])
        ends = [0, 1 + drafts, 2 + drafts]
        batch = types.SimpleNamespace(
            num_tokens=count,
            num_reqs=2,
            cu_num_logits=torch.tensor(ends, dtype=torch.int32),
            query_start_loc=torch.tensor([0, spans[0], count, count, count], dtype=torch.int32),
            seq_lens=torch.tensor(
                [computed[0] + spans[0], computed[1] + spans[1], 0, 0], dtype=torch.int32
            ),
            input_ids=torch.tensor([*ids, 0, 0], dtype=torch.int32),
            positions=torch.tensor([p for _, p in flat] + [0, 0]),
            idx_mapping=self.places,
            spans=spans,
            rejected=max(0, drafts + 1 - sampled),
            sampled=torch.tensor([sampled, 0], dtype=torch.int32),
        )
        self.prepare_attn(batch)
        self.sample(None, batch, None)


@pytest.mark.parametrize("direct", [False, True])
def test_the_watch_follows_a_v2_runner(direct: bool) -> None:
    runner = Runner(direct)
    watch = LongWatch(types.SimpleNamespace(model_runner=runner), BLOCKS, K)
    watch.begin(every=1)
    runner.step([3, 2], [0, 0], drafts=0, sampled=1)
    runner.step([5, 2], [3, 2], drafts=4, sampled=3)
    found = watch.end()
    assert (found["steps"], found["looked"], found["certain"]) == (2, 3, 8)
    assert (found["drafts"], found["accepted"]) == (4, 2)
    looks = [dict(zip(COLUMNS, look, strict=True)) for look in found["looks"]]
    assert [look["computed"] for look in looks] == [5, 10, 0]
    only(looks[0])
    only(looks[1], **({"rejected": 2} if direct else {}))
    only(looks[2], **({"rejected": 2} if direct else {}))


TEXT = list(range(700))


def test_plans_give_the_same_requests_again() -> None:
    plan = Plan(tokens=3000, temperature=0.8, mixed=True)
    first, again = list(plan.requests(TEXT)), list(plan.requests(TEXT))
    assert first == again
    assert sum(request.tokens for request in first) >= 3000
    assert sum(request.tokens for request in first[:-1]) < 3000
    assert {request.temperature for request in first} == {0.0, 0.8}
    assert len({tuple(request.prompt) for request in first}) == len(first)
    assert list(Plan(tokens=3000, seed=1).requests(TEXT)) != first


def test_an_endless_plan_has_no_end() -> None:
    assert len(list(itertools.islice(Plan(tokens=0).requests(TEXT), 500))) == 500


def test_a_plan_continues_earlier_answers() -> None:
    earlier = [([1, 2], [3, 4, 5, 6]), ([7], [8, 9])]
    requests = list(Plan(tokens=0, follow="greedy").requests(TEXT, earlier))
    assert len(requests) == 2
    assert requests[0].prompt[:4] == [1, 2, 3, 4]
    assert requests[1].prompt[:2] == [7, 8]


def test_aborts_are_drawn_by_step() -> None:
    plan = Plan(tokens=9, chance=0.1, storm=10, share=0.5)
    live = list(range(40))
    drawn = [Aborts(plan).before(step, live) for step in (3, 9)]
    assert drawn == [Aborts(plan).before(step, live) for step in (3, 9)]
    one, two = Aborts(plan), Aborts(plan)
    assert [one.before(s, live) for s in range(20)] == [two.before(s, live) for s in range(20)]
    assert 10 < len(drawn[1]) < 30
    assert Aborts(Plan(tokens=9)).before(9, live) == []


def samples(growth: float, count: int = 97, noise: int = 0) -> list[dict[str, Any]]:
    """Every five seconds; a first minute that grows, then `growth` bytes a second."""
    found = []
    for index in range(count):
        seconds = 5.0 * index
        bytes_ = int(min(seconds, 55) * 1e7 + max(0, seconds - 60) * growth) + noise * (index % 2)
        found.append({"seconds": seconds, "step": index, "allocated": bytes_, "rss": bytes_})
    return found


def test_memory_that_stays_is_fine_and_memory_that_grows_is_not() -> None:
    limits = {"allocated": 1 << 20, "rss": 16 << 20}
    found, problems = long_memory.judged(samples(0, noise=1 << 21), samples(0), allowed=limits)
    assert problems == []
    assert found["allocated"]["grew"] == 0
    _, problems = long_memory.judged(samples(5e3), samples(0), allowed=limits)
    assert len(problems) == 1
    assert "allocated grew" in problems[0]
    _, problems = long_memory.judged(samples(1e5), samples(0), allowed=limits)
    assert len(problems) == 2
    _, problems = long_memory.judged(samples(1e5), samples(1e5), allowed=limits)
    assert problems == []


def test_memory_that_was_not_sampled_for_long_enough_is_a_problem() -> None:
    found, problems = long_memory.judged(samples(0, count=15), samples(0))
    assert found["rss"]["grew"] is None
    assert any("too few samples of rss" in text for text in problems)
    assert long_memory.judged([], [])[1]


def test_the_devices_memory_is_judged_once_the_others_are_gone() -> None:
    rows = [{"seconds": 5.0 * i, "device": (400 << 20) * (i < 40)} for i in range(97)]
    assert long_memory.alone(rows, 205.0) == (
        {"since": 205.0, "grew": 0, "allowed": long_memory.DEVICE}, [],
    )  # fmt: skip
    rows[80:] = [{**row, "device": 200 << 20} for row in rows[80:]]
    assert long_memory.alone(rows, 205.0)[1]
    assert long_memory.alone(rows, 470.0) == (
        {"since": 470.0, "grew": None, "allowed": long_memory.DEVICE}, [],
    )  # fmt: skip


def test_memory_of_a_soak_is_in_its_report() -> None:
    soak = Part("soak", ("stage", "stock"), 9, {"soak": {"tokens": 0}}, endless=True)
    found = {
        kind: {"facts": {}, "runs": {"soak": run(memory=samples(rate), cut=True, began=0.0)}}
        for kind, run, rate in (("stage", a_run, 1e6), ("stock", stock_run, 0))
    }
    report = long_report.part_report(soak, found, decode)
    assert len(report["problems"]) == 2
    assert all("grew by" in text for text in report["problems"])
    found["stage"]["runs"]["soak"]["memory"] = samples(0)
    assert long_report.part_report(soak, found, decode)["problems"] == []


def test_a_sample_is_of_this_process() -> None:
    first = long_memory.sample(0.0, 1)
    kept = bytearray(64 << 20)
    assert long_memory.sample(1.0, 2)["rss"] - first["rss"] > len(kept) // 2


LOOK = dict.fromkeys(COLUMNS, 0)


def a_run(**more: Any) -> dict[str, Any]:
    """Of a staged engine, two requests."""
    looks = [
        [{**LOOK, "step": step, "rows": 40, "computed": 9 * (step < 3), "digest": 7 + step}[c]
         for c in COLUMNS]
        for step in (1, 2, 3)
    ]  # fmt: skip
    watched = {
        "steps": 3, "certain": 10, "verified": 5, "drafts": 20, "accepted": 8,
        "drafted_per_position": [5, 5, 5, 5], "accepted_per_position": [4, 2, 1, 1],
        "looked": 3, "looks": looks,
    }  # fmt: skip
    nwor = {
        "nwor_total_staged": 20, "nwor_total_committed": 8, "nwor_total_rejected": 12,
        "nwor_drafted_per_position": [5, 5, 5, 5], "nwor_accepted_per_position": [4, 2, 1, 1],
        "nwor_error_windows": 0, "nwor_fallback_count": 0, "nwor_unique_tokens": 0,
    }  # fmt: skip
    return {
        "calls": 4, "tokens": 7, "cut": False, "ids": [[1, 2, 3, 4], [5, 6, 7]],
        "prompts": [[9, 9], [8]], "scores": [], "memory": [], "seconds": 1.0,
        "ended": [[1, "finished", 2, 3, "b"], [0, "finished", 3, 4, "a"]],
        "prefix_hits": 3, "preemptions": 1, "vllm_drafts": 20, "vllm_accepted": 8, "drafts": 5,
        "positions": [4, 2, 1, 1], "nwor": nwor, "watched": watched, "graphs": {"FULL": 3}, **more,
    }  # fmt: skip


def stock_run(**more: Any) -> dict[str, Any]:
    run = a_run(nwor={}, **more)
    run["watched"]["looks"][1][COLUMNS.index("rejected")] = 11
    return run


def decode(ids: Any) -> str:
    return " ".join(map(str, ids))


def test_equal_runs_have_no_problem() -> None:
    found = long_report.compare(a_run(), stock_run(), decode)
    assert found["problems"] == []
    assert found["tokens"] == 7
    assert found["ended"] == {"requests": 2, "finished": 2, "aborted": 0, "tokens": 7}
    assert found["looks"] == {"compared": 3, "rows": 120}


def test_a_difference_is_told_with_its_context() -> None:
    found = long_report.compare(a_run(ids=[[1, 2, 0, 4], [5, 6, 7]]), stock_run(), decode)
    assert found["tokens"] == 2 + 3
    assert found["first_difference"] == {
        "request": 0, "position": 2, "after": "9 9 1 2", "ours": "0 4",
    }  # fmt: skip
    assert "ids differ" in found["problems"][0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: run["ids"][1].pop(), "ids differ"),
        (lambda run: run["ids"].pop(), "ids differ"),
        (lambda run: run["ended"][1].__setitem__(2, 9), "ended as"),
        (lambda run: run["ended"].pop(), "requests ended"),
        (lambda run: run["watched"]["accepted_per_position"].__setitem__(3, 0), "accepted_per"),
        (lambda run: run["watched"].__setitem__("steps", 4), "steps differs"),
        (lambda run: run["positions"].__setitem__(0, 5), "positions differs"),
        (lambda run: run["watched"]["looks"][1].__setitem__(-1, 0), "rows differ from theirs at"),
        (lambda run: run["watched"]["looks"].clear(), "no look of both"),
    ],
)
def test_whatever_differs_is_a_problem(change: Any, told: str) -> None:
    run = a_run()
    change(run)
    problems = long_report.compare(run, stock_run(), decode)["problems"]
    assert any(told in text for text in problems), problems


def test_a_run_that_the_time_ended_is_compared_as_far_as_it_went() -> None:
    run = a_run(cut=True, ids=[[1, 2], [5, 6, 7]])
    run["ended"] = [[1, "finished", 2, 3, "b"], [0, "cut", 3, 2, "c"]]
    run["watched"]["looks"].pop()
    found = long_report.compare(run, stock_run(), decode)
    assert (found["problems"], found["tokens"], found["ended"]["requests"]) == ([], 5, 1)
    run["ids"][0][1] = 0
    assert "ids differ" in long_report.compare(run, stock_run(), decode)["problems"][0]


PLAN = {"tokens": 7}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_in_a_look_is_a_problem_of_a_staged_engine(fault: str) -> None:
    run = a_run()
    assert long_report.alone("stage", PLAN, run) == []
    run["watched"]["looks"][2][COLUMNS.index(fault)] = 2
    assert long_report.alone("stage", PLAN, run) == [f"2 rows {fault} in looks"]
    assert bool(long_report.alone("nan", PLAN, run)) == (fault != "marked")
    run["nwor"] = {}
    assert bool(long_report.alone("stock", PLAN, run)) == (fault != "rejected")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: run["nwor"].__setitem__("nwor_total_staged", 19), "nwor_total_staged is 19"),
        (lambda run: run["nwor"].__setitem__("nwor_total_rejected", 11), "not committed and"),
        (lambda run: run["nwor"].__setitem__("nwor_error_windows", 1), "nwor_error_windows is 1"),
        (lambda run: run["nwor"].__setitem__("nwor_accepted_per_position", [4, 2, 2, 0]), "_per_"),
        (lambda run: run["watched"].__setitem__("looked", 0), "not looked at"),
        (lambda run: run["watched"].__setitem__("looked", 9999), "more looks"),
        (lambda run: run.__setitem__("tokens", 6), "6 tokens instead of 7"),
        (lambda run: run.__setitem__("cut", True), "ended by the time"),
    ],
)
def test_what_is_wrong_with_one_run_is_told(change: Any, told: str) -> None:
    run = a_run()
    change(run)
    assert any(told in text for text in long_report.alone("stage", PLAN, run))


def engines(**runs: Any) -> dict[str, Any]:
    return {kind: {"facts": {}, "runs": {"greedy": run}} for kind, run in runs.items()}


SMALL = Part("small", ("stock", "stage"), 9, {"greedy": PLAN})


def test_a_part_that_could_show_nothing_is_a_problem() -> None:
    good = engines(stock=stock_run(), stage=a_run())
    assert long_report.part_report(SMALL, good, decode)["problems"] == []
    blind = engines(stock=a_run(nwor={}), stage=a_run())
    assert "no rejected row" in long_report.part_report(SMALL, blind, decode)["problems"][0]
    calm = engines(stock=stock_run(), stage=a_run(preemptions=0))
    problems = long_report.part_report(SMALL, calm, decode)["problems"]
    assert problems == ["stage: no request was preempted"]
    poisoned = Part("tokens", ("stock", "nan"), 9, {"greedy": PLAN})
    found = engines(stock=stock_run(), nan=a_run())
    assert "no poisoned row" in long_report.part_report(poisoned, found, decode)["problems"][0]


def test_engines_that_are_missing_are_problems() -> None:
    found = {**engines(stock=stock_run()), "stage": {"runs": {}, "error": "the engine ended: X"}}
    problems = long_report.part_report(SMALL, found, decode)["problems"]
    assert problems[:2] == ["stage: the engine ended: X", "stage: greedy was not run"]


def scored(ids: list[list[int]], chosen: float, leads: list[list[float]]) -> dict[str, Any]:
    return {"ids": ids, "scores": [[(chosen, lead) for lead in row] for row in leads]}


def test_kernels_may_part_only_where_no_token_leads() -> None:
    leads = [[1.0, 1.0, 0.015], [2.0, 2.0, 2.0]]
    stock = scored([[1, 2, 3], [4, 5, 6]], -0.5, leads)
    same = long_report.divergences(scored([[1, 2, 3], [4, 5, 6]], -0.51, leads), stock)
    assert (same["equal_tokens"], same["parted"], same["unexplained"]) == (6, 0, [])
    assert same["largest_move"] == pytest.approx(0.01)
    close = long_report.divergences(scored([[1, 2, 9], [4, 5, 6]], -0.51, leads), stock)
    assert (close["parted"], close["unexplained"]) == (1, [])
    far = long_report.divergences(scored([[1, 2, 3], [4, 9, 6]], -0.51, leads), stock)
    assert far["unexplained"] == [{"request": 1, "position": 1, "lead": 2.0}]


def test_acceptance_within_sampling_error() -> None:
    def watched(*accepted: int) -> dict[str, Any]:
        return {"accepted_per_position": list(accepted), "drafted_per_position": [1000, 1000]}

    near = long_report.acceptance(watched(500, 200), watched(520, 190))
    far = long_report.acceptance(watched(500, 200), watched(500, 300))
    assert near["deviations"] < long_report.DEVIATIONS < far["deviations"]


def test_parts_say_what_engines_need() -> None:
    for device in ("cuda", "cpu"):
        for part in parts(100_000, device).values():
            for kind in part.kinds:
                json.dumps(part.options(kind, device))
            for command in part.commands():
                plan = Plan.of(command["plan"])
                longest = part.options("stage", device)["llm"]["max_model_len"]
                followed = 600 if plan.follow else 0
                assert plan.prompt[1] + plan.length[1] + followed <= longest
    full = parts(100_000, "cuda")
    for name in ("tokens", "small"):
        runs = list(full[name].runs)
        # What is continued must be in the cache still.
        assert runs[runs.index("follow") - 1] == full[name].runs["follow"]["follow"]
    assert full["tokens"].runs["greedy"]["tokens"] == full["tokens"].runs["sampled"]["tokens"]


STAND_IN = """
import json, sys, time
options = json.load(open(sys.argv[1]))
run = json.load(open(RUN))
staged = options["nwor"] is not None
if options["speculative"].get("dies") or DIES and staged:
    print("RuntimeError: out of order", file=sys.stderr)
    sys.exit(1)
print(json.dumps({"blocks": 9}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    assert command["limit"] > 0
    if not staged:
        run["watched"]["looks"][0][1] = 5
    run["nwor"] = run["nwor"] if staged else {}
    if staged and DIFFERS:
        run["ids"][0][0] = 77
    print(json.dumps(run), flush=True)
"""


def namespace(seconds: float) -> argparse.Namespace:
    return argparse.Namespace(
        seconds=seconds, jobs=4, stagger=0, device="cuda", minutes=1, cache=None
    )  # fmt: skip


@pytest.mark.parametrize("fault", ["", "dies", "differs"])
def test_the_driver_reports_what_its_engines_did(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(a_run()))
    script = tmp_path / "stand_in.py"
    text = STAND_IN.replace("RUN", repr(str(tmp_path / "run.json")))
    script.write_text(
        text.replace("DIES", str(fault == "dies")).replace("DIFFERS", str(fault == "differs"))
    )
    monkeypatch.setattr(long_run, "SCRIPT", script)
    given = namespace(60)
    run = long_run.LongRun({"small": SMALL}, given, tmp_path / "scratch", tmp_path)
    run.run()
    found = long_report.part_report(SMALL, run.engines["small"], decode)
    record = {"parts": {"small": copy.deepcopy(found)}}
    told = "\n".join(long_report.lines(record))
    if fault == "":
        assert found["problems"] == []
        assert "small: passed" in told
    elif fault == "dies":
        assert "RuntimeError: out of order" in found["problems"][0]
    else:
        assert "ids differ" in found["problems"][0]
        assert "small: FAILED" in told


def test_a_late_engine_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time; time.sleep(600)")
    monkeypatch.setattr(long_run, "SCRIPT", script)
    given = namespace(1)
    start = time.monotonic()
    run = long_run.LongRun({"small": SMALL}, given, tmp_path / "scratch", tmp_path)
    run.run()
    assert time.monotonic() - start < 20
    assert "no answer" in run.engines["small"]["stage"]["error"]
