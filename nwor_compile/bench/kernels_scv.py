"""SCV and the commit: device time of each part, and host time of the calls."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from nwor_compile.bench.kernels_timing import Run, compare
from nwor_compile.bench.record import Spread
from nwor_compile.config import NworConfig
from nwor_compile.ops import accept_mask, commit_kv, stage_kv_window
from nwor_compile.scv import validate
from nwor_compile.window import Window

LAYERS, KV_HEADS, SIZE, BLOCK_SIZE, DRAFTS = 32, 8, 128, 16, 4
REQUESTS = (1, 16, 64, 256)
STEPS = 8  # in a graph


@dataclass(frozen=True)
class Measured:
    """Microseconds."""

    device: dict[str, Spread]
    host: dict[str, Spread]


class _Step:
    """A window over 32 layers and one step's inputs; half of the drafts are accepted."""

    def __init__(self, requests: int) -> None:
        tokens = requests * (DRAFTS + 1)
        shape = (-(-tokens // BLOCK_SIZE) + 1, BLOCK_SIZE, KV_HEADS, SIZE)
        zeros = functools.partial(torch.zeros, dtype=torch.bfloat16, device="cuda")
        self.caches = [(zeros(shape), zeros(shape)) for _ in range(LAYERS)]
        self.window = Window(
            {f"layer {i}": pair for i, pair in enumerate(self.caches)},
            max_requests=requests, max_drafts=DRAFTS, max_tokens=tokens,
            config=NworConfig(mode="stage", scv="graph"),
        )  # fmt: skip
        self.window.warm_up([requests])
        ints = functools.partial(torch.arange, device="cuda", dtype=torch.int32)
        self.counts = torch.full((requests,), DRAFTS, dtype=torch.int32, device="cuda")
        self.starts = ints(requests + 1) * (DRAFTS + 1)
        self.ends = ints(1, requests + 1) * DRAFTS
        self.slots = torch.arange(tokens, device="cuda")
        self.rows = zeros(tokens, KV_HEADS, SIZE)
        ids = torch.randint(1000, (requests, DRAFTS), device="cuda")
        self.draft_ids = ids.flatten()
        taken = DRAFTS // 2
        self.sampled = torch.full((requests, DRAFTS + 1), -1, device="cuda")
        self.sampled[:, :taken] = ids[:, :taken]
        self.sampled[:, taken] = 1000
        self.num_sampled = torch.full((requests,), taken + 1, dtype=torch.int32, device="cuda")
        self.mask = accept_mask(self.sampled, self.draft_ids, self.ends)[0]
        # The drafts and slots of a window stay known when it is closed, and layers that staged
        # nothing then agree with its routing: it can be validated any number of times.
        self.stage()
        self.window.abort()
        self.window.tensors.state.zero_()

    def stage(self) -> None:
        """Open a window and stage every layer."""
        self.window.begin(self.counts, self.starts, self.slots)
        for key_cache, value_cache in self.caches:
            stage_kv_window(self.rows, self.rows, key_cache, value_cache, self.slots)

    def commit(self) -> Tensor:
        """The whole of SCV and the commit, through the window."""
        return self.window.commit(self.sampled, self.draft_ids, self.num_sampled).accepted

    def op(self) -> None:
        """The commit op alone."""
        tensors = self.window.tensors
        batch = tensors.batches[0]
        commit_kv(
            batch.key_caches, batch.value_caches, batch.staged_keys, batch.staged_values,
            batch.slots, self.mask, tensors.error, self.counts, self.counts, tensors.counters,
            batch.table, LAYERS, tensors.rows,
        )  # fmt: skip


def measure(requests: int, *, seconds: float, replays: int) -> Measured:
    """Device time of the parts in a chain of steps, host time of the calls that start them."""
    step = _Step(requests)
    tensors = step.window.tensors
    parts: dict[str, Run] = {
        "mask": lambda: accept_mask(step.sampled, step.draft_ids, step.ends, step.num_sampled),
        "mask, flags and commit": lambda: validate(
            tensors, step.sampled, step.draft_ids, step.num_sampled
        ),
        "commit": step.op,
    }
    runs: dict[str, Run] = {
        name: functools.partial(_repeated, part) for name, part in parts.items()
    }
    device = compare(runs, dict.fromkeys(runs, STEPS), seconds=seconds, replays=replays)
    host = {
        "commit_kv": _host(lambda: None, step.op),
        "Window.commit": _host(step.stage, step.commit),
    }
    step.window.close()
    return Measured(device, host)


def _repeated(part: Run) -> None:
    for _ in range(STEPS):
        part()


def _host(prepare: Run, call: Run, repeats: int = 40) -> Spread:
    """Microseconds until `call` returns to the host; the device is idle when it begins."""
    times = []
    for _ in range(repeats + 5):
        prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return Spread.of(times[5:])
