"""The debug log of windows, printed one step late so that no window waits for the device."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import Tensor

from nwor_compile.ops.error_bits import describe_error
from nwor_compile.scv import Committed, WindowTensors

log = logging.getLogger("nwor_compile")


@dataclass
class _Pending:
    """Copies, made on the device, of what one window did."""

    drafts: Tensor
    accepted: Tensor | None = None
    error: Tensor | None = None
    state: Tensor | None = None
    layers: tuple[str, ...] = ()


@dataclass
class WindowLog:
    """Lines at begin and commit; nothing is copied or printed unless enabled."""

    enabled: bool
    _pending: _Pending | None = None
    _warned: set[str] = field(default_factory=set)

    def begun(self, tensors: WindowTensors, requests: int) -> None:
        """Remember a window's draft counts."""
        if self.enabled:
            self._pending = _Pending(drafts=tensors.drafts[:requests].clone())

    def committed(
        self,
        tensors: WindowTensors,
        requests: int,
        result: Committed,
        layers: tuple[str, ...],
    ) -> None:
        """Remember what the window came to."""
        if self._pending is not None:
            self._pending.accepted = result.accepted.clone()
            self._pending.error = result.error.clone()
            self._pending.state = tensors.state.clone()
            self._pending.layers = layers

    def flush(self) -> None:
        """Print the last window. Reads the device."""
        window, self._pending = self._pending, None
        if window is None:
            return
        drafts = window.drafts.tolist()
        log.info("NWOR: %d draft tokens across %d requests", sum(drafts), len(drafts))
        if window.accepted is None or window.error is None or window.state is None:
            log.info("NWOR: aborted, nothing committed")
            return
        log.info("NWOR: %s", commit_line(drafts, window.accepted.tolist()))
        bits = int(window.error.item())
        if bits:
            per_layer = dict(zip(window.layers, window.state.tolist(), strict=True))
            log.error(
                "NWOR: error flag (%s); per layer [staged, error]: %s",
                describe_error(bits),
                per_layer,
            )

    def warn_columns(self, columns: int, max_drafts: int) -> None:
        """Say once that the sampler's matrix is narrower than drafts + 1."""
        if "columns" not in self._warned:
            self._warned.add("columns")
            log.warning(
                "SCV: sampled_ids has %d columns, %d drafts need %d; drafts past the last column, "
                "if there are any, are rejected",
                columns, max_drafts, max_drafts + 1,
            )  # fmt: skip


def commit_line(drafts: list[int], accepted: list[int]) -> str:
    """`committed 7/32 tokens (acceptance=21.9%, per-req [...], saved 25 rows, 78%)`."""
    staged, taken = sum(drafts), sum(accepted)
    rate = taken / staged if staged else 0.0
    saved = staged - taken
    share = saved / staged if staged else 0.0
    return (
        f"committed {taken}/{staged} tokens (acceptance={rate:.1%}, per-req {accepted}, "
        f"saved {saved} rows, {share:.0%})"
    )
