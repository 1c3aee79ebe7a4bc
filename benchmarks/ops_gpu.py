"""Times the ops on a CUDA GPU, every competitor in this one process, by replays of CUDA graphs.

Writes: 32 layers' direct writes, their staged twins, and one commit of all layers, at several row
counts and acceptance rates, beside a device copy of the bytes that the commit moves. Attention:
`verify_attention` (tail from staging) and `paged_attention` (everything in the cache) beside
torch's scaled_dot_product_attention over dense K and V, and a copy of as many bytes of traffic.

    python benchmarks/ops_gpu.py --json results.json
"""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nwor_compile import ops

console = Console()

LAYERS, KV_HEADS, HEADS, SIZE, BLOCK_SIZE = 32, 8, 32, 128, 16  # Llama-3-8B
SPAN = 5  # rows of a verify span: one certain, four drafts
ROWS = (5, 20, 80, 320, 1280)
ACCEPTANCE = (0.0, 0.3, 1.0)
SHAPES = ((1, 512), (1, 8192), (4, 2048), (8, 1024), (16, 2048), (64, 4096))
ATTENTION_BYTES = 16e9  # KV caches of all layers together: as many layers as fit
ROW_BYTES = 2 * KV_HEADS * SIZE * 2  # K and V of one token of one layer, bfloat16

Run = Callable[[], Any]


@dataclass(frozen=True)
class Measurement:
    """Microseconds a replay (writes: a step of all layers; attention: one layer)."""

    group: str
    case: str
    name: str
    median: float
    p10: float
    p90: float
    replays: int


def capture(run: Run) -> torch.cuda.CUDAGraph:
    """A graph of `run`, which is called twice before: kernels compile outside of the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def compare(
    group: str, case: str, runs: dict[str, Run], replays: int, per: int
) -> list[Measurement]:
    """Time the runs interleaved, replay by replay, so that clocks and caches treat them alike."""
    graphs = {name: capture(run) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(replays + 3):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if i >= 3:
                times[name].append(begin.elapsed_time(end) * 1000 / per)
    out = []
    for name, values in times.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        median = statistics.median(values)
        out.append(Measurement(group, case, name, median, deciles[0], deciles[-1], replays))
    return out


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, device="cuda", dtype=torch.int32)


def vllm_write() -> Callable[..., None] | None:
    """vLLM's own paged write, if vLLM is installed."""
    try:
        from vllm import _custom_ops
    except ImportError:
        return None
    write: Callable[..., None] = _custom_ops.reshape_and_cache_flash
    return write


# ---- writes ---------------------------------------------------------------------------------


def write_runs(rows: int) -> dict[str, Run]:
    """The write path of one step of `rows` draft tokens, by every way there is."""
    blocks = 4096
    shape = (LAYERS, blocks, BLOCK_SIZE, KV_HEADS, SIZE)
    key_caches, value_caches = list(random(*shape)), list(random(*shape))
    key, value = (list(random(LAYERS, rows, KV_HEADS, SIZE)) for _ in range(2))
    staged = random(LAYERS, rows, KV_HEADS, SIZE), random(LAYERS, rows, KV_HEADS, SIZE)
    slots = torch.randperm(blocks * BLOCK_SIZE, device="cuda")[:rows]
    row_map = torch.arange(rows, device="cuda", dtype=torch.int32)
    state = torch.zeros(LAYERS, 2, device="cuda", dtype=torch.int32)
    table = ops.cache_table(key_caches, value_caches)
    requests = max(1, rows // (SPAN - 1))
    drafts = torch.full((requests,), SPAN - 1, device="cuda", dtype=torch.int32)
    accepted = torch.ones(requests, device="cuda", dtype=torch.int32)
    counters = torch.zeros(ops.counter_size(SPAN - 1), device="cuda", dtype=torch.int64)
    error = ints(0)
    source = torch.empty(LAYERS * rows * ROW_BYTES, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)

    def direct() -> None:
        for i in range(LAYERS):
            ops.reshape_and_cache(key[i], value[i], key_caches[i], value_caches[i], slots)

    def stage() -> None:
        for i in range(LAYERS):
            ops.stage_kv(
                key[i], value[i], key_caches[i], value_caches[i], staged[0][i], staged[1][i],
                state[i], slots, row_map,
            )  # fmt: skip

    def commit(mask: Tensor) -> Run:
        return lambda: ops.commit_kv(
            key_caches, value_caches, *staged, slots, mask, error, drafts, accepted, counters,
            table, LAYERS,
        )  # fmt: skip

    runs: dict[str, Run] = {f"{LAYERS} x reshape_and_cache": direct, f"{LAYERS} x stage_kv": stage}
    for rate in ACCEPTANCE:
        mask = torch.zeros(rows, device="cuda", dtype=torch.bool)
        mask[torch.randperm(rows, device="cuda")[: round(rate * rows)]] = True
        runs[f"1 x commit_kv, {rate:.0%} accepted"] = commit(mask)
    runs["device copy of all rows"] = lambda: target.copy_(source)
    theirs = vllm_write()
    if theirs is not None:
        one = torch.ones(1, device="cuda")

        def vllm() -> None:
            for i in range(LAYERS):
                theirs(key[i], value[i], key_caches[i], value_caches[i], slots, "auto", one, one)

        runs[f"{LAYERS} x vLLM reshape_and_cache_flash"] = vllm
    return runs


# ---- attention ------------------------------------------------------------------------------


def attention_runs(batch: int, context: int) -> tuple[dict[str, Run], int]:
    """Verify spans over `context` rows each; the runs, and how many layers one replay walks."""
    columns = context // BLOCK_SIZE
    blocks = batch * columns
    layers = max(2, min(LAYERS, int(ATTENTION_BYTES // (2 * batch * context * ROW_BYTES))))
    caches = [
        (random(blocks, BLOCK_SIZE, KV_HEADS, SIZE), random(blocks, BLOCK_SIZE, KV_HEADS, SIZE))
        for _ in range(layers)
    ]
    dense = [
        (random(batch, KV_HEADS, context, SIZE), random(batch, KV_HEADS, context, SIZE))
        for _ in range(layers)
    ]
    drafts = SPAN - 1
    staged = random(layers, batch * drafts, KV_HEADS, SIZE)
    query = random(batch * SPAN, HEADS, SIZE)
    spread = query.view(batch, SPAN, HEADS, SIZE).transpose(1, 2).contiguous()
    table = torch.randperm(blocks, device="cuda").view(batch, columns).to(torch.int32)
    lengths = ints(*[context] * batch)
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * SPAN
    tails = torch.arange(batch, device="cuda", dtype=torch.int32) * drafts
    num_drafts = ints(*[drafts] * batch)
    source = torch.empty(batch * context * ROW_BYTES // 2, device="cuda", dtype=torch.uint8)
    copies = [(source.clone(), torch.empty_like(source)) for _ in range(layers)]

    def verify() -> None:
        for i, cache in enumerate(caches):
            ops.verify_attention(
                query, *cache, staged[i], staged[i], table, lengths, starts, num_drafts, tails,
                SIZE**-0.5,
            )  # fmt: skip

    def paged() -> None:
        for cache in caches:
            ops.paged_attention(query, *cache, table, lengths, starts, SIZE**-0.5)

    def sdpa() -> None:
        for key, value in dense:
            torch.nn.functional.scaled_dot_product_attention(spread, key, value, enable_gqa=True)

    def copy() -> None:
        for there, here in copies:
            here.copy_(there)

    return {
        "verify_attention": verify,
        "paged_attention": paged,
        "SDPA (dense, no mask)": sdpa,
        "device copy, same traffic": copy,
    }, layers


# ---- report ---------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": "python benchmarks/" + " ".join(Path(part).name for part in sys.argv),
    }


def report(results: list[Measurement], about: dict[str, str]) -> None:
    table = Table(title=", ".join(f"{k} {v}" for k, v in about.items() if k != "command"))
    for column in ("what", "case", "run"):
        table.add_column(column)
    for column in ("median µs", "p10", "p90"):
        table.add_column(column, justify="right")
    last = None
    for m in results:
        if last not in (None, (m.group, m.case)):
            table.add_section()
        last = m.group, m.case
        numbers = (f"{value:.1f}" for value in (m.median, m.p10, m.p90))
        table.add_row(m.group, m.case, m.name, *numbers)
    console.print(table)


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the results here.")
    ] = None,
    replays: Annotated[int, typer.Option(min=20, help="Timed replays of each run.")] = 50,
    writes: Annotated[bool, typer.Option(help="Time the writes and the commit.")] = True,
    attention: Annotated[bool, typer.Option(help="Time the attention.")] = True,
) -> None:
    """Time the ops on a CUDA GPU; see the module's docstring."""
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/ops_gpu.py needs a CUDA GPU: it times kernels, and this machine has none"
        )
    about = environment()
    results: list[Measurement] = []
    if writes:
        for rows in ROWS:
            results += compare("writes", f"{rows} rows", write_runs(rows), replays, 1)
            torch.cuda.empty_cache()
    if attention:
        for batch, context in SHAPES:
            runs, layers = attention_runs(batch, context)
            case = f"{batch} x {context}, {layers} layers"
            results += compare("attention, a layer", case, runs, replays, layers)
            del runs
            torch.cuda.empty_cache()
    report(results, about)
    if json_file is not None:
        rows = [asdict(m) for m in results]
        json_file.write_text(json.dumps({"about": about, "microseconds": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
