"""Bytes that the write path of a step moves on a GPU, counted by Nsight Compute.

    python benchmarks/write_bytes_gpu.py --json FILE

32 layers of Llama-3-8B's K and V (8 heads of 128, bfloat16, blocks of 16), requests of one certain
token and 4 drafts, of which 30 % are accepted. Direct: vLLM's 32 `reshape_and_cache_flash`. Staged
in tail blocks: begin, redirect, 32 `stage_kv`, judge and commit, for a first window (the rows of
partly filled blocks are copied) and for windows behind another one.

`l2` is what the L2 cache served, `read` what it loaded from memory. `written` is what it wrote back
while the kernel ran: most of what a step writes stays in L2 until long after, so it is near zero
for either path and says nothing. `ncu` empties the caches before each kernel, so `read` has no
reuse between kernels. Needs `ncu`, with access to the performance counters.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel

from nwor_compile.bench.record import Machine, this_machine

METRICS = {
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "lts__t_bytes.sum": "l2",
}
REQUESTS = (1, 4, 16, 64)
DRAFTS, LAYERS, HEADS, SIZE, BLOCK, COLUMNS = 4, 32, 8, 128, 16, 40
# Of ten requests: 30 % of the drafts.
ACCEPTED = (1, 1, 2, 1, 1, 1, 2, 1, 1, 1)
# Triton's, all of whose names begin so here, and vLLM's write; not torch's fills and conversions.
KERNELS = "regex:^_|reshape_and_cache"
PHASES = ("direct", "first window", "window", "window")


class Moved(BaseModel):
    """Bytes by kernel of one phase. read, written, l2: sums over `kernels`."""

    requests: int
    phase: str
    kernels: dict[str, dict[str, float]]
    read: float
    written: float
    l2: float


class Record(BaseModel):
    """What the command writes. ratios: l2 of a window over l2 of the direct writes, by requests."""

    command: str
    machine: Machine
    device: str
    vllm: str
    moved: list[Moved]
    ratios: dict[int, float]


def steps(requests: int) -> None:
    """Under `ncu`: the phases, a profiled range each."""
    import torch

    from nwor_compile import NworConfig, Window
    from nwor_compile.bench import kernels_vllm as vllm
    from nwor_compile.ops import stage_kv_window
    from nwor_compile.tail_blocks import TailBlocks, tail_blocks_needed

    # Loads vLLM's library too, whose write is the baseline.
    if problem := vllm.missing():
        raise SystemExit(f"write_bytes_gpu.py: {problem}")
    blocks = requests * COLUMNS
    spare = tail_blocks_needed(requests, DRAFTS, BLOCK)
    caches = []
    for _ in range(LAYERS):
        packed = torch.zeros(
            blocks + spare, BLOCK, HEADS, 2 * SIZE, dtype=torch.bfloat16, device="cuda"
        )
        caches.append((packed[..., :SIZE], packed[..., SIZE:]))
    window = Window(
        {f"layers.{i}": pair for i, pair in enumerate(caches)},
        max_requests=requests, max_drafts=DRAFTS, max_tokens=requests * (DRAFTS + 1),
        config=NworConfig(), tail_blocks=TailBlocks(first={"kv": blocks}, columns=COLUMNS),
    )  # fmt: skip
    window.warm_up()
    table = torch.randperm(blocks, device="cuda").view(requests, COLUMNS).int()
    counts = torch.full((requests,), DRAFTS, dtype=torch.int32, device="cuda")
    starts = torch.arange(0, requests * (DRAFTS + 1) + 1, DRAFTS + 1, device="cuda").int()
    shape = (requests * (DRAFTS + 1), HEADS, SIZE)
    key, value = torch.randn(2, *shape, dtype=torch.bfloat16, device="cuda").unbind(0)
    ids = torch.zeros(requests * DRAFTS, dtype=torch.int64, device="cuda")
    accepted = torch.tensor(ACCEPTED, device="cuda").repeat(requests)[:requests, None]
    column = torch.arange(DRAFTS + 1, device="cuda").expand(requests, -1)
    sampled = torch.where(column < accepted, 0, torch.where(column == accepted, 1, -1))
    # In the middle of a block, as far as the steps go.
    lengths = BLOCK * torch.randint(16, 32, (requests,), device="cuda") + 3
    one = torch.ones(1, device="cuda")

    for phase in PHASES:
        total = (lengths + DRAFTS + 1).int()
        position = lengths[:, None] + torch.arange(DRAFTS + 1, device="cuda")
        block = table.gather(1, position // BLOCK).long()
        slots = (block * BLOCK + position % BLOCK).flatten()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        if phase == "direct":
            for pair in caches:
                vllm.write(key, value, pair, slots, one)
        else:
            window.begin(counts, starts, slots, block_table=table, seq_lens=total)
            for pair in caches:
                stage_kv_window(key, value, *pair, slots)
            window.commit(sampled, ids)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        if phase != "direct":
            lengths = lengths + accepted[:, 0] + 1


def profiled(requests: int) -> str:
    """The CSV of `ncu` over `steps`. Raises SystemExit where it cannot count."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise SystemExit("write_bytes_gpu.py: ncu is not on the path; install Nsight Compute")
    found = subprocess.run(
        [
            ncu, "--csv", "--profile-from-start", "off", "--metrics", ",".join(METRICS),
            "--kernel-name", KERNELS, sys.executable, __file__, "--under-ncu", str(requests),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if found.returncode:
        raise SystemExit(f"write_bytes_gpu.py: ncu failed\n{found.stdout}\n{found.stderr}")
    return found.stdout


def parse(text: str) -> list[dict[str, dict[str, float]]]:
    """Phases of `profiled`'s output: by kernel, launches and bytes. A begin kernel opens one."""
    lines = text.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith('"ID"'))
    launches: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for row in csv.DictReader(lines[header:]):
        if (row["ID"] or "").isdigit():
            names[row["ID"]] = row["Kernel Name"]
            value = float(row["Metric Value"].replace(",", ""))
            launches.setdefault(row["ID"], {})[METRICS[row["Metric Name"]]] = value
    phases: list[dict[str, dict[str, float]]] = [{}]
    for launch, counted in launches.items():
        name = names[launch]
        if name == "_begin_kernel":
            phases.append({})
        short = name.removeprefix("void ").split("<")[0].split("(")[0]
        sums = phases[-1].setdefault(short, {"launches": 0, **dict.fromkeys(METRICS.values(), 0)})
        sums["launches"] += 1
        for metric, value in counted.items():
            sums[metric] += value
    return phases


def moved(requests: int, text: str) -> Iterable[Moved]:
    """The phases that were counted. Raises SystemExit if one is missing."""
    phases = parse(text)
    if len(phases) != len(PHASES) or not all(phases):
        raise SystemExit(f"write_bytes_gpu.py: expected the phases {PHASES}, got {phases}")
    for phase, kernels in zip(PHASES, phases, strict=True):
        sums = {m: sum(k[m] for k in kernels.values()) for m in METRICS.values()}
        yield Moved(requests=requests, phase=phase, kernels=kernels, **sums)


def main(
    json: Annotated[Path | None, typer.Option(help="write the record here")] = None,
    under_ncu: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Count, print, record."""
    if under_ncu is not None:
        steps(under_ncu)
        return
    import torch

    from nwor_compile.bench import kernels_vllm as vllm

    if problem := vllm.missing():
        raise SystemExit(f"write_bytes_gpu.py: no direct writes to compare with: {problem}")
    found = [each for requests in REQUESTS for each in moved(requests, profiled(requests))]
    by = {(each.requests, each.phase): each for each in found}
    record = Record(
        command="python benchmarks/write_bytes_gpu.py --json FILE",
        machine=this_machine(),
        device=torch.cuda.get_device_name(),
        vllm=str(vllm.version()),
        moved=found,
        ratios={r: by[r, "window"].l2 / by[r, "direct"].l2 for r in REQUESTS},
    )
    print("| requests | phase | through L2, MB | read from memory, MB | l2 / direct |")
    print("|---|---|---|---|---|")
    for each in found:
        share = each.l2 / by[each.requests, "direct"].l2
        print(
            f"| {each.requests} | {each.phase} | {each.l2 / 1e6:.1f} | {each.read / 1e6:.1f} | "
            f"{share:.2f} |"
        )
    if json is not None:
        json.write_text(record.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
