"""Settings for the whole test run: Triton's interpreter, the gpu marker, hypothesis profiles."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Triton decides at its import whether kernels are compiled or interpreted, so this comes first.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Workers of pytest-xdist share the cores: threads of one would only wait for those of another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)

_common = settings(
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# `ci` gives the same examples on every run; `explore` looks for new ones:
# HYPOTHESIS_PROFILE=explore python -m pytest tests/test_ops_fuzz.py
settings.register_profile("ci", _common, derandomize=True, max_examples=40)
settings.register_profile("explore", _common, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
