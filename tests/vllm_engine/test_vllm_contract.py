"""The contract check: on small packages, on the installed vLLM, and on published ones."""

from __future__ import annotations

import concurrent.futures
import re
import time
from collections.abc import Callable
from pathlib import Path

import published
import pytest

from nwor_compile.vllm_adapter import contract
from nwor_compile.vllm_adapter.contract import mismatches
from nwor_compile.vllm_adapter.contract_entries import CONTRACT
from nwor_compile.vllm_adapter.contract_forms import (
    Attributes,
    CustomOp,
    Entry,
    Function,
    Names,
    Text,
    broken,
)
from nwor_compile.vllm_adapter.versions import RUN, is_supported, numbers

PUBLISHED = (("vllm", "0.26.0"), ("vllm", "0.32.0"), ("vllm", "0.33.0"))
Sources = Callable[[str, str], Path]

SOURCE = """
class Runner:
    field: int = 0

    def __init__(self):
        self.state, self.other = 1, [self.field]

    def step(self, logits, metadata=None): ...


def write(key: int, layer: str = "") -> None:
    key.copy(layer)


direct_register_custom_op(op_name="write", op_func=write, mutates_args=["key"])
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    (tmp_path / "runner.py").write_text(SOURCE)
    return tmp_path


def check(
    monkeypatch: pytest.MonkeyPatch, root: Path, *entries: object, version: str = "0.32.0"
) -> list[str]:
    monkeypatch.setattr(contract, "CONTRACT", entries)
    return mismatches(version, root)


def test_a_kept_contract_is_silent(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    assert not check(
        monkeypatch,
        package,
        Function("runner.py", "Runner.step", ("self", "logits")),
        Function("runner.py", "write", ("key", "layer"), exact=True),
        Names("runner.py", "Runner", ("field",)),
        Names("runner.py", "", ("Runner", "write")),
        Attributes("runner.py", "Runner", ("state", "other")),
        CustomOp("runner.py", "write", ("key",)),
        CustomOp("runner.py", "write", ("key",), "(key: int, layer: str='') -> None"),
        Text("runner.py", "write", "key.copy(layer)"),
    )


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (Function("runner.py", "Runner.step", ("self", "x")), r"takes \(self, logits, metadata\)"),
        (Function("runner.py", "Runner.step", ("self", "logits"), exact=True), "expected"),
        (Function("runner.py", "Runner.gone", ("self",)), "Runner.gone is missing"),
        (Function("gone.py", "f", ()), "the file is missing"),
        (Names("runner.py", "Runner", ("field", "other")), "Runner has no other"),
        (Attributes("runner.py", "Runner", ("state", "field")), "Runner has no field"),
        (Text("runner.py", "Runner", "key.copy(layer)"), "Runner has no `key.copy"),
        (CustomOp("runner.py", "write", ()), "op write mutates"),
        (
            CustomOp("runner.py", "write", ("key",), "(key: int) -> None"),
            r"op write is \(key: int, layer: str=''\) -> None, expected \(key: int\)",
        ),
        (CustomOp("runner.py", "read", ()), "op read is not registered"),
    ],
)
def test_a_mismatch_names_version_and_what(
    monkeypatch: pytest.MonkeyPatch, package: Path, entry: object, named: str
) -> None:
    (problem,) = check(monkeypatch, package, entry)
    assert re.search(named, problem)
    assert "vLLM 0.32.0" in problem
    assert getattr(entry, "path", "") in problem


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0"])
def test_versions_outside_the_range_are_refused(
    monkeypatch: pytest.MonkeyPatch, package: Path, version: str
) -> None:
    monkeypatch.setattr(contract, "CONTRACT", ())
    (problem,) = mismatches(version, package)
    assert "supported are 0.26" in problem


def test_an_entry_may_hold_in_some_versions_only(
    monkeypatch: pytest.MonkeyPatch, package: Path
) -> None:
    entry = Names("runner.py", "Runner", ("gone",), since=(0, 30), until=(0, 33))
    for version, said in (("0.29.1", 0), ("0.30.0", 1), ("0.32.9", 1), ("0.33.0", 0)):
        assert len(check(monkeypatch, package, entry, version=version)) == said


@pytest.mark.vllm
def test_the_installed_vllm_keeps_the_contract() -> None:
    version, root = contract.installed()
    assert mismatches(version, root) == []
    assert contract.was_run(version)


@pytest.mark.vllm
def test_the_check_costs_little_at_start() -> None:
    start = time.perf_counter()
    mismatches(*contract.installed())
    assert time.perf_counter() - start < 20  # a few files are parsed; a minute would be a fault


# The published packages, read without installing them. The first and the last supported version
# are those in which something may have moved.


@pytest.fixture(scope="session")
def sources(request: pytest.FixtureRequest) -> Sources:
    """Folder of the vllm package of a published version; only the files of the contract."""
    members = [f"vllm/{path}" for path in sorted({entry.path for entry in CONTRACT})]
    assert request.config.cache is not None
    cache = request.config.cache.mkdir("published")
    with concurrent.futures.ThreadPoolExecutor(len(PUBLISHED)) as pool:
        found = {key: pool.submit(published.unpacked, *key, members, cache) for key in PUBLISHED}

    def folder(package: str, version: str) -> Path:
        try:
            return found[package, version].result() / "vllm"
        except published.IndexUnreachableError as error:
            pytest.skip(f"pip cannot reach its package index: {error}")

    return folder


@pytest.mark.parametrize(("name", "version"), PUBLISHED)
def test_published_packages_keep_the_contract(sources: Sources, name: str, version: str) -> None:
    assert is_supported(version)
    assert mismatches(version, sources(name, version)) == []


def test_the_published_versions_span_what_is_supported() -> None:
    versions = {version for _, version in PUBLISHED}
    assert set(RUN) < versions
    first, end = (min(map(numbers, versions)), max(map(numbers, versions)))
    assert is_supported(".".join(map(str, first)))
    assert not is_supported(f"{first[0]}.{first[1] - 1}.0")
    assert not is_supported(f"{end[0]}.{end[1] + 1}.0")


def _what_it_names(entry: Entry) -> list[str]:
    if isinstance(entry, Names | Attributes):
        return list(entry.members)
    if isinstance(entry, Text):
        return [re.findall(r"[A-Za-z_]\w+", entry.expression)[-1]]
    own = entry.name.split(".")[-1]
    return [] if own == "__init__" else [own]


@pytest.mark.parametrize("version", ["0.26.0", "0.33.0"])
def test_each_entry_can_be_broken(sources: Sources, tmp_path: Path, version: str) -> None:
    """With its names renamed in a copy of the real source, each is missed."""
    held = [
        entry
        for entry in CONTRACT
        if entry.since <= numbers(version) < entry.until and _what_it_names(entry)
    ]
    for path in sorted({entry.path for entry in held}):
        entries = [entry for entry in held if entry.path == path]
        names = {name for entry in entries for name in _what_it_names(entry)}
        copy = tmp_path / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = (sources("vllm", version) / path).read_text()
        copy.write_text(re.sub(rf"\b({'|'.join(names)})\b", r"renamed_\1", text))
        for entry in entries:
            said = broken(entry, tmp_path)
            assert said, entry
            if isinstance(entry, Names | Attributes):
                assert all(name in said for name in entry.members)
