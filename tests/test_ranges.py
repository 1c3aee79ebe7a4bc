"""Ranges for profilers: seen while one records, nothing otherwise, never part of a graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from window_support import SOME, rig

from nwor_compile.ops import ranges
from nwor_compile.ops.ranges import span


@pytest.mark.parametrize(
    ("variable", "listens"),
    [
        ("NVTX_INJECTION64_PATH", True),
        ("NSYS_PROFILING_SESSION_ID", True),
        ("NV_NSIGHT_INJECTION_TRANSPORT_TYPE", True),
        ("PATH", False),
    ],
)
def test_a_tool_is_known_by_the_variables_that_it_sets(variable: str, listens: bool) -> None:
    assert ranges.tool_listens({variable: "x"}) is listens


def test_without_a_profiler_a_range_is_one_shared_object() -> None:
    assert span("nwor.stage") is span("nwor.commit")


def test_a_window_shows_up_in_torchs_profiler() -> None:
    with (
        rig(layers=2) as r,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        r.run(SOME)
    found = [event.name for event in profile.events() if event.name.startswith("nwor.")]
    assert sorted(found) == [
        "nwor.accept", "nwor.begin", "nwor.commit", "nwor.stage", "nwor.stage",
    ]  # fmt: skip


def test_for_a_tool_that_listens_it_is_an_nvtx_range(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(ranges, "_NVTX_LISTENS", False)
    assert span("nwor.stage") is span("nwor.commit")
    monkeypatch.setattr(ranges, "_NVTX_LISTENS", True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    with span("nwor.stage"):
        calls.append("inside")
    assert calls == ["nwor.stage", "inside", "pop"]


def test_no_range_is_traced_into_a_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def step(x: Tensor) -> Tensor:
        with span("nwor.stage"):
            return x * 2

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert step(torch.ones(2)).tolist() == [2, 2]
    (graph,) = graphs
    assert "record_function" not in graph.code
    assert not [event for event in profile.events() if event.name == "nwor.stage"]
