"""Which kernel attends for a verify step in vLLM, with setting `auto`.

`nwor bench kernels` measures both alone, `nwor bench steps` in an engine; within the limits the
records of either have this package's ahead of FlashAttention 3.
"""

from __future__ import annotations

# Few requests are too little work for FA3's schedule, whatever their contexts.
ALWAYS_REQUESTS = 2
# Some more are, while their contexts together are short and query heads share KV heads.
FUSED_REQUESTS = 4
FUSED_TOKENS = 32768
FUSED_SPAN = 16


def prefers_fused(requests: int, longest_span: int, tokens: int, *, grouped: bool) -> bool:
    """True for this package's kernel, False for the engine's own; both read staged rows by the
    redirected block table.

    requests: of the step, padding included. longest_span: the most tokens that one of them has.
    tokens: of all contexts together, or an upper bound. grouped: several query heads share a KV
    head.
    """
    if depends_on_tokens(requests, longest_span):
        return grouped and tokens <= FUSED_TOKENS
    return 1 < longest_span <= FUSED_SPAN and requests <= ALWAYS_REQUESTS


def ever_depends_on_tokens(longest: int, *, grouped: bool) -> bool:
    """Whether contexts can decide for a layer, in an engine of up to `longest` tokens a request."""
    return grouped and FUSED_REQUESTS * longest > FUSED_TOKENS


def depends_on_tokens(requests: int, longest_span: int) -> bool:
    """Whether it is the contexts that decide between the kernels for a step of this shape."""
    return 1 < longest_span <= FUSED_SPAN and ALWAYS_REQUESTS < requests <= FUSED_REQUESTS
