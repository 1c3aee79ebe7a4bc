"""Layers under NWOR, and the ops that a rewritten graph calls: the `window` overloads.

A compiler pass that runs after AOTAutograd cannot add inputs to a graph, and a compiled piece may
serve several layers. So the rewritten ops take what the ops they replace took, and find the
staging rows of their layer when they run, by the address of the key cache. CUDA graphs record the
result: the buffers are persistent and never move while a layer is registered.

NOTE [hidden state]: the staging buffers are written by `stage_kv.window` and read by
`verify_attention.window` without being arguments. The compiler cannot reorder the two, because
the first declares a mutation of the caches that the second takes; nothing else in a graph can
reach the buffers.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nwor_compile.ops.attention import (
    PAGED_SCHEMA,
    check_paged,
    paged_attention,
    verify_attention,
)
from nwor_compile.ops.cache_write import WRITE_SCHEMA, check_write, reshape_and_cache, stage_kv
from nwor_compile.ops.library import define_composite
from nwor_compile.ops.ranges import span


class UnregisteredCacheError(RuntimeError):
    """A rewritten op met a cache that no window knows, while a window was open."""


@dataclass(frozen=True)
class Routing:
    """Where the tokens of the present step go; persistent device tensors, shared by all layers.

    row_map: int32 `[max_tokens]`, the codes of `stage_kv`: -1 for certain rows. num_drafts,
    tail_start: int32 `[max_requests]`.
    """

    row_map: Tensor
    num_drafts: Tensor
    tail_start: Tensor


@dataclass(frozen=True)
class LayerStaging:
    """One layer's staging: rows `[S, kv_heads, head_size]`, state int32 `[2]`.

    block_table: int32 `[max_requests, columns]`, where the rows lie in tail blocks of the cache: by
        this table a stock attention kernel reads prefix and tail. Else None.
    """

    name: str
    key: Tensor
    value: Tensor
    state: Tensor
    routing: Routing
    block_table: Tensor | None = None


@dataclass
class _Registry:
    layers: dict[tuple[torch.device, int], LayerStaging] = field(default_factory=dict)
    value_address: dict[tuple[torch.device, int], int] = field(default_factory=dict)
    direct: Counter[tuple[torch.device, int]] = field(default_factory=Counter)  # how many said so
    open_windows: int = 0
    executions: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_registry = _Registry()


def _address(cache: Tensor) -> tuple[torch.device, int]:
    return cache.device, cache.data_ptr()


def register_layer(key_cache: Tensor, value_cache: Tensor, staging: LayerStaging) -> None:
    """Put a layer under NWOR. Raises ValueError if its key cache is registered already."""
    address = _address(key_cache)
    with _registry.lock:
        taken = _registry.layers.get(address)
        if taken is not None:
            raise ValueError(
                f"layer {staging.name!r}: its key cache is registered as {taken.name!r}; layers "
                "that share a cache are one layer, and a window must be closed before its caches "
                "are registered again"
            )
        _registry.layers[address] = staging
        _registry.value_address[address] = value_cache.data_ptr()


def unregister_layer(key_cache: Tensor) -> None:
    """Take a layer out of the registry; unknown caches are ignored."""
    with _registry.lock:
        address = _address(key_cache)
        _registry.layers.pop(address, None)
        _registry.value_address.pop(address, None)


def register_direct(key_cache: Tensor) -> None:
    """Say that a cache stays direct (a drafter's): rewritten ops may meet it inside a window.

    Counted: it stays so until every caller has taken it back by `unregister_direct`. A cache that
    is registered as a layer too is staged, and stays registered as a layer.
    """
    with _registry.lock:
        _registry.direct[_address(key_cache)] += 1


def unregister_direct(key_cache: Tensor) -> None:
    """Take one `register_direct` back; unknown caches are ignored."""
    with _registry.lock:
        address = _address(key_cache)
        _registry.direct[address] -= 1
        if _registry.direct[address] <= 0:
            del _registry.direct[address]


def window_opened() -> None:
    """A window began: from now on an unregistered cache is an error."""
    with _registry.lock:
        _registry.open_windows += 1


def window_closed() -> None:
    """A window was committed or aborted."""
    with _registry.lock:
        _registry.open_windows -= 1


def executions() -> int:
    """How many staged writes, RoPE's included, found their layer in this process (and captures).

    Zero after a warm-up means that nothing was rewritten: the pass did not run or did not match.
    """
    return _registry.executions


def executed() -> None:
    """Count one staged write of a layer that `lookup` found."""
    _registry.executions += 1


def lookup(key_cache: Tensor, value_cache: Tensor) -> LayerStaging | None:
    """The staging of the layer that owns these caches; None if the layer stays direct.

    Raises UnregisteredCacheError if a window is open and nobody named the cache.
    """
    address = _address(key_cache)
    staging = _registry.layers.get(address)
    if staging is None:
        if _registry.open_windows and address not in _registry.direct:
            raise UnregisteredCacheError(
                f"a rewritten op met a key cache {list(key_cache.shape)} on {key_cache.device} "
                "that is not registered while a window is open, and its draft rows would be "
                "written unverified: give the layer to the Window, or name it in "
                "`direct_caches` if it belongs to the drafter"
            )
        return None
    if _registry.value_address[address] != value_cache.data_ptr():
        raise UnregisteredCacheError(
            f"layer {staging.name!r}: key cache is registered with another value cache than the "
            "one in this call"
        )
    return staging


def _stage_window(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    options = (kv_cache_dtype, k_scale, v_scale)
    staging = lookup(key_cache, value_cache)
    if staging is None:
        reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, *options)
        return
    executed()
    with span("nwor.stage"):
        stage_kv(
            key, value, key_cache, value_cache, staging.key, staging.value, staging.state,
            slot_mapping, staging.routing.row_map, *options,
        )  # fmt: skip


def _stage_window_fake(*args: object, **kwargs: object) -> None:
    check_write(*args, **kwargs)  # type: ignore[arg-type]


def _verify_window(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    options = (scale, sliding_window, softcap, kv_cache_dtype, k_scale, v_scale)
    staging = lookup(key_cache, value_cache)
    if staging is None:
        return paged_attention(
            query, key_cache, value_cache, block_table, seq_lens, query_start_loc, *options
        )
    return verify_attention(
        query, key_cache, value_cache, staging.key, staging.value, block_table, seq_lens,
        query_start_loc, staging.routing.num_drafts, staging.routing.tail_start, *options,
    )  # fmt: skip


def _verify_window_fake(query: Tensor, *args: object, **kwargs: object) -> Tensor:
    check_paged(query, *args, **kwargs)  # type: ignore[arg-type]
    return torch.empty_like(query, memory_format=torch.contiguous_format)


stage_kv_window = define_composite(
    f"stage_kv.window{WRITE_SCHEMA}",
    run=_stage_window,
    fake=_stage_window_fake,
    name="stage_kv.window",
)
verify_attention_window = define_composite(
    f"verify_attention.window{PAGED_SCHEMA}",
    run=_verify_window,
    fake=_verify_window_fake,
    name="verify_attention.window",
)
