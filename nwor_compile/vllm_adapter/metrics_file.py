"""The file through which rank 0 of an engine shows its counters to the other processes.

A page of JSON that never changes (what the numbers belong to), then int64 words: a few that Python
counts, then the window's counter vector. They are mapped memory, and each commit leaves the vector
there: on CUDA the device writes it, as a part of the commit's graph, so that publishing costs the
host nothing. Readers may therefore see a window half counted; each word is whole, and the next read
is right.

The file outlives its engine, so a report can be taken after shutdown.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nwor_compile.metrics import Metrics, metrics_of
from nwor_compile.window import Window

log = logging.getLogger("nwor_compile")

PAGE = 4096
HOST_WORDS = ("fallbacks", "vectorised")
SUFFIX = ".nwor"


@dataclass(frozen=True)
class Snapshot:
    """What one engine's file says."""

    engine: int
    model: str
    row_bytes: int
    words: list[int]

    def metrics(self) -> Metrics:
        """The counters of this engine."""
        return total([self])


def total(snapshots: list[Snapshot]) -> Metrics:
    """The counters of data-parallel engines together; rates are those of the sums."""
    first = snapshots[0]
    words = [sum(column) for column in zip(*(s.words for s in snapshots), strict=True)]
    host = len(HOST_WORDS)
    return metrics_of(
        words[host:],
        row_bytes=first.row_bytes,
        unique_tokens=0,  # written between windows
        **dict(zip(HOST_WORDS, words[:host], strict=True)),
    )


class SnapshotWriter:
    """Has one window write its counters; lives in the worker of rank 0.

    Made before `Window.warm_up`; raises WindowOrderError once that captured graphs. Readers find
    the file from `show` on, and after `close` too.
    """

    def __init__(self, prefix: Path, window: Window, *, engine: int, model: str) -> None:
        self.window = window
        self.path = prefix.with_name(f"{prefix.name}-{engine}{SUFFIX}")
        counters = window.tensors.counters
        header = {
            "engine": engine,
            "model": model,
            "row_bytes": window.row_bytes,
        }
        size = len(HOST_WORDS) + counters.numel()
        page = json.dumps(header).encode().ljust(PAGE)
        if len(page) != PAGE:
            raise ValueError(f"the served model name is too long for a metrics file: {model[:80]}…")
        self._hidden = self.path.with_suffix(".tmp")
        self._hidden.write_bytes(page + bytes(8 * size))
        self._words = np.memmap(self._hidden, np.int64, "r+", offset=PAGE, shape=(size,))
        self._counted = (0, 0)
        # An inference tensor could be written in inference mode alone; warm-up is not in it.
        with torch.inference_mode(False):
            self._counters = torch.from_numpy(self._words)[len(HOST_WORDS) :]
        self._unpin = _pin(self._words) if counters.is_cuda else None
        window.mirror_counters(self._counters)

    def show(self) -> None:
        """From here on readers find the file. It is there as a whole, and has the counters of now,
        not those of a warm-up."""
        self.publish()
        os.replace(self._hidden, self.path)

    def close(self, *, keep: bool) -> None:
        """Write the last counters, let the window go and the memory be pageable again. Waits for
        the device.

        keep: leave the file for a report; else it goes, as of an engine that never ran or runs
            direct.
        """
        window = self.window
        if keep:
            self.publish()
        window.stop_mirror()
        if self._unpin is not None:
            torch.cuda.synchronize()  # commits under way still write there
            self._unpin()
        if not keep:
            self._hidden.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def publish(self) -> None:
        """Write everything, as of the work enqueued so far. Waits for nothing."""
        self.publish_host()
        self._counters.copy_(self.window.tensors.counters, non_blocking=True)

    def publish_host(self) -> None:
        """Write what Python counts; the rest is there after each commit."""
        counted = self.window.fallbacks, sum(self.window.validator.vectorised.values())
        if counted != self._counted:
            self._counted = counted
            self._words[: len(HOST_WORDS)] = counted


def read(path: Path) -> Snapshot:
    """The file's numbers at this moment."""
    content = path.read_bytes()
    header: dict[str, Any] = json.loads(content[:PAGE])
    return Snapshot(words=np.frombuffer(content, np.int64, offset=PAGE).tolist(), **header)


def read_all(prefix: Path) -> list[Snapshot]:
    """The engines whose files begin with `prefix`, in order; empty before the first one is up."""
    found = [read(path) for path in prefix.parent.glob(f"{prefix.name}-*{SUFFIX}")]
    return sorted(found, key=lambda snapshot: snapshot.engine)


def _pin(words: np.ndarray) -> Callable[[], object]:
    """Let the device copy into the mapped file by itself, for as long as it is mapped; without it
    such a copy would wait.

    Linux lets a device write to pages of a file in memory, and not of one on a disk. Returns what
    undoes it; that happens with the mapping's end at the latest, or the next mapping at this
    address, of the next engine of this process, could not be pinned.
    """
    code = torch.cuda.cudart().cudaHostRegister(words.ctypes.data, words.nbytes, 0)
    if int(code) != 0:
        raise RuntimeError(
            f"cudaHostRegister of NWOR's metrics file failed with {int(code)}: expected a file in "
            "memory. Unset NWOR_METRICS_DIR, or set it to a directory under /dev/shm"
        )
    unpin = weakref.finalize(words, _unpin, words.ctypes.data)
    unpin.atexit = False  # CUDA may be gone by then
    return unpin


def _unpin(address: int) -> None:
    code = torch.cuda.cudart().cudaHostUnregister(address)
    if int(code) != 0:
        log.warning("cudaHostUnregister of NWOR's metrics file failed with %d", int(code))
