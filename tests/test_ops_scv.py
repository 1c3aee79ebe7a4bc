"""`accept_mask`: which drafts were accepted, against a loop on the host."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from cases import Span, accept_arguments, make_batch, make_sampling

from nwor_compile import ops


def verdict(
    sampled: list[list[int]],
    drafts: list[list[int]],
    num_sampled: list[int] | None = None,
    columns: int | None = None,
    dtype: torch.dtype = torch.int32,
) -> tuple[list[bool], list[int], bool]:
    """`accept_mask` on lists, checked against the oracle; then the result as lists."""
    flat = [token for ids in drafts for token in ids]
    ends = list(itertools.accumulate(len(ids) for ids in drafts))
    width = len(sampled[0]) if columns is None and sampled else columns or 0
    mask, accepted, mismatch = ops.accept_mask(
        torch.tensor(sampled, dtype=dtype).reshape(len(sampled), width),
        torch.tensor(flat, dtype=dtype),
        torch.tensor(ends, dtype=dtype),
        None if num_sampled is None else torch.tensor(num_sampled, dtype=dtype),
    )
    want = oracle.accept(sampled, flat, ends, num_sampled)
    got = mask.tolist(), accepted.tolist(), bool(mismatch)
    assert got == (want.mask, want.accepted, want.mismatch)
    assert (mask.dtype, accepted.dtype, mismatch.dtype) == (torch.bool, torch.int32, torch.int32)
    assert list(mismatch.shape) == [1]
    return got


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("accepted", range(5))
def test_the_accepted_prefix_is_the_one_the_sampler_took(
    accepted: int, counted: bool, dtype: torch.dtype
) -> None:
    batch = make_batch([Span(3, 1, 4), Span(2, 1), Span(5, 1, 4)], index_dtype=dtype)
    sampling = make_sampling(batch, [accepted, 0, 4 - accepted], counted=counted)
    mask, taken, mismatch = ops.accept_mask(**accept_arguments(batch, sampling))
    assert taken.tolist() == [accepted, 0, 4 - accepted]
    want = [j < accepted for j in range(4)] + [j < 4 - accepted for j in range(4)]
    assert mask.tolist() == want
    assert mismatch.tolist() == [0]


def test_a_match_after_a_rejected_draft_is_not_accepted() -> None:
    assert verdict([[1, 9, 3, -1]], [[1, 2, 3]])[:2] == ([True, False, False], [1])


@pytest.mark.parametrize("accepted", range(4))
def test_ids_past_the_count_never_influence(accepted: int) -> None:
    """V2's sampler leaves garbage there; the worst garbage is the draft ids themselves."""
    batch = make_batch([Span(3, 1, 4)])
    sampling = make_sampling(batch, [accepted])
    tail = sampling.sampled_ids[0, accepted + 1 : 4]
    assert torch.equal(tail, batch.draft_ids[accepted + 1 :])
    assert ops.accept_mask(**accept_arguments(batch, sampling))[1].tolist() == [accepted]


@pytest.mark.parametrize("garbage", [-1, 0, 5, 2**31 - 1, -(2**31)])
def test_any_garbage_past_the_count_gives_the_same_result(garbage: int) -> None:
    clean = verdict([[1, 7, -1, -1], [4, -1, -1, -1]], [[1, 2, 5], [5, 5, 5]], [2, 1])
    dirty = [[1, 7, garbage, garbage], [4, garbage, garbage, garbage]]
    assert verdict(dirty, [[1, 2, 5], [5, 5, 5]], [2, 1]) == clean


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("accepted", range(4))
def test_a_sampler_that_emits_the_drafts_own_id_is_not_a_mismatch(
    accepted: int, counted: bool
) -> None:
    """Synthetic rejection: the token at the rejected place may equal the draft, and counts once."""
    batch = make_batch([Span(3, 1, 4)])
    sampling = make_sampling(batch, [accepted], echo=True, counted=counted)
    assert sampling.sampled_ids[0, accepted] == batch.draft_ids[accepted]
    mask, taken, mismatch = ops.accept_mask(**accept_arguments(batch, sampling))
    assert (taken.tolist(), mismatch.tolist()) == ([accepted], [0])
    assert int(mask.sum()) == accepted


def test_a_matching_prefix_shorter_than_the_count_is_a_mismatch() -> None:
    assert verdict([[1, 9, 3, 4]], [[1, 2, 3]], [4]) == ([True, False, False], [1], True)
    assert verdict([[1, 9, 3, 4]], [[1, 2, 3]], [3])[2] is True
    assert verdict([[1, 9, 3, 4]], [[1, 2, 3]], [2])[2] is False


def test_a_mismatch_of_one_request_is_reported_for_the_window() -> None:
    drafts = [[1, 2], [3, 4], [5, 6]]
    assert verdict([[1, 2, 8], [9, 9, 9], [5, 8, 0]], drafts, [3, 3, 2])[2] is True
    assert verdict([[1, 2, 8], [9, 9, 9], [5, 8, 0]], drafts, [3, 1, 2])[2] is False


def test_more_samples_than_drafts_and_bonus_is_a_mismatch() -> None:
    assert verdict([[1, 2, 8, 8]], [[1, 2]], [4]) == ([True, True], [2], True)


@pytest.mark.parametrize("count", [0, -5])
def test_a_chunked_prefill_that_sampled_nothing_accepts_nothing(count: int) -> None:
    assert verdict([[1, 2, 3]], [[1, 2]], [count]) == ([False, False], [0], False)


def test_placeholders_end_the_sampled_ids_at_the_first_one() -> None:
    assert verdict([[1, -1, 3, 4]], [[1, 2, 3]]) == ([False] * 3, [0], False)
    assert verdict([[-1, 1, 2, 3]], [[1, 2, 3]]) == ([False] * 3, [0], False)


def test_placeholders_of_many_rows_are_judged_row_by_row() -> None:
    sampled = [[1, 2, 3, 9], [4, 8, -1, -1], [-1, -1, -1, -1], [7, -1, -1, -1]]
    drafts = [[1, 2, 3], [4, 5, 6], [], [7, 7]]
    assert verdict(sampled, drafts)[1] == [3, 1, 0, 0]


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_too_few_columns_are_clamped(columns: int) -> None:
    """The last column read is the bonus or correction: columns - 1 drafts at most."""
    drafts = [[1, 2, 3, 4], [1, 2, 3, 4]]
    sampled = [[1, 2, 3, 4, 5][:columns], [9, 2, 3, 4, 5][:columns]]
    assert verdict(sampled, drafts, [5, 1])[1:] == ([columns - 1, 0], False)
    assert verdict(sampled, drafts)[1][0] == columns - 1


@pytest.mark.parametrize("num_sampled", [None, [3, 3]])
def test_zero_columns_accept_nothing(num_sampled: list[int] | None) -> None:
    got = verdict([[], []], [[1, 2], [3]], num_sampled, columns=0)
    assert got == ([False] * 3, [0, 0], False)


def test_no_requests_and_no_drafts() -> None:
    assert verdict([], [], columns=3) == ([], [], False)
    assert verdict([[5], [6]], [[], []]) == ([], [0, 0], False)


def test_rows_past_the_last_draft_are_never_accepted() -> None:
    """`draft_ids` may be a persistent buffer: what lies behind the drafts is stale."""
    mask, accepted, mismatch = ops.accept_mask(
        torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]),
        torch.tensor([1, 2, 1, 2, 3, 4]),
        torch.tensor([2, 4]),
        torch.tensor([3, 2]),
    )
    assert mask.tolist() == [True, True, True, False, False, False]
    assert (accepted.tolist(), mismatch.tolist()) == ([2, 1], [0])


def test_rows_past_the_last_draft_do_not_shorten_the_last_request() -> None:
    mask, accepted, _ = ops.accept_mask(
        torch.tensor([[1, 2, 9]]), torch.tensor([1, 2, 77, 77, 77]), torch.tensor([2])
    )
    assert (mask.tolist(), accepted.tolist()) == ([True, True, False, False, False], [2])


def test_requests_without_drafts_do_not_shift_their_neighbours() -> None:
    drafts = [[], [1, 2], [], [], [3, 4], []]
    sampled = [[5, 0, 0], [1, 2, 9], [5, 0, 0], [5, 0, 0], [3, 9, 0], [5, 0, 0]]
    got = verdict(sampled, drafts, [1, 3, 1, 0, 2, 1])
    assert got == ([True, True, True, False], [0, 2, 0, 0, 1, 0], False)


def test_48_drafts() -> None:
    drafts = list(range(100, 148))
    for accepted in (0, 1, 31, 47, 48):
        sampled = drafts[:accepted] + [5] + [-1] * (48 - accepted)
        assert verdict([sampled], [drafts])[1] == [accepted]


def test_every_small_case() -> None:
    """Two ids, two drafts, two columns and a bonus, every count: all of them at once."""
    tokens = (0, 1)
    cases = [
        (list(ids), [list(d)], n)
        for ids in itertools.product(tokens, repeat=3)
        for d in itertools.product(tokens, repeat=2)
        for n in range(5)
    ]
    for ids, drafts, n in cases:
        verdict([ids], drafts, [n])
    verdict([c[0] for c in cases], [c[1][0] for c in cases], [c[2] for c in cases])


def test_the_arguments_are_left_alone() -> None:
    batch = make_batch([Span(3, 1, 4)])
    arguments = accept_arguments(batch, make_sampling(batch, [2]))
    before = {name: tensor.clone() for name, tensor in arguments.items()}
    ops.accept_mask(**arguments)
    assert all(torch.equal(arguments[name], tensor) for name, tensor in before.items())
