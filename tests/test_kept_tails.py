"""Tail blocks over many steps: what a window finds there from the step before, and when it may.

NOTE [kept tails] in `nwor_compile/tail_blocks.py` says why. An engine of a few lines allocates
blocks, batches requests in rows that change, and knows what every row of every request holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from window_support import config

from nwor_compile import Window, WindowOrderError
from nwor_compile.ops import reshape_and_cache, stage_kv_window
from nwor_compile.ops.library import implementation
from nwor_compile.tail_blocks import TailBlocks, tail_blocks_needed

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE = 4  # rows of a block
ROWS = 4  # requests of a step
MOST = 6  # drafts of a request: more than a block
BLOCKS = 14  # of the engine's, a group: few, so that freed ones are soon another's
COLUMNS = 10
LONGEST = COLUMNS * SIZE - MOST - 4
# Two batches of layers in one slot group, and another group with blocks of its own.
LAYERS = {"a": ("first", 1), "b": ("first", 2), "c": ("second", 1)}
GROUPS = ("first", "second")


@pytest.fixture(params=["reference", "triton"])
def ops(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on the references and on the kernels, in Triton's interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton")
    with implementation(request.param):
        yield request.param


@dataclass
class Request:
    """blocks: by group. rows: by layer, what its K holds at each computed position; V holds the
    negative."""

    blocks: dict[str, list[int]] = field(default_factory=lambda: {g: [] for g in GROUPS})
    rows: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in LAYERS})

    @property
    def computed(self) -> int:
        return len(self.rows["a"])


class Engine:
    """Requests, allocators and one window. `batch` is the step's: request, certain, drafts."""

    def __init__(self, seed: int = 0, **settings: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        blocks = BLOCKS + tail_blocks_needed(ROWS, MOST, SIZE)
        self.caches = {
            name: (self._noise(blocks, SIZE, heads, 4), self._noise(blocks, SIZE, heads, 4))
            for name, (_, heads) in LAYERS.items()
        }
        self.free = {group: list(range(BLOCKS)) for group in GROUPS}
        self.window = Window(
            self.caches, max_requests=ROWS, max_drafts=MOST, max_tokens=64,
            config=config(**settings), groups={name: group for name, (group, _) in LAYERS.items()},
            tail_blocks=TailBlocks(first=dict.fromkeys(GROUPS, BLOCKS), columns=COLUMNS),
        )  # fmt: skip
        self.live: list[Request] = []
        self.batch: list[tuple[Request, int, int]] = []

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE)

    def leave(self, request: Request) -> None:
        self.live.remove(request)
        for group, blocks in request.blocks.items():
            self.free[group] += reversed(blocks)  # the last in is the next out
            blocks.clear()

    def preempt(self, request: Request) -> None:
        """Its first block may be hit when it comes back, if that was full; rows are recomputed."""
        self.leave(request)
        self.live.append(request)
        for rows in request.rows.values():
            rows.clear()

    def room(self, request: Request, tokens: int) -> bool:
        """Allocate for so many tokens more; False if there are no blocks left."""
        wanted = -(-(request.computed + tokens) // SIZE)
        if any(wanted - len(own) > len(self.free[group]) for group, own in request.blocks.items()):
            return False
        for group, own in request.blocks.items():
            while len(own) < wanted:
                own.append(self.free[group].pop())
        return True

    def prepare(self, batch: list[tuple[Request, int, int]]) -> None:
        """The tensors of a step, and the K and V of its tokens."""
        self.batch = batch
        spans = [certain + drafts for _, certain, drafts in batch]
        self.counts = _ints([drafts for _, _, drafts in batch])
        self.starts = _ints([0, *torch.tensor(spans).cumsum(0).tolist()])
        self.lengths = _ints([r.computed + n for (r, _, _), n in zip(batch, spans, strict=True)])
        self.tables, self.slots = {}, {}
        for group in GROUPS:
            table = torch.zeros(len(batch), COLUMNS, dtype=torch.int32)
            slots: list[int] = []
            for row, ((request, _, _), n) in enumerate(zip(batch, spans, strict=True)):
                own = request.blocks[group]
                table[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
                places = range(request.computed, request.computed + n)
                slots += [own[place // SIZE] * SIZE + place % SIZE for place in places]
            self.tables[group] = table.to(DEVICE)
            self.slots[group] = torch.tensor(slots, device=DEVICE)
        self.keys = {name: self._noise(sum(spans), heads, 4) for name, (_, heads) in LAYERS.items()}

    def begin(self) -> None:
        self.window.begin(
            self.counts, self.starts, self.slots, block_table=self.tables, seq_lens=self.lengths
        )

    def forward(self, direct: str = "") -> None:
        """Every layer's write; the layer `direct` writes as if nothing had been rewritten."""
        for name, (group, _) in LAYERS.items():
            write = reshape_and_cache if name == direct else stage_kv_window
            key = self.keys[name]
            write(key, -key, *self.caches[name], self.slots[group])

    def commit(self, accepted: list[int], *, wrong: bool = False) -> None:
        """Sample so that these drafts pass; `wrong`: with counts that the ids
        contradict."""
        total = int(self.counts.sum())
        ids = torch.arange(1, total + 1, device=DEVICE)
        sampled = torch.zeros(len(accepted), MOST + 1, dtype=torch.int64)
        start = 0
        for row, (taken, (_, _, drafts)) in enumerate(zip(accepted, self.batch, strict=True)):
            sampled[row, :taken] = torch.arange(start + 1, start + taken + 1)
            start += drafts
        taken_counts = [taken + 1 + wrong * (MOST - taken) for taken in accepted]
        done = self.window.commit(sampled.to(DEVICE), ids, _ints(taken_counts))
        assert (done.error.item() != 0) == wrong
        self.note(done.accepted.tolist())

    def note(self, accepted: list[int]) -> None:
        """The step's certain rows and so many drafts are computed."""
        start = 0
        for (request, certain, drafts), taken in zip(self.batch, accepted, strict=True):
            for name in LAYERS:
                request.rows[name] += list(self.keys[name][start : start + certain + taken])
            start += certain + drafts
        self.batch = []

    def check_tails(self, *, staged: bool) -> None:
        """Rows as attention reads them by the window's tables: those before each span, and the
        step's own once they are staged."""
        start = 0
        for row, (request, certain, drafts) in enumerate(self.batch):
            for name, (group, _) in LAYERS.items():
                wanted = request.rows[name]
                if staged:
                    wanted = [*wanted, *self.keys[name][start : start + certain + drafts]]
                table = self.window.block_tables[group][row].tolist()
                self._check(name, table, wanted)
            start += certain + drafts

    def check_caches(self) -> None:
        """The engine's own blocks hold every computed row."""
        for request in self.live:
            for name, (group, _) in LAYERS.items():
                self._check(name, request.blocks[group], request.rows[name])

    def _check(self, name: str, table: list[int], wanted: list[Tensor]) -> None:
        key, value = self.caches[name]
        for position, row in enumerate(wanted):
            block, place = table[position // SIZE], position % SIZE
            assert torch.equal(key[block, place], row), (name, position)
            assert torch.equal(value[block, place], -row), (name, position)

    def overwrite(self) -> None:
        """The engine's blocks get other rows from elsewhere."""
        for request in self.live:
            for name, (group, _) in LAYERS.items():
                for position, row in enumerate(request.rows[name]):
                    block, place = request.blocks[group][position // SIZE], position % SIZE
                    request.rows[name][position] = row + 1
                    self.caches[name][0][block, place] = row + 1
                    self.caches[name][1][block, place] = -row - 1

    def window_step(self, accepted: list[int] | None = None) -> None:
        """A whole window over the present batch, checked on the way."""
        self.begin()
        self.check_tails(staged=False)
        self.forward()
        self.check_tails(staged=True)
        if accepted is None:
            accepted = [self.random.randint(0, drafts) for _, _, drafts in self.batch]
        self.commit(accepted)
        self.check_caches()


def _ints(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


class RandomEngine(Engine):
    """Steps of every kind, in any order."""

    def draw(self) -> list[tuple[Request, int, int]]:
        """A batch: mostly the requests of the step before, in their rows."""
        if self.live and self.random.random() < 0.15:
            self.leave(self.random.choice(self.live))
        if self.live and self.random.random() < 0.1:
            self.preempt(self.random.choice(self.live))
        for request in list(self.live):
            if request.computed > LONGEST:
                self.leave(request)
        # A request that comes takes the row, and likely the blocks, of one that left.
        while len(self.live) < ROWS and self.random.random() < 0.7:
            self.live.insert(self.random.randint(0, len(self.live)), Request())
        if self.random.random() < 0.1:
            self.random.shuffle(self.live)
        batch = []
        for request in list(self.live):
            if self.random.random() < 0.1:
                continue
            certain = self.random.choice((1, 1, 1, 1, 2, 3))
            drafts = self.random.randint(0, MOST) if self.random.random() < 0.9 else 0
            # An engine may pad a request's first step with drafts that never pass.
            if self.room(request, certain + drafts):
                batch.append((request, certain, drafts))
        return batch

    def step(self) -> None:
        batch = self.draw()
        if not batch:
            return
        self.prepare(batch)
        kind = self.random.choices(
            ["window", "plain", "abort", "wrong", "direct", "fault", "changed"],
            [20, 2, 1, 1, 1, 1, 1],
        )[0]
        if kind == "plain":
            self.window.pass_through(self.tables)
            self.check_tails(staged=False)
            self.forward()
            self.check_tails(staged=True)
            self.note([drafts for _, _, drafts in batch])  # all of them were certain
        elif kind == "changed":
            self.overwrite()
            self.window.caches_changed()
            self.window_step()
        elif kind == "fault":
            self.bad_begin()
            self.window_step()
        elif kind == "window":
            self.window_step()
        else:
            self.begin()
            self.check_tails(staged=False)
            self.forward(direct="b" if kind == "direct" else "")
            if kind == "abort":
                self.window.abort()
                self.note([0] * len(batch))
            elif kind == "wrong":
                self.commit([0] * len(batch), wrong=True)
            else:
                self.end_faulty()
        self.check_caches()

    def bad_begin(self) -> None:
        """A begin that fails halfway, over rows in another order."""
        batch = self.batch
        self.prepare(batch[::-1])

        def fail(*args: object) -> None:
            raise RuntimeError("halfway")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.window._log, "begun", fail)
            with pytest.raises(RuntimeError, match="halfway"):
                self.begin()
        self.prepare(batch)

    def end_faulty(self) -> None:
        """Commit a window that one layer took no part in: if it had drafts, the flag goes up."""
        total = int(self.counts.sum())
        sampled = torch.zeros(len(self.batch), MOST + 1, dtype=torch.int64, device=DEVICE)
        ids = torch.arange(1, total + 1, device=DEVICE)
        done = self.window.commit(sampled, ids, torch.ones_like(self.counts))
        assert (done.error.item() != 0) == (total > 0)
        self.note([0] * len(self.batch))


def test_tails_hold_what_the_caches_hold_over_any_sequence_of_steps(ops: str) -> None:
    seeds, steps = (25, 40) if ops == "reference" else (2, 14)
    for seed in range(seeds):
        engine = RandomEngine(seed)
        try:
            for _ in range(steps):
                engine.step()
        finally:
            engine.window.close()


@pytest.mark.parametrize("poison", ["nan", "large"])
def test_poisoned_slots_are_nothing_that_a_tail_keeps(poison: str) -> None:
    for seed in range(4):
        engine = RandomEngine(seed, poison=poison)
        for _ in range(20):
            engine.step()
        engine.window.close()


@pytest.fixture
def engine(ops: str) -> Iterator[Engine]:
    """Two requests of 5 and 10 rows, in blocks of 4, with a window behind them."""
    made = Engine()
    made.live = [Request(), Request()]
    for request, rows in zip(made.live, (4, 8), strict=True):
        assert made.room(request, rows)
    made.prepare([(request, rows, 0) for request, rows in zip(made.live, (4, 8), strict=True)])
    made.window.pass_through(made.tables)
    made.forward()
    made.note([0, 0])
    next_step(made)
    made.window_step([0, 1])
    yield made
    made.window.close()


def next_step(engine: Engine, order: tuple[int, ...] = (0, 1), drafts: int = 1) -> None:
    for index in order:
        assert engine.room(engine.live[index], 1 + drafts)
    engine.prepare([(engine.live[index], 1, drafts) for index in order])


def spoil(engine: Engine) -> None:
    """Make every row of the engine's blocks NaN, unsaid: whoever copies one shows it."""
    for key, value in engine.caches.values():
        key[:BLOCKS] = float("nan")
        value[:BLOCKS] = float("nan")


def copied(engine: Engine) -> list[bool]:
    """By row: whether the tail block got its rows from the spoiled cache, in all layers."""
    answers = []
    for row, (request, certain, _) in enumerate(engine.batch):
        own = BLOCKS + row * tail_blocks_needed(1, MOST, SIZE)
        kept = request.computed - (request.computed + certain) // SIZE * SIZE
        assert kept > 0, "no rows to copy"
        caches = [cache for pair in engine.caches.values() for cache in pair]
        gone = {bool(cache[own, :kept].isnan().all()) for cache in caches}
        there = {bool(cache[own, :kept].isnan().any()) for cache in caches}
        assert len(gone) == 1
        assert gone == there
        answers.append(gone.pop())
    return answers


def test_a_window_after_a_window_copies_nothing(engine: Engine) -> None:
    spoil(engine)
    next_step(engine)
    engine.begin()
    assert copied(engine) == [False, False]
    engine.forward()
    engine.commit([0, 0])
    spoil(engine)
    next_step(engine, order=(0,))
    engine.begin()
    assert copied(engine) == [False]
    engine.window.abort()


def test_rows_that_spilled_into_the_next_block_are_copied(engine: Engine) -> None:
    next_step(engine, drafts=4)
    engine.window_step([3, 0])  # request 0: 9 rows, one of them in a new block
    spoil(engine)
    next_step(engine, order=(0,))
    engine.begin()
    assert copied(engine) == [True]
    engine.window.abort()


def _plain(engine: Engine) -> None:
    engine.prepare([(request, 0, 0) for request in engine.live])
    engine.window.pass_through(engine.tables)


def _abort(engine: Engine) -> None:
    next_step(engine)
    engine.begin()
    engine.window.abort()


def _flag(engine: Engine) -> None:
    next_step(engine)
    engine.begin()
    engine.forward()
    engine.commit([0, 0], wrong=True)
    for request in engine.live:  # the test goes on at the lengths that it knows
        for rows in request.rows.values():
            rows.pop()


def _impossible_counts(engine: Engine) -> None:
    next_step(engine)
    engine.counts.fill_(2)
    engine.begin()
    engine.window.commit(
        torch.zeros(2, MOST + 1, dtype=torch.int64, device=DEVICE),
        torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.ones_like(engine.counts),
    )  # fmt: skip


def _changed(engine: Engine) -> None:
    engine.window.caches_changed()


def _failed_begin(engine: Engine) -> None:
    next_step(engine)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.window._log, "begun", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            engine.begin()


def _other_blocks(engine: Engine) -> None:
    for request in engine.live:
        for group, own in request.blocks.items():
            own[-1] = engine.free[group].pop()


BETWEEN: dict[str, Callable[[Engine], None]] = {
    "a step without a window": _plain,
    "an abort": _abort,
    "a window with the error flag up": _flag,
    "impossible counts": _impossible_counts,
    "rows from elsewhere": _changed,
    "a begin that failed": _failed_begin,
    "other blocks": _other_blocks,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_whatever_comes_between_two_windows_has_the_rows_copied(name: str, engine: Engine) -> None:
    BETWEEN[name](engine)
    spoil(engine)
    next_step(engine)
    engine.begin()
    assert copied(engine) == [True, True]
    engine.window.abort()


def test_a_row_that_was_absent_or_another_requests_is_copied(engine: Engine) -> None:
    next_step(engine, order=(0,))
    engine.window_step([0])
    spoil(engine)
    next_step(engine)
    engine.begin()
    assert copied(engine) == [False, True]
    engine.window.abort()


def test_requests_that_change_rows_are_copied(engine: Engine) -> None:
    spoil(engine)
    next_step(engine, order=(1, 0))
    engine.begin()
    assert copied(engine) == [True, True]
    engine.window.abort()


def test_rows_written_unsaid_are_found_by_these_tests(engine: Engine) -> None:
    """The checks above can fail."""
    engine.overwrite()
    next_step(engine)
    engine.begin()
    with pytest.raises(AssertionError):
        engine.check_tails(staged=False)
    engine.window.abort()
    next_step(engine)
    engine.begin()
    engine.check_tails(staged=False)
    engine.window.abort()


def test_caches_change_between_windows_only(engine: Engine) -> None:
    next_step(engine)
    engine.begin()
    with pytest.raises(WindowOrderError):
        engine.window.caches_changed()
    engine.window.abort()


def test_windows_without_tail_blocks_keep_nothing() -> None:
    cache = torch.zeros(4, SIZE, 1, 4)
    layers = {"a": (cache, cache.clone())}
    window = Window(layers, max_requests=1, max_drafts=1, max_tokens=4, config=config())
    window.caches_changed()
    window.close()


@pytest.mark.gpu
def test_a_captured_step_keeps_its_tails_from_replay_to_replay() -> None:
    engine = Engine()
    engine.live = [Request(), Request()]
    for request in engine.live:
        assert engine.room(request, 4)
    engine.prepare([(request, 4, 0) for request in engine.live])
    engine.window.pass_through(engine.tables)
    engine.forward()
    engine.note([0, 0])
    next_step(engine)
    inputs = [
        engine.counts, engine.starts, engine.lengths, *engine.tables.values(),
        *engine.slots.values(), *engine.keys.values(),
    ]  # fmt: skip
    sampled = torch.zeros(2, MOST + 1, dtype=torch.int64, device=DEVICE)
    ids, counts = torch.ones(2, dtype=torch.int64, device=DEVICE), torch.ones_like(engine.counts)

    def step() -> None:
        engine.begin()
        engine.forward()
        engine.window.commit(sampled, ids, counts)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.synchronize()
    engine.window.caches_changed()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for replay in range(3):  # first drafts at rows 5, 6 and 7 of the requests: one block
        next_step(engine)
        now = [
            engine.counts, engine.starts, engine.lengths, *engine.tables.values(),
            *engine.slots.values(), *engine.keys.values(),
        ]  # fmt: skip
        for held, new in zip(inputs, now, strict=True):
            held.copy_(new)
        if replay:
            spoil(engine)
        graph.replay()
        for row in range(2):
            own = BLOCKS + row * tail_blocks_needed(1, MOST, SIZE)
            for name, (key, value) in engine.caches.items():
                wanted = engine.batch[row][0].rows[name][4:]
                for place, want in enumerate(wanted):
                    assert torch.equal(key[own, place], want), (replay, name, place)
                    assert torch.equal(value[own, place], -want), (replay, name, place)
        engine.note([0, 0])
    engine.window.close()
