"""A second copy of the target's caches that accepted rows alone reach, and what differs from it.

The accounting of `long_watch.py`, on tensors of any device: slots, counts, ids and positions are
the engine's own. Unlike `row_audit.py` it writes nothing into the caches and reads nothing back to
the host in a step, so an engine runs as it does without it, and it sees the cache as it stands at
any step, not only what one step changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
UNTOUCHED, ACCEPTED, REJECTED = 0, 1, 2
FAULTS = ("rejected", "marked", "changed", "not_a_number", "uncommitted", "misplaced")
COLUMNS = ("step", *FAULTS, "rows", "computed", "digest")


@dataclass(frozen=True)
class Step:
    """One step of R requests and T tokens, on the caches' device.

    slots `[T]`; starts `[R + 1]`: first token of each request; drafts `[R]`: of each, at the end
    of its tokens; tokens, positions `[T]`; lengths `[R]`: computed tokens, with this step's; table
    `[R or more, columns]`: blocks of each request.
    """

    slots: Tensor
    starts: Tensor
    drafts: Tensor
    tokens: Tensor
    positions: Tensor
    lengths: Tensor
    table: Tensor


class CacheShadow:
    """`follow` each step; `look` at any of them.

    Args:
        caches: of the target's layers, `[blocks, block, ...]` as `row_audit.rows_of` gives them,
            all of one KV-cache group.
        blocks: how many the engine's allocator hands out; tail blocks behind them are not kept.
        drafts: most of a request. looks: how many are kept; later ones are counted only.
    """

    @torch.inference_mode()
    def __init__(self, caches: Sequence[Tensor], blocks: int, drafts: int, looks: int) -> None:
        if len({cache.shape[1] for cache in caches}) != 1:
            raise ValueError("the layers have blocks of different sizes")
        self.caches = [cache[:blocks] for cache in caches]
        self.block = caches[0].shape[1]
        device = caches[0].device
        self.kept = [self._bits(cache).clone() for cache in self.caches]
        slots, width = self.kept[0].shape
        generator = torch.Generator().manual_seed(0)
        self._weights = torch.randint(
            -(2**62), 2**62, (len(caches), width), generator=generator, dtype=torch.int64
        ).to(device)
        self._odd = 2 * torch.arange(slots, dtype=torch.int64, device=device) + 1
        self.state = torch.zeros(slots, dtype=torch.uint8, device=device)
        self.token = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self.position = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self._places = torch.arange(drafts, device=device)
        # Per position: drafted, accepted. Then: certain tokens, verified requests.
        self._positions = torch.zeros(2, drafts, dtype=torch.int64, device=device)
        self._counts = torch.zeros(2, dtype=torch.int64, device=device)
        self._looks = torch.zeros(looks, len(COLUMNS), dtype=torch.int64, device=device)
        self.steps = self.looked = 0

    @torch.inference_mode()
    def forget(self) -> None:
        """Start counting again. What is known of the rows stays."""
        self._positions.zero_()
        self._counts.zero_()
        self._looks.zero_()
        self.steps = self.looked = 0

    @torch.inference_mode()
    def follow(self, step: Step, sampled: Tensor) -> None:
        """The step sampled and committed; nothing else has run since. sampled `[R]`: new tokens
        of each request, of which all but one are accepted drafts."""
        requests, count = step.drafts.shape[0], step.slots.shape[0]
        spans = step.starts[1:] - step.starts[:-1]
        owner = torch.repeat_interleave(
            torch.arange(requests, device=spans.device), spans, output_size=count
        )
        accepted = torch.where(step.drafts > 0, sampled - 1, 0).clamp(min=0)
        accepted = torch.minimum(accepted, step.drafts)
        written = spans - step.drafts + accepted
        local = torch.arange(count, device=spans.device) - step.starts[:-1][owner]
        good = local < written[owner]
        for cache, kept in zip(self.caches, self.kept, strict=True):
            rows = self._bits(cache[step.slots // self.block, step.slots % self.block][:, None])
            kept[step.slots] = torch.where(good[:, None], rows, kept[step.slots])
        self.state[step.slots] = torch.where(good, ACCEPTED, REJECTED).to(torch.uint8)
        for store, new in ((self.token, step.tokens), (self.position, step.positions)):
            store[step.slots] = torch.where(good, new.long(), store[step.slots])
        drafted = step.drafts[:, None] > self._places
        self._positions[0] += drafted.sum(0)
        self._positions[1] += (drafted & (accepted[:, None] > self._places)).sum(0)
        self._counts[0] += (spans - step.drafts).sum()
        self._counts[1] += (step.drafts > 0).sum()
        self._written, self._spans = written, spans
        self.steps += 1

    @torch.inference_mode()
    def look(self, step: Step | None = None, known: Tensor | None = None) -> None:
        """Compare the whole cache with the copy; and after `follow` of a step, the blocks of its
        requests with their ids, `known` before it: `[R, length]`."""
        if self.looked >= len(self._looks):
            self.looked += 1
            return
        zero = torch.zeros_like(self.state, dtype=torch.bool)
        differs, not_poison, not_a_number = zero.clone(), zero.clone(), zero.clone()
        digest = torch.zeros_like(self._odd)
        for layer, (cache, kept) in enumerate(zip(self.caches, self.kept, strict=True)):
            bits = self._bits(cache)
            unlike = (bits != kept).any(-1)
            nan = self._numbers(cache).isnan()
            differs |= unlike
            not_poison |= unlike & ~nan.all(-1)
            not_a_number |= nan.any(-1)
            digest += (bits.long() * self._weights[layer]).sum(-1)
        accepted, rejected = self.state == ACCEPTED, self.state == REJECTED
        uncommitted, misplaced, computed = torch.zeros(3, dtype=torch.int64, device=digest.device)
        if step is not None and known is not None:
            uncommitted, misplaced, computed = self._requests(step, known.long())
        found = {
            "rejected": (rejected & not_poison).sum(),
            "marked": (rejected & differs & ~not_poison).sum(),
            "changed": (differs & ~rejected).sum(),
            "not_a_number": (accepted & not_a_number).sum(),
            "uncommitted": uncommitted,
            "misplaced": misplaced,
            "rows": accepted.sum(),
            "computed": computed,
            "digest": (digest * self._odd * accepted).sum(),
        }
        row = self._looks[self.looked]
        row[0] = self.steps
        row[1:] = torch.stack([found[name] for name in COLUMNS[1:]])
        self.looked += 1

    def _requests(self, step: Step, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of all rows that the step's requests have computed: how many are not accepted rows; how
        many are those of another token or position; how many there are."""
        requests = step.drafts.shape[0]
        place = torch.arange(known.shape[1], device=self.state.device)
        before = (step.lengths - self._spans)[:, None]
        computed = place < before + self._written[:, None]
        blocks = step.table[:requests].long()
        columns = (place // self.block).clamp(max=blocks.shape[1] - 1)
        slots = blocks[:, columns] * self.block + place % self.block
        slots = torch.where(computed, slots, 0)
        bad = computed & (self.state[slots] != ACCEPTED)
        # What a step accepts becomes known after it.
        other = (self.token[slots] != known) & (place < before)
        other |= (self.position[slots] != place) & computed
        return bad.sum(), other.sum(), computed.sum()

    def result(self) -> dict[str, Any]:
        """Counts since `forget`, and the looks as rows of `COLUMNS`. Waits for the device."""
        drafted, accepted = self._positions.tolist()
        certain, verified = self._counts.tolist()
        return {
            "steps": self.steps,
            "certain": certain,
            "verified": verified,
            "drafts": sum(drafted),
            "accepted": sum(accepted),
            "drafted_per_position": drafted,
            "accepted_per_position": accepted,
            "looked": self.looked,
            "looks": self._looks[: self.looked].tolist(),
        }

    def _bits(self, cache: Tensor) -> Tensor:
        """`[slots, row]`, raw bits, since NaN is unlike itself; a copy if the memory needs it."""
        return cache.view(BITS[cache.element_size()]).flatten(0, 1).flatten(1)

    def _numbers(self, cache: Tensor) -> Tensor:
        return cache.flatten(0, 1).flatten(1)
