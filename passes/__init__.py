"""The FX pass that turns cache writes into staged writes. This package knows ops and FX only."""

if __name__ != "nwor_compile.passes":
    raise ImportError(
        f"expected to be imported as 'nwor_compile.passes', was imported as {__name__!r}. Use "
        "`import nwor_compile.passes`."
    )

from typing import TYPE_CHECKING, Any

from nwor_compile.passes.nwor_pass import rewrite
from nwor_compile.passes.report import Decision, Report, VisibilityError, last_reports
from nwor_compile.passes.table import CacheReader, CacheWrite, register_reader, register_write

if TYPE_CHECKING:
    from nwor_compile.passes.inductor import NworPass

__all__ = [
    "CacheReader",
    "CacheWrite",
    "Decision",
    "NworPass",
    "Report",
    "VisibilityError",
    "last_reports",
    "register_reader",
    "register_write",
    "rewrite",
]


def __getattr__(name: str) -> Any:
    """`NworPass`, imported when it is first asked for: see `passes/inductor.py`."""
    if name == "NworPass":
        from nwor_compile.passes.inductor import NworPass

        return NworPass
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
