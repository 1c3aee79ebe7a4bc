"""Which kernel attends for a verify step in vLLM, with setting `auto`: from shapes alone, so that
a captured graph and its replays agree. `nwor bench kernels` measures both."""

from __future__ import annotations

# Requests, and tokens a request, up to which this package's kernel is ahead of FlashAttention 3 in
# the record of `nwor bench kernels`.
FUSED_REQUESTS = 4
FUSED_SPAN = 16


def prefers_fused(requests: int, longest_span: int) -> bool:
    """True for this package's kernel, False for the engine's own; both read staged rows by the
    redirected block table.

    requests: of the step, padding included. longest_span: the most tokens that one of them has.
    """
    return requests <= FUSED_REQUESTS and 1 < longest_span <= FUSED_SPAN
