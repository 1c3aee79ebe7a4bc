"""`benchmarks/write_bytes_gpu.py`: what it makes of the profiler's output."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "write_bytes_gpu.py"
HEADER = '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def csv_of(*kernels: tuple[str, int, int, int]) -> str:
    lines = ["==PROF== some words", HEADER]
    metrics = ("dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_bytes.sum")
    for index, (name, *values) in enumerate(kernels):
        for metric, value in zip(metrics, values, strict=True):
            lines.append(f'"{index}","{name}","{metric}","byte","{value:,}"')
    return "\n".join(lines)


DIRECT = ("void vllm::reshape_and_cache_flash_kernel<short>(int)", 1000, 0, 3000)
WINDOW = [("_begin_kernel", 10, 0, 20), ("_write_kernel", 400, 1, 900), ("_commit_kernel", 5, 0, 7)]


def test_kernels_are_summed_by_phase(script: dict[str, Any]) -> None:
    text = csv_of(DIRECT, DIRECT, *WINDOW, *WINDOW, *WINDOW)
    first, *windows = script["moved"](4, text)
    assert (first.phase, first.read, first.l2) == ("direct", 2000, 6000)
    assert first.kernels["vllm::reshape_and_cache_flash_kernel"]["launches"] == 2
    assert [w.phase for w in windows] == ["first window", "window", "window"]
    assert all((w.read, w.written, w.l2) == (415, 1, 927) for w in windows)


@pytest.mark.parametrize("kernels", [[DIRECT, *WINDOW], [*WINDOW, *WINDOW, *WINDOW]])
def test_a_phase_that_is_missing_is_no_figure(script: dict[str, Any], kernels: Any) -> None:
    with pytest.raises(SystemExit, match="expected the phases"):
        list(script["moved"](4, csv_of(*kernels)))
