"""What every benchmark record carries: device, versions, date, command, and spread."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
from collections.abc import Sequence

import torch
from pydantic import BaseModel

from nwor_compile.doctor.checks import cpu_name


class Spread(BaseModel):
    """Median, quartiles and extremes of repeated measurements."""

    median: float
    p25: float
    p75: float
    smallest: float
    largest: float
    repeats: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise at least one value."""
        ordered = sorted(values)
        lower, _, upper = (
            statistics.quantiles(ordered, n=4, method="inclusive")
            if len(ordered) > 1
            else (ordered[0],) * 3
        )
        return cls(
            median=statistics.median(ordered),
            p25=lower,
            p75=upper,
            smallest=ordered[0],
            largest=ordered[-1],
            repeats=len(ordered),
        )

    def __format__(self, spec: str) -> str:
        """`median [p25, p75]`, each number formatted by `spec`."""
        return f"{self.median:{spec}} [{self.p25:{spec}}, {self.p75:{spec}}]"


class Machine(BaseModel):
    """Where and with what a record was made."""

    cpu: str
    cores: int
    torch_threads: int
    load_average: list[float]
    python: str
    torch: str
    nwor_compile: str
    date: str


def this_machine() -> Machine:
    """The machine now."""
    from nwor_compile import __version__

    return Machine(
        cpu=cpu_name(),
        cores=os.cpu_count() or 1,
        torch_threads=torch.get_num_threads(),
        load_average=[round(load, 2) for load in os.getloadavg()],
        python=platform.python_version(),
        torch=torch.__version__,
        nwor_compile=__version__,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
