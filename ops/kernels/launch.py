"""What the launchers share: views of raw bits, strides, scales, the device to launch on, and
launches that keep their compiled kernel.

NOTE [kept kernels]: at every launch Triton works out which compiled kernel the arguments call for:
by their types, by addresses that are multiples of 16, by integers that are 1 or multiples of 16,
by constants and options. With many arguments that takes 15 to 25 us, several times the launch. A
window launches the same few kernels in every step, and a layer the same write, so `KeptLaunch`
keeps them, each under a key of all that can differ between its launches and would call for another
one:
- dtype and alignment of the tensors that a caller brings, and which of them are missing;
- integers that Triton specialises on, such as strides, by value;
- constants.
A launch whose key is new takes the ordinary way, and keeps the kernel that it was given. Arguments
outside the key cannot call for another kernel: those fixed for the window, and the integers of
`do_not_specialize`, whose type alone counts. It is int32, or what the kernel declares; a number
that does not fit is an OverflowError.

What a kept launch leaves out of the ordinary one: hooks that run before it (`pre_run_hooks`; NWOR's
kernels have none), and the question whether debug settings or globals that the kernel reads have
changed since it was compiled. What it does not: it goes to the current stream, which may be under
capture, of the device that the kernel was loaded on, and a profiler's launch hooks are called.
Addresses go as integers, so nobody asks the driver whether they are on the device; callers have
checked. They hold the tensors until the launch is enqueued, as for any other argument.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from nwor_compile.ops.layout import logical_key, logical_value

INTERPRETED: bool = triton.knobs.runtime.interpret
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
MOST_FORMS = 64  # of a launch, or of a layer's calls, that are kept
# How kernels are told the cache dtype; 0 is `auto`.
FP8_CODE = {"auto": 0, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 2}


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers of its element size: moving them cannot change a NaN."""
    return tensor.view(_BITS[tensor.element_size()])


@functools.cache
def overlaps(index: int | None) -> bool:
    """Whether device `index` can launch a kernel while the one before it runs."""
    return not INTERPRETED and torch.cuda.get_device_capability(index) >= (9, 0)


@functools.cache
def decodes_fp8(index: int | None) -> bool:
    """Whether device `index` has conversions from fp8; see NOTE [integer casts] in `fp8`."""
    return not INTERPRETED and torch.cuda.get_device_capability(index) >= (8, 9)


class RowStrides(NamedTuple):
    """Strides of a cache in elements; element d of a row is at (d // x) * outer + (d % x) * inner.

    For a 4-D cache x is the head size, so the first term is zero.
    """

    block: int
    offset: int
    head: int
    outer: int
    inner: int
    x: int


def cache_strides(key_cache: Tensor, value_cache: Tensor) -> tuple[RowStrides, RowStrides]:
    """Strides of a key and a value cache of any form in `nwor_compile.ops.layout`."""
    value = logical_value(key_cache, value_cache)
    block, offset, head, inner = value.stride()
    value_strides = RowStrides(block, offset, head, 0, inner, value.shape[3])
    key = logical_key(key_cache)
    if key.dim() == 4:
        block, offset, head, inner = key.stride()
        return RowStrides(block, offset, head, 0, inner, key.shape[3]), value_strides
    block, offset, head, outer, inner = key.stride()
    return RowStrides(block, offset, head, outer, inner, key.shape[4]), value_strides


def scale_stride(scale: Tensor | None) -> int:
    """Stride between the scales of two KV heads: 0 for one scale a tensor."""
    return 0 if scale is None or scale.numel() == 1 else scale.stride(0)


def on_device(where: Tensor | torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it this one, or the tensor's."""
    device = where.device if isinstance(where, Tensor) else where
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


# What was compiled so far, or is to be, and for which device; None: kernels are launched.
_compiled: ContextVar[list[tuple[Any, int]] | None] = ContextVar("_compiled", default=None)


def compile_together(calls: Callable[[], None]) -> None:
    """Call `calls`, in which `launch` and every `KeptLaunch` compile their kernels and launch
    nothing; at the end all are compiled and loaded.

    They compile at the same time, each in a thread, and so do their launchers, which Triton
    otherwise makes one by one as kernels are first launched: most of it happens outside of Python.
    A kernel that cannot be compiled, or wants more shared memory than there is, says so when it is
    launched; one that cannot be loaded otherwise, here.
    """
    # A context of its own: Triton's mode is a variable of the context, and stays set if something
    # fails while it waits for its threads.
    copy_context().run(_compile_together, calls)


def _compile_together(calls: Callable[[], None]) -> None:
    compiled: list[tuple[Any, int]] = []
    _compiled.set(compiled)
    with ThreadPoolExecutor() as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            calls()
        found = {}
        for kernel, device in compiled:
            done = kernel.result(True) if hasattr(kernel, "result") else kernel
            if done is not None:
                found[id(done)] = done, device
        list(pool.map(lambda each: _load(*each), found.values()))  # raises what a load raised


def _load(kernel: Any, device: int) -> None:
    """Make the launcher and load the kernel, which Triton does when `run` is asked for."""
    # Each thread has its own current device. OutOfResources: the launch raises it again.
    with torch.cuda.device(torch.device("cuda", device)), contextlib.suppress(OutOfResources):
        _ = kernel.run


def launch(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> Any:
    """Launch `kernel`, the ordinary way, on the current device; gives the compiled kernel, or None
    where it was only compiled."""
    compiled = _compiled.get()
    if compiled is not None:
        found = kernel.warmup(*arguments, grid=grid, **options)
        if found is not None:  # nothing is in Triton's interpreter
            compiled.append((found, torch.cuda.current_device()))
        return None
    return kernel[grid](*arguments, **options)


_Argument = Tensor | int | None


class KeptLaunch:
    """Launches of one kernel for one window; see NOTE [kept kernels].

    The parameters of the kernel come in this order: `fixed`, then `pointers`, `strides`, `numbers`
    and `constants` of each launch.

    Args:
        kernel: a `triton.jit` function.
        device: where it runs. A kernel that was compiled and loaded belongs to one device.
        fixed: arguments that are the same in every launch; tensors are held.
        options: launch options, `num_warps` and such.
    """

    def __init__(
        self, kernel: Any, device: torch.device, fixed: Sequence[_Argument], **options: int
    ) -> None:
        self.kernel, self.device, self.options = kernel, device, options
        self.fixed = tuple(fixed)
        self.addresses = tuple(_address(argument) for argument in self.fixed)
        self.kept: dict[tuple[object, ...], Any] = {}

    def __call__(
        self,
        programs: int | tuple[int, int],
        pointers: Sequence[Tensor | None] = (),
        strides: tuple[int, ...] = (),
        numbers: tuple[int, ...] = (),
        constants: tuple[int, ...] = (),
    ) -> None:
        """Launch `programs` programs, in one dimension or two, on the current stream.

        Args:
            pointers: tensors of the caller's, of any dtype and alignment, or None.
            strides: integers that the kernel is specialised on.
            numbers: integers of the kernel's `do_not_specialize`.
            constants: its constexprs.
        """
        places: list[int | None] = []
        parts: list[object] = [constants, strides]
        for tensor in pointers:
            if tensor is None:
                places.append(None)
                parts.append(None)
                continue
            place = tensor.data_ptr()
            places.append(place)
            parts.append(tensor.dtype)
            if place % 16:  # behind the dtype of the tensor that is not aligned
                parts.append(place % 16)
        key = tuple(parts)
        kernel = self.kept.get(key)
        if kernel is None or _compiled.get() is not None:
            arguments = (*self.fixed, *pointers, *strides, *numbers, *constants)
            self._launch_first(programs, key, arguments)
            return
        arguments = (*self.addresses, *places, *strides, *numbers, *constants)
        if self.device.index == torch.cuda.current_device():
            _launch(kernel, programs, self.device, arguments)
        else:
            with torch.cuda.device(self.device):
                _launch(kernel, programs, self.device, arguments)

    def _launch_first(
        self,
        programs: int | tuple[int, int],
        key: tuple[object, ...],
        arguments: tuple[_Argument, ...],
    ) -> None:
        grid = programs if isinstance(programs, tuple) else (programs,)
        with on_device(self.device):
            kernel = launch(self.kernel, grid, *arguments, **self.options)
        if INTERPRETED or kernel is None:  # a hook of Triton's may refuse to compile, too
            return
        if len(self.kept) >= MOST_FORMS:  # strides that change from step to step
            self.kept.clear()
        self.kept[key] = kernel


def _address(argument: _Argument) -> int | None:
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def _launch(
    kernel: Any,
    programs: int | tuple[int, int],
    device: torch.device,
    arguments: Sequence[object],
) -> None:
    x, y = programs if isinstance(programs, tuple) else (programs, 1)
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # chains, or one alone
        kernel[(x, y, 1)](*arguments)
        return
    stream = driver.active.get_current_stream(device.index)
    kernel.run(
        x, y, 1, stream, kernel.function, kernel.packed_metadata, None, None, None,
        *arguments,
    )  # fmt: skip


@triton.jit
def element_offset(d, s_outer, s_inner, D: tl.constexpr, X: tl.constexpr):
    """Offset of element d of a row; see `RowStrides`. int64: a row may be strided."""
    # Without the branch the compiler does not see that a plain row is contiguous.
    if X == D:
        return d.to(tl.int64) * s_inner
    return (d // X).to(tl.int64) * s_outer + (d % X).to(tl.int64) * s_inner
