"""SCV and the commit: device time of each part, and host time of the calls."""

from __future__ import annotations

import contextlib
import functools
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nwor_compile.bench.kernels_batch import LAYERS, Batch
from nwor_compile.bench.kernels_points import Point
from nwor_compile.bench.kernels_timing import Run, compare
from nwor_compile.bench.record import Spread
from nwor_compile.ops import accept_mask, commit_kv
from nwor_compile.ops.decide import DECIDING, Decide, fits
from nwor_compile.ops.library import pick
from nwor_compile.scv import validate
from nwor_compile.validator import GraphValidator
from nwor_compile.window import State

CONTEXT, DRAFTS = 512, 4
REQUESTS = (1, 16, 64, 256)
STEPS = 8  # in a graph


@dataclass(frozen=True)
class Measured:
    """Microseconds."""

    device: dict[str, Spread]
    host: dict[str, Spread]


class _Step:
    """A window over 32 layers with tail blocks and one step's inputs, as vLLM's V2 runner gives
    them; half of the drafts are accepted."""

    def __init__(self, requests: int) -> None:
        self.batch = Batch(Point(requests, CONTEXT, span=DRAFTS + 1))
        self.window = self.batch.window
        self.window.abort()
        self.window.warm_up([requests])
        tensors = self.window.tensors
        self.graphs = GraphValidator(tensors, DRAFTS, adaptive=False, one_launch=False)
        self.graphs.warm_up([requests])
        self.token_ids = torch.randint(1000, (self.batch.tokens,), device="cuda")
        ids = self.token_ids.view(requests, DRAFTS + 1)[:, 1:]
        self.draft_ids = ids.flatten()
        # Every token of a span has a logit here.
        logit_starts = self.batch.starts.clone()
        self.opening: dict[str, Any] = {
            "num_drafts": None, "query_start_loc": self.batch.starts,
            "slot_mapping": {"kv": self.batch.slots}, "block_table": {"kv": self.batch.table},
            "seq_lens": self.batch.lengths, "token_ids": self.token_ids,
            "logit_starts": logit_starts,
        }  # fmt: skip
        self.window.record_begin("step", **self.opening)
        self.ends = self.batch.starts[1:] // (DRAFTS + 1) * DRAFTS
        taken = DRAFTS // 2
        self.sampled = torch.full((requests, DRAFTS + 1), -1, device="cuda")
        self.sampled[:, :taken] = ids[:, :taken]
        self.sampled[:, taken] = 1000
        self.num_sampled = torch.full((requests,), taken + 1, dtype=torch.int32, device="cuda")
        self.num_rejected = torch.full_like(self.num_sampled, DRAFTS - taken)
        self.counts = (torch.empty_like(self.num_sampled), torch.empty_like(self.num_sampled))
        self.decided: Decide | None = None
        self.mask = accept_mask(self.sampled, self.draft_ids, self.ends)[0]
        # The drafts and slots of a window stay known when it is closed, and layers that staged
        # nothing then agree with its routing: it can be validated any number of times.
        self.stage()
        self.window.abort()
        self.window.tensors.state.zero_()

    def begin(self) -> None:
        """Open a window, as the adapter of vLLM's V2 runner does in a step of drafts alone."""
        self.window.begin_recorded("step")

    def begin_anew(self) -> None:
        """The same, of tensors that were not seen before."""
        self.window.begin(**self.opening)

    def begin_plainly(self) -> None:
        """Open a window by draft counts, without the tokens."""
        batch = self.batch
        self.window.begin(
            batch.num_drafts, batch.starts, batch.slots, block_table=batch.table,
            seq_lens=batch.lengths,
        )  # fmt: skip

    def abort(self) -> None:
        """Drop the window, if one is open."""
        if self.window.state is State.OPEN:
            self.window.abort()

    def stage(self) -> None:
        """Open a window and stage every layer."""
        self.begin()
        self.batch.each(self.batch.stage)

    def say_staged(self) -> None:
        """Open a window that passes for staged, without the calls that would stage it."""
        self.begin()
        self.window.tensors.state[:, 0] = self.batch.tokens - self.sampled.shape[0]

    def stage_anew(self) -> None:
        """The same after a window that is still open to `Window`."""
        self.abort()
        self.stage()

    def stage_plainly(self) -> None:
        """The same by draft counts."""
        self.begin_plainly()
        self.batch.each(self.batch.stage)

    def commit(self) -> Tensor:
        """The whole of SCV and the commit, through the window, as the V2 adapter does."""
        counts = self.num_sampled, self.num_rejected
        return self.window.commit(self.sampled, None, *counts, form=self.batch.tokens).accepted

    def commit_by_graph(self) -> None:
        """The same as where requests are many: a judgement, and the replay of the rest."""
        counts = self.num_sampled, self.num_rejected
        self.graphs(self.sampled, None, *counts, form=self.batch.tokens)

    def commit_plainly(self) -> Tensor:
        """The same with the drafts' ids and without counts."""
        return self.window.commit(self.sampled, self.draft_ids).accepted

    def pass_through(self) -> None:
        """A step without a window."""
        self.window.pass_through({"kv": self.batch.table})

    def decide(self) -> None:
        """Judgement and commit in one launch."""
        given = (self.sampled, self.draft_ids, self.num_sampled, self.num_rejected)
        plan = self.window.tensors.deciding
        if plan is None:
            raise RuntimeError("these windows are not decided in one launch")
        if self.decided is None:
            self.decided = pick(DECIDING, self.sampled.device)(plan, *given)
        self.decided(*given, self.counts, None)

    def check(self) -> None:
        """Raise RuntimeError if the windows that were timed moved nothing."""
        error, fallbacks = int(self.window.tensors.error), self.window.fallbacks
        if error or fallbacks:
            raise RuntimeError(
                f"scv, {self.sampled.shape[0]} requests: the windows that were timed did not "
                f"commit (error {error}, {fallbacks} fallbacks)"
            )

    def validate(self) -> None:
        """Judgement and commit in a launch each."""
        validate(self.window.tensors, self.sampled, None, self.num_sampled, self.num_rejected)

    def op(self) -> None:
        """The commit op alone."""
        tensors, counts = self.window.tensors, self.batch.num_drafts
        batch = tensors.batches[0]
        commit_kv(
            batch.key_caches, batch.value_caches, batch.staged_keys, batch.staged_values,
            batch.slots, self.mask, tensors.error, counts, counts, tensors.counters, batch.table,
            LAYERS, tensors.rows,
        )  # fmt: skip


def measure(requests: int, *, seconds: float, replays: int) -> Measured:
    """Device time of the parts in a chain of steps, host time of the calls that start them."""
    step = _Step(requests)
    with contextlib.closing(step.batch):
        parts: dict[str, Run] = {
            "mask": lambda: accept_mask(step.sampled, step.draft_ids, step.ends, step.num_sampled),
            "mask, flags and commit": step.validate,
            "commit": step.op,
        }
        runs: dict[str, Run] = {
            name: functools.partial(_repeated, part) for name, part in parts.items()
        }
        device = compare(runs, dict.fromkeys(runs, STEPS), seconds=seconds, replays=replays)
        if fits(requests, requests * DRAFTS):
            # It goes by the drafts that begin noted, which an abort leaves: these layers staged.
            step.window.tensors.state[:, 0] = requests * DRAFTS
            alone: dict[str, Run] = {"all in one launch": functools.partial(_repeated, step.decide)}
            device |= compare(alone, {"all in one launch": STEPS}, seconds=seconds, replays=replays)
            step.check()
        host = {
            "commit_kv": _host(lambda: None, step.op),
            "Window.begin_recorded": _host(step.abort, step.begin),
            "Window.begin": _host(step.abort, step.begin_anew),
            "Window.begin, counts": _host(step.abort, step.begin_plainly),
        }
        step.abort()
        host["Window.pass_through"] = _host(lambda: None, step.pass_through)
        host["Window.commit"] = _host(step.stage, step.commit)
        # Its code and data are still in the processor's caches.
        host["Window.commit, in a loop"] = _host(step.say_staged, step.commit)
        # An engine that schedules ahead does not wait between its calls.
        host["Window.commit, no wait before"] = _host(step.stage, step.commit, wait=False)
        host["Window.commit by a graph"] = _host(step.stage_anew, step.commit_by_graph)
        step.abort()
        host["Window.commit, ids"] = _host(step.stage_plainly, step.commit_plainly)
        step.check()
    return Measured(device, host)


def _repeated(part: Run) -> None:
    for _ in range(STEPS):
        part()


def _host(prepare: Run, call: Run, repeats: int = 100, *, wait: bool = True) -> Spread:
    """Microseconds until `call` returns to the host. wait: the device is idle when it begins; else
    what `prepare` launched, and the calls before it, may still be under way."""
    times = []
    for _ in range(repeats + 5):
        prepare()
        if wait:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return Spread.of(times[5:])
