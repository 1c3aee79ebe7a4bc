"""The pass's work grows with the graph, not with writes times nodes: counted, not timed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch
from graphs import FORMS, Builder
from torch.fx import Graph, Node

from nwor_compile.passes import visibility

LAYERS = (8, 32)
PASSES = str(Path(visibility.__file__).parent)


def layers_graph(layers: int, form: str, stray: bool) -> Graph:
    """Layers with caches of their own, and ops between them that touch no cache."""
    b = Builder("example_value" if form == "plain" else "val")
    step = b.step()
    caches = [b.caches(f"layer{index}_") for index in range(layers)]
    stranger = b.input("stranger", 4)
    written: list[tuple[Node, Node]] = []
    hidden = step.query
    for pair in caches:
        now = b.write(step, *pair, form)
        written += zip(pair, now, strict=True)
        hidden = b.read(step._replace(query=hidden), *now)
        for _ in range(10):
            hidden = b.call(torch.ops.aten.mul.Tensor, hidden, hidden)
    if form != "plain":
        b.write_back(*written)
    if stray:  # it could read any cache, so every write is held against it
        b.call(torch.ops.aten.sum.default, stranger)
        stranger.meta.clear()
    return b.output(hidden)


def visits(graph: Graph, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many (write, node) pairs are looked at."""
    count, touch = 0, visibility._touch

    def counted(write: visibility.Write, node: Node, touches: visibility.Touches) -> str:
        nonlocal count
        count += 1
        return touch(write, node, touches)

    with monkeypatch.context() as patch:
        patch.setattr(visibility, "_touch", counted)
        visibility.judge(graph)
    return count


def calls(graph: Graph) -> int:
    """How many functions of the package run, each turn of a generator counted."""
    count = 0

    def counted(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PASSES)

    before = sys.getprofile()
    sys.setprofile(counted)
    try:
        visibility.judge(graph)
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("stray", [False, True], ids=["", "a reader of unknown memory"])
@pytest.mark.parametrize("form", FORMS)
def test_work_grows_linearly(form: str, stray: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (layers_graph(layers, form, stray) for layers in LAYERS)
    assert all(bool(write.reason) == stray for write in visibility.judge(many))
    times = LAYERS[1] // LAYERS[0]
    assert visits(many, monkeypatch) == times * visits(few, monkeypatch) > 0
    assert calls(few) > 0
    assert calls(many) <= 1.1 * times * calls(few)
