"""The staged write of one vLLM layer, whatever its attention backend.

A backend's own write (`do_kv_cache_update`) is told slots; ours is told the window's routing too.
What it needs of a backend is the packed cache of `packed_cache.py` and its dtype.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nwor_compile.ops.cache_write import STAGE
from nwor_compile.ops.library import pick
from nwor_compile.ops.staging import LayerStaging
from nwor_compile.vllm_adapter.packed_cache import split_cache
from nwor_compile.vllm_adapter.stored_rows import PLAIN


def stored(layer: Any) -> tuple[str, Tensor | None, Tensor | None]:
    """How rows of `layer` are stored: the arguments kv_cache_dtype, k_scale and v_scale of our ops.

    vLLM rounds rows by these scales whatever the backend (`reshape_and_cache_flash` and its Triton
    twin), one float32 value each.
    """
    name = layer.impl.kv_cache_dtype
    if name in PLAIN:
        return "auto", None, None
    return name, layer._k_scale, layer._v_scale


def stage(
    layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor, staging: LayerStaging
) -> None:
    """Certain rows to the cache, draft rows to staging, in one launch.

    Without the checks of the op `stage_kv`: outside graphs this runs once a layer and step, and
    what they look at was checked when the window was made.
    """
    key_cache, value_cache = split_cache(kv_cache)
    pick(STAGE, key.device)(
        key, value, key_cache, value_cache, staging.key, staging.value, staging.state, slots,
        staging.routing.row_map, *stored(layer),
    )  # fmt: skip
