"""Very many windows with random drafts, acceptances and slots leave the oracle's cache.

NWOR_STRESS_WINDOWS=1000000 python -m pytest tests/gpu/test_stress_gpu.py -s --timeout=0

Everything runs on the device: a CUDA graph draws the inputs of some windows, runs them one after
the other, and compares the caches with an oracle that knows no window: of all rows that may be
written, the last one of each slot stays.
"""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nwor_compile import NworConfig, Window
from nwor_compile.ops import rope_stage_kv_window, stage_kv_window

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

WINDOWS = int(os.environ.get("NWOR_STRESS_WINDOWS", "5000"))
IN_GRAPH = 50  # windows of one replay
REQUESTS, DRAFTS, CERTAIN, LAYERS = 8, 5, 2, 2
TOKENS = REQUESTS * (DRAFTS + CERTAIN)
BLOCKS, BLOCK, HEADS, SIZE = 64, 16, 2, 8
SLOTS = BLOCKS * BLOCK


class Inputs(NamedTuple):
    """Of `IN_GRAPH` windows; `tags` are the rows, a different number each."""

    num_drafts: Tensor
    starts: Tensor
    slots: Tensor
    accepted: Tensor
    draft_ids: Tensor
    sampled: Tensor
    tags: Tensor
    stays: Tensor  # bool: certain or accepted, and with a slot


def draw(windows: int) -> Inputs:
    device = torch.device("cuda")

    def randint(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, device=device)

    drafts = randint(0, DRAFTS + 1, windows, REQUESTS)
    certain = randint(1, CERTAIN + 1, windows, REQUESTS)
    accepted = (torch.rand(windows, REQUESTS, device=device) * (drafts + 1)).long()
    starts = torch.nn.functional.pad((drafts + certain).cumsum(1), (1, 0))
    token = torch.arange(TOKENS, device=device).expand(windows, TOKENS)
    owner = (token.unsqueeze(2) >= starts[:, 1:].unsqueeze(1)).sum(2)
    real = owner < REQUESTS
    owner = owner.clamp(max=REQUESTS - 1)
    draft = token - starts.gather(1, owner) - certain.gather(1, owner)
    # Distinct slots: an odd factor permutes the numbers below a power of two.
    factor, shift = 2 * randint(0, SLOTS, windows, 1) + 1, randint(0, SLOTS, windows, 1)
    slots = (factor * token + shift) % SLOTS
    slots = torch.where(real & (torch.rand(slots.shape, device=device) > 0.05), slots, -1)
    ids = randint(0, 10, windows, REQUESTS * DRAFTS)
    column = torch.arange(DRAFTS + 1, device=device).expand(windows, REQUESTS, DRAFTS + 1)
    first = (drafts.cumsum(1) - drafts).unsqueeze(2)
    place = (first + column).clamp(max=REQUESTS * DRAFTS - 1)
    given = ids.unsqueeze(1).expand(windows, REQUESTS, -1).gather(2, place)
    taken = accepted.unsqueeze(2)
    sampled = torch.where(column < taken, given, torch.where(column == taken, given + 1, -1))
    tags = randint(1, 1 << 22, windows, TOKENS).float()
    stays = (draft < accepted.gather(1, owner)) & (slots >= 0)
    return Inputs(drafts, starts, slots, accepted, ids, sampled, tags, stays)


def scale(layer: int) -> float:
    """Rows of a layer are the tags times this: exact in float32."""
    return 0.5**layer


class Stress:
    """Caches, their oracle, and what went wrong so far, all on the device."""

    def __init__(self) -> None:
        shape = (BLOCKS, BLOCK, HEADS, SIZE)
        self.caches = [
            (torch.zeros(shape, device="cuda"), torch.zeros(shape, device="cuda"))
            for _ in range(LAYERS)
        ]
        self.window = Window(
            {f"layers.{i}": pair for i, pair in enumerate(self.caches)},
            max_requests=REQUESTS, max_drafts=DRAFTS, max_tokens=TOKENS,
            config=NworConfig(scv="graph"),
        )  # fmt: skip
        self.oracle = torch.zeros(SLOTS, device="cuda")
        self.wrong = torch.zeros(2, dtype=torch.int64, device="cuda")  # elements, acceptances
        self.committed = torch.zeros((), dtype=torch.int64, device="cuda")
        self.staged = torch.zeros((), dtype=torch.int64, device="cuda")
        # RoPE by no angle: the rows stay, and the fused kernel runs.
        self.cos = torch.ones(TOKENS, SIZE // 2, device="cuda")
        self.sin = torch.zeros(TOKENS, SIZE // 2, device="cuda")
        self.query = torch.zeros(TOKENS, HEADS, SIZE, device="cuda")

    def run(self, windows: int) -> None:
        s = draw(windows)
        accepted = []
        for w in range(windows):
            self.window.begin(s.num_drafts[w], s.starts[w], s.slots[w])
            for layer, caches in enumerate(self.caches):
                rows = (s.tags[w] * scale(layer)).view(TOKENS, 1, 1).expand(TOKENS, HEADS, SIZE)
                if (w + layer) % 2:
                    rope_stage_kv_window(
                        self.query, rows, -rows, self.cos, self.sin, SIZE, True, *caches, s.slots[w]
                    )
                else:
                    stage_kv_window(rows, -rows, *caches, s.slots[w])
            done = self.window.commit(s.sampled[w], s.draft_ids[w])
            accepted.append(done.accepted)
        self.check(s, torch.stack(accepted))

    def check(self, s: Inputs, accepted: Tensor) -> None:
        """The last row of each slot stays, in whatever window it was written."""
        number = torch.arange(s.tags.numel(), device="cuda")
        slot = torch.where(s.stays, s.slots, SLOTS).flatten()
        last = torch.full((SLOTS + 1,), -1, dtype=torch.int64, device="cuda")
        last.scatter_reduce_(0, slot, number, "amax")
        last = last[:SLOTS]
        tag = s.tags.flatten()[last.clamp(min=0)]
        self.oracle.copy_(torch.where(last >= 0, tag, self.oracle))
        wanted = self.oracle.view(BLOCKS, BLOCK, 1, 1)
        for layer, (key, value) in enumerate(self.caches):
            self.wrong[0] += (key != wanted * scale(layer)).sum()
            self.wrong[0] += (value != -wanted * scale(layer)).sum()
        self.wrong[1] += (accepted != s.accepted).sum()
        self.committed += s.accepted.sum()
        self.staged += s.num_drafts.sum()


def test_the_caches_after_very_many_windows_are_those_of_the_oracle() -> None:
    torch.manual_seed(int(os.environ.get("NWOR_SEED", time.time_ns() % 2**31)))
    print(f"NWOR_SEED={torch.initial_seed()}")
    stress = Stress()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            stress.run(2)  # compiles the kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stress.run(IN_GRAPH)
        replays = -(-WINDOWS // IN_GRAPH)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"{replays * IN_GRAPH} windows in {seconds:.1f} s")
        metrics = stress.window.metrics()
        assert stress.wrong.tolist() == [0, 0]
        assert metrics.nwor_error_windows == 0
        assert metrics.nwor_total_committed == int(stress.committed)
        assert metrics.nwor_total_staged == int(stress.staged)
        assert int(stress.committed) > replays * IN_GRAPH  # it did accept
        assert (stress.oracle > 0).all()
    finally:
        stress.window.close()


def test_the_comparison_finds_a_single_wrong_row() -> None:
    stress = Stress()
    try:
        stress.run(20)
        assert stress.wrong.tolist() == [0, 0]
        stress.caches[1][1].view(SLOTS, HEADS, SIZE)[17, 1, 3] += 1
        stress.run(1)
        assert 0 < int(stress.wrong[0]) <= 1
    finally:
        stress.window.close()
