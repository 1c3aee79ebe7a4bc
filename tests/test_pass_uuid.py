"""The pass's uuid stands for everything that changes the graph it makes, and for nothing else."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import nwor_compile
from nwor_compile.passes import NworPass, nwor_pass

PACKAGE = Path(nwor_compile.__file__).parent
FILES = sorted(path.name for path in (PACKAGE / "passes").glob("*.py"))
PRINT_UUID = "from nwor_compile.passes import NworPass; print(NworPass().uuid())"


def uuid_of_process(path: Path | None = None) -> str:
    """The uuid in a fresh process, of the package in `path` if given."""
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", PRINT_UUID],
        env=environment, capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    return result.stdout.strip()


def test_the_uuid_is_the_same_for_equal_passes(tmp_path: Path) -> None:
    assert NworPass().uuid() == NworPass().uuid()
    assert NworPass(dump_dir=tmp_path).uuid() == NworPass().uuid()


def test_a_run_and_a_pickle_leave_the_uuid_alone() -> None:
    pass_ = NworPass(strict=True)
    pass_.reports.append(nwor_compile.passes.Report())
    copy = pickle.loads(pickle.dumps(pass_))
    assert copy.uuid() == pass_.uuid()
    assert copy.strict
    assert copy.reports == []


def test_strict_changes_the_uuid() -> None:
    assert NworPass(strict=True).uuid() != NworPass(strict=False).uuid()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of passes/ that the source hash reads."""
    shutil.copytree(PACKAGE / "passes", tmp_path / "passes")
    monkeypatch.setattr(nwor_pass, "__file__", str(tmp_path / "passes" / "nwor_pass.py"))
    nwor_pass.sources_hash.cache_clear()
    yield tmp_path / "passes"
    nwor_pass.sources_hash.cache_clear()


@pytest.mark.parametrize("name", FILES)
def test_every_file_of_the_package_is_in_the_uuid(name: str, sources: Path) -> None:
    before = NworPass().uuid()
    with (sources / name).open("a") as file:
        file.write("# changed\n")
    nwor_pass.sources_hash.cache_clear()
    assert NworPass().uuid() != before


def test_a_new_helper_file_changes_the_uuid(sources: Path) -> None:
    before = NworPass().uuid()
    (sources / "helper.py").write_text("")
    nwor_pass.sources_hash.cache_clear()
    assert NworPass().uuid() != before


@pytest.mark.slow
def test_the_uuid_follows_the_sources_across_processes(tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(PACKAGE, tmp_path / "nwor_compile", ignore=ignore)
    # Neither the process nor the place of the package matters.
    assert uuid_of_process(tmp_path) == NworPass().uuid()
    helper = tmp_path / "nwor_compile" / "passes" / "aliases.py"
    helper.write_text(helper.read_text().replace("_MAX_STEPS = 8", "_MAX_STEPS = 9"))
    assert uuid_of_process(tmp_path) != NworPass().uuid()
