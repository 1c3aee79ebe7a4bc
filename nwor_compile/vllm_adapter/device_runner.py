"""Hooks on one V2 model runner, whose counts live on the device.

Methods of the runner instance that are wrapped, with what each is needed for:

- `speculator.load_model`: layers known before it are the target's, those after are the drafter's;
- `initialize_kv_cache`: the caches exist, so the window can be made; before graphs are captured,
  because they record the addresses of staging;
- `prepare_attn`: the step's slots and counts are on the device: begin. Captures and dummy runs take
  other ways to their inputs and so see no drafts;
- `execute_model`: abort if it raises;
- `sample`: commit after it, before the output is copied and before the drafter runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nwor_compile.config import NworConfig
from nwor_compile.vllm_adapter import patches
from nwor_compile.vllm_adapter.runner import RunnerHooks
from nwor_compile.window import State, Window

log = logging.getLogger("nwor_compile")


class DeviceRunnerHooks(RunnerHooks):
    """`RunnerHooks` for vLLM's V2 model runner."""

    HOOKED = ("initialize_kv_cache", "prepare_attn", "execute_model", "sample")

    def __init__(self, runner: Any, config: Any, settings: NworConfig) -> None:
        self._draft_ids = torch.empty(0)
        super().__init__(runner, config, settings)

    def _attach(self) -> None:
        speculator = getattr(self.runner, "speculator", None)
        if speculator is not None and hasattr(speculator, "load_model"):
            patches.wrap(speculator, "speculator.load_model", self._load_drafter)
        for name, hook in (
            ("initialize_kv_cache", self._initialize_kv_cache),
            ("prepare_attn", self._prepare_attn),
            ("execute_model", self._execute_model),
            ("sample", self._sample_step),
        ):
            patches.wrap(self.runner, f"GPUModelRunner.{name}", hook)

    def _open(self, kv_cache_config: Any) -> None:
        super()._open(kv_cache_config)
        if self.window is not None:
            slots = self.window.capacity + 1  # the last takes the ids that are no drafts
            device = self.window.tensors.error.device
            self._draft_ids = torch.zeros(slots, dtype=torch.int32, device=device)

    def warmed_up(self) -> None:
        """As on V1; and vLLM's warm-up, which has run whole steps here, is not counted."""
        super().warmed_up()
        if self.window is not None:
            self.window.tensors.counters.zero_()

    def _prepare_attn(
        self, original: Callable[..., Any], input_batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(input_batch, *args, **kwargs)
        window = self.window
        if window is None:
            return result
        if window.state is State.OPEN:
            # The step before this one never sampled: its drafts are lost, its certain rows stand.
            log.error("NWOR: a window was never committed; aborted")
            window.abort()
        # On the host vLLM knows how many drafts there are; which rows they are is device data.
        # Without any, the graphs find the routing of direct mode.
        if input_batch.num_draft_tokens > 0:
            self._begin_step(window, input_batch, result[1])
        return result

    def _begin_step(self, window: Window, input_batch: Any, slot_mappings: Tensor) -> None:
        counts = torch.diff(input_batch.cu_num_logits) - 1  # a span's logits: drafts and one more
        starts = input_batch.query_start_loc[: counts.shape[0] + 1]
        groups = {batch.group for batch in window.tensors.batches}
        window.begin(counts, starts, {name: slot_mappings[int(name)] for name in groups})

    def _execute_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:
            self._abort_open()
            raise

    def _abort_open(self) -> None:
        if self.window is not None and self.window.state is State.OPEN:
            self.window.abort()

    def _sample_step(
        self,
        original: Callable[..., Any],
        hidden_states: Tensor,
        input_batch: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        window = self.window
        if window is None or window.state is not State.OPEN:
            return original(hidden_states, input_batch, *args, **kwargs)
        try:
            output, sampled, rejected = original(hidden_states, input_batch, *args, **kwargs)
        except BaseException:
            window.abort()
            raise
        drafts = self._drafts_of(window, input_batch)
        done = window.commit(output.sampled_token_ids, drafts, sampled)
        # With the error flag up nothing was committed: each request keeps its first token alone.
        # Else this changes nothing. A prefill that goes on has sampled, and keeps, none.
        kept = torch.minimum(sampled, done.accepted + 1)
        output.num_sampled, output.num_rejected = kept, rejected + (sampled - kept)
        return output, output.num_sampled, output.num_rejected

    def _drafts_of(self, window: Window, input_batch: Any) -> Tensor:
        """The step's draft ids, request after request: gathered as the rejection sampler does."""
        places = input_batch.logits_indices
        rows = window.tensors.routing.row_map[places]  # -1, of a token that is no draft: the last
        self._draft_ids[rows] = input_batch.input_ids[places]
        return self._draft_ids[: input_batch.num_draft_tokens]
