"""The process around the demo: threads, warnings, memory, versions."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import nwor_compile
from nwor_compile.demo.screen import Screen


@contextmanager
def one_thread() -> Iterator[None]:
    """The tensors are tiny: with two threads the same run took 30 times the CPU time, all of it
    threads waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Once(logging.Handler):
    """Prints each distinct message once."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.WARNING)
        self.screen = screen
        self.seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.seen:
            self.seen.add(text)
            self.screen.say(f"{record.levelname.lower()}: {text}")


@contextmanager
def warnings_once(screen: Screen) -> Iterator[None]:
    """Every run opens a window of its own, and each would repeat the same warnings."""
    logger = logging.getLogger("nwor_compile")
    handler = _Once(screen)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def peak_rss() -> int:
    """Most memory that this process or one of its children (the compiler) held, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(kind).ru_maxrss for kind in kinds) * unit


def environment() -> dict[str, str]:
    """Versions, machine, date and command, for the JSON."""
    return {
        "nwor_compile": nwor_compile.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": str(os.cpu_count()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        # Names without their folders: a record is read on other machines.
        "command": " ".join(Path(part).name for part in sys.argv),
    }
