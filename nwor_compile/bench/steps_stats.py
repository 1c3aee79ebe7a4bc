"""Ratios of measurements that were taken in pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from pydantic import BaseModel

# Two-sided 95 % points of Student's t for 1 to 30 degrees of freedom.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def student(freedom: int) -> float:
    """The 95 % point; beyond the table 1.96 and the first term of its expansion."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    return 1.96 + 2.372 / freedom


class Ratio(BaseModel):
    """Baseline over mode, pair by pair; above 1 the mode is faster.

    ratio: the geometric mean. low, high: its 95 % interval, by Student's t on the logarithms.
    spread: the largest pair's ratio over the smallest's, less 1.
    """

    ratio: float
    low: float
    high: float
    spread: float
    pairs: int

    @classmethod
    def of(cls, baseline: Sequence[float], mode: Sequence[float]) -> Ratio:
        """At least two pairs of positive numbers; raises ValueError otherwise."""
        if len(baseline) != len(mode) or len(mode) < 2:
            raise ValueError(
                f"{len(baseline)} and {len(mode)} measurements; expected at least two pairs"
            )
        logs = [math.log(a / b) for a, b in zip(baseline, mode, strict=True)]
        mean = statistics.mean(logs)
        half = student(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        return cls(
            ratio=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half),
            spread=math.exp(max(logs) - min(logs)) - 1, pairs=len(logs),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"
