"""The FX pass that turns cache writes into staged writes. This package knows ops and FX only."""

if __name__ != "nwor_compile.passes":
    raise ImportError(
        f"expected to be imported as 'nwor_compile.passes', was imported as {__name__!r}. Use "
        "`import nwor_compile.passes`."
    )

from nwor_compile.passes.nwor_pass import NworPass, rewrite
from nwor_compile.passes.report import Decision, Report, VisibilityError, last_reports
from nwor_compile.passes.table import CacheReader, CacheWrite, register_reader, register_write

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
