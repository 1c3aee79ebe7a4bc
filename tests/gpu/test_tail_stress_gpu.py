"""Very many windows with staging in tail blocks: at every one attention would read the right rows.

NWOR_STRESS_WINDOWS=100000 python -m pytest tests/gpu/test_tail_stress_gpu.py -s --timeout=0

What an engine does to requests and blocks is drawn on the device: requests change places, end and
begin anew in their own blocks or in those of others, steps without drafts come between, windows are
aborted. A tail block keeps its rows from one window to the next, so whatever is stale must be known
as stale. The oracle is one number a slot, and knows no window.
"""

from __future__ import annotations

import os
import time

import pytest
import torch
from torch import Tensor

from nwor_compile import NworConfig, Window
from nwor_compile.ops import stage_kv_window
from nwor_compile.tail_blocks import TailBlocks, tail_blocks_needed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

WINDOWS = int(os.environ.get("NWOR_STRESS_WINDOWS", "5000"))
IN_GRAPH = 44  # windows of one replay: each kind of step comes at different places
REQUESTS, DRAFTS, LAYERS = 8, 5, 2
BLOCK, COLUMNS, HEADS, SIZE = 8, 6, 2, 8  # small blocks: tails cross into a second one
LENGTH = BLOCK * COLUMNS
BLOCKS = REQUESTS * COLUMNS
SLOTS = BLOCKS * BLOCK
TOKENS = REQUESTS * (DRAFTS + 1)
PASSED, ABORTED = 7, 11  # each so many-th step has no window, or one that is aborted


def chance(p: float, *shape: int) -> Tensor:
    return torch.rand(shape, device="cuda") < p


def shuffled(n: int) -> Tensor:
    """Of 0 to n - 1. `randperm` draws few numbers on the host, which no graph can capture."""
    return torch.rand(n, device="cuda").argsort()


class TailStress:
    """Requests, their blocks, caches and oracle; what went wrong so far, all on the device."""

    def __init__(self) -> None:
        spare = tail_blocks_needed(REQUESTS, DRAFTS, BLOCK)
        shape = (BLOCKS + spare, BLOCK, HEADS, SIZE)
        self.caches = [
            (torch.zeros(shape, device="cuda"), torch.zeros(shape, device="cuda"))
            for _ in range(LAYERS)
        ]
        self.window = Window(
            {f"layers.{i}": pair for i, pair in enumerate(self.caches)},
            max_requests=REQUESTS, max_drafts=DRAFTS, max_tokens=TOKENS, config=NworConfig(),
            tail_blocks=TailBlocks(first={"kv": BLOCKS}, columns=COLUMNS),
        )  # fmt: skip
        self.lengths = torch.zeros(REQUESTS, dtype=torch.int64, device="cuda")
        self.fresh = torch.ones(REQUESTS, dtype=torch.bool, device="cuda")
        self.tables = shuffled(BLOCKS).view(REQUESTS, COLUMNS)
        self.oracle = torch.zeros(SLOTS, device="cuda")
        # Rows below the step's, rows of the step, cache after it.
        self.wrong = torch.zeros(3, dtype=torch.int64, device="cuda")
        self.accepted = torch.zeros((), dtype=torch.int64, device="cuda")

    def slots_of(self, table: Tensor) -> Tensor:
        """[requests, LENGTH]: the slot of each position."""
        position = torch.arange(LENGTH, device="cuda")
        return table[:, position // BLOCK].long() * BLOCK + position % BLOCK

    def requests_change(self) -> None:
        """Some move to another row, some end; all of them may be given other blocks."""
        order = torch.where(
            chance(0.1), shuffled(REQUESTS),
            torch.arange(REQUESTS, device="cuda"),
        )  # fmt: skip
        self.lengths.copy_(self.lengths[order])
        self.tables.copy_(self.tables[order])
        self.fresh.copy_(self.fresh[order])
        everybody = chance(0.02)
        ended = chance(0.03, REQUESTS) | (self.lengths + DRAFTS + 1 > LENGTH) | everybody
        dealt = shuffled(BLOCKS).view(REQUESTS, COLUMNS)
        self.tables.copy_(torch.where(everybody, dealt, self.tables))
        # A prompt is computed in steps without drafts; only its last token is left to do here.
        prompt = torch.randint(0, LENGTH // 2, (REQUESTS,), device="cuda")
        self.lengths.copy_(torch.where(ended, prompt, self.lengths))
        self.fresh.logical_or_(ended)
        tags = torch.randint(1, 1 << 22, (SLOTS,), device="cuda").float()
        position = torch.arange(LENGTH, device="cuda")
        inside = ended[:, None] & (position < self.lengths[:, None])
        self.write(torch.where(inside, self.slots_of(self.tables), SLOTS).flatten(), tags)

    def write(self, slots: Tensor, tags: Tensor) -> None:
        """Outside windows: `tags` of the slots, to the oracle and the caches. SLOTS: nowhere."""
        chosen = torch.zeros(SLOTS + 1, dtype=torch.bool, device="cuda")
        chosen.index_fill_(0, slots, True)
        self.oracle.copy_(torch.where(chosen[:SLOTS], tags, self.oracle))
        for layer, (key, value) in enumerate(self.caches):
            rows = (self.oracle * 0.5**layer).view(BLOCKS, BLOCK, 1, 1)
            mine = chosen[:SLOTS].view(BLOCKS, BLOCK, 1, 1)
            key[:BLOCKS].copy_(torch.where(mine, rows, key[:BLOCKS]))
            value[:BLOCKS].copy_(torch.where(mine, -rows, value[:BLOCKS]))

    def unlike(self, table: Tensor, wanted: Tensor, inside: Tensor) -> Tensor:
        """Elements of positions `inside` that are not `wanted` when they are read by `table`."""
        slot = self.slots_of(table)
        found = torch.zeros((), dtype=torch.int64, device="cuda")
        for layer, (key, value) in enumerate(self.caches):
            for cache, sign in ((key, 1), (value, -1)):
                rows = cache.view(-1, HEADS, SIZE)[slot]
                other = rows != (wanted * sign * 0.5**layer)[:, :, None, None]
                found += (other & inside[:, :, None, None]).sum()
        return found

    def step(self, number: int) -> None:
        self.requests_change()
        passed, aborted = number % PASSED == PASSED - 1, number % ABORTED == ABORTED - 1
        drafts = torch.randint(0, DRAFTS + 1, (REQUESTS,), device="cuda")
        drafts = torch.where(self.fresh, 0, drafts * (not passed))
        self.fresh.zero_()
        accepted = (torch.rand(REQUESTS, device="cuda") * (drafts + 1)).long() * (not aborted)
        starts = torch.nn.functional.pad((drafts + 1).cumsum(0), (1, 0))
        token = torch.arange(TOKENS, device="cuda")
        owner = (token[:, None] >= starts[1:]).sum(1)
        real = owner < REQUESTS
        owner = owner.clamp(max=REQUESTS - 1)
        nth = token - starts[owner]
        position = (self.lengths[owner] + nth).clamp(max=LENGTH - 1)
        slots = torch.where(real, self.slots_of(self.tables)[owner, position], -1)
        tags = torch.randint(1, 1 << 22, (TOKENS,), device="cuda").float()
        tables = self.tables.int()
        total = self.lengths + drafts + 1

        if passed:
            self.window.pass_through(tables)
        else:
            self.window.begin(drafts, starts, slots, block_table=tables, seq_lens=total)
        read = self.window.block_tables["kv"]
        below = self.oracle[self.slots_of(self.tables)]
        everywhere = torch.arange(LENGTH, device="cuda")
        self.wrong[0] += self.unlike(read, below, everywhere < self.lengths[:, None])
        for layer, caches in enumerate(self.caches):
            rows = (tags * 0.5**layer).view(TOKENS, 1, 1).expand(TOKENS, HEADS, SIZE)
            stage_kv_window(rows, -rows, *caches, slots)
        place = torch.where(real, owner * LENGTH + position, REQUESTS * LENGTH)
        own = torch.zeros(REQUESTS * LENGTH + 1, device="cuda").index_copy_(0, place, tags)
        own = own[:-1].view(REQUESTS, LENGTH)
        inside = (everywhere >= self.lengths[:, None]) & (everywhere < total[:, None])
        self.wrong[1] += self.unlike(read, own, inside)
        if aborted and not passed:
            self.window.abort()
        elif not passed:
            self.commit(drafts, accepted)

        stays = torch.where(real & (nth <= accepted[owner]), slots, SLOTS)
        padded = torch.nn.functional.pad(self.oracle, (0, 1)).index_copy_(0, stays, tags)
        self.oracle.copy_(padded[:SLOTS])
        for layer, (key, value) in enumerate(self.caches):
            rows = (self.oracle * 0.5**layer).view(BLOCKS, BLOCK, 1, 1)
            self.wrong[2] += (key[:BLOCKS] != rows).sum() + (value[:BLOCKS] != -rows).sum()
        self.lengths += accepted + 1
        self.accepted += accepted.sum() * (not passed)

    def commit(self, drafts: Tensor, accepted: Tensor) -> None:
        ids = torch.zeros(REQUESTS * DRAFTS, dtype=torch.int64, device="cuda")
        column = torch.arange(DRAFTS + 1, device="cuda").expand(REQUESTS, -1)
        taken = accepted[:, None]
        sampled = torch.where(column < taken, 0, torch.where(column == taken, 1, -1))
        self.window.commit(sampled, ids)

    def run(self, steps: int) -> None:
        for number in range(steps):
            self.step(number)


def test_attention_would_read_the_right_rows_at_each_of_very_many_windows() -> None:
    torch.manual_seed(int(os.environ.get("NWOR_SEED", time.time_ns() % 2**31)))
    print(f"NWOR_SEED={torch.initial_seed()}")
    stress = TailStress()
    try:
        stress.window.warm_up()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            stress.run(PASSED * 2)
        torch.cuda.current_stream().wait_stream(side)
        assert stress.wrong.tolist() == [0, 0, 0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stress.run(IN_GRAPH)
        replays = -(-WINDOWS // IN_GRAPH)
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
        print(f"{replays * IN_GRAPH} windows")
        metrics = stress.window.metrics()
        assert stress.wrong.tolist() == [0, 0, 0]
        assert metrics.nwor_error_windows == 0
        assert int(stress.accepted) > replays * IN_GRAPH  # it did accept
    finally:
        stress.window.close()


def test_a_tail_that_somebody_wrote_to_is_noticed() -> None:
    stress = TailStress()
    try:
        for _ in range(5):  # in some steps all requests change places, and nothing is kept
            stress.run(PASSED - 1)
            assert stress.wrong.tolist() == [0, 0, 0]
            for key, _ in stress.caches:
                key[BLOCKS:] = float("nan")
            stress.run(1)
            if int(stress.wrong[0]) > 0:
                return
        pytest.fail("five times nobody read a row that a tail block had kept")
    finally:
        stress.window.close()
