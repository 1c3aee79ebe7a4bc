"""Twins of vLLM's two layer ops, with the same arguments: `nwor::vllm_stage`, `nwor::vllm_verify`.

Layers that no window knows (a drafter's) go through vLLM's own code, so one rewritten graph may
serve both models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.model_executor.layers.attention.kv_transfer_utils import maybe_transfer_kv_layer
from vllm.utils.torch_utils import LayerNameType, _resolve_layer_name, direct_register_custom_op

from nwor_compile.errors import ConfigError
from nwor_compile.ops.ranges import span
from nwor_compile.ops.staging import LayerStaging
from nwor_compile.vllm_adapter import layer_calls, staged_write
from nwor_compile.vllm_adapter.redirected import Redirected

_library = torch.library.Library("nwor", "FRAGMENT")
_layers: dict[str, LayerStaging] = {}
_executions = {"calls": 0, "staged": 0, "direct": 0}
_called: set[str] = set()
_redirected = Redirected()
_idle: Callable[[], bool] | None = None


def set_layers(layers: dict[str, LayerStaging], idle: Callable[[], bool] | None = None) -> None:
    """The layers that stage from now on, by vLLM's layer name; replaces the former ones.

    idle: says that no window is open.

    Raises ConfigError for a layer whose staging is not in tail blocks: its attention would read the
    cache alone, and draft rows as whatever is there.
    """
    global _idle
    blind = [name for name, staging in layers.items() if staging.block_table is None]
    if blind:
        raise ConfigError(f"no block table leads to the staged rows of {', '.join(blind)}")
    _idle = idle
    _layers.clear()
    _layers.update(layers)
    _redirected.forget()
    staged_write.forget()
    if not layers:
        layer_calls.forget()


def executions() -> dict[str, int]:
    """How often `vllm_stage` ran in this process: in all (warm-up included), for layers that
    stage, and for others."""
    return dict(_executions)


def take_called() -> set[str]:
    """Names of the layers whose `vllm_stage` ran since this was asked last."""
    names = set(_called)
    _called.clear()
    return names


class LayerCall(NamedTuple):
    """What one call of a layer's write works on. slots: None where there is nothing to write.

    staging: None if all rows go to the cache: no window knows the layer, or `certain` is set.
    """

    name: str
    layer: Any
    kv_cache: Tensor
    slots: Tensor | None
    staging: LayerStaging | None
    certain: bool


def write_called(layer_name: LayerNameType) -> LayerCall:
    """Count a call of a layer's write, and look up what it works on."""
    _executions["calls"] += 1
    name = _resolve_layer_name(layer_name)
    _called.add(name)
    _, layer, kv_cache, slots = get_attention_context(name)
    staging = _layers.get(name)
    if slots is not None:
        _executions["direct" if staging is None else "staged"] += 1
    certain = staging is not None and _certain_only(staging)
    return LayerCall(name, layer, kv_cache, slots, None if certain else staging, certain)


def _stage(key: Tensor, value: Tensor, layer_name: LayerNameType) -> Tensor:
    name, layer, kv_cache, slots, staging, _ = write_called(layer_name)
    if slots is None:
        layer_calls.note(name, key, value)
    elif staging is None:
        layer.impl.do_kv_cache_update(layer, key, value, kv_cache, slots)
    else:
        with span("nwor.stage"):
            staged_write.stage_write(name, layer, kv_cache, staging)(key, value, slots)
    return key.new_empty(0)


def _certain_only(staging: LayerStaging) -> bool:
    """Whether this call, made now and not recorded for later, has no draft to stage: then the
    engine's own write does, which costs the host less."""
    if _idle is None or not _idle():
        return False
    table = staging.block_table
    on_gpu = table is not None and table.is_cuda
    return not (on_gpu and torch.cuda.is_current_stream_capturing())


def _stage_fake(key: Tensor, value: Tensor, layer_name: LayerNameType) -> Tensor:
    return torch.empty(0, device=key.device, dtype=key.dtype)


# In this order, as on vLLM's op: the connector's calls belong into the eager segment.
@eager_break_during_capture
@maybe_transfer_kv_layer
def _verify(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    layer_name: LayerNameType,
    output_scale: Tensor | None = None,
    output_block_scale: Tensor | None = None,
    kv_cache_dummy_dep: Tensor | None = None,
) -> None:
    del kv_cache_dummy_dep
    name = _resolve_layer_name(layer_name)
    metadata, layer, kv_cache, _ = get_attention_context(name)
    shared = getattr(layer, "kv_sharing_target_layer_name", None)
    staging = _layers.get(shared or name)
    if staging is not None:
        metadata = _redirected(metadata, staging)
    layer.impl.forward(
        layer, query, key, value, kv_cache, metadata, output=output, output_scale=output_scale,
        output_block_scale=output_block_scale,
    )  # fmt: skip


def _verify_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    layer_name: LayerNameType,
    output_scale: Tensor | None = None,
    output_block_scale: Tensor | None = None,
    kv_cache_dummy_dep: Tensor | None = None,
) -> None:
    return None


direct_register_custom_op(
    op_name="vllm_stage", op_func=_stage, mutates_args=[], fake_impl=_stage_fake,
    target_lib=_library,
)  # fmt: skip
direct_register_custom_op(
    op_name="vllm_verify", op_func=_verify, mutates_args=["output", "output_block_scale"],
    fake_impl=_verify_fake, target_lib=_library,
)  # fmt: skip


def check_twins() -> None:
    """Raise ConfigError unless each twin takes what vLLM's op takes; see NOTE [contract]."""
    pairs = (
        ("unified_kv_cache_update", "vllm_stage"),
        ("unified_attention_with_output", "vllm_verify"),
    )
    for name, twin in pairs:
        theirs, ours = (
            str(getattr(namespace, op).default._schema).partition("(")[2]
            for namespace, op in ((torch.ops.vllm, name), (torch.ops.nwor, twin))
        )
        if theirs != ours:
            raise ConfigError(
                f"vllm::{name} has another schema than this adapter's twin: ({theirs} against "
                f"({ours}; this vLLM is not supported"
            )


check_twins()
