"""Follows a model runner from outside with a `CacheShadow`: V2 on a GPU, V1 on either device.

Wraps the runner's methods after NWOR did, so it sees a step as vLLM does: whole. It knows nothing
of windows and staging, and on V2 nothing of it waits for the device: a step stays asynchronous.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from long_shadow import CacheShadow, Step
from step_audit import audited_layers
from torch import Tensor

LOOKS = 8192


class LongWatch:
    """Follows every step from its making on; looks at every `every`-th (0: at none)."""

    def __init__(self, worker: Any, blocks: int, drafts: int) -> None:
        """blocks: how many the scheduler hands out. Raises ValueError for several groups."""
        self.runner = worker.model_runner
        layers = audited_layers(self.runner)
        if {layer.group for layer in layers} != {0}:
            raise ValueError("this watch follows a target with one KV-cache group")
        sizes = {(layer.block_size, layer.cache.shape[1]) for layer in layers}
        if any(a != b for a, b in sizes):
            raise ValueError(f"the allocator's blocks are cut: {sizes}")
        self.name = layers[0].name
        self.shadow = CacheShadow([layer.cache for layer in layers], blocks, drafts, LOOKS)
        self.every = 0
        self._step: Step | None = None
        self._known: Callable[[], Tensor]
        v2 = hasattr(self.runner, "prepare_attn")
        hooks: tuple[tuple[str, Callable[..., Any]], ...] = (
            (("prepare_attn", self._prepare_attn), ("sample", self._sample_v2))
            if v2
            else (("_model_forward", self._model_forward), ("_sample", self._sample_v1))
        )
        for name, hook in hooks:
            setattr(self.runner, name, functools.partial(hook, getattr(self.runner, name)))

    def begin(self, every: int) -> None:
        """Count from here on."""
        self.shadow.forget()
        self.every = every

    def end(self) -> dict[str, Any]:
        """What was counted since `begin`, after a last look at the caches."""
        self.shadow.look()
        return self.shadow.result()

    def _after(self, sampled: Tensor) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        self.shadow.follow(step, sampled[: step.drafts.shape[0]])
        if self.every and self.shadow.steps % self.every == 0:
            self.shadow.look(step, self._known())

    def _prepare_attn(self, original: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(batch, *args, **kwargs)
        count, ends = batch.num_tokens, batch.cu_num_logits
        requests = ends.shape[0] - 1
        # Buffers of the runner that the step itself, or its drafter, writes again.
        self._step = Step(
            slots=result[1][0, :count].long().clone(),
            starts=batch.query_start_loc[: requests + 1].long(),
            drafts=(ends[1:] - ends[:-1] - 1).long(),
            tokens=batch.input_ids[:count].long(),
            positions=batch.positions[:count].clone(),
            lengths=batch.seq_lens[:requests].long(),
            table=result[0][0],
        )
        places = batch.idx_mapping[:requests].long()
        self._known = lambda: self.runner.req_states.all_token_ids.gpu[places]
        return result

    def _sample_v2(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self._after(result[1].long())
        return result

    def _model_forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.forward_context import get_forward_context

        runner, batch = self.runner, self.runner.input_batch
        requests = batch.num_reqs
        starts = runner.query_start_loc.gpu[: requests + 1].long()
        count = int(runner.query_start_loc.np[requests])
        self._step = Step(
            slots=get_forward_context().slot_mapping[self.name][:count].long(),
            starts=starts,
            drafts=torch.zeros(requests, dtype=torch.int64, device=starts.device),
            tokens=runner.input_ids.gpu[:count].long(),
            positions=runner.positions[:count].clone(),
            lengths=runner.seq_lens[:requests].long(),
            table=batch.block_table[0].block_table.gpu,
        )
        self._known = lambda: torch.from_numpy(batch.token_ids_cpu[:requests]).to(starts.device)
        return original(*args, **kwargs)

    def _sample_v1(self, original: Any, logits: Any, metadata: Any) -> Any:
        result = original(logits, metadata)
        if self._step is not None and metadata is not None:
            self._step.drafts.copy_(torch.tensor(metadata.num_draft_tokens))
        # -1 stands where nothing was sampled.
        self._after((result.sampled_token_ids >= 0).sum(-1).long())
        return result
