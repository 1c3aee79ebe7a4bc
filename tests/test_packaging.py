"""The wheel and the sdist hold what they must, and folders import in one direction only."""

from __future__ import annotations

import ast
import configparser
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import nwor_compile

ROOT = Path(__file__).parent.parent
WEIGHTS = "nwor_compile/demo/weights"


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # hatchling is called as a build frontend calls it; `python -m build` would want a network or a
    # second interpreter for the same result.
    return Path(next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("w")))))


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(next(SdistBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("s")))))


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def python(
    *arguments: str, path: Path | None = None, cwd: Path
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=240,
    )  # fmt: skip


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_the_wheel_holds_every_source_once(wheel: Path) -> None:
    names = names_in(wheel)
    assert len(names) == len(set(names))
    # What git does not track may be a work in progress, but what is on disk is in the wheel.
    wanted = {
        f"nwor_compile/{path.relative_to(ROOT)}" for path in [*sources("ops"), *sources("passes")]
    }
    linked = (ROOT / "nwor_compile/ops", ROOT / "nwor_compile/passes")
    wanted |= {
        str(path.relative_to(ROOT))
        for path in sources("nwor_compile")
        if not any(link in path.parents for link in linked)
    }
    assert {name for name in names if name.endswith(".py")} == wanted


@pytest.mark.parametrize(
    "name",
    [
        "nwor_compile/py.typed",
        "nwor_compile/ops/kernels/attention.py",
        "nwor_compile/passes/nwor_pass.py",
        f"{WEIGHTS}/target/model.safetensors",
        f"{WEIGHTS}/target/config.json",
        f"{WEIGHTS}/target/tokenizer.json",
        f"{WEIGHTS}/draft/model.safetensors",
        f"{WEIGHTS}/draft/config.json",
    ],
)
def test_the_wheel_holds(wheel: Path, name: str) -> None:
    assert name in names_in(wheel)


def test_the_wheel_installs_one_top_level_name(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names_in(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"nwor_compile"}


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size < 5 * 2**20


def test_metadata_names_licence_command_and_backend(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        texts = {
            name.partition(".dist-info/")[2]: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/" in name
        }
    assert "Apache License" in texts["licenses/LICENSE"]
    assert "License-Expression: Apache-2.0" in texts["METADATA"]
    assert f"\nVersion: {nwor_compile.__version__}\n" in texts["METADATA"]
    points = configparser.ConfigParser(delimiters=("=",))
    points.read_string(texts["entry_points.txt"])
    assert points["console_scripts"]["nwor"] == "nwor_compile.cli:app"
    assert points["torch_dynamo_backends"]["nwor"] == "nwor_compile.backend:nwor"


def test_an_installed_wheel_imports_from_where_it_is(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:  # a pure wheel is installed by unpacking it
        archive.extractall(site)
    code = (
        "import nwor_compile, nwor_compile.ops, nwor_compile.passes, torch\n"
        "from importlib.metadata import entry_points\n"
        "print(nwor_compile.__file__, nwor_compile.ops.__file__, sep='\\n')\n"
        "point = next(iter(entry_points(group='torch_dynamo_backends', name='nwor')))\n"
        "assert point.load() is nwor_compile.backend.nwor\n"
        "assert str(torch.ops.nwor.reshape_and_cache.default._schema).endswith('-> ()')\n"
    )
    done = python("-c", code, path=site, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [Path(line).parent.parent for line in done.stdout.splitlines()] == [
        site,
        site / "nwor_compile",
    ]


@pytest.mark.parametrize("folder", ["ops", "passes"])
def test_a_folder_refuses_to_load_under_its_bare_name(folder: str) -> None:
    done = python("-c", f"import {folder}", cwd=ROOT)
    assert done.returncode != 0
    assert f"expected to be imported as 'nwor_compile.{folder}'" in done.stderr


def test_the_sdist_is_complete_and_free_of_links(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() or member.isdir() for member in members)
    names = {member.name.split("/", 1)[1] for member in members}
    for wanted in (
        "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md",
        "constraints-cpu.txt", "ops/__init__.py", "passes/__init__.py", "nwor_compile/py.typed",
        "nwor_compile/demo/weights/target/model.safetensors", "tests/test_packaging.py",
        "tests/conftest.py", "examples/train_tiny_models.py", "docs/architecture.md",
        "benchmarks/README.md",
    ):  # fmt: skip
        assert wanted in names, f"{wanted} is missing from the sdist"
    # The links are for development; an sdist has the real folders only.
    assert not any(name.startswith(("nwor_compile/ops", "nwor_compile/passes")) for name in names)


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    again = next(WheelBuilder(str(root)).build(directory=str(tmp_path / "dist")))
    assert sorted(names_in(Path(again))) == sorted(names_in(wheel))


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports anywhere, `from a import b` as both `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def foreign(path: Path, *allowed: str) -> list[str]:
    """Imports of a file from outside the standard library and the `allowed` packages."""

    def fits(module: str) -> bool:
        top = module.split(".")[0]
        return top in sys.stdlib_module_names or any(
            module == name or module.startswith(f"{name}.") for name in allowed
        )

    # A name out of an allowed package is listed twice; the package itself decides.
    return sorted(m for m in imports_of(path) if not fits(m))


@pytest.mark.parametrize("path", sources("ops"), ids=lambda p: str(p.relative_to(ROOT)))
def test_ops_know_torch_and_triton_only(path: Path) -> None:
    allowed = ["torch", "nwor_compile.ops"]
    if path.parent.name == "kernels":
        allowed.append("triton")
    assert foreign(path, *allowed) == []


@pytest.mark.parametrize("path", sources("passes"), ids=lambda p: str(p.relative_to(ROOT)))
def test_passes_know_ops_and_torch_only(path: Path) -> None:
    assert foreign(path, "torch", "rich", "nwor_compile.ops", "nwor_compile.passes") == []


@pytest.mark.parametrize(
    "path",
    [p for p in sources("nwor_compile") if "vllm_adapter" not in p.parts],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_only_the_adapter_imports_vllm(path: Path) -> None:
    assert not any(module.split(".")[0] == "vllm" for module in imports_of(path))


def test_importing_the_package_loads_neither_triton_kernels_nor_demo(tmp_path: Path) -> None:
    code = (
        "import sys, nwor_compile\n"
        "loaded = [m for m in sys.modules if m.startswith(('nwor_compile.ops.kernels', "
        "'nwor_compile.demo', 'nwor_compile.cli', 'nwor_compile.vllm_adapter'))]\n"
        "assert not loaded, loaded\n"
    )
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_ci_takes_its_commands_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci/run").read_text()
    for marker in ("ci:demo", "ci:test"):
        assert readme.count(f"<!-- {marker} -->") == 1, f"README.md lacks <!-- {marker} -->"
        assert marker in script
