"""The built-in model that shows both outcomes of the pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BLOCKS, BLOCK_SIZE, KV_HEADS, HEADS, HEAD_SIZE = 4, 4, 1, 2, 16
TOKENS = 3
# What the pass must decide on it.
STAGED, DIRECT = 2, 1


class SampleModel(nn.Module):
    """Three cached layers. The last one's cache is also read by plain indexing, which would miss
    staged rows: the pass must stage the first two and leave the last one direct.
    """

    def __init__(self) -> None:
        super().__init__()
        size = HEADS * HEAD_SIZE
        self.query = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        self.cached = nn.ModuleList(nn.Linear(size, 2 * KV_HEADS * HEAD_SIZE) for _ in range(3))
        self.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        caches: list[Tensor],
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states, and a value that an ordinary op read from the last layer's cache."""
        for index, (project_q, project_kv) in enumerate(zip(self.query, self.cached, strict=True)):
            key_cache, value_cache = caches[2 * index], caches[2 * index + 1]
            query = project_q(x).view(-1, HEADS, HEAD_SIZE)
            key, value = project_kv(x).view(-1, 2, KV_HEADS, HEAD_SIZE).unbind(1)
            torch.ops.nwor.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)
            out = torch.ops.nwor.paged_attention(
                query, key_cache, value_cache, block_table, seq_lens, query_start_loc, 0.25
            )
            x = x + out.flatten(1)
        return x, caches[-1][0].sum()


def sample() -> tuple[SampleModel, tuple[Any, ...]]:
    """The sample model and its inputs, as a `--model` factory returns them."""
    torch.manual_seed(0)
    caches = [torch.zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_SIZE) for _ in range(6)]
    batch = (torch.tensor([[0, 1, 2, 3]]), torch.tensor([TOKENS]), torch.tensor([0, TOKENS]))
    x = torch.randn(TOKENS, HEADS * HEAD_SIZE)
    return SampleModel(), (x, caches, torch.arange(TOKENS), *batch)
