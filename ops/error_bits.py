"""Bits of a window's device-side error flag; any of them means: accept no draft."""

from __future__ import annotations

from typing import Final

OVERFLOW: Final = 1  # more drafts than staging takes, or a layer met a draft without a row
BAD_COUNTS: Final = 2  # a negative count, more drafts than max_drafts, or no certain token first
COUNT_MISMATCH: Final = 4  # a layer staged another number of rows than the window has drafts
ID_MISMATCH: Final = 8  # sampled ids and counts contradict the drafts
EARLY_WRITE: Final = 16  # poison mode: a draft slot was written before its commit

ERROR_NAMES: Final = {
    OVERFLOW: "staging overflow",
    BAD_COUNTS: "impossible draft counts",
    COUNT_MISMATCH: "layers staged different numbers of rows",
    ID_MISMATCH: "sampled ids contradict the drafts",
    EARLY_WRITE: "a draft slot was written before its commit",
}


def describe_error(bits: int) -> str:
    """The error flag in words; empty for 0."""
    return ", ".join(text for bit, text in ERROR_NAMES.items() if bits & bit)
