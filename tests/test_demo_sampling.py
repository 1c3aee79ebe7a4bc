"""Rejection sampling keeps the target's distribution, whatever the drafter proposes."""

import pytest
import torch

from nwor_compile.demo.sampling import (
    ACCEPT,
    DRAFT,
    Noise,
    draw_noise,
    generator,
    race,
    verify,
    verify_rows,
)

VOCAB, DRAFTS, RUNS = 6, 2, 40_000
# Expected total variation of 40,000 draws over 6 outcomes is about 0.004, over 36 about 0.012.
FIRST, PAIR = 0.015, 0.03


def distributions(seed):
    source = torch.Generator().manual_seed(seed)
    logits = torch.randn(DRAFTS + 1, VOCAB, generator=source) * 1.5
    drafter = torch.softmax(torch.randn(DRAFTS, VOCAB, generator=source) * 1.5, -1)
    return logits, drafter.double()


def run_verify(logits, q, draft_ids, source, one_hot=False):
    noise = Noise(
        torch.rand(RUNS, DRAFTS, generator=source),
        torch.empty(RUNS, DRAFTS + 1, VOCAB).exponential_(generator=source),
    )
    return verify(
        logits.expand(RUNS, -1, -1), draft_ids, torch.full((RUNS,), DRAFTS),
        torch.ones(RUNS, dtype=torch.bool), 1.0, noise,
        None if one_hot else q.expand(RUNS, -1, -1),
    )  # fmt: skip


def total_variation(tokens, expected):
    found = torch.bincount(tokens, minlength=len(expected)).double() / len(tokens)
    return float((found - expected).abs().sum() / 2)


@pytest.mark.parametrize("one_hot", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_emitted_tokens_are_distributed_as_the_target(seed, one_hot):
    logits, q = distributions(seed)
    source = torch.Generator().manual_seed(seed + 10)
    draws = torch.empty(RUNS, DRAFTS, VOCAB, dtype=torch.float64).exponential_(generator=source)
    # A deterministic drafter proposes always the same; a sampled one draws from q.
    drafts = logits[:-1].argmax(-1).expand(RUNS, -1) if one_hot else race(q, draws)
    sampled, count = run_verify(logits, q, drafts, source, one_hot)
    p = torch.softmax(logits.double(), -1)
    assert total_variation(sampled[:, 0], p[0]) < FIRST
    assert 0.05 < float((count > 1).double().mean()) < 0.95
    two = sampled[count >= 2]
    # Given that the first draft stood, the second token is distributed as p of the second place.
    assert total_variation(two[:, 1], p[1]) < PAIR


def test_the_test_notices_a_sampler_without_the_residual():
    logits, q = distributions(0)
    source = torch.Generator().manual_seed(5)
    draws = torch.empty(RUNS, DRAFTS, VOCAB, dtype=torch.float64).exponential_(generator=source)
    drafts = race(q, draws)
    sampled, count = run_verify(logits, q, drafts, source)
    p = torch.softmax(logits.double(), -1)
    fresh = race(p[0].expand(RUNS, -1), torch.empty(RUNS, VOCAB).exponential_(generator=source))
    biased = torch.where(count == 1, fresh, sampled[:, 0])
    assert total_variation(biased, p[0]) > 3 * FIRST


def test_greedy_accepts_the_matching_prefix_and_places_the_next_token():
    best = torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    logits = torch.nn.functional.one_hot(best, VOCAB).float()
    drafts = torch.tensor([[1, 2], [1, 5], [5, 2], [-1, -1], [1, -1]])
    sampled, count = verify(
        logits, drafts, torch.tensor([2, 2, 2, 0, 1]), torch.tensor([True] * 4 + [False]), 0.0
    )
    assert sampled.tolist() == [[1, 2, 3], [1, 2, -1], [1, -1, -1], [1, -1, -1], [-1, -1, -1]]
    assert count.tolist() == [3, 2, 1, 1, 0]
    assert count.dtype == torch.int32


def test_noise_depends_on_request_and_length_alone():
    alone = draw_noise(7, [(3, 20)], 2, 5)
    among = draw_noise(7, [(1, 9), None, (3, 20)], 2, 5)
    torch.testing.assert_close(alone.token[0], among.token[2], rtol=0, atol=0)
    torch.testing.assert_close(alone.accept[0], among.accept[2], rtol=0, atol=0)
    assert not torch.equal(alone.accept[0], draw_noise(7, [(3, 21)], 2, 5).accept[0])
    streams = [torch.rand(4, generator=generator(0, 1, 2, s)) for s in (DRAFT, ACCEPT)]
    assert not torch.equal(streams[0], streams[1])


def test_a_temperature_without_noise_is_an_error():
    with pytest.raises(ValueError, match="needs noise"):
        verify(
            torch.zeros(1, 3, 4), torch.zeros(1, 2, dtype=torch.int64), torch.tensor([2]),
            torch.tensor([True]), 0.5,
        )  # fmt: skip


def test_rows_of_a_mixed_batch():
    starts, drafts = torch.tensor([0, 3, 3, 7, 8]), torch.tensor([0, 0, 3, 0])
    rows = verify_rows(starts, drafts, 3)
    assert rows[0, 0] == 2
    assert rows[2].tolist() == [3, 4, 5, 6]
    assert rows[3, 0] == 7
    assert int(rows.max()) <= 7
