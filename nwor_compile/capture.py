"""Capture of the CUDA graphs that a window replays."""

from __future__ import annotations

from collections.abc import Callable

import torch

# torch raises plain RuntimeError for every capture failure.
CAPTURE_ERRORS = (RuntimeError, NotImplementedError)


def capture(
    run: Callable[[], object], first: Callable[[], object] | None = None
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what `run` enqueues.

    first: is called before, on a side stream; by default `run`. First calls compile kernels, which
        must not become part of a graph.

    Synchronises. Raises one of CAPTURE_ERRORS; the stream can then be used as before.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        (first or run)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
