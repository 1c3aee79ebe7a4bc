"""Verification: which drafts the target accepts, and the token that follows them.

Greedy: a draft stands while it is the target's argmax. At a temperature: rejection sampling
(Leviathan et al. 2023, Chen et al. 2023). Draft d, drawn from q, stands with probability
min(1, p(d) / q(d)); at the first that falls the token is drawn from the normalised max(p - q, 0),
and from p after the last draft. The result is distributed as p, whatever q is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Streams of random numbers that must be independent of each other.
DRAFT, ACCEPT, TOKEN = 1, 2, 3


@dataclass(frozen=True)
class Noise:
    """The random numbers of one step: uniform `[R, K]`; exponential `[R, K + 1, V]`."""

    accept: Tensor
    token: Tensor


def generator(seed: int, request: int, length: int, stream: int) -> torch.Generator:
    """Random numbers that depend on nothing but these four.

    Not on the step or the batch, so two runs that decide the same tokens draw the same numbers.
    """
    mixed = seed
    for part in (request, length, stream):
        mixed = (mixed * 1_000_003 + part + 1) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


def draw_noise(
    seed: int, rows: list[tuple[int, int] | None], max_drafts: int, vocab_size: int
) -> Noise:
    """Noise for a batch; `rows` are (request, tokens so far), None for an empty row."""
    accept = torch.ones(len(rows), max_drafts)
    token = torch.ones(len(rows), max_drafts + 1, vocab_size)
    for index, row in enumerate(rows):
        if row is None:
            continue
        request, length = row
        accept[index].uniform_(generator=generator(seed, request, length, ACCEPT))
        token[index].exponential_(generator=generator(seed, request, length, TOKEN))
    return Noise(accept, token)


def race(weights: Tensor, exponential: Tensor) -> Tensor:
    """Draw an index in proportion to `weights [..., V]` (the smallest Exp(weight) wins)."""
    return (weights / exponential.clamp(min=1e-30)).argmax(-1)


def verify(
    logits: Tensor,
    draft_ids: Tensor,
    num_drafts: Tensor,
    samples: Tensor,
    temperature: float,
    noise: Noise | None = None,
    draft_probs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Accept drafts and choose the token after them, on the device.

    Args:
        logits: `[R, K + 1, V]` at each request's last certain token and its drafts.
        draft_ids: `[R, K]` int64; entries past `num_drafts` are not used.
        num_drafts: `[R]`. samples: bool `[R]`, False for rows that decide nothing in this step.
        temperature: 0 is greedy and needs no noise.
        draft_probs: q, `[R, K, V]`; None if the drafter is deterministic (q is one-hot).
    Returns:
        sampled_ids: `[R, K + 1]` int64: accepted drafts, the next token, then -1.
        num_sampled: `[R]` int32, accepted drafts + 1, or 0.
    """
    requests, columns, _ = logits.shape
    column = torch.arange(columns, device=logits.device)
    drafted = column[:-1] < num_drafts.unsqueeze(1)
    ids = draft_ids.clamp(min=0)
    if temperature == 0:
        best = logits.argmax(-1)
        accept = drafted & (ids == best[:, :-1])
        accepted = accept.to(torch.int64).cumprod(1).sum(1)
        token = best.gather(1, accepted.unsqueeze(1)).squeeze(1)
    else:
        if noise is None:
            raise ValueError("verify: a temperature needs noise")
        p = torch.softmax(logits.double() / temperature, -1)
        if draft_probs is None:
            q = torch.zeros_like(p[:, :-1]).scatter_(2, ids.unsqueeze(2), 1.0)
        else:
            q = draft_probs.double()
        p_draft = p[:, :-1].gather(2, ids.unsqueeze(2)).squeeze(2)
        q_draft = q.gather(2, ids.unsqueeze(2)).squeeze(2)
        accept = drafted & (noise.accept * q_draft < p_draft)
        accepted = accept.to(torch.int64).cumprod(1).sum(1)
        row = torch.arange(requests, device=logits.device)
        # After the last draft nothing was proposed: q is zero there and the residual is p.
        q = torch.where(drafted.unsqueeze(2), q, 0.0)
        q = torch.cat((q, torch.zeros_like(p[:, :1])), 1)
        chosen = p[row, accepted]
        residual = (chosen - q[row, accepted]).clamp(min=0)
        # p == q leaves no residual, and rejects with probability zero; rounding may still get here.
        residual = torch.where(residual.sum(1, keepdim=True) > 0, residual, chosen)
        token = race(residual, noise.token[row, accepted].double())
    padded = torch.cat((ids, ids.new_zeros(requests, 1)), 1)
    place = accepted.unsqueeze(1)
    sampled = torch.where(column < place, padded, -1)
    sampled = torch.where(column == place, token.unsqueeze(1), sampled)
    sampled = torch.where(samples.unsqueeze(1), sampled, -1)
    return sampled, torch.where(samples, accepted + 1, 0).to(torch.int32)


def verify_rows(query_start_loc: Tensor, num_drafts: Tensor, max_drafts: int) -> Tensor:
    """`[R, K + 1]` rows of the flat batch: each request's last certain token and its drafts.

    Columns past a request's drafts, and empty requests, give some row of the batch: unused.
    """
    first = query_start_loc[1:].long() - 1 - num_drafts
    rows = first.unsqueeze(1) + torch.arange(max_drafts + 1, device=num_drafts.device)
    last = query_start_loc[1:].long().unsqueeze(1) - 1
    return torch.minimum(rows, last).clamp(min=0)
