"""The worker class that a configured CUDA engine names in `worker_cls`."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from vllm.v1.worker.gpu_worker import Worker

from nwor_compile.config import NworConfig
from nwor_compile.errors import ConfigError
from nwor_compile.vllm_adapter import graph_split, layer_calls
from nwor_compile.vllm_adapter.context_graphs import ContextGraphs
from nwor_compile.vllm_adapter.cuda_backend import NworFlashImpl, use
from nwor_compile.vllm_adapter.device_runner import DeviceRunnerHooks
from nwor_compile.vllm_adapter.runner import RunnerHooks
from nwor_compile.vllm_adapter.settings import PASS_SLOT, requested
from nwor_compile.vllm_adapter.spare_blocks import bytes_needed
from nwor_compile.vllm_adapter.staging_worker import StagingWorker
from nwor_compile.window import Window


class NworGPUWorker(StagingWorker, Worker):
    """vLLM's GPU worker with NWOR hooks on its model runner in mode `stage`. Mode `off` takes the
    attention kernels of mode `stage` alone, so that the two can be compared."""

    _settings: NworConfig | None = None

    def init_device(self) -> None:
        """Make the runner, then hook it. Layers look their backend up later, in load_model."""
        use()
        super().init_device()
        self._settings = settings = requested(self.vllm_config.additional_config)
        if settings is not None and settings.mode == "stage":
            hooks = DeviceRunnerHooks if self.use_v2_model_runner else RunnerHooks
            self.nwor = hooks(self.model_runner, self.vllm_config, settings)
            options = self.vllm_config.compilation_config.inductor_compile_config
            graph_split.use(options[PASS_SLOT])

    def load_model(self, **kwargs: Any) -> None:
        """The setting `attention` goes to the target's layers."""
        super().load_model(**kwargs)
        if self._settings is None:
            return
        theirs = drafters_layers(self.model_runner)
        context = self.vllm_config.compilation_config.static_forward_context
        longest = self.vllm_config.model_config.max_model_len
        contexts = None
        if self.use_v2_model_runner and self._settings.attention == "auto":
            contexts = ContextGraphs()
        chosen = []
        for name, layer in context.items():
            impl = getattr(layer, "impl", None)
            if name in theirs or not isinstance(impl, NworFlashImpl):
                continue
            problem = impl.choose(self._settings.attention, longest, contexts)
            if problem:
                raise ConfigError(f"layer {name}: {problem}")
            chosen.append(impl)
        if contexts is not None and any(impl.goes_by_contexts for impl in chosen):
            contexts.hook(self.model_runner)

    def _call_kernels(self, window: Window) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        layer_calls.call_writes(layers, window.layers)
        called = set()
        for name, staging in window.layers.items():
            impl, cache = layers[name].impl, layers[name].kv_cache
            if not isinstance(impl, NworFlashImpl):
                continue
            table = cast(Tensor, staging.block_table)  # `ops.set_layers` takes no layer without
            form = impl.num_heads, impl.head_size, impl.attention, cache.shape, cache.stride()
            if form not in called:
                called.add(form)
                impl.call_kernels(cache, table, window.sizes, window.max_drafts)

    @torch.inference_mode()
    def determine_available_memory(self) -> int:
        """What vLLM finds available, less the tail blocks that staging takes from it."""
        available = super().determine_available_memory()
        if self.nwor is None:
            return available
        needed = bytes_needed(self.model_runner.get_kv_cache_spec(), *self.nwor.sizes)
        return available - needed


def drafters_layers(runner: Any) -> set[str]:
    """Names of the drafter's attention layers, on either runner, once it is loaded."""
    for holder, names in (
        ("speculator", "draft_attn_layer_names"),
        ("drafter", "_draft_attn_layer_names"),
    ):
        found = getattr(getattr(runner, holder, None), names, None)
        if found is not None:
            return set(found)
    return set()
