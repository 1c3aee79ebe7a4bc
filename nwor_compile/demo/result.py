"""What the demo found, as data: everything that `--json` writes."""

from __future__ import annotations

from pydantic import BaseModel, Field

from nwor_compile.demo.audit import AuditResult
from nwor_compile.metrics import Metrics


class RunResult(BaseModel):
    """One run of all requests in one mode.

    tokens: new token ids, a list for each request. emitted: how many; decoded: those that came
    after a request's first, which its last prompt chunk emits.
    windows: verify spans with at least one draft. Rows and bytes are from the audit; staging bytes
    count each staged row once when written and once more when read back for its commit.
    metrics: the window's own counters, beside which the audit stands.
    """

    mode: str
    temperature: float
    tokens: list[list[int]] = Field(default_factory=list)
    steps: int = 0
    windows: int = 0
    emitted: int = 0
    decoded: int = 0
    drafted_per_position: list[int]
    accepted_per_position: list[int]
    audit: AuditResult = Field(default_factory=AuditResult)
    row_bytes: int = 0
    cache_bytes: int = 0
    staging_bytes: int = 0
    metrics: Metrics | None = None
    seconds: dict[str, float] = Field(default_factory=dict)

    @classmethod
    def empty(cls, mode: str, temperature: float, max_drafts: int) -> RunResult:
        """A run that has not begun."""
        return cls(
            mode=mode,
            temperature=temperature,
            drafted_per_position=[0] * max_drafts,
            accepted_per_position=[0] * max_drafts,
        )

    @property
    def drafted(self) -> int:
        """Drafts that were verified."""
        return sum(self.drafted_per_position)

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted."""
        return sum(self.accepted_per_position) / self.drafted if self.drafted else 0.0

    @property
    def acceptance_per_position(self) -> list[float]:
        """The same, for each draft position."""
        pairs = zip(self.accepted_per_position, self.drafted_per_position, strict=True)
        return [accepted / drafted if drafted else 0.0 for accepted, drafted in pairs]

    @property
    def rows_per_token(self) -> float:
        """Rows written to the cache for each token emitted by decode and verify steps."""
        return self.audit.decode_rows / self.decoded if self.decoded else 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes moved in all, cache and staging, for each of those tokens."""
        cache = self.audit.decode_rows * self.row_bytes
        return (cache + self.staging_bytes) / self.decoded if self.decoded else 0.0

    @property
    def fallbacks(self) -> int:
        """Windows that accepted nothing for want of usable ids, or because of the error flag."""
        if self.metrics is None:
            return 0
        return self.metrics.nwor_fallback_count + self.metrics.nwor_error_windows
