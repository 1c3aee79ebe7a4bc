"""Repairs of vLLM 0.32's CPU sampler, for engines of the benchmark harness; users' engines keep
vLLM's own.

- `expand_batch_to_tokens` returns memory that nobody filled unless the dtype is int64, so drafts
  are verified at random temperatures. Computed here.
- `rejection_sample` refuses synthetic acceptance ("not supported with CPU sampling"). That case is
  computed here.

Both follow the Triton kernels in vLLM's `v1/sample/rejection_sampler.py`, which a GPU runs.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nwor_compile.vllm_adapter import patches

NOTE = (
    "vLLM {version}'s CPU sampler is repaired in these engines: it loses the temperatures of "
    "drafts, and has no synthetic acceptance"
)


def repair() -> None:
    """Replace the two functions in this process; a second call does nothing."""
    sampler: Any = importlib.import_module("vllm.v1.sample.rejection_sampler")
    patches.wrap(
        sampler,
        "rejection_sampler.expand_batch_to_tokens",
        lambda original, *args, **kwargs: expand_batch_to_tokens(*args, **kwargs),
    )
    patches.wrap(
        sampler,
        "rejection_sampler.rejection_sample",
        functools.partial(_rejection_sample, sampler),
    )


def expand_batch_to_tokens(
    x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> Tensor:
    """A value a request `[requests]` to a value a token `[num_tokens]`; `replace_from` becomes
    `replace_to`."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    filled = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return filled.repeat_interleave(counts, output_size=num_tokens)


def synthetic_sample(
    drafts: Tensor,
    counts: Sequence[int],
    width: int,
    uniform: Tensor,
    rates: Tensor,
    otherwise: Tensor,
    bonus: Tensor,
) -> Tensor:
    """Accept drafts by chance, whatever the target says.

    Args:
        drafts: draft token ids of all requests, `[tokens]`; -1 is never accepted.
        counts: drafts of each request.
        width: the most drafts a request can have.
        uniform: a number in [0, 1) a draft, `[tokens]`.
        rates: chance of each position, given that all before it were accepted, `[width]`.
        otherwise: what stands for a draft that is not accepted, `[tokens]`.
        bonus: what follows if all are accepted, `[requests, 1]`.

    Returns:
        int32 `[requests, width + 1]`, -1 past the last token.
    """
    out = torch.full((len(counts), width + 1), -1, dtype=torch.int32)
    start = 0
    for request, count in enumerate(counts):
        mine = slice(start, start + count)
        taken = (uniform[mine] < rates[:count]) & (drafts[mine] >= 0)
        accepted = int(taken.long().cumprod(0).sum())
        out[request, :accepted] = drafts[mine][:accepted].int()
        last = bonus[request, 0] if accepted == count else otherwise[mine][accepted]
        out[request, accepted] = last.int()
        start += count
    return out


def _rejection_sample(
    sampler: Any,
    original: Callable[..., Tensor],
    draft_token_ids: Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    bonus_token_ids: Tensor,
    sampling_metadata: Any,
    synthetic_mode: bool = False,
    synthetic_conditional_rates: Tensor | None = None,
    **more: Any,
) -> Tensor:
    given = (
        draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs,
        target_logits, bonus_token_ids, sampling_metadata,
    )  # fmt: skip
    if not synthetic_mode or synthetic_conditional_rates is None:
        return original(*given, synthetic_mode, synthetic_conditional_rates, **more)
    uniform = sampler.generate_uniform_probs(
        draft_token_ids.shape[0], num_draft_tokens, sampling_metadata.generators,
        target_logits.device,
    )  # fmt: skip
    otherwise = target_logits.argmax(-1)
    if not sampling_metadata.all_greedy:
        recovered = sampler.sample_recovered_tokens(
            max_spec_len, num_draft_tokens, cu_num_draft_tokens, draft_token_ids, draft_probs,
            target_logits.softmax(-1, dtype=torch.float32), sampling_metadata, target_logits.device,
        )  # fmt: skip
        greedy = expand_batch_to_tokens(
            sampling_metadata.temperature == 0, cu_num_draft_tokens, draft_token_ids.shape[0]
        )
        otherwise = torch.where(greedy.bool(), otherwise, recovered.long())
    return synthetic_sample(
        draft_token_ids, num_draft_tokens, max_spec_len, uniform, synthetic_conditional_rates,
        otherwise, bonus_token_ids,
    )  # fmt: skip
