"""Whether the installed vLLM still has what this adapter relies on; see NOTE [contract]."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

from nwor_compile.vllm_adapter.contract_entries import CONTRACT
from nwor_compile.vllm_adapter.contract_forms import broken
from nwor_compile.vllm_adapter.versions import (
    DISTRIBUTIONS,
    RUN,
    is_supported,
    numbers,
    supported_text,
)


def installed() -> tuple[str, Path]:
    """Version and folder of the installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("vllm is not installed")
    version = "unknown"
    for name in DISTRIBUTIONS:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        break
    return version.split("+")[0], Path(spec.origin).parent


def mismatches(version: str, root: Path) -> list[str]:
    """What of the contract the vLLM at `root` breaks; empty if it holds."""
    found = [] if is_supported(version) else [supported_text()]
    for entry in CONTRACT:
        if not entry.since <= numbers(version) < entry.until:
            continue
        problem = broken(entry, root)
        if problem:
            found.append(f"{entry.path}: {problem}")
    return [f"vLLM {version} is not as this adapter knows it: {text}" for text in found]


def was_run(version: str) -> bool:
    """Whether the engine tests ran with this version, or only its source is known to fit."""
    return version in RUN
