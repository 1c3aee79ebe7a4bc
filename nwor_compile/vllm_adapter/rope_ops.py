"""RoPE and the staged write of a layer in one launch: `nwor::vllm_rope_stage`.

The pass puts it in the place of a rotation and a write (`passes/rope_layers.py`), among the twins
of `ops.py`.
"""

import torch
from torch import Tensor
from vllm.utils.torch_utils import LayerNameType, direct_register_custom_op

from nwor_compile.ops.ranges import span
from nwor_compile.ops.rope import rotary_embedding
from nwor_compile.vllm_adapter import layer_calls
from nwor_compile.vllm_adapter.ops import write_called
from nwor_compile.vllm_adapter.staged_write import rope_write, writable

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
    name, layer, kv_cache, slots, staging, certain = write_called(layer_name)
    if slots is not None and (staging is not None or certain or writable(layer, kv_cache)):
        with span("nwor.rope_stage"):
            write = rope_write(name, layer, kv_cache, staging, cos_sin_cache, is_neox)
            write(query, key, value, positions, slots)
        return key.new_empty(0)
    rotary_embedding(positions, query, key, query.shape[2], cos_sin_cache, is_neox)
    if slots is None:
        layer_calls.note(name, query, key, value, positions, table=cos_sin_cache, is_neox=is_neox)
    else:
        layer.impl.do_kv_cache_update(layer, key, value, kv_cache, slots)
    return key.new_empty(0)


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
