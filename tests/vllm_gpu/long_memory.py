"""Memory of a process over a long run, and whether it grew."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
# What may come and go without a leak: torch reserves segments of 2 and 20 MiB, and the host's
# allocator keeps pages. A row of the tiny target leaked every step would be tens of MiB.
ALLOWED = {
    "allocated": 1 * MIB, "reserved": 32 * MIB, "rss": 16 * MIB, "process": 40 * MIB,
}  # fmt: skip
DEVICE = 64 * MIB  # the whole device, once the two engines of the soak have it to themselves
WARM = 60.0
LEAST = 8


def sample(seconds: float, step: int) -> dict[str, Any]:
    """Now, in bytes: `allocated` and `reserved` by torch on its device, `rss` on the host,
    `process` (this one on the device; None where the driver does not tell), `device` (all)."""
    import torch

    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found: dict[str, Any] = {
        "seconds": round(seconds, 1), "step": step,
        "rss": pages * os.sysconf("SC_PAGE_SIZE"),
    }  # fmt: skip
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found |= {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "device": total - free,
            "process": _process_bytes(),
        }
    return found


def _process_bytes() -> int | None:
    """This process's memory on its device, as nvidia-smi has it."""
    import torch
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
            if process.pid == os.getpid():
                return process.usedGpuMemory
    except pynvml.NVMLError:
        return None  # a container that sees no driver, or other process ids
    return None


def growth(samples: Sequence[Mapping[str, Any]], name: str, warm: float = WARM) -> int | None:
    """Bytes by which the median of the last quarter of the run is above that of the first quarter
    after `warm` seconds. None: too few samples."""
    values = [s[name] for s in samples if s["seconds"] >= warm and s.get(name) is not None]
    if len(values) < LEAST:
        return None
    quarter = len(values) // 4
    return int(statistics.median(values[-quarter:]) - statistics.median(values[:quarter]))


def judged(
    ours: Sequence[Mapping[str, Any]],
    theirs: Sequence[Mapping[str, Any]],
    warm: float = WARM,
    allowed: Mapping[str, int] = ALLOWED,
) -> tuple[dict[str, Any], list[str]]:
    """Growth of both engines by kind of memory, and what is wrong: more than is allowed on top of
    what the untouched engine grew by, or memory that cannot be judged at all."""
    found: dict[str, Any] = {}
    problems = []
    for name, limit in allowed.items():
        mine, other = growth(ours, name, warm), growth(theirs, name, warm)
        found[name] = {"grew": mine, "stock_grew": other, "allowed": limit}
        if mine is None:
            if any(s.get(name) is not None for s in ours):
                problems.append(f"memory: too few samples of {name} after {warm:.0f} s")
        elif mine > limit + max(0, other or 0):
            problems.append(f"memory: {name} grew by {mine} bytes, stock's by {other}")
    if not any(isinstance(entry["grew"], int) for entry in found.values()):
        problems.append("memory: nothing was sampled for long enough")
    return found, problems


def alone(ours: Sequence[Mapping[str, Any]], since: float) -> tuple[dict[str, Any], list[str]]:
    """The device's memory from `since` on, when no other engine started or ended any more. Not
    judged (`grew` is None) where that was too short, or nothing was sampled."""
    grew = growth(ours, "device", max(since, WARM))
    wrong = grew is not None and grew > DEVICE
    found = {"since": round(since, 1), "grew": grew, "allowed": DEVICE}
    return found, [f"memory: the device's grew by {grew} bytes"] if wrong else []
