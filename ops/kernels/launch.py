"""What the launchers share: views of raw bits, strides, scales and the device to launch on."""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nwor_compile.ops.layout import logical_key, logical_value

INTERPRETED: bool = triton.knobs.runtime.interpret
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
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


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


@triton.jit
def element_offset(d, s_outer, s_inner, D: tl.constexpr, X: tl.constexpr):
    """Offset of element d of a row; see `RowStrides`. int64: a row may be strided."""
    # Without the branch the compiler does not see that a plain row is contiguous.
    if X == D:
        return d.to(tl.int64) * s_inner
    return (d // X).to(tl.int64) * s_outer + (d % X).to(tl.int64) * s_inner
