"""Capture of the CUDA graphs that a window replays."""

from __future__ import annotations

from collections.abc import Callable

import torch

# torch raises plain RuntimeError for every capture failure.
CAPTURE_ERRORS = (RuntimeError, NotImplementedError)


def capture(
    run: Callable[[], object],
    first: Callable[[], object] | None = None,
    *,
    device: torch.device,
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `run` enqueues on `device`.

    first: is called before, on a side stream; by default `run`. First calls compile kernels, which
        must not become part of a graph.

    Synchronises. Raises one of CAPTURE_ERRORS; the stream can then be used as before.
    """
    # The stream that torch captures on by default belongs to the device of its first capture.
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            (first or run)()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            run()
    return graph
