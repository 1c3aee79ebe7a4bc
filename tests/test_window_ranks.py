"""A window of a model that is split over ranks, and one whose engine finds layers by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from window_support import ALL, NONE, SOME, registered, rig

from nwor_compile import NworConfig, Window, WindowInputError


def test_another_ranks_flag_stops_the_commit_here() -> None:
    def other_rank_failed(error: Tensor) -> None:
        error.fill_(1)

    with rig(window={"share_error": other_rank_failed}) as r:
        before = r.rows()
        result = r.run(ALL)
        assert result.accepted.tolist() == NONE
        assert r.holds(r.expected(before, NONE))
        assert r.window.metrics().nwor_error_windows == 1


@pytest.mark.parametrize("scv", ["off", "graph", "adaptive"])
def test_the_flag_is_shared_once_a_commit_with_all_causes_and_before_any_write(scv: str) -> None:
    seen: list[tuple[int, bool]] = []
    with rig(window={"share_error": lambda error: seen.append((int(error), kept()))}, scv=scv) as r:
        before = r.rows()

        def kept() -> bool:
            return r.holds(r.expected(before, NONE))

        r.run(SOME)
        assert seen == [(0, True)]
        seen.clear()
        r.begin()
        r.forward(skip=[1])  # this rank's own fault
        r.commit(ALL)
        assert [bits != 0 for bits, _ in seen] == [True]


def test_ids_that_do_not_fit_still_take_part_in_sharing() -> None:
    """A rank that left the reduction out would leave the others waiting."""
    calls: list[int] = []
    with rig(window={"share_error": lambda error: calls.append(int(error))}) as r:
        r.begin()
        r.forward()
        r.window.commit(torch.zeros(1, 1), r.batch.draft_ids)
        assert r.window.fallbacks == 1
        assert calls == [0]


def window(groups: dict[str, str], *, by_name: bool) -> Window:
    """Two layers on the same memory."""
    key, value = torch.zeros(4, 8, 2, 16), torch.zeros(4, 8, 2, 16)
    return Window(
        {"a": (key, value), "b": (key, value)},
        max_requests=2,
        max_drafts=2,
        max_tokens=16,
        config=NworConfig(),
        groups=groups,
        by_name=by_name,
    )


def test_layers_of_two_groups_may_share_memory_if_they_are_found_by_name() -> None:
    before = registered()
    made = window({"a": "0", "b": "1"}, by_name=True)
    assert made.layers.keys() == {"a", "b"}
    assert registered() == before
    made.close()


@pytest.mark.parametrize(
    ("groups", "by_name"), [({"a": "0", "b": "1"}, False), ({"a": "0", "b": "0"}, True)]
)
def test_other_layers_on_one_memory_are_refused(groups: dict[str, str], by_name: bool) -> None:
    with pytest.raises(WindowInputError, match="layers that share a cache are one layer"):
        window(groups, by_name=by_name)
