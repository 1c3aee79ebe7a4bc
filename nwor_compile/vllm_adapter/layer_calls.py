"""The writes of the layers, called for `compile_together` before the engine's own calls.

Triton compiles a kernel when it is first called, and how it is called shows late: vLLM's profiling
runs every layer without a cache, and the captures that follow would wait for one kernel after the
other. So the sizes and strides of that first run are noted, and the writes to come are called with
tensors of the same form, as soon as there are caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nwor_compile.ops.staging import LayerStaging
from nwor_compile.vllm_adapter.staged_write import rope_write, stage_write, writable


class _Noted(NamedTuple):
    """A layer's call: shape, stride and dtype of each tensor of its tokens, and the rotation."""

    forms: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    table: Tensor | None
    is_neox: bool


_noted: dict[str, _Noted] = {}


def note(name: str, *tensors: Tensor, table: Tensor | None = None, is_neox: bool = False) -> None:
    """A layer without a cache was called with `tensors`, one line a token: key and value, or with
    a rotation by `table` query, key, value and positions."""
    forms = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors)
    _noted[name] = _Noted(forms, table, is_neox)


def forget() -> None:
    """Drop what was noted: it holds the rotation's table."""
    _noted.clear()


def call_writes(layers: Mapping[str, Any], staging: Mapping[str, LayerStaging]) -> None:
    """Call each kernel that the writes of these layers will need, on a token of no value; then
    forget what was noted.

    layers: vLLM's layers by name, with their caches. staging: of those that stage.
    """
    for name, noted in _noted.items():
        layer, to = layers.get(name), staging.get(name)
        if layer is None or not writable(layer, layer.kv_cache):  # an earlier engine's, or vLLM's
            continue
        cache = layer.kv_cache
        tokens = [
            torch.empty_strided((1, *shape[1:]), stride, dtype=dtype, device=cache.device)
            for shape, stride, dtype in noted.forms
        ]
        slots = torch.full((1,), -1, dtype=torch.int64, device=cache.device)
        writes: list[Callable[..., None]] = []
        if noted.table is not None:
            rotation = noted.table, noted.is_neox
            # In steps without drafts a layer that stages is written as one that does not.
            writes.append(rope_write(name, layer, cache, None, *rotation))
            if to is not None:
                writes.append(rope_write(name, layer, cache, to, *rotation))
        elif to is not None:
            writes.append(stage_write(name, layer, cache, to))
        for write in writes:
            write(*tokens, slots)
    forget()
