"""`benchmarks/lookahead.py` on a small cache: it counts what vLLM's allocator does."""

from __future__ import annotations

import math
import runpy
from pathlib import Path
from typing import Any

import pytest

from nwor_compile.tail_blocks import tail_blocks_needed

pytestmark = pytest.mark.vllm
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "lookahead.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def by_hand(blocks: int, context: int, slots: int) -> int:
    """One block of vLLM's is never handed out."""
    count, left = 0, blocks - 1
    while True:
        tokens = context + count % 16 + 1 + slots
        left -= math.ceil(tokens / 16)
        if left < 0:
            return count
        count += 1


@pytest.mark.parametrize("slots", [0, 8, 16, 25, 48])
def test_requests_fit_as_many_as_their_blocks_do(script: dict[str, Any], slots: int) -> None:
    for context in (16, 100, 512):
        assert script["fitting"](400, context, slots) == by_hand(400, context, slots)


def test_tail_blocks_of_those_that_run_are_paid_for(script: dict[str, Any]) -> None:
    count = script["fitting_with_tail_blocks"](400, 100, 8)

    def fits(requests: int) -> bool:
        left = 400 - tail_blocks_needed(requests, 8, 16)
        return by_hand(left, 100, script["SLOTS"]["async"](8)) >= requests

    assert fits(count)
    assert not fits(count + 1)


def test_a_queue_ends_and_slots_for_drafts_cost_room(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    played = {slots: script["play"](48, slots, 900, 40) for slots in ("none", "verified", "eagle")}
    tokens = {round(each.tokens_per_step * each.steps) for each in played.values()}
    assert max(tokens) - min(tokens) < 0.05 * max(tokens)
    assert played["none"].running > played["verified"].running > played["eagle"].running
    assert played["none"].steps < played["eagle"].steps
