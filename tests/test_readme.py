"""What the README says: blocks quoted from records, the example, the sizing table, links."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nwor_compile.groups import staging_bytes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def load(path: Path) -> ModuleType:
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_quoted_blocks_are_those_of_the_records_and_the_example() -> None:
    assert load(ROOT / "benchmarks" / "readme.py").filled(README) == README


def test_the_ten_line_example_runs_and_accepts_two_of_three_drafts() -> None:
    accepted, metrics = load(ROOT / "examples" / "own_model.py").main()
    assert accepted.tolist() == [2]
    assert (metrics.nwor_total_staged, metrics.nwor_total_committed) == (3, 2)
    assert metrics.nwor_certain_rows == 1


@pytest.mark.parametrize(
    ("model", "layers", "kv_heads", "size"),
    [("Llama-3.2-3B", 28, 8, 128), ("Llama-3-8B", 32, 8, 128), ("Llama-2-7B", 32, 32, 128)],
)
def test_the_sizing_table_is_the_formula(model: str, layers: int, kv_heads: int, size: int) -> None:
    row = next(line for line in README.splitlines() if line.startswith(f"| {model} "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    units = {"MiB": 2**20, "GiB": 2**30}
    stated = [float(n) * units[u] for n, u in (cell.split() for cell in cells[2:])]
    assert stated == [
        staging_bytes(layers, kv_heads, size, 2, requests, drafts)
        for requests, drafts in ((64, 4), (256, 8))
    ]


def test_links_to_files_of_the_repository_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in t]
    assert targets
    assert [t for t in targets if not (ROOT / t).exists()] == []


def test_tests_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named
    written = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name in sorted(named) if f"def {name}(" not in written] == []
