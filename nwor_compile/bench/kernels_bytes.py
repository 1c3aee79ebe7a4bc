"""Rows of K/V that a step reads and writes, by counting: direct writes against tail blocks.

Not measured: this is what the kernels are told to move. A row is K and V of one token in one layer;
reading and writing it are two moves. The steps are those of requests that had a window in the step
before, where a tail block has its rows unless the first draft got into a new block; `first` is
that of a window that finds nothing.
"""

from __future__ import annotations

from pydantic import BaseModel

# Drafts a request, and the share of them that is accepted.
CASES = ((1, 0.3), (4, 0.0), (4, 0.3), (4, 1.0), (8, 0.3), (16, 0.3), (48, 0.3))


class BytesRow(BaseModel):
    """Row moves of one request in a step, by what is done, on average over where in its block the
    first draft lies and over how many drafts passed in the step before."""

    drafts: int
    accepted: float
    direct: float  # read what the model made, write it to the cache
    staged: float
    parts: dict[str, float]
    first: float  # `staged` of a window that finds nothing in its tail blocks
    crossing: float  # share of windows whose first draft lies in another block than before
    in_rope: float  # staging in RoPE's kernel, which has K in its hands already
    cache_rows_direct: float  # written to blocks of the engine's
    cache_rows_staged: float
    ratio: float  # staged over direct
    in_rope_ratio: float


def counted(drafts: int, rate: float, block_size: int) -> BytesRow:
    """The moves of one request with one certain row and `drafts` drafts, of which `rate` pass."""
    accepted = rate * drafts
    # The first draft lies at each row of its block equally often. Rows before it in the block are
    # shown by the tail block too: the step's certain row by a second store, older ones by copying,
    # which is needed where the last step's advance got the first draft into this block.
    places = range(block_size)
    mirrored = sum(min(place, 1) for place in places) / block_size
    older = [max(place - 1, 0) for place in places]
    copied = crossing = 0.0
    for passed, chance in enumerate(chances(drafts, rate)):
        crossed = older[: passed + 1]
        copied += chance * sum(crossed) / block_size
        crossing += chance * len(crossed) / block_size
    parts = {
        "read": 1.0 + drafts,
        "certain to the cache": 1.0,
        "drafts to tail blocks": float(drafts),
        "mirrored": mirrored,
        "copied in": 2 * copied,
        "commit": 2 * accepted,
    }
    direct, staged = 2.0 * (1 + drafts), sum(parts.values())
    in_rope = staged - (1 + drafts) / 2
    return BytesRow(
        drafts=drafts, accepted=rate, direct=direct, staged=staged, parts=parts,
        first=staged + 2 * (sum(older) / block_size - copied), crossing=crossing, in_rope=in_rope,
        cache_rows_direct=1.0 + drafts, cache_rows_staged=1 + accepted, ratio=staged / direct,
        in_rope_ratio=in_rope / direct,
    )  # fmt: skip


def chances(drafts: int, rate: float) -> list[float]:
    """How likely 0, 1, ... `drafts` drafts pass, if `rate * drafts` do on average and each passes
    with one chance behind those before it."""
    low, high = 0.0, 1.0
    for _ in range(60):
        chance = (low + high) / 2
        if sum(chance**n for n in range(1, drafts + 1)) < rate * drafts:
            low = chance
        else:
            high = chance
    at_least = [high**n for n in range(drafts + 1)]
    return [more - less for more, less in zip(at_least, [*at_least[1:], 0.0], strict=True)]


def rows(block_size: int) -> list[BytesRow]:
    """The cases that the record has."""
    return [counted(drafts, rate, block_size) for drafts, rate in CASES]
