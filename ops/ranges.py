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

import torch

_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def span(name: str) -> AbstractContextManager[None]:
    """A range called `name` around a `with` block; nothing unless somebody could see it."""
    if torch.compiler.is_compiling():
        return _NOTHING
    nvtx = torch.cuda.is_initialized()
    profiled = torch.autograd._profiler_enabled()
    return _seen(name, nvtx=nvtx, profiled=profiled) if nvtx or profiled else _NOTHING


@contextlib.contextmanager
def _seen(name: str, *, nvtx: bool, profiled: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if nvtx:
            torch.cuda.nvtx.range_push(name)
            stack.callback(torch.cuda.nvtx.range_pop)
        if profiled:
            stack.enter_context(torch.profiler.record_function(name))
        yield
