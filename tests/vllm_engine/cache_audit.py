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
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

COUNTED = (
    "steps", "mixed_steps", "certain", "drafts", "accepted", "decode_rows", "decode_tokens",
    "rejected_present", "unexpected", "layers_disagree", "checked", "checked_hits", "lost",
)  # fmt: skip


class Audit:
    """Per step: rows changed against rows that may change. Totals are in `result()`.

    A layer's slots are those of its KV-cache group. Layers of two groups may share memory (a block
    belongs to one group at a time), so what may change is looked up by memory.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.on = False
        self._metadata: Any = None
        self._step: dict[str, Any] | None = None
        context = runner.compilation_config.static_forward_context
        # vLLM builds the target before the drafter.
        self.names = list(context)[:NUM_TARGET_LAYERS]
        self.tensors = [context[name].kv_cache for name in self.names]
        self.dtype = self.tensors[0].dtype
        groups = runner.kv_cache_config.kv_cache_groups
        self.group_of = [
            next(index for index, group in enumerate(groups) if name in group.layer_names)
            for name in self.names
        ]
        self.groups = sorted(set(self.group_of))
        specs = [groups[index].kv_cache_spec for index in self.group_of]
        known = runner.vllm_config.cache_config.num_gpu_blocks
        self.blocks = [
            known * (spec.block_size // tensor.shape[2])
            for spec, tensor in zip(specs, self.tensors, strict=True)
        ]
        self.windows = [getattr(spec, "sliding_window", None) for spec in specs]
        memory = [tensor.data_ptr() for tensor in self.tensors]
        self.sharing = [
            {g for g, other in zip(self.group_of, memory, strict=True) if other == mine}
            for mine in memory
        ]
        for name, hook in (
            ("_calc_spec_decode_metadata", self._calc_metadata),
            ("_model_forward", self._model_forward),
            ("_sample", self._sample),
        ):
            setattr(runner, name, functools.partial(hook, getattr(runner, name)))
        self.rows: dict[tuple[str, int], Tensor] = {}
        self.by_text: dict[bytes, Tensor] = {}
        self.forget()

    def reset(self) -> None:
        """Forget everything, and fill the caches with noise."""
        for tensor in self.tensors:
            tensor.copy_(self._noise(tensor, tensor.shape))
        self.rows, self.by_text = {}, {}
        self.forget()

    def forget(self) -> None:
        """Forget the totals. The rows seen stay, for requests that hit the prefix cache."""
        self.totals = dict.fromkeys(COUNTED, 0)

    def result(self) -> dict[str, int]:
        """The totals; see `_account`."""
        return dict(self.totals)

    def distance(self, one: Tensor, two: Tensor) -> float:
        """Largest difference of two rows `[layers, row]` as `rows` keeps them."""
        return float((self._numbers(one) - self._numbers(two)).abs().max())

    def caches(self) -> list[Tensor]:
        """`[slots, row]` for each layer, a copy as raw bits (NaN compares equal to itself). Blocks
        that the scheduler does not know, where NWOR stages, are left out."""
        bits = BITS[self.tensors[0].element_size()]
        return [
            cache[:blocks].view(bits).permute(0, 2, 1, 3).flatten(0, 1).flatten(1).clone()
            for cache, blocks in zip(self.tensors, self.blocks, strict=True)
        ]

    def _noise(self, cache: Tensor, shape: tuple[int, ...]) -> Tensor:
        if cache.element_size() == 1:  # fp8: bytes that are no NaN in either format
            return torch.randint(0, 0x70, shape, dtype=torch.uint8).view(cache.dtype)
        return torch.empty(shape, dtype=cache.dtype).uniform_(-8, 8)

    def _spoil(self, slots: dict[int, list[int]]) -> None:
        """Noise in the slots of this step's tokens, which hold nothing yet.

        Layer 0's row depends on token and position alone, so what an earlier request left there
        may be the very row, and a write that changes nothing would not be seen.
        """
        for cache, group in zip(self.tensors, self.group_of, strict=True):
            rows = cache.permute(0, 2, 1, 3)
            slot = torch.tensor(slots[group])
            place = (slot // rows.shape[1], slot % rows.shape[1])
            rows[place] = self._noise(cache, (len(slot), *rows.shape[2:]))

    def _numbers(self, row: Tensor) -> Tensor:
        dtype = self.dtype
        if dtype == torch.uint8:
            e5m2 = self.runner.vllm_config.cache_config.cache_dtype == "fp8_e5m2"
            dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
        return row.view(dtype).float()

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
        slots = {
            group: batch.block_table[group].slot_mapping.gpu[: starts[-1]].tolist()
            for group in self.groups
        }
        self._spoil(slots)
        before = self.caches()
        self._check_computed(before)
        self._step = {
            "ids": list(batch.req_ids),
            "starts": starts,
            "drafts": drafts,
            "slots": slots,
            "computed": batch.num_computed_tokens_cpu[:requests].tolist(),
            "texts": runner.input_ids.gpu[: starts[-1]].tolist(),
            "before": before,
        }

    def _check_computed(self, caches: list[Tensor]) -> None:
        """Every row that the scheduler believes computed is the row that some step committed."""
        batch = self.runner.input_batch
        for index in range(batch.num_reqs):
            computed = int(batch.num_computed_tokens_cpu[index])
            text = batch.token_ids_cpu[index]
            for position in range(computed):
                known = self.rows.get((batch.req_ids[index], position))
                if known is None:  # a prefix-cache hit: the row of an earlier request
                    known = self.by_text.get(text[: position + 1].tobytes())
                    self.totals["checked_hits"] += known is not None
                if known is None:
                    self.totals["lost"] += 1
                    continue
                self.totals["checked"] += 1
                self.totals["lost"] += not self._holds(caches, index, position, computed, known)

    def _holds(
        self, caches: list[Tensor], index: int, position: int, computed: int, known: Tensor
    ) -> bool:
        for layer, cache in enumerate(caches):
            window = self.windows[layer]
            if window is not None and position <= computed - window:
                continue  # out of sight; vLLM gives such blocks back
            table = self.runner.input_batch.block_table[self.group_of[layer]]
            block = int(table.block_table.gpu[index, position // table.block_size])
            slot = block * table.block_size + position % table.block_size
            if not torch.equal(cache[slot], known[layer]):
                return False
        return True

    def _sample(self, original: Any, logits: Any, metadata: Any) -> Any:
        output = original(logits, metadata)
        if self._step is not None:
            self._account(self._step, output.sampled_token_ids)
            self._step = None
        return output

    def _account(self, step: dict[str, Any], sampled: Tensor) -> None:
        totals = self.totals
        after = self.caches()
        changed = [(a != b).any(-1) for a, b in zip(after, step["before"], strict=True)]
        allowed: dict[int, set[int]] = {group: set() for group in self.groups}
        rejected: dict[int, set[int]] = {group: set() for group in self.groups}
        emitted = (sampled >= 0).sum(1).tolist()
        spans = zip(step["starts"], step["starts"][1:], step["drafts"], emitted, strict=False)
        kinds = set()
        for index, (start, end, drafts, count) in enumerate(spans):
            accepted = min(drafts, count - 1) if drafts else 0
            written = end - start - drafts + accepted
            for group in self.groups:
                slots = step["slots"][group][start:end]
                allowed[group].update(slots[:written])
                rejected[group].update(slots[written:])
            kinds.add("verify" if drafts else "decode" if end - start == 1 else "prefill")
            totals["certain"] += end - start - drafts
            totals["drafts"] += drafts
            totals["accepted"] += accepted
            if drafts:
                totals["decode_tokens"] += count
                first = step["slots"][self.group_of[0]][start:end]
                totals["decode_rows"] += int(changed[0][first].sum())
            for offset in range(written):
                self._remember(step, after, index, start, offset)
        totals["steps"] += 1
        totals["mixed_steps"] += {"verify", "prefill"} <= kinds
        self._compare(changed, allowed, rejected)

    def _compare(
        self, changed: list[Tensor], allowed: dict[int, set[int]], rejected: dict[int, set[int]]
    ) -> None:
        """Add up rejected rows that are there, rows that nobody may write, and layers that differ
        from the first of their group."""
        touched = [set(rows.nonzero().flatten().tolist()) for rows in changed]
        first: dict[int, set[int]] = {}
        present: set[tuple[int, int]] = set()
        unexpected: set[tuple[int, int]] = set()
        for layer, slots in enumerate(touched):
            group = self.group_of[layer]
            present |= {(group, slot) for slot in slots & rejected[group]}
            known = set().union(*(allowed[g] | rejected[g] for g in self.sharing[layer]))
            unexpected |= {(layer, slot) for slot in slots - known}
            mine = slots & (allowed[group] | rejected[group])
            self.totals["layers_disagree"] += len(mine ^ first.setdefault(group, mine))
        self.totals["rejected_present"] += len(present)
        self.totals["unexpected"] += len(unexpected)

    def _remember(
        self, step: dict[str, Any], after: list[Tensor], index: int, start: int, offset: int
    ) -> None:
        row = torch.stack(
            [
                cache[step["slots"][group][start + offset]]
                for cache, group in zip(after, self.group_of, strict=True)
            ]
        )
        name, position = step["ids"][index], step["computed"][index] + offset
        self.rows[name, position] = row
        # The step's own ids: a draft that was accepted is not among the batch's tokens yet.
        text = self.runner.input_batch.token_ids_cpu[index, : position + 1].copy()
        text[step["computed"][index] :] = step["texts"][start : start + offset + 1]
        self.by_text[text.tobytes()] = row
