"""Layout of the device counters, an int64 vector that `commit_kv` updates.

Rows are unique token rows, never multiplied by layers; only `stage_operations` is row x layer.
After the fixed slots come `drafted[k]` and `accepted[k]` for draft position k.
"""

from typing import Final

COUNTERS: Final = {
    "windows": 0,  # windows with at least one draft
    "staged": 1,
    "committed": 2,
    "rejected": 3,
    "stage_operations": 4,
    "errors": 5,  # windows that the error flag turned into zero accepted drafts
    "certain": 6,  # rows written straight to the cache
}
FIXED: Final = 8


def counter_size(max_drafts: int) -> int:
    """Length of the counter vector for `max_drafts` draft positions."""
    return FIXED + 2 * max_drafts
