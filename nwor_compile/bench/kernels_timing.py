"""Timing of CUDA graphs side by side, and the machine's own floors."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import torch

from nwor_compile.bench.record import Spread

Run = Callable[[], object]
WARM_UP = 3  # replays that are not counted


def capture(run: Run) -> torch.cuda.CUDAGraph:
    """A graph of `run`, which is called twice before: kernels compile outside of the capture."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def compare(
    runs: dict[str, Run], per: dict[str, int], *, seconds: float, replays: int
) -> dict[str, Spread]:
    """Microseconds of one of `per[name]` parts of each run, over replays of its graph.

    Runs take turns, replay by replay, so that clocks and caches treat them alike, and the device
    never waits for the host in between.

    Args:
        seconds: about how long all of it may take; slow runs are replayed less, but 5 times.
        replays: the most of each.
    """
    graphs = {name: capture(run) for name, run in runs.items()}
    once = _time(graphs, WARM_UP)
    slowest = sum(min(values) for values in once.values()) / 1e6
    count = max(5, min(replays, int(seconds / slowest)))
    times = _time(graphs, count)
    for graph in graphs.values():
        graph.reset()
    return {
        name: Spread.of([value / per[name] for value in values]) for name, values in times.items()
    }


def _time(graphs: dict[str, torch.cuda.CUDAGraph], count: int) -> dict[str, list[float]]:
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in graphs}
    for _ in range(count):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: [begin.elapsed_time(end) * 1000 for begin, end in pairs]
        for name, pairs in events.items()
    }


def copy_bandwidth(*, seconds: float = 0.5) -> Spread:
    """Bytes read and written a microsecond by a copying kernel over 2 GiB.

    A kernel, and not `copy_`: in a graph that is a copy node, which is slower.
    """
    source = torch.empty(2**28, dtype=torch.int64, device="cuda").random_()
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: torch.add(source, 0, out=target)}
    copied = compare(runs, {"copy": 1}, seconds=seconds, replays=50)["copy"]
    moved = 2 * source.numel() * source.element_size()
    return Spread(
        median=moved / copied.median,
        p25=moved / copied.p75,
        p75=moved / copied.p25,
        smallest=moved / copied.largest,
        largest=moved / copied.smallest,
        repeats=copied.repeats,
    )


def launch_floor(*, chain: int = 64) -> Spread:
    """Microseconds of an empty kernel in a chain of such kernels in a graph."""
    import triton

    @triton.jit
    def empty() -> None:
        pass

    def run() -> None:
        for _ in range(chain):
            empty[(1,)](num_warps=1)

    return compare({"empty": run}, {"empty": chain}, seconds=0.2, replays=50)["empty"]


def clocks() -> str:
    """What nvidia-smi says now of clocks, power and driver; its error if it cannot be asked."""
    fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,driver_version"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi: {error}"
    return f"{fields}: {done.stdout.strip().splitlines()[0]}"
