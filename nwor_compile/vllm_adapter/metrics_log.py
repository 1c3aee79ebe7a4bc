"""Where this package's log lines go inside vLLM."""

from __future__ import annotations

import logging


def use_vllm_handlers() -> None:
    """Print `nwor_compile` lines as vLLM prints its own, unless the user has set up logging.

    vLLM configures the logger `vllm` alone: without this, what VLLM_NWOR_DEBUG logs goes nowhere.
    """
    own, vllm = logging.getLogger("nwor_compile"), logging.getLogger("vllm")
    if own.hasHandlers() or not vllm.handlers:
        return
    own.handlers = list(vllm.handlers)
    own.setLevel(vllm.level)
