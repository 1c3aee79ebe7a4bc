"""No-Write-On-Reject KV caching for speculative decoding: torch.compile passes and ops."""

import nwor_compile.ops  # noqa: F401  registers torch.ops.nwor
from nwor_compile.backend import compile_options
from nwor_compile.config import NworConfig
from nwor_compile.errors import (
    ConfigError,
    NworError,
    StagingAllocationError,
    WindowInputError,
    WindowOrderError,
)
from nwor_compile.metrics import Metrics, NworCollector
from nwor_compile.named_pass import vllm_pass
from nwor_compile.passes import VisibilityError, last_reports
from nwor_compile.scv import Committed
from nwor_compile.window import State, Window

__version__ = "0.1.0"

__all__ = [
    "Committed",
    "ConfigError",
    "Metrics",
    "NworCollector",
    "NworConfig",
    "NworError",
    "StagingAllocationError",
    "State",
    "VisibilityError",
    "Window",
    "WindowInputError",
    "WindowOrderError",
    "__version__",
    "compile_options",
    "last_reports",
    "vllm_pass",
]
