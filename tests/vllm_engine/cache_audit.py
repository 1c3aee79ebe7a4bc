"""Watches a V1 runner from outside: which rows of the target's caches did a step change?

Wraps the runner's methods after NWOR did, so it sees a step as vLLM does: whole. It knows nothing
of windows and staging; slots, draft counts and sampled ids are vLLM's own.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

NUM_TARGET_LAYERS = 4


class Audit:
    """Per step: rows changed against rows that may change. Totals are in `result()`."""

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.on = False
        self._metadata: Any = None
        self._step: dict[str, Any] | None = None
        for name, hook in (
            ("_calc_spec_decode_metadata", self._calc_metadata),
            ("_model_forward", self._model_forward),
            ("_sample", self._sample),
        ):
            original = getattr(runner, name)
            setattr(runner, name, functools.partial(hook, original))
        self.reset()

    def reset(self) -> None:
        """Forget the totals and the rows seen, and fill the caches with noise.

        Layer 0's row depends on token and position alone, so without noise a second run would
        write what is there already, and a write that changes nothing would not be seen.
        """
        for name in self.names():
            self.runner.compilation_config.static_forward_context[name].kv_cache.uniform_(-8, 8)
        self.totals = dict.fromkeys(
            (
                "steps", "mixed_steps", "certain", "drafts", "accepted", "decode_rows",
                "decode_tokens", "rejected_present", "unexpected", "layers_disagree", "checked",
                "lost",
            ),
            0,
        )  # fmt: skip
        # Request and position to the row of all layers, as the cache held it after its step.
        self.rows: dict[tuple[str, int], Tensor] = {}
        self.tokens: dict[str, list[int]] = {}

    def result(self) -> dict[str, int]:
        """The totals; see `_account`."""
        return dict(self.totals)

    def names(self) -> list[str]:
        """The target's layers; vLLM builds the target before the drafter."""
        return list(self.runner.compilation_config.static_forward_context)[:NUM_TARGET_LAYERS]

    def caches(self) -> Tensor:
        """`[layers, slots, row]`, a copy as raw bits (NaN compares equal to itself)."""
        context = self.runner.compilation_config.static_forward_context
        rows = []
        for name in self.names():
            cache = context[name].kv_cache.permute(0, 2, 1, 3)
            rows.append(cache.reshape(cache.shape[0] * cache.shape[1], -1))
        return torch.stack(rows).view(torch.int32)

    def _calc_metadata(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        self._metadata = original(*args, **kwargs)
        return self._metadata

    def _model_forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        metadata, self._metadata = self._metadata, None
        if self.on:
            self._begin(metadata)
        return original(*args, **kwargs)

    def _begin(self, metadata: Any) -> None:
        runner = self.runner
        batch = runner.input_batch
        requests = batch.num_reqs
        starts = runner.query_start_loc.gpu[: requests + 1].tolist()
        drafts = [0] * requests if metadata is None else list(metadata.num_draft_tokens)
        slots = batch.block_table[0].slot_mapping.gpu[: starts[-1]].tolist()
        before = self.caches()
        self._check_computed(before)
        self._step = {
            "ids": list(batch.req_ids),
            "starts": starts,
            "drafts": drafts,
            "slots": slots,
            "computed": batch.num_computed_tokens_cpu[:requests].tolist(),
            "before": before,
        }

    def _check_computed(self, caches: Tensor) -> None:
        """Every row that the scheduler believes computed is the row that some step committed."""
        batch = self.runner.input_batch
        table = batch.block_table[0]
        for index in range(batch.num_reqs):
            for position in range(int(batch.num_computed_tokens_cpu[index])):
                known = self.rows.get((batch.req_ids[index], position))
                if known is None:  # a prefix-cache hit: another request's row
                    continue
                block = int(table.block_table.gpu[index, position // table.block_size])
                slot = block * table.block_size + position % table.block_size
                self.totals["checked"] += 1
                self.totals["lost"] += not torch.equal(caches[:, slot], known)

    def _sample(self, original: Any, logits: Any, metadata: Any) -> Any:
        output = original(logits, metadata)
        if self._step is not None:
            self._account(self._step, output.sampled_token_ids)
            self._step = None
        return output

    def _account(self, step: dict[str, Any], sampled: Tensor) -> None:
        totals = self.totals
        after = self.caches()
        changed = (after != step["before"]).any(-1)  # [layers, slots]
        allowed: set[int] = set()
        rejected: set[int] = set()
        emitted = (sampled >= 0).sum(1).tolist()
        spans = zip(step["starts"], step["starts"][1:], step["drafts"], emitted, strict=False)
        kinds = set()
        for index, (start, end, drafts, count) in enumerate(spans):
            accepted = min(drafts, count - 1) if drafts else 0
            written = end - start - drafts + accepted
            slots = step["slots"][start:end]
            allowed.update(slots[:written])
            rejected.update(slots[written:])
            kinds.add("verify" if drafts else "decode" if end - start == 1 else "prefill")
            totals["certain"] += end - start - drafts
            totals["drafts"] += drafts
            totals["accepted"] += accepted
            if drafts:
                totals["decode_tokens"] += count
                totals["decode_rows"] += int(changed[0, slots].sum())
            for offset in range(written):
                key = (step["ids"][index], step["computed"][index] + offset)
                self.rows[key] = after[:, slots[offset]].clone()
        totals["steps"] += 1
        totals["mixed_steps"] += {"verify", "prefill"} <= kinds
        touched = set(changed.any(0).nonzero().flatten().tolist())
        totals["rejected_present"] += len(touched & rejected)
        totals["unexpected"] += len(touched - allowed - rejected)
        totals["layers_disagree"] += int((changed.any(0) != changed.all(0)).sum())
