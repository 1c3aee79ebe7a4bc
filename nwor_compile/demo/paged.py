"""A paged KV cache: a pool of blocks, a block table a request, and the slot of a position."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from nwor_compile.demo.model import LlamaConfig


class OutOfBlocksError(RuntimeError):
    """The pool has no free block, or a request outgrew its block table."""


class PagedCache:
    """The caches of one model and who owns which block.

    Args:
        config: geometry of the model.
        num_blocks, block_size: the pool; `num_blocks * block_size` slots.
        table_width: blocks a request may have, the fixed width of the block table. Fixed, because
            a width that grew would be one more dynamic dimension of the compiled graph.
        seed: order in which blocks are handed out. Scattered blocks make a wrong slot visible.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        num_blocks: int,
        block_size: int,
        table_width: int,
        seed: int = 0,
    ) -> None:
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        # One tensor a cache: views of one storage would be aliased inputs to a compiled graph.
        self.key_caches = [torch.zeros(shape) for _ in range(config.num_hidden_layers)]
        self.value_caches = [torch.zeros(shape) for _ in range(config.num_hidden_layers)]
        self.num_blocks, self.block_size, self.table_width = num_blocks, block_size, table_width
        self._free = list(range(num_blocks))
        random.Random(seed).shuffle(self._free)
        self._tables: dict[int, list[int]] = {}

    @property
    def layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Name to (key cache, value cache), as `Window` takes them."""
        pairs = zip(self.key_caches, self.value_caches, strict=True)
        return {f"layers.{index}.self_attn": pair for index, pair in enumerate(pairs)}

    @property
    def num_slots(self) -> int:
        """Rows in each layer's cache."""
        return self.num_blocks * self.block_size

    @property
    def row_bytes(self) -> int:
        """Bytes of one token row: K and V of all layers."""
        first = self.key_caches[0]
        return 2 * len(self.key_caches) * first[0, 0].numel() * first.element_size()

    @property
    def free_blocks(self) -> int:
        """Blocks that no request owns."""
        return len(self._free)

    def grow(self, request: int, length: int) -> None:
        """Give `request` blocks for `length` rows; else OutOfBlocksError, nothing changed."""
        table = self._tables.get(request, [])
        missing = -(-length // self.block_size) - len(table)
        if len(table) + missing > self.table_width:
            raise OutOfBlocksError(
                f"request {request} needs {len(table) + missing} blocks for {length} rows, its "
                f"block table has {self.table_width}: lower max_new_tokens or the prompt's length"
            )
        if missing > len(self._free):
            raise OutOfBlocksError(
                f"request {request} needs {missing} more blocks, {len(self._free)} are free"
            )
        self._tables[request] = table + [self._free.pop() for _ in range(missing)]

    def release(self, request: int) -> None:
        """Return the blocks of `request` to the pool; their rows stay as they are."""
        self._free.extend(self._tables.pop(request, []))

    def slots(self, request: int, start: int, stop: int) -> list[int]:
        """The slots of positions `start` to `stop - 1`."""
        table, size = self._tables[request], self.block_size
        return [table[p // size] * size + p % size for p in range(start, stop)]

    def block_table(self, requests: Sequence[int | None]) -> Tensor:
        """int32 `[len(requests), table_width]`; zeros where there is no block or no request."""
        rows = []
        for request in requests:
            table = self._tables.get(request, []) if request is not None else []
            rows.append(table + [0] * (self.table_width - len(table)))
        return torch.tensor(rows, dtype=torch.int32)

    def rows(self, slots: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """K and V `[len(slots), Hkv, D]` of every layer at `slots`."""
        index = torch.tensor(slots, dtype=torch.int64)
        return [
            (key.flatten(0, 1)[index], value.flatten(0, 1)[index])
            for key, value in zip(self.key_caches, self.value_caches, strict=True)
        ]
