"""vLLM's attention metadata with the window's block table.

Every layer of a KV-cache group is given the same metadata object in a step, so its copy is made
once a step and group. Only the reference changes: the drafter, whose first pass reuses the
target's metadata, goes on reading the engine's own table.
"""

from __future__ import annotations

import copy
from typing import Any

from nwor_compile.ops.staging import LayerStaging


class Redirected:
    """Copies of a step's metadata, by the window's table that they point to."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Any]] = {}

    def __call__(self, metadata: Any, staging: LayerStaging) -> Any:
        """`metadata` with the block table of `staging`, which has one; None (a step without
        attention) as it is."""
        table = staging.block_table
        if metadata is None or table is None:
            return metadata
        original, changed = self._made.get(id(table), (None, None))
        # The address of a freed object may be another's: compare the object itself.
        if original is not metadata:
            changed = copy.copy(metadata)
            rows, columns = metadata.block_table.shape
            changed.block_table = table[:rows, :columns]
            self._made[id(table)] = (metadata, changed)
        return changed

    def forget(self) -> None:
        """Drop what is kept of the last step."""
        self._made.clear()
