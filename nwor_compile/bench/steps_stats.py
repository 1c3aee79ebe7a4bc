"""Ratios of measurements that were taken in pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Middle:
    """The middle pair's ratio, for pairs among which some are far off: they do not move it.

    low, high: its interval of at least 95 %, from one pair to another, for pairs that are
    independent, whatever their distribution (the sign test's; David and Nagaraja, Order Statistics,
    3rd ed., 7.1). None with fewer than 6 pairs, for which there is none.
    """

    ratio: float
    low: float | None
    high: float | None
    pairs: int

    @classmethod
    def of(cls, baseline: Sequence[float], mode: Sequence[float]) -> Middle:
        """Positive numbers, in pairs."""
        ratios = sorted(a / b for a, b in zip(baseline, mode, strict=True))
        pairs, outside, cut = len(ratios), 0.0, -1
        while (outside := outside + math.comb(pairs, cut + 1) / 2**pairs) <= 0.025:
            cut += 1
        low, high = (None, None) if cut < 0 else (ratios[cut], ratios[-1 - cut])
        return cls(ratio=statistics.median(ratios), low=low, high=high, pairs=pairs)

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.ratio:.3f}"
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"
