"""Named ranges for profilers: `nwor.begin`, `nwor.stage`, `nwor.accept`, `nwor.commit`.

NVTX ranges in a process that Nsight started, and `torch.profiler` ranges while that profiler
records. With neither, a range is one shared object that does nothing. They are host-side calls: a
captured CUDA graph holds none, and a compiled graph neither, because the ops that use them are
opaque to the compiler and what it does trace gets the empty range.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Literal

import torch

# Set in what a tool starts: the library that NVTX is to load, Nsight Systems' session, and Nsight
# Compute's connection. Without a tool NVTX does nothing, but a push and a pop take a microsecond,
# and a step of a small model waits for its host.
_TOOLS = (
    "NVTX_INJECTION64_PATH", "NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_TRANSPORT_TYPE",
)  # fmt: skip


def tool_listens(variables: Mapping[str, str]) -> bool:
    """Whether a process with these environment variables has a tool that sees NVTX ranges."""
    return any(name in variables for name in _TOOLS)


_NVTX_LISTENS = tool_listens(os.environ)
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """A range called `name` around a `with` block; nothing unless somebody could see it."""
    if torch.compiler.is_compiling():
        return _NOTHING
    nvtx = _NVTX_LISTENS and torch.cuda.is_initialized()
    if torch.autograd._profiler_enabled():
        return _profiled(name, nvtx=nvtx)
    return _Marked(name) if nvtx else _NOTHING


class _Marked(AbstractContextManager[None]):
    """An NVTX range."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        torch.cuda.nvtx.range_push(self.name)

    def __exit__(self, *error: object) -> Literal[False]:
        torch.cuda.nvtx.range_pop()
        return False


@contextlib.contextmanager
def _profiled(name: str, *, nvtx: bool) -> Iterator[None]:
    with _Marked(name) if nvtx else _NOTHING, torch.profiler.record_function(name):
        yield
