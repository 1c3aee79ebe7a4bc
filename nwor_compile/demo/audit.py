"""The audit: what reached the cache, from the cache itself. No counter is trusted.

After every step the whole cache is compared, bit by bit, with what it held when the step's window
began. Each row that changed belongs to a decided token (a prompt token, the last sampled token, an
accepted draft), to a draft that was rejected, or to nobody. When a request ends, all of its rows
are compared with a forward pass over its tokens that uses neither our ops nor any cache.

Both together give the property at every step boundary: a row is written once and does not change
after that, and what it holds in the end is right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, computed_field
from torch import Tensor

from nwor_compile.demo.model import Llama
from nwor_compile.demo.paged import PagedCache
from nwor_compile.demo.schedule import Request, Span

# The dense pass adds up in another order than the paged one: float32 rounding alone makes the two
# differ, by below 1e-6 of a layer's largest element in the demo's four layers. What a wrong row
# differs by is 0.1 and more. The tolerance leaves room for other machines' rounding below that.
TOLERANCE = 1e-4


class AuditResult(BaseModel):
    """Rows are token rows: all layers' K and V together, counted once.

    prompt_rows, generated_rows: rows that changed in the slots of decided tokens.
    rejected_rows: rows that changed in the slots of drafts of that step that were rejected, of
        `rejected_offered` such drafts.
    stray_rows: rows that changed in slots of no token of that step.
    repeated_rows: decided tokens' rows that changed in a later step.
    missing_rows: decided tokens of a step whose row did not change in it.
    wrong_rows: rows, of `checked_rows`, that differ from the recomputed pass by more than
        `tolerance` of the largest element of their layer; `worst_difference` is the largest
        difference, in that measure.
    """

    prompt_rows: int = 0
    generated_rows: int = 0
    rejected_rows: int = 0
    rejected_offered: int = 0
    stray_rows: int = 0
    repeated_rows: int = 0
    missing_rows: int = 0
    checked_rows: int = 0
    wrong_rows: int = 0
    worst_difference: float = 0.0
    tolerance: float = TOLERANCE

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_written(self) -> int:
        """Every row that changed."""
        return self.prompt_rows + self.decode_rows

    @computed_field  # type: ignore[prop-decorator]
    @property
    def decode_rows(self) -> int:
        """Rows that changed, those of the prompts aside."""
        return self.generated_rows + self.rejected_rows + self.stray_rows + self.repeated_rows

    @computed_field  # type: ignore[prop-decorator]
    @property
    def clean(self) -> bool:
        """The cache holds the accepted sequences and nothing was written elsewhere or twice."""
        return not (
            self.rejected_rows
            or self.stray_rows
            or self.repeated_rows
            or self.missing_rows
            or self.wrong_rows
        )


def changed_slots(cache: PagedCache, before: list[Tensor]) -> set[int]:
    """Slots where any bit of any layer's K or V differs from `before`."""
    changed = torch.zeros(cache.num_slots, dtype=torch.bool)
    for old, new in zip(before, cache.key_caches + cache.value_caches, strict=True):
        # Bits, not values: a poisoned slot holds NaN, which equals nothing.
        differs = old.view(torch.int32) != new.view(torch.int32)
        changed |= differs.flatten(2).any(2).flatten()
    return set(changed.nonzero().flatten().tolist())


@dataclass
class CacheAudit:
    """The audit of one run over `cache`; `model` recomputes."""

    cache: PagedCache
    model: Llama
    result: AuditResult = field(default_factory=AuditResult)
    _before: list[Tensor] = field(default_factory=list)

    def before(self) -> None:
        """Snapshot the caches. Called once the window has begun: poison is not a row."""
        self._before = [c.clone() for c in self.cache.key_caches + self.cache.value_caches]

    def after(self, spans: list[Span | None], accepted: list[int]) -> set[int]:
        """Account for every row that changed; return the slots that hold a rejected draft."""
        changed = changed_slots(self.cache, self._before)
        result, rejected_here = self.result, set()
        for span, taken in zip(spans, accepted, strict=True):
            if span is None:
                continue
            kept = span.start + span.certain + taken
            slots = self.cache.slots(span.request.id, 0, span.stop)
            prompt = len(span.request.prompt)
            for position, slot in enumerate(slots):
                hit = slot in changed
                changed.discard(slot)
                if position >= kept:
                    result.rejected_offered += 1
                    result.rejected_rows += hit
                    rejected_here |= {slot} if hit else set()
                elif position < span.start:
                    result.repeated_rows += hit
                else:
                    result.missing_rows += not hit
                    result.prompt_rows += hit and position < prompt
                    result.generated_rows += hit and position >= prompt
        result.stray_rows += len(changed)
        return rejected_here

    def finish(self, request: Request) -> None:
        """Compare all rows of a request with a recomputed pass over its tokens."""
        count = request.computed
        if not count:
            return
        slots = self.cache.slots(request.id, 0, count)
        _, expected = self.model.dense(torch.tensor(request.tokens[:count]))
        wrong = torch.zeros(count, dtype=torch.bool)
        for pair, want_pair in zip(self.cache.rows(slots), expected, strict=True):
            for rows, want in zip(pair, want_pair, strict=True):
                size = want.abs().max().clamp(min=1e-6)
                difference = (rows - want).abs().flatten(1).amax(1) / size
                # `not <=` also catches NaN.
                wrong |= ~(difference <= TOLERANCE)
                worst = float(difference.nan_to_num(float("inf")).max().item())
                self.result.worst_difference = max(self.result.worst_difference, worst)
        self.result.checked_rows += count
        self.result.wrong_rows += int(wrong.sum().item())
