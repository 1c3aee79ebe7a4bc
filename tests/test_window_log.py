"""What a window logs: at its start, and in debug mode one step late."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import Span
from window_support import ALL, SOME, Rig, rig

from nwor_compile.debug import commit_line
from nwor_compile.ops.error_bits import describe_error

EIGHT = [Span(4 + r, 1, 4) for r in range(8)]
TAKEN = [3, 0, 0, 2, 0, 0, 2, 0]
BEGUN = "NWOR: 32 draft tokens across 8 requests"
DONE = (
    "NWOR: committed 7/32 tokens (acceptance=21.9%, per-req [3, 0, 0, 2, 0, 0, 2, 0], "
    "saved 25 rows, 78%)"
)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.set_level(logging.INFO, "nwor_compile")
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "vectorised" not in record.getMessage():
                messages.append(f"{record.levelname} {record.getMessage()}")

    caplog.handler.setLevel(logging.INFO)
    handler = Collect()
    logger = logging.getLogger("nwor_compile")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def eight(**settings: Any) -> Rig:
    return Rig(EIGHT, max_requests=8, max_drafts=4, **settings)


def test_the_start_says_modes_capacity_and_layers(lines: list[str]) -> None:
    r = eight(scv="adaptive", poison="nan", debug=True, layers=3)
    r.window.close()
    # 32 rows x 3 layers x K and V x 2 heads x 8 x 4 bytes
    assert lines == [
        "INFO NWOR mode=stage scv=adaptive debug=True poison=nan: staging 32 rows (8 requests x 4 "
        "drafts), 12288 bytes, 3 layers: layers.0, layers.1, layers.2"
    ]


def test_a_window_is_printed_one_step_late(lines: list[str]) -> None:
    r = eight(debug=True)
    try:
        del lines[:]
        r.run(TAKEN)
        assert lines == []
        r.begin()
        assert lines == [f"INFO {BEGUN}", f"INFO {DONE}"]
        del lines[:]
        r.forward()
        r.commit([0] * 8)
        assert lines == []
        r.window.flush_log()
        assert lines == [
            f"INFO {BEGUN}",
            "INFO NWOR: committed 0/32 tokens (acceptance=0.0%, per-req [0, 0, 0, 0, 0, 0, 0, 0], "
            "saved 32 rows, 100%)",
        ]
        r.window.flush_log()
        assert len(lines) == 2
    finally:
        r.window.close()


def test_the_last_window_is_printed_at_close(lines: list[str]) -> None:
    r = eight(debug=True)
    r.run(TAKEN)
    r.window.close()
    assert lines[1:] == [f"INFO {BEGUN}", f"INFO {DONE}"]


def test_flushing_inside_a_window_waits_for_its_end(lines: list[str]) -> None:
    """Half a window would be printed as aborted, and its commit never."""
    r = eight(debug=True)
    try:
        del lines[:]
        r.begin()
        r.window.flush_log()
        assert lines == []
        r.forward()
        r.commit(TAKEN)
        r.window.flush_log()
        assert lines == [f"INFO {BEGUN}", f"INFO {DONE}"]
    finally:
        r.window.close()


def test_the_next_begin_prints_the_counts_and_flag_of_the_window_before(lines: list[str]) -> None:
    with rig(debug=True) as r:
        del lines[:]
        r.begin()
        r.forward(skip=[0])
        r.commit(ALL)
        counts = torch.zeros_like(r.batch.num_drafts)
        r.begin(num_drafts=counts)
        assert lines[0] == "INFO NWOR: 9 draft tokens across 6 requests"
        assert lines[2].startswith("ERROR")
        r.window.abort()


def test_an_aborted_window_is_printed_as_such(lines: list[str]) -> None:
    with rig(debug=True) as r:
        del lines[:]
        r.begin()
        r.window.abort()
        r.window.flush_log()
        assert lines == [
            "INFO NWOR: 9 draft tokens across 6 requests",
            "INFO NWOR: aborted, nothing committed",
        ]


def test_an_error_flag_prints_every_layer(lines: list[str]) -> None:
    with rig(debug=True, layers=3) as r:
        del lines[:]
        r.begin()
        r.forward(skip=[1])
        r.commit(ALL)
        r.window.flush_log()
        assert lines == [
            "INFO NWOR: 9 draft tokens across 6 requests",
            "INFO NWOR: committed 0/9 tokens (acceptance=0.0%, per-req [0, 0, 0, 0, 0, 0], saved "
            "9 rows, 100%)",
            "ERROR NWOR: error flag (layers staged different numbers of rows); per layer [staged, "
            "error]: {'layers.0': [9, 0], 'layers.1': [0, 0], 'layers.2': [9, 0]}",
        ]


def test_impossible_counts_print_the_layers_that_met_drafts_without_a_row(
    lines: list[str],
) -> None:
    with rig(debug=True, max_drafts=4) as r:
        del lines[:]
        r.run(SOME)
        r.window.flush_log()
        assert lines[-1] == (
            "ERROR NWOR: error flag (staging overflow, impossible draft counts, sampled ids "
            "contradict the drafts); per layer [staged, error]: {'layers.0': [0, 1], 'layers.1': "
            "[0, 1]}"
        )


def test_nothing_is_printed_without_debug(lines: list[str]) -> None:
    with rig() as r:
        del lines[:]
        r.run(SOME)
        r.begin()
        r.window.abort()
        r.window.flush_log()
    assert lines == []


def test_a_window_without_drafts_divides_by_nothing() -> None:
    assert commit_line([0, 0], [0, 0]) == (
        "committed 0/0 tokens (acceptance=0.0%, per-req [0, 0], saved 0 rows, 0%)"
    )


def test_every_bit_of_the_error_flag_has_words() -> None:
    assert describe_error(0) == ""
    words = [describe_error(1 << bit) for bit in range(5)]
    assert all(words)
    assert describe_error(31) == ", ".join(words)
