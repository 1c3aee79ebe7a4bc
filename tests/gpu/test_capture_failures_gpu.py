"""Captures that fail as they do in practice: SCV goes on without a graph, and comes back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Geometry
from test_window_gpu import run, warnings_of
from window_support import ALL, SOME, rig

from nwor_compile import validator

pytestmark = pytest.mark.gpu

GEOMETRY = Geometry(
    model_dtype=torch.bfloat16, head_size=64, kv_heads=2, heads=8, block_size=16, device="cuda"
)


def waits(tensors: Any) -> None:
    """An operation that a capture does not support: reading a value back."""
    tensors.error.item()


def runs_out_of_memory(tensors: Any) -> None:
    """An allocation, inside the capture, of more than the device has."""
    torch.empty(1 << 50, dtype=torch.uint8, device=tensors.error.device)


def has_no_implementation(tensors: Any) -> None:
    raise NotImplementedError("no kernel for this device")


FAILURES: dict[str, Callable[[Any], None]] = {
    "unsupported operation": waits,
    "allocation": runs_out_of_memory,
    "no implementation": has_no_implementation,
}


@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("mode", ["graph", "adaptive"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_capture_that_fails_costs_one_line_a_count_and_nothing_else(
    failure: str, mode: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nwor_compile")
    settle = validator.settle

    def failing(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            FAILURES[failure](tensors)
        return settle(tensors, *args, **kwargs)

    with rig(geometries=(GEOMETRY,), scv=mode) as r:
        with monkeypatch.context() as patch:
            patch.setattr(validator, "settle", failing)
            r.window.warm_up([6])
        assert r.window.validator.graphs == {}
        assert len([w for w in warnings_of(caplog) if "capture failed" in w]) == 1
        degraded = r.window.metrics().nwor_scv_vectorised
        assert degraded == 1
        before = r.rows()
        result = run(r, SOME)
        assert (result.accepted.tolist(), result.error.item()) == (SOME, 0)
        assert r.holds(r.expected(before, SOME))
        assert r.window.metrics().nwor_scv_vectorised == degraded + 1

        # The cause is gone: capturing works again, and windows use it.
        r.window.warm_up([6])
        assert sorted(r.window.validator.graphs) == [6]
        graphs = r.window.validator.graphs
        graphs[6] = graphs[6]._replace(faster=True)
        r.new_rows(seed=5)
        before = r.rows()
        result = run(r, ALL)
        assert (result.accepted.tolist(), result.error.item()) == (ALL, 0)
        assert r.holds(r.expected(before, ALL))
        assert r.window.metrics().nwor_scv_vectorised == degraded + 1
