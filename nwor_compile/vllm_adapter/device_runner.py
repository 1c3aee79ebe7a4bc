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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nwor_compile.vllm_adapter import patches
from nwor_compile.vllm_adapter.runner import RunnerHooks, abort_unsampled
from nwor_compile.window import State, Window

log = logging.getLogger("nwor_compile")


class DeviceRunnerHooks(RunnerHooks):
    """`RunnerHooks` for vLLM's V2 model runner."""

    HOOKED = ("initialize_kv_cache", "prepare_attn", "execute_model", "sample")
    _places: tuple[int, ...] = ()

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
        self._places = ()  # of an earlier window's; this one has nothing recorded yet
        super()._open(kv_cache_config)

    def _kernel_block_sizes(self) -> list[int]:
        return list(self.runner.kernel_block_sizes)

    def _columns(self, group: int) -> int:
        return int(self.runner.block_tables.input_block_tables[group].shape[1])

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
        abort_unsampled(window)
        # On the host vLLM knows how many drafts there are; which rows they are is device data.
        # Without any, the graphs find the routing of direct mode, and the engine's block tables.
        if input_batch.num_draft_tokens > 0:
            self._begin_step(window, input_batch, *result)
        else:
            window.pass_through({name: result[0][int(name)] for name in window.groups})
        return result

    def warm_up(self, others: Callable[[Window], None] | None = None) -> None:
        """As on V1; and record how windows open over the buffers in which vLLM keeps each step's
        tensors, because its graphs record where they lie."""
        super().warm_up(others)
        window = self.window
        if window is None:
            return
        for requests in window.sizes:
            window.record_begin(requests, **self._kept_step(window, requests))
        self._places = self._places_of(self.runner.input_buffers, *self._kept_attention())

    def _steps(self, window: Window) -> list[dict[str, Any]]:
        return super()._steps(window) + [self._kept_step(window, n) for n in window.sizes]

    def _kept_attention(self) -> tuple[list[Tensor], Tensor]:
        tables = self.runner.block_tables
        return tables.input_block_tables, tables.slot_mappings

    def _kept_step(self, window: Window, requests: int) -> dict[str, Any]:
        """Arguments of a begin: what vLLM keeps for a step of so many requests. What it does not
        use of a buffer in a step, it fills: empty spans, no tokens, no slots."""
        buffers = self.runner.input_buffers
        tables, slots = self._kept_attention()
        tokens = requests * (1 + window.max_drafts)
        return {
            "num_drafts": None,
            "one_certain": True,
            "query_start_loc": buffers.query_start_loc[: requests + 1],
            "slot_mapping": {name: slots[int(name)][:tokens] for name in window.groups},
            "block_table": {name: tables[int(name)][:requests] for name in window.groups},
            "seq_lens": buffers.seq_lens[:requests],
            "token_ids": buffers.input_ids,
        }

    def _places_of(self, step: Any, tables: Sequence[Tensor], slots: Tensor) -> tuple[int, ...]:
        """Where a step's tensors begin. step: vLLM's buffers, or a batch of views of them."""
        tensors = (step.query_start_loc, step.seq_lens, step.input_ids, slots, *tables)
        return tuple([tensor.data_ptr() for tensor in tensors])

    def _empty_step(self, window: Window, requests: int) -> dict[str, Any]:
        step = super()._empty_step(window, requests)
        step["logit_starts"] = step["query_start_loc"].clone()
        step["token_ids"] = torch.zeros_like(step["seq_lens"])
        return {**step, "num_drafts": None}

    def _begin_step(
        self, window: Window, batch: Any, tables: tuple[Tensor, ...], slots: Tensor
    ) -> None:
        # Known on the host: whether every request has its drafts and one token more.
        one_certain = batch.num_draft_tokens + batch.num_reqs == batch.num_tokens
        if one_certain and self._places_of(batch, tables, slots) == self._places:
            # Graphs are there for powers of two; attention of a padded step reads padded tables.
            size = 1 << (batch.num_reqs_after_padding - 1).bit_length()
            window.begin_recorded(min(size, window.max_requests), batch.num_reqs)
            return
        requests = batch.num_reqs
        window.begin(
            None,
            batch.query_start_loc[: requests + 1],
            {name: slots[int(name)] for name in window.groups},
            block_table={name: tables[int(name)] for name in window.groups},
            seq_lens=batch.seq_lens[:requests],
            token_ids=batch.input_ids,
            logit_starts=batch.cu_num_logits,
        )

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
        # As many ids a request in every step as the sampler of drafts has columns.
        done = window.commit(
            output.sampled_token_ids, None, sampled, rejected, form=input_batch.num_reqs
        )
        if done.num_sampled is None or done.num_rejected is None:
            raise RuntimeError("a commit that was given counts returned none")
        # With the error flag up nothing was committed: each request keeps its first token alone.
        # Else the counts are what they were. A prefill that goes on has sampled, and keeps, none.
        output.num_sampled, output.num_rejected = done.num_sampled, done.num_rejected
        return output, output.num_sampled, output.num_rejected
