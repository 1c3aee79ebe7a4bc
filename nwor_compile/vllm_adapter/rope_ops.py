"""RoPE and the staged write of a layer in one launch: `nwor::vllm_rope_stage`.

The pass puts it in the place of a rotation and a write (`passes/rope_layers.py`), among the twins
of `ops.py`.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

from nwor_compile.ops.library import Launcher, pick
from nwor_compile.ops.ranges import span
from nwor_compile.ops.rope import rope_write_reference, rotary_embedding, split_table
from nwor_compile.ops.staging import LayerStaging
from nwor_compile.vllm_adapter.ops import write_called
from nwor_compile.vllm_adapter.packed_cache import is_packed, split_cache
from nwor_compile.vllm_adapter.refusals import layer_refusal
from nwor_compile.vllm_adapter.staged_write import stored

_ROPE_WRITE = Launcher(rope_write_reference, "rope:rope_write")
_library = torch.library.Library("nwor", "FRAGMENT")


def _rope_stage(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    layer_name: LayerNameType,
) -> Tensor:
    """Rotate q `[T, heads, D]` and k `[T, kv_heads, D]` in place; write or stage k and v.

    positions: `[T]`, rows of `cos_sin_cache` `[positions, rotary_dim]`. The result only orders the
    attention after this, as that of vLLM's own write.
    """
    layer, kv_cache, slots, staging, certain = write_called(layer_name)
    angles = (positions, cos_sin_cache, is_neox)
    if slots is not None and (staging is not None or certain or _writable(layer, kv_cache)):
        with span("nwor.rope_stage"):
            rope_write(layer, query, key, value, angles, kv_cache, slots, staging)
        return key.new_empty(0)
    rotary_embedding(positions, query, key, query.shape[2], cos_sin_cache, is_neox)
    if slots is not None:
        layer.impl.do_kv_cache_update(layer, key, value, kv_cache, slots)
    return key.new_empty(0)


def rope_write(
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    angles: tuple[Tensor, Tensor, bool],
    kv_cache: Tensor,
    slots: Tensor,
    staging: LayerStaging | None,
) -> None:
    """Rotate in place by `angles` (positions, table, is_neox); certain rows to the cache, draft
    rows to `staging`; without it, all of them to the cache."""
    positions, table, is_neox = angles
    to = None
    if staging is not None:
        to = (staging.key, staging.value, staging.state, staging.routing.row_map)
    pick(_ROPE_WRITE, key.device)(
        query, key, value, *split_table(table), positions, table.shape[1], is_neox,
        *split_cache(kv_cache), slots, to, *stored(layer), in_place=True,
    )  # fmt: skip


def _writable(layer: Any, kv_cache: Tensor) -> bool:
    """True if a layer that no window knows has a cache that our kernel can write: the same that
    could be staged."""
    return is_packed(kv_cache) and not layer_refusal("", layer)


def _rope_stage_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    layer_name: LayerNameType,
) -> Tensor:
    return torch.empty(0, device=key.device, dtype=key.dtype)


direct_register_custom_op(
    op_name="vllm_rope_stage", op_func=_rope_stage, mutates_args=["query", "key"],
    fake_impl=_rope_stage_fake, target_lib=_library,
)  # fmt: skip
