"""Which rows of the target's caches did a step change? The accounting of `step_audit.py`.

It knows nothing of windows, staging and runners, and runs on CPU tensors as well: slots, draft
counts and accepted counts are the engine's own, and a row counts as changed when its bits did.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def rows_of(cache: Tensor) -> Tensor:
    """A layer's cache as `[blocks, block, ...]`, a view; one row is one token's K and V.

    Raises ValueError for a shape that is none of vLLM's: `[blocks, kv_heads, block, 2 * D]`
    (packed, FLASH_ATTN and TRITON_ATTN of 0.26), `[2, blocks, block, kv_heads, D]` and
    `[blocks, 2, block, kv_heads, D]` (K and V apart), `[blocks, block, width]` (MLA).
    """
    shape = list(cache.shape)
    if cache.dim() == 3:
        return cache
    if cache.dim() == 4:
        return cache.transpose(1, 2)
    if cache.dim() == 5 and shape[0] == 2:
        return cache.permute(1, 2, 0, 3, 4)
    if cache.dim() == 5 and shape[1] == 2:
        return cache.permute(0, 2, 1, 3, 4)
    raise ValueError(f"a cache of shape {shape} is not one that this audit can read")


@dataclass(frozen=True)
class AuditedLayer:
    """One attention layer of the target.

    cache: as `rows_of` gives it. group: of its slots. block_size: rows of one block of the
    allocator; the cache may be cut into smaller ones. dtype: what its bytes mean, where the cache
    holds raw bytes (vLLM's fp8 caches are uint8); None: the tensor's own.
    """

    name: str
    group: int
    cache: Tensor
    block_size: int
    dtype: torch.dtype | None = None

    @property
    def memory(self) -> int:
        """Layers of several groups may lie in the same memory, in other blocks of it."""
        return self.cache.untyped_storage().data_ptr()


class RowAudit:
    """Compares the caches before and after a step; totals count since `clear`.

    Args:
        layers: the target's, none twice.
        blocks: how many blocks the engine's allocator hands out. What lies behind them (tail
            blocks, where drafts are staged) is not looked at.
    """

    def __init__(self, layers: Sequence[AuditedLayer], blocks: int) -> None:
        if not layers:
            raise ValueError("the target has no attention layer to audit")
        self.layers, self.blocks = list(layers), blocks
        self.groups = sorted({layer.group for layer in layers})
        # Other groups whose layers lie in the memory of a layer, each with its block size.
        self._beside = {
            layer.name: {
                other.group: other.block_size
                for other in layers
                if other.memory == layer.memory and other.group != layer.group
            }
            for layer in layers
        }
        device = layers[0].cache.device
        # A generator of its own: the engine's samplers draw from the default one.
        self._noise = torch.Generator(device=device)
        self._noise.manual_seed(0)
        self.totals: Counter[str] = Counter()
        self._before: list[Tensor] | None = None
        self._slots: dict[int, list[int]] = {}

    def clear(self) -> None:
        """Forget the totals, and a step that never ended."""
        self.totals.clear()
        self._before = None

    def before(self, slots: Mapping[int, Tensor]) -> None:
        """The step is about to run. slots: `[tokens]` of each group, without padding."""
        self._slots = {group: slots[group].tolist() for group in self.groups}
        for layer in self.layers:
            self._spoil(layer, slots[layer.group].long())
        self._before = [self._bits(layer) for layer in self.layers]

    @property
    def open(self) -> bool:
        """A step began and did not end."""
        return self._before is not None

    def after(self, starts: Sequence[int], drafts: Sequence[int], accepted: Sequence[int]) -> None:
        """The step sampled; nothing else has run since.

        Args:
            starts: first token of each request in `slots`, and the number of tokens.
            drafts: of each request, at the end of its tokens.
            accepted: how many of them, from the first on.
        """
        if self._before is None:
            return
        before, self._before = self._before, None
        changed = [
            set((a != self._bits(layer)).any(-1).nonzero().flatten().tolist())
            for a, layer in zip(before, self.layers, strict=True)
        ]
        allowed: dict[int, set[int]] = {group: set() for group in self.groups}
        rejected: dict[int, set[int]] = {group: set() for group in self.groups}
        first, kinds = changed[0], set()
        for index, count in enumerate(drafts):
            start, end = starts[index], starts[index + 1]
            written = end - start - count + accepted[index]
            for group, slots in self._slots.items():
                allowed[group].update(slots[start : start + written])
                rejected[group].update(slots[start + written : end])
            kinds.add("verify" if count else "decode" if end - start == 1 else "prefill")
            self.totals["certain"] += end - start - count
            self.totals["drafts"] += count
            self.totals["accepted"] += accepted[index]
            if count:
                self.totals["decode_tokens"] += accepted[index] + 1
                own = set(self._slots[self.layers[0].group][start:end])
                self.totals["decode_rows"] += len(first & own)
        self.totals["steps"] += 1
        self.totals["mixed_steps"] += {"verify", "prefill"} <= kinds
        for layer, slots_changed in zip(self.layers, changed, strict=True):
            self._count(layer, slots_changed, allowed, rejected)

    def _count(
        self,
        layer: AuditedLayer,
        changed: set[int],
        allowed: Mapping[int, set[int]],
        rejected: Mapping[int, set[int]],
    ) -> None:
        self.totals["rejected_present"] += len(changed & rejected[layer.group])
        self.totals["missing"] += len(allowed[layer.group] - changed)
        rest = changed - allowed[layer.group] - rejected[layer.group]
        # A block belongs to one group at a time. What another group wrote in its own blocks shows
        # here too, and is judged where its layers are.
        theirs = {
            slot // size
            for group, size in self._beside[layer.name].items()
            for slot in allowed[group] | rejected[group]
        }
        self.totals["unexpected"] += sum(row // layer.block_size not in theirs for row in rest)

    def _spoil(self, layer: AuditedLayer, slots: Tensor) -> None:
        """Noise in the slots of this step's tokens, which hold nothing yet: what an earlier request
        left there may be the very row, and reading a row before its write must show."""
        size = layer.cache.shape[1]
        shape = (slots.shape[0], *layer.cache.shape[2:])
        noise = torch.empty(shape, dtype=torch.float32, device=layer.cache.device)
        noise.uniform_(-8, 8, generator=self._noise)
        values = noise.to(layer.dtype or layer.cache.dtype)
        layer.cache[slots // size, slots % size] = values.view(layer.cache.dtype)

    def _bits(self, layer: AuditedLayer) -> Tensor:
        """`[slots, row]`, a copy as raw bits (NaN compares equal to itself)."""
        usable = layer.cache[: self.blocks * layer.block_size // layer.cache.shape[1]]
        bits = usable.view(BITS[usable.element_size()])
        return bits.flatten(0, 1).flatten(1).clone()
