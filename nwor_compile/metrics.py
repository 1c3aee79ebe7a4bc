"""The counters of a window, in the names that users know, and their Prometheus collector."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily, UnknownMetricFamily
from prometheus_client.registry import Collector
from pydantic import BaseModel

from nwor_compile.ops.counters import COUNTERS, FIXED
from nwor_compile.scv import WindowTensors


class Metrics(BaseModel):
    """A snapshot. Rows are unique token rows; `nwor_stage_operations` alone is row x layer.

    nwor_unique_tokens: rows in the staging buffer at this moment (0 between windows).
    nwor_fallback_count: windows that accepted nothing because the sampler's ids were malformed.
    nwor_scv_vectorised: commits that ran as plain launches although graphs were asked for.
    nwor_error_windows: windows that the device-side error flag turned into zero accepted drafts.
    Bytes count K and V of all layers: to the cache, through staging (written, and read again when
    committed), and what a direct run of the same steps writes. What tail blocks copy beside them
    (rows of partly filled blocks, and the step's certain rows in them) is not counted.
    """

    nwor_windows: int
    nwor_total_staged: int
    nwor_total_committed: int
    nwor_total_rejected: int
    nwor_acceptance_rate: float
    nwor_acceptance_rate_per_position: list[float]
    nwor_drafted_per_position: list[int]
    nwor_accepted_per_position: list[int]
    nwor_fallback_count: int
    nwor_scv_vectorised: int
    nwor_error_windows: int
    nwor_unique_tokens: int
    nwor_stage_operations: int
    nwor_certain_rows: int
    nwor_cache_bytes: int
    nwor_staging_bytes_moved: int
    nwor_direct_bytes: int


class MetricsSource(Protocol):
    """A `Window`, as far as the collector knows it."""

    def metrics(self) -> Metrics:
        """A snapshot."""
        ...


def read_metrics(
    tensors: WindowTensors, *, row_bytes: int, fallbacks: int, vectorised: int
) -> Metrics:
    """Read a window's device counters (synchronises).

    row_bytes: bytes of one token row, K and V of all layers. fallbacks, vectorised: what the host
    counted.
    """
    return metrics_of(
        tensors.counters.tolist(),
        row_bytes=row_bytes,
        fallbacks=fallbacks,
        vectorised=vectorised,
        unique_tokens=int(tensors.routing.num_drafts.sum().item()),
    )


def metrics_of(
    values: list[int], *, row_bytes: int, fallbacks: int, vectorised: int, unique_tokens: int
) -> Metrics:
    """The metrics that a copy of a window's counter vector stands for."""
    count = {name: values[index] for name, index in COUNTERS.items()}
    positions = (len(values) - FIXED) // 2
    drafted, accepted = values[FIXED : FIXED + positions], values[FIXED + positions :]
    staged, committed, row = count["staged"], count["committed"], row_bytes
    return Metrics(
        nwor_windows=count["windows"],
        nwor_total_staged=staged,
        nwor_total_committed=committed,
        nwor_total_rejected=count["rejected"],
        nwor_acceptance_rate=committed / staged if staged else 0.0,
        nwor_acceptance_rate_per_position=[
            a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)
        ],
        nwor_drafted_per_position=drafted,
        nwor_accepted_per_position=accepted,
        nwor_fallback_count=fallbacks,
        nwor_scv_vectorised=vectorised,
        nwor_error_windows=count["errors"],
        nwor_unique_tokens=unique_tokens,
        nwor_stage_operations=count["stage_operations"],
        nwor_certain_rows=count["certain"],
        nwor_cache_bytes=(count["certain"] + committed) * row,
        nwor_staging_bytes_moved=(staged + committed) * row,
        nwor_direct_bytes=(count["certain"] + staged) * row,
    )


GAUGES = ("nwor_acceptance_rate", "nwor_acceptance_rate_per_position", "nwor_unique_tokens")


class NworCollector(Collector):
    """Serves a window's counters to Prometheus; reads the device when scraped, not in a step.

    Register it with `prometheus_client.REGISTRY.register(NworCollector(window))`.
    """

    def __init__(self, source: MetricsSource) -> None:
        self.source = source

    def collect(self) -> Iterator[GaugeMetricFamily | UnknownMetricFamily]:
        """One family a field of `Metrics`, under exactly that name; lists have a `position` label.

        prometheus_client would serve a counter called `nwor_total_staged` as
        `nwor_total_staged_total`. So the counters are of type unknown: `rate()` works on them just
        the same, and the names are those in the log and in `Metrics`.
        """
        for name, value in self.source.metrics().model_dump().items():
            text = name.removeprefix("nwor_").replace("_", " ")
            family_type = GaugeMetricFamily if name in GAUGES else UnknownMetricFamily
            if isinstance(value, list):
                family = family_type(name, text, labels=["position"])
                for position, amount in enumerate(value):
                    family.add_metric([str(position)], amount)
                yield family
            else:
                yield family_type(name, text, value=value)
