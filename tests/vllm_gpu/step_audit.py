"""Watches a V2 runner from outside: which rows of the target's caches did a step change?

Wraps the runner's methods after NWOR did, so it sees a step as vLLM does: whole. It knows nothing
of windows and staging; slots, draft counts and sampled counts are vLLM's own. It synchronises.
"""

from __future__ import annotations

import functools
import statistics
from collections import Counter
from typing import Any

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class StepAudit:
    """Counts of graph modes always; rows while `on`; step times while `timing`."""

    def __init__(self, worker: Any) -> None:
        runner = worker.model_runner
        self.runner = runner
        self.on = self.timing = False
        context = runner.compilation_config.static_forward_context
        drafters = runner.speculator.draft_attn_layer_names
        self.names = [name for name in context if name not in drafters]
        groups = runner.kv_cache_config.kv_cache_groups
        self.group_of = [
            next(index for index, group in enumerate(groups) if name in group.layer_names)
            for name in self.names
        ]
        # [blocks, block, kv_heads, 2 * D]
        self.caches = [context[name].kv_cache.transpose(1, 2) for name in self.names]
        self.step: dict[str, Any] | None = None
        self.events: list[tuple[Any, torch.cuda.Event]] = []
        self.totals: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        for owner, name, hook in (
            (runner, "prepare_attn", self._prepare_attn),
            (runner, "sample", self._sample),
            (runner.cudagraph_manager, "dispatch", self._dispatch),
        ):
            setattr(owner, name, functools.partial(hook, getattr(owner, name)))

    def begin(self, *, audit: bool, timing: bool) -> None:
        """Forget the totals."""
        self.on, self.timing, self.step = audit, timing, None
        self.totals.clear()
        self.modes.clear()
        self.events.clear()

    def end(self) -> dict[str, Any]:
        """Totals since `begin`."""
        self.on = False
        torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for (shape, start), (_, stop) in zip(self.events, self.events[1:], strict=False):
            times.setdefault(str(shape), []).append(start.elapsed_time(stop))
        spread = {
            shape: {
                "steps": len(ms), "median_ms": statistics.median(ms), "min_ms": min(ms),
                "p90_ms": sorted(ms)[int(0.9 * len(ms))],
            }
            for shape, ms in times.items()
            if len(ms) >= 8
        }  # fmt: skip
        return {"rows": dict(self.totals), "graphs": dict(self.modes), "step_ms": spread}

    def _dispatch(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        self.modes[result.cg_mode.name] += 1
        return result

    def _prepare_attn(self, original: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if self.timing:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.events.append(((batch.num_reqs, batch.num_tokens), event))
        result = original(batch, *args, **kwargs)
        if self.on:
            slots = result[1][:, : batch.num_tokens].long()
            self._spoil(slots)
            self.step = {"slots": slots.tolist(), "before": self._bits()}
        return result

    def _spoil(self, slots: Tensor) -> None:
        """Noise in the slots of this step's tokens, which hold nothing yet: what an earlier request
        left there may be the very row, and reading a row before its write must show."""
        for cache, group in zip(self.caches, self.group_of, strict=True):
            place = (slots[group] // cache.shape[1], slots[group] % cache.shape[1])
            shape = (slots.shape[1], *cache.shape[2:])
            noise = torch.empty(shape, dtype=torch.float32, device=cache.device).uniform_(-8, 8)
            cache[place] = noise.to(cache.dtype)

    def _bits(self) -> list[Tensor]:
        """`[slots, row]` for each layer, a copy as raw bits (NaN compares equal to itself)."""
        return [
            c.view(BITS[c.element_size()]).flatten(0, 1).flatten(1).clone() for c in self.caches
        ]

    def _sample(self, original: Any, hidden: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(hidden, batch, *args, **kwargs)
        if self.step is not None:
            self._account(self.step, batch, result[1].tolist())
            self.step = None
        return result

    def _account(self, step: dict[str, Any], batch: Any, sampled: list[int]) -> None:
        pairs = zip(step["before"], self._bits(), strict=True)
        changed = [set((a != b).any(-1).nonzero().flatten().tolist()) for a, b in pairs]
        allowed: dict[int, set[int]] = {group: set() for group in self.group_of}
        rejected: dict[int, set[int]] = {group: set() for group in self.group_of}
        starts = batch.query_start_loc_np.tolist()
        drafts_of = batch.num_draft_tokens_per_req
        drafts_of = [0] * batch.num_reqs if drafts_of is None else drafts_of.tolist()
        totals, kinds = self.totals, set()
        for index, drafts in enumerate(drafts_of):
            start, end = starts[index], starts[index + 1]
            accepted = min(drafts, sampled[index] - 1) if drafts else 0
            written = end - start - drafts + accepted
            for group in allowed:
                slots = step["slots"][group][start:end]
                allowed[group].update(slots[:written])
                rejected[group].update(slots[written:])
            kinds.add("verify" if drafts else "decode" if end - start == 1 else "prefill")
            totals["certain"] += end - start - drafts
            totals["drafts"] += drafts
            totals["accepted"] += accepted
            if drafts:
                totals["decode_tokens"] += sampled[index]
                first = step["slots"][self.group_of[0]][start:end]
                totals["decode_rows"] += len(changed[0] & set(first))
        totals["steps"] += 1
        totals["mixed_steps"] += {"verify", "prefill"} <= kinds
        for slots, group in zip(changed, self.group_of, strict=True):
            totals["rejected_present"] += len(slots & rejected[group])
            totals["missing"] += len(allowed[group] - slots)
            totals["unexpected"] += len(slots - allowed[group] - rejected[group])
