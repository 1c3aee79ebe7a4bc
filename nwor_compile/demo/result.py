"""What the demo found, as data: everything that `--json` writes."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, computed_field

from nwor_compile.demo.audit import AuditResult
from nwor_compile.metrics import Metrics


class DemoOptions(BaseModel):
    """What `nwor demo` can be told.

    drafter: the small model, prompt lookup (ngram), or both. temperature: the second temperature,
    beside greedy; 0 runs greedy alone. eager: no torch.compile, the staged ops called by hand.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    drafter: Literal["model", "ngram", "both"] = "both"
    draft_tokens: int = Field(default=4, ge=1, le=48)
    temperature: float = Field(default=0.7, ge=0)
    requests: int = Field(default=4, ge=1, le=64)
    max_new_tokens: int = Field(default=56, ge=2, le=512)
    seed: int = Field(default=0, ge=0)
    show_stale: bool = False
    scv: Literal["off", "graph", "adaptive"] = "graph"
    poison: Literal["off", "nan", "large"] = "off"
    eager: bool = False


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

    @computed_field  # type: ignore[prop-decorator]
    @property
    def drafted(self) -> int:
        """Drafts that were verified."""
        return sum(self.drafted_per_position)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted."""
        return sum(self.accepted_per_position) / self.drafted if self.drafted else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def acceptance_per_position(self) -> list[float]:
        """The same, for each draft position."""
        pairs = zip(self.accepted_per_position, self.drafted_per_position, strict=True)
        return [accepted / drafted if drafted else 0.0 for accepted, drafted in pairs]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def rows_per_token(self) -> float:
        """Rows written to the cache for each token emitted by decode and verify steps."""
        return self.audit.decode_rows / self.decoded if self.decoded else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def bytes_per_token(self) -> float:
        """Bytes moved in all, cache and staging, for each of those tokens."""
        cache = self.audit.decode_rows * self.row_bytes
        return (cache + self.staging_bytes) / self.decoded if self.decoded else 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def counted_rows(self) -> int:
        """Rows written to the cache by the window's own counters."""
        if self.metrics is None:
            return 0
        return self.metrics.nwor_certain_rows + self.metrics.nwor_total_committed

    @computed_field  # type: ignore[prop-decorator]
    @property
    def fallbacks(self) -> int:
        """Windows that accepted nothing for want of usable ids, or because of the error flag."""
        if self.metrics is None:
            return 0
        return self.metrics.nwor_fallback_count + self.metrics.nwor_error_windows


class PassSummary(BaseModel):
    """What the pass did to the target's graph. None of it ran if `eager`.

    staged, refused: a line for each write: its node, and what reads it or why it stays direct.
    report: the pass's own table.
    """

    writes_rewritten: int
    readers_rewritten: int
    staged: list[str]
    refused: list[str]
    seconds: float
    report: str


class CompileSummary(BaseModel):
    """graphs: compiled in the whole run, warm-up included; 1 a model means no recompile."""

    eager: bool
    target_graphs: int
    draft_graphs: int
    target_seconds: float
    draft_seconds: float
    staged_executions: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def recompiles(self) -> int:
        """Graphs past the first of each model."""
        return max(0, self.target_graphs - 1) + max(0, self.draft_graphs - 1)


class Scenario(BaseModel):
    """One drafter at one temperature, in both modes."""

    drafter: str
    temperature: float
    direct: RunResult
    staged: RunResult

    @computed_field  # type: ignore[prop-decorator]
    @property
    def name(self) -> str:
        """As shown in the table's heading."""
        kind = "greedy" if self.temperature == 0 else f"T={self.temperature:g}"
        return f"{self.drafter}, {kind}"


class Check(BaseModel):
    """One thing that must hold, whether it did, and the figures."""

    name: str
    ok: bool
    detail: str


class DemoResult(BaseModel):
    """Everything the demo measured."""

    options: DemoOptions
    scenarios: list[Scenario]
    plain: RunResult
    stale: RunResult | None = None
    rewrite: PassSummary
    compiled: CompileSummary
    checks: list[Check] = Field(default_factory=list)
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    environment: dict[str, str] = Field(default_factory=dict)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ok(self) -> bool:
        """Every check holds."""
        return all(check.ok for check in self.checks)
