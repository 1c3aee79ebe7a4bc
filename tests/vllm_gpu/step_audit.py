"""Watches a model runner from outside: which rows of the target's caches did a step change?

Wraps the runner's methods after NWOR did, so it sees a step as vLLM does: whole. It knows nothing
of windows and staging; slots, draft counts and sampled counts are vLLM's own. It synchronises.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from row_audit import FP8, AuditedLayer, RowAudit, rows_of


class StepAudit:
    """Counts of graph modes always; rows while `on`.

    `rows` needs room for a second copy of the target's caches.
    """

    def __init__(self, worker: Any, blocks: int) -> None:
        """blocks: how many the scheduler hands out; further ones at the end are not looked at."""
        self.runner = worker.model_runner
        self.on = False
        self.rows = RowAudit(audited_layers(self.runner), blocks)
        self.modes: Counter[str] = Counter()
        if hasattr(self.runner, "prepare_attn"):
            hooks: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
                (self.runner, "prepare_attn", self._prepare_attn),
                (self.runner, "sample", self._sample_v2),
                (self.runner.cudagraph_manager, "dispatch", self._dispatch),
            )
        else:
            hooks = (
                (self.runner, "_determine_batch_execution_and_padding", self._determine),
                (self.runner, "_model_forward", self._model_forward),
                (self.runner, "_sample", self._sample_v1),
            )
        for owner, name, hook in hooks:
            setattr(owner, name, functools.partial(hook, getattr(owner, name)))

    def begin(self, *, audit: bool) -> None:
        """Forget the totals."""
        self.on = audit
        self.rows.clear()
        self.modes.clear()

    def end(self) -> dict[str, Any]:
        """Totals since `begin`."""
        self.on = False
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return {"rows": dict(self.rows.totals), "graphs": dict(self.modes)}

    # V2: slots, spans and draft counts are known when the attention is prepared.

    def _dispatch(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.modes[result.cg_mode.name] += 1
        return result

    def _prepare_attn(self, original: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(batch, *args, **kwargs)
        if self.on:
            slots = result[1][:, : batch.num_tokens]
            self.rows.before({group: slots[group] for group in self.rows.groups})
        return result

    def _sample_v2(self, original: Any, hidden: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(hidden, batch, *args, **kwargs)
        if self.rows.open:
            drafts = batch.num_draft_tokens_per_req
            drafts = [0] * batch.num_reqs if drafts is None else drafts.tolist()
            sampled = result[1].tolist()
            accepted = [
                min(n, sampled[request] - 1) if n else 0 for request, n in enumerate(drafts)
            ]
            self.rows.after(batch.query_start_loc_np.tolist(), drafts, accepted)
        return result

    # V1: slots and spans are in the forward context, draft counts come with the sampler's call.

    def _determine(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.modes[result[0].name] += 1
        return result

    def _model_forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        starts = self._starts()
        if self.on:
            from vllm.forward_context import get_forward_context

            mapping = get_forward_context().slot_mapping
            self.rows.before(
                {layer.group: mapping[layer.name][: starts[-1]] for layer in self.rows.layers}
            )
        return original(*args, **kwargs)

    def _sample_v1(self, original: Any, logits: Any, metadata: Any) -> Any:
        result = original(logits, metadata)
        if self.rows.open:
            starts = self._starts()
            drafts = [0] * (len(starts) - 1) if metadata is None else metadata.num_draft_tokens
            # -1 stands where nothing was sampled.
            sampled = (result.sampled_token_ids >= 0).sum(-1).tolist()
            accepted = [
                min(n, sampled[request] - 1) if n else 0 for request, n in enumerate(drafts)
            ]
            self.rows.after(starts, drafts, accepted)
        return result

    def _starts(self) -> list[int]:
        requests = self.runner.input_batch.num_reqs
        return list(map(int, self.runner.query_start_loc.np[: requests + 1]))


def audited_layers(runner: Any) -> list[AuditedLayer]:
    """The target's layers that have a cache of their own."""
    context = runner.compilation_config.static_forward_context
    theirs = drafters_layers(runner)
    found = []
    for index, group in enumerate(runner.kv_cache_config.kv_cache_groups):
        for name in group.layer_names:
            layer = context[name]
            shared = getattr(layer, "kv_sharing_target_layer_name", None)
            if name in theirs or shared is not None:
                continue
            raw = layer.kv_cache.dtype == torch.uint8
            found.append(
                AuditedLayer(
                    name=name,
                    group=index,
                    cache=rows_of(layer.kv_cache),
                    block_size=group.kv_cache_spec.block_size,
                    dtype=FP8.get(getattr(layer, "kv_cache_dtype", "")) if raw else None,
                )
            )
    return found


def drafters_layers(runner: Any) -> set[str]:
    """Names of the drafter's attention layers, on either runner; empty if it has none."""
    for holder, names in (
        ("speculator", "draft_attn_layer_names"),
        ("drafter", "_draft_attn_layer_names"),
    ):
        found = getattr(getattr(runner, holder, None), names, None)
        if found is not None:
            return set(found)
    return set()
