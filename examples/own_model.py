"""NWOR in a torch.compile model of your own: one layer, one request, three drafts.

Run it: `python examples/own_model.py`. The part between the markers is quoted in the README.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import nwor_compile
from nwor_compile.ops import paged_attention, reshape_and_cache

HEADS, KV_HEADS, SIZE, BLOCKS, BLOCK_SIZE, VOCABULARY = 4, 2, 16, 8, 4, 32


class OneLayer(nn.Module):
    """Embedding, one attention layer with a paged cache, logits."""

    key_cache: Tensor
    value_cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HEADS * SIZE)
        self.qkv = nn.Linear(HEADS * SIZE, (HEADS + 2 * KV_HEADS) * SIZE)
        self.register_buffer("key_cache", torch.zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE))
        self.register_buffer("value_cache", torch.zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, SIZE))

    def forward(
        self, tokens: Tensor, slots: Tensor, block_table: Tensor, seq_lens: Tensor, starts: Tensor
    ) -> Tensor:
        """Logits `[T, vocabulary]` of a flat batch of tokens `[T]`."""
        hidden = self.embed(tokens)
        heads = self.qkv(hidden).unflatten(-1, (-1, SIZE))
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        # These two calls are all that NWOR needs to find in a model.
        reshape_and_cache(k, v, self.key_cache, self.value_cache, slots)
        out = paged_attention(
            q, self.key_cache, self.value_cache, block_table, seq_lens, starts, SIZE**-0.5
        )
        return (hidden + out.flatten(1)) @ self.embed.weight.T


def main() -> tuple[Tensor, nwor_compile.Metrics]:
    """One verification step; returns the accepted counts and the metrics."""
    torch.manual_seed(0)
    model = OneLayer()
    # The last certain token, then three drafts. An untrained model repeats its input: the first two
    # drafts will be accepted.
    tokens = torch.tensor([7, 7, 7, 3])
    draft_ids = tokens[1:]
    num_drafts, starts = torch.tensor([3]), torch.tensor([0, 4])
    slots, block_table, seq_lens = torch.arange(4), torch.tensor([[0]]), torch.tensor([4])
    # readme: begin
    layers = {"layer.0": (model.key_cache, model.value_cache)}
    window = nwor_compile.Window(layers, max_requests=8, max_drafts=4, max_tokens=512)
    step = torch.compile(model, backend="nwor")  # the pass rewrites the write and its attention

    with torch.no_grad(), window.step(num_drafts, starts, slots):
        logits = step(tokens, slots, block_table, seq_lens, starts)  # drafts go to staging
        sampled = logits.argmax(-1)
        taken = (sampled[:-1] == draft_ids).cumprod(0).sum() + 1
        sampled = torch.where(torch.arange(4) < taken, sampled, -1).view(1, -1)
        done = window.commit(sampled, draft_ids)  # accepted rows go to the cache
    print("accepted", done.accepted.tolist(), "of", num_drafts.tolist())
    # readme: end
    print(nwor_compile.last_reports()[-1])
    metrics = window.metrics()
    window.close()
    return done.accepted, metrics


if __name__ == "__main__":
    print(main()[1])
