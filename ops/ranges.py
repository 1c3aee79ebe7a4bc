"""Named ranges for profilers: `nwor.begin`, `nwor.stage`, `nwor.accept`, `nwor.commit`.

NVTX ranges where CUDA is in use (Nsight shows them), and `torch.profiler` ranges while that
profiler records. With neither, a range is one shared object that does nothing. They are host-side
calls: a captured CUDA graph holds none, and a compiled graph neither, because the ops that use them
are opaque to the compiler and what it does trace gets the empty range.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """A range called `name` around a `with` block; nothing unless somebody could see it."""
    if torch.compiler.is_compiling():
        return _NOTHING
    nvtx = torch.cuda.is_initialized()
    if torch.autograd._profiler_enabled():
        return _profiled(name, nvtx=nvtx)
    return _Marked(name) if nvtx else _NOTHING


class _Marked(AbstractContextManager[None]):
    """An NVTX range. A class: the context manager of a generator costs 2 us more, and a step has
    these around each of its calls whether or not anybody looks."""

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
