"""`nwor bench core`: ratios of the CPU path, each with its baseline in the same run.

(a) The pass's share of `torch.compile`'s time on a model of many layers.
(b) A window (begin, staged writes, commit) against the same rows written directly.

On the CPU the ops run as references in plain torch, where a window costs more than the direct
writes it replaces. These figures say what the machinery costs; what a GPU saves is measured there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._inductor.utils import fresh_cache
from torch.fx import Graph

from nwor_compile.bench.record import Machine, Spread, this_machine
from nwor_compile.config import NworConfig
from nwor_compile.demo.model import Llama, LlamaConfig
from nwor_compile.ops import stage_kv_window
from nwor_compile.passes import NworPass
from nwor_compile.window import Window

BLOCK_SIZE = 16
# (requests, drafts a request): one user, a small batch, a large one.
SIZES = ((1, 4), (8, 4), (32, 4))
SHARE_TARGET = 0.02


class CompileCost(BaseModel):
    """Seconds of one model's compilations, caches empty, and of the pass inside them."""

    layers: int
    staged: int
    total_seconds: Spread
    pass_seconds: Spread
    share: Spread
    target: float = SHARE_TARGET


class WindowCost(BaseModel):
    """One size: microseconds for all layers, and the ratio of the two in each repeat."""

    requests: int
    drafts: int
    layers: int
    kv_heads: int
    head_size: int
    acceptance: float
    direct_us: Spread
    window_us: Spread
    begin_us: Spread
    stage_us: Spread
    commit_us: Spread
    ratio: Spread


class CoreRecord(BaseModel):
    """Everything that one run measured."""

    benchmark: str = "core-cpu"
    command: str
    machine: Machine
    compile: CompileCost
    windows: list[WindowCost]


def run(*, layers: int = 32, compiles: int = 3, repeats: int = 30) -> CoreRecord:
    """Both benchmarks."""
    machine = this_machine()
    return CoreRecord(
        command=f"nwor bench core --layers {layers} --compiles {compiles} --repeats {repeats}",
        machine=machine,
        compile=compile_cost(layers, compiles),
        windows=[window_cost(r, d, layers, repeats) for r, d in SIZES],
    )


class _TimedPass(NworPass):
    """The pass with a clock around all that Inductor calls of it."""

    seconds = 0.0

    def __call__(self, graph: Graph) -> None:
        start = time.perf_counter()
        super().__call__(graph)
        self.seconds += time.perf_counter() - start

    def uuid(self) -> str:
        """The pass's own, timed as well."""
        start = time.perf_counter()
        text = super().uuid()
        self.seconds += time.perf_counter() - start
        return text


def compile_cost(layers: int, compiles: int) -> CompileCost:
    """Compile a small Llama of `layers` layers with the pass, several times over.

    Each time into an empty cache, as on a fresh machine: g++ is part of the time.
    """
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    model, inputs = Llama(config).eval(), _inputs(config)
    totals, passes, staged = [], [], 0
    for _ in range(compiles):
        torch.compiler.reset()
        timed = _TimedPass(strict=True)
        with fresh_cache():
            start = time.perf_counter()
            torch.compile(model, fullgraph=True, options={"post_grad_custom_pre_pass": timed})(
                *inputs
            )
            totals.append(time.perf_counter() - start)
        passes.append(timed.seconds)
        staged = sum(len(report.rewritten) for report in timed.reports)
    torch.compiler.reset()
    if staged != layers:
        raise RuntimeError(f"expected the pass to stage {layers} writes, it staged {staged}")
    return CompileCost(
        layers=layers,
        staged=staged,
        total_seconds=Spread.of(totals),
        pass_seconds=Spread.of(passes),
        share=Spread.of([p / t for p, t in zip(passes, totals, strict=True)]),
    )


def _inputs(config: LlamaConfig, tokens: int = 5) -> tuple[Any, ...]:
    """One request of `tokens` tokens, for `Llama.forward`."""
    shape = (4, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
    caches = [[torch.zeros(shape) for _ in range(config.num_hidden_layers)] for _ in "kv"]
    token = torch.arange(tokens)
    table = torch.zeros(1, 4, dtype=torch.int32)
    lengths = torch.tensor([tokens], dtype=torch.int32)
    starts = torch.tensor([0, tokens], dtype=torch.int32)
    return token, token, *caches, token, table, lengths, starts


class _Step:
    """Rows and ids of one verification step over `layers` caches; half the drafts are accepted."""

    def __init__(
        self, requests: int, drafts: int, layers: int, kv_heads: int = 8, head_size: int = 128
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        span = drafts + 1
        tokens = requests * span
        blocks = -(-tokens * 4 // BLOCK_SIZE)
        shape = (blocks, BLOCK_SIZE, kv_heads, head_size)
        self.caches = [
            (torch.zeros(shape, dtype=torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16))
            for _ in range(layers)
        ]
        rows = torch.randn(2, tokens, kv_heads, head_size, generator=generator)
        self.key, self.value = rows.bfloat16().unbind(0)
        self.slots = torch.randperm(blocks * BLOCK_SIZE, generator=generator)[:tokens]
        self.num_drafts = torch.full((requests,), drafts, dtype=torch.int32)
        self.starts = torch.arange(requests + 1, dtype=torch.int32) * span
        ids = torch.randint(1000, (requests, drafts), generator=generator)
        self.draft_ids = ids.flatten()
        taken = drafts // 2
        # The accepted drafts, a correction that is no draft's id, then placeholders.
        self.sampled = torch.full((requests, span), -1, dtype=torch.int64)
        self.sampled[:, :taken] = ids[:, :taken]
        self.sampled[:, taken] = 1000
        self.acceptance = taken / drafts
        self.window = Window(
            {f"layer {i}": pair for i, pair in enumerate(self.caches)},
            max_requests=requests,
            max_drafts=drafts,
            max_tokens=tokens,
            config=NworConfig(mode="stage", scv="graph"),
        )

    def direct(self) -> None:
        """Every row of every layer straight to the cache."""
        for key_cache, value_cache in self.caches:
            torch.ops.nwor.reshape_and_cache(
                self.key, self.value, key_cache, value_cache, self.slots
            )

    def begin(self) -> None:
        """Open the window."""
        self.window.begin(self.num_drafts, self.starts, self.slots)

    def stage(self) -> None:
        """What a rewritten graph calls: certain rows to the cache, drafts to staging."""
        for key_cache, value_cache in self.caches:
            stage_kv_window(self.key, self.value, key_cache, value_cache, self.slots)

    def commit(self) -> Tensor:
        """Accept and commit."""
        return self.window.commit(self.sampled, self.draft_ids).accepted


def window_cost(requests: int, drafts: int, layers: int, repeats: int) -> WindowCost:
    """Direct writes and a window over the same rows, in turns, on one thread.

    These tensors are small: a second thread costs more than it brings, and makes times jump.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    step = _Step(requests, drafts, layers)
    parts: dict[str, list[float]] = {n: [] for n in ("direct", "begin", "stage", "commit")}
    try:
        for index in range(repeats + 3):
            times = {name: _microseconds(getattr(step, name)) for name in parts}
            if index >= 3:  # the first ones warm up
                for name, value in times.items():
                    parts[name].append(value)
        metrics = step.window.metrics()
    finally:
        step.window.close()
        torch.set_num_threads(threads)
    expected = (repeats + 3) * requests * int(drafts * step.acceptance)
    if metrics.nwor_total_committed != expected or metrics.nwor_error_windows:
        raise RuntimeError(
            f"expected {expected} committed rows and no error window, got "
            f"{metrics.nwor_total_committed} and {metrics.nwor_error_windows}"
        )
    windows = [sum(p) for p in zip(parts["begin"], parts["stage"], parts["commit"], strict=True)]
    return WindowCost(
        requests=requests,
        drafts=drafts,
        layers=layers,
        kv_heads=step.key.shape[1],
        head_size=step.key.shape[2],
        acceptance=step.acceptance,
        direct_us=Spread.of(parts["direct"]),
        window_us=Spread.of(windows),
        begin_us=Spread.of(parts["begin"]),
        stage_us=Spread.of(parts["stage"]),
        commit_us=Spread.of(parts["commit"]),
        ratio=Spread.of([w / d for w, d in zip(windows, parts["direct"], strict=True)]),
    )


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def show(record: CoreRecord, console: Console) -> None:
    """Print a record; numbers are median [quartiles]."""
    machine, cost = record.machine, record.compile
    console.print(
        f"{machine.cpu}, {machine.torch_threads} threads, torch {machine.torch}, {machine.date}"
    )
    table = Table("layers", "torch.compile, s", "pass, s", "share", "target")
    table.title = "Compile time, caches empty"
    table.add_row(
        str(cost.layers), f"{cost.total_seconds:.1f}", f"{cost.pass_seconds:.3f}",
        f"{cost.share:.2%}", f"< {cost.target:.0%}",
    )  # fmt: skip
    console.print(table)
    table = Table("requests x drafts", "direct, us", "window, us", "begin", "stage", "commit")
    table.add_column("window / direct")
    table.title = f"KV writes of {cost.layers} layers, reference ops on one CPU thread"
    for row in record.windows:
        parts = (row.direct_us, row.window_us, row.begin_us, row.stage_us, row.commit_us)
        cells = [f"{part:.0f}" for part in parts]
        table.add_row(f"{row.requests} x {row.drafts}", *cells, f"{row.ratio:.2f}")
    console.print(table)
