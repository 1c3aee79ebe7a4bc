"""The staged write of one vLLM layer, whatever its attention backend.

A backend's own write (`do_kv_cache_update`) is told slots; ours is told the window's routing too.
What it needs of a backend is the packed cache of `packed_cache.py` and its dtype.

Outside CUDA graphs a write runs once a layer and step, and what it costs the host is what the step
waits for. So each layer's is prepared once (NOTE [kept kernels] in `ops/kernels/launch.py`) and
kept for as long as what it was prepared from stays; and nothing is checked that was checked when
the window was made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from nwor_compile.ops.cache_write import STAGE_WRITE
from nwor_compile.ops.library import pick
from nwor_compile.ops.rope import ROPE_WRITE, split_table
from nwor_compile.ops.staging import LayerStaging
from nwor_compile.vllm_adapter.packed_cache import is_packed, split_cache
from nwor_compile.vllm_adapter.refusals import layer_refusal
from nwor_compile.vllm_adapter.stored_rows import PLAIN


class _Kept(NamedTuple):
    """A prepared write, and what it was prepared from that an engine may replace: the layer's cache
    and staging, and where its rotation's table lies. Scales change in place."""

    kv_cache: Tensor
    staging: LayerStaging | None
    table: int
    write: Callable[..., None]


_kept: dict[tuple[str, str], _Kept] = {}


def forget() -> None:
    """Drop all that was prepared: it holds caches, and was made for the implementation of then."""
    _kept.clear()


def writable(layer: Any, kv_cache: Tensor) -> bool:
    """True if a layer that no window knows has a cache that our kernel can write: the same that
    could be staged."""
    return is_packed(kv_cache) and not layer_refusal("", layer)


def stored(layer: Any) -> tuple[str, Tensor | None, Tensor | None]:
    """How rows of `layer` are stored: the arguments kv_cache_dtype, k_scale and v_scale of our ops.

    vLLM rounds rows by these scales whatever the backend (`reshape_and_cache_flash` and its Triton
    twin), one float32 value each.
    """
    name = layer.impl.kv_cache_dtype
    if name in PLAIN:
        return "auto", None, None
    return name, layer._k_scale, layer._v_scale


def stage_write(
    name: str, layer: Any, kv_cache: Tensor, staging: LayerStaging
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """Certain rows to the cache, draft rows to staging, in one launch: a function of key, value and
    slot_mapping."""
    kept = _kept.get((name, "stage"))
    if kept is not None and kept.kv_cache is kv_cache and kept.staging is staging:
        return kept.write
    prepare = pick(STAGE_WRITE, kv_cache.device)
    write = prepare(*split_cache(kv_cache), _staged(staging), *stored(layer))
    _kept[name, "stage"] = _Kept(kv_cache, staging, 0, write)
    return write


def rope_write(
    name: str,
    layer: Any,
    kv_cache: Tensor,
    staging: LayerStaging | None,
    table: Tensor,
    is_neox: bool,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]:
    """The same after a rotation of q and k in place by `table` `[positions, rotary_dim]`, in one
    launch: a function of query, key, value, positions and slot_mapping. Without `staging` all rows
    go to the cache. A layer's `is_neox` is always the same."""
    key = name, "certain" if staging is None else "rope"
    kept = _kept.get(key)
    # Of the table the engine may bring another object, a view of the same memory.
    place = table.data_ptr()
    if (
        kept is not None
        and kept.kv_cache is kv_cache
        and kept.staging is staging
        and kept.table == place
    ):
        return kept.write
    prepare = pick(ROPE_WRITE, kv_cache.device)
    to = None if staging is None else _staged(staging)
    write = prepare(
        *split_table(table), table.shape[1], is_neox, *split_cache(kv_cache), to, *stored(layer)
    )
    _kept[key] = _Kept(kv_cache, staging, place, write)
    return write


def _staged(staging: LayerStaging) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return staging.key, staging.value, staging.state, staging.routing.row_map
