"""NWOR's counters on the server's /metrics, in `LLM.get_metrics()`, and after shutdown.

NOTE [how the counters leave the engine] Workers run in other processes than the frontend, vLLM's
`SchedulerStats` has no free field, and metrics that a worker registers are in nobody's registry. So
rank 0 writes a file (see metrics_file.py) and a collector in each frontend reads it when scraped.
The file's prefix travels in the environment: set by the process that makes the engine's
configuration, inherited by its workers and, with `--api-server-count`, by the other API servers.
Two things about vLLM shape the collector: at engine start it unregisters every collector whose
`_name` starts with `vllm:` (a custom collector has no `_name` and stays), and with several API
servers each scrape makes a registry that holds a `MultiProcessCollector` alone, which adds up files
of prometheus_client's own; so that class is made to hand out these families too.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from nwor_compile.metrics import GAUGES, Metrics
from nwor_compile.vllm_adapter import patches
from nwor_compile.vllm_adapter.metrics_file import Snapshot, read_all, total
from nwor_compile.vllm_adapter.settings import requested

PREFIX_VARIABLE = "NWOR_METRICS_PREFIX"
"""Set by this module: directory and start of the name of this engine's files."""
DIRECTORY_VARIABLE = "NWOR_METRICS_DIR"
"""Set by users who want to keep the files: an existing directory, on CUDA one in memory. Otherwise
a temporary one, which goes with the process that started the engine."""


def serve(config: Any, refused: Sequence[str] = ()) -> None:
    """Serve the counters of the engine that `config` (a VllmConfig) is for, from this process.

    refused: why this engine runs direct although it was asked to stage (`"strict": false`).

    Counters of an earlier engine of this process are served no more, as with vLLM's own.
    """
    settings = requested(config.additional_config)
    _collector.refused = list(refused)
    if settings is None or settings.mode != "stage":
        _collector.model = None
        os.environ.pop(PREFIX_VARIABLE, None)
        return
    _collector.model = str(config.model_config.served_model_name)
    if not (_is_one_of_several(config.parallel_config) and PREFIX_VARIABLE in os.environ):
        name = f"{os.getpid()}-{time.time_ns()}"
        os.environ[PREFIX_VARIABLE] = str(_directory() / name)
    _register()


def snapshots() -> list[Snapshot]:
    """The files of this process's newest engine, one a data-parallel rank."""
    prefix = os.environ.get(PREFIX_VARIABLE)
    return read_all(Path(prefix)) if prefix else []


def last_report() -> Metrics | None:
    """The counters of this process's newest engine, also after its shutdown, summed over
    data-parallel ranks; None if it never staged."""
    found = snapshots()
    return total(found) if found else None


class NworEngineCollector(Collector):
    """Reads the files when scraped. Families are called `vllm:` + the name in `Metrics`, with
    vLLM's labels; as for vLLM's own counters, /metrics appends `_total` to those that count.

    `vllm:nwor_active` is 0 where staging was asked for and the engine runs direct; then
    `vllm:nwor_refused` counts the reasons that its configuration gave.
    """

    model: str | None = None
    """Of the engine that was asked to stage; None if there is none."""
    refused: Sequence[str] = ()
    """Why that engine runs direct, if its configuration was refused."""

    def describe(self) -> list[Any]:
        """Nothing: the registry then asks for no numbers when this is registered."""
        return []

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """One family a field of `Metrics`, one sample an engine; lists have a `position` too."""
        if self.model is None:
            return
        engines = [(each, each.metrics().model_dump()) for each in snapshots()]
        active = GaugeMetricFamily("vllm:nwor_active", "NWOR: 1 if staging", labels=["model_name"])
        active.add_metric([self.model], float(bool(engines)))
        yield active
        if not engines:
            refused = CounterMetricFamily(
                "vllm:nwor_refused", "NWOR: reasons to run direct", labels=["model_name"]
            )
            # A worker that gave up after warm-up had one reason, which stands in the log.
            refused.add_metric([self.model], max(1, len(self.refused)))
            yield refused
            return
        for name, first in engines[0][1].items():
            labels = ["model_name", "engine"] + ["position"] * isinstance(first, list)
            family_type = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
            family = family_type(f"vllm:{name}", _describe(name), labels=labels)
            for engine, values in engines:
                where = [engine.model, str(engine.engine)]
                if isinstance(first, list):
                    for position, amount in enumerate(values[name]):
                        family.add_metric([*where, str(position)], amount)
                else:
                    family.add_metric(where, values[name])
            yield family


def _describe(name: str) -> str:
    return "NWOR: " + name.removeprefix("nwor_").replace("_", " ")


_collector = NworEngineCollector()


def _register() -> None:
    """Put the collector where a scrape finds it, with one API server and with several; once."""
    with contextlib.suppress(ValueError):  # "Duplicated timeseries": it is there already
        REGISTRY.register(_collector)
    patches.wrap(MultiProcessCollector, "MultiProcessCollector.collect", _collect_all)


def _collect_all(original: Callable[..., Any], self: MultiProcessCollector) -> list[Metric]:
    return [*original(self), *_collector.collect()]


def _is_one_of_several(parallel: Any) -> bool:
    """Whether this process is an API server whose launcher has made the engine's configuration."""
    count = getattr(parallel, "_api_process_count", 1)
    return count > 1 and getattr(parallel, "_api_process_rank", 0) >= 0


@functools.cache
def _directory() -> Path:
    """The user's directory, or a temporary one that goes when this process does."""
    given = os.environ.get(DIRECTORY_VARIABLE)
    if given:
        return Path(given)
    in_memory = "/dev/shm"
    where = in_memory if os.access(in_memory, os.W_OK) else None
    made = Path(tempfile.mkdtemp(prefix="nwor-metrics-", dir=where))
    atexit.register(_remove, made, os.getpid())
    return made


def _remove(directory: Path, owner: int) -> None:
    if os.getpid() == owner:  # and not a fork of it
        shutil.rmtree(directory, ignore_errors=True)
