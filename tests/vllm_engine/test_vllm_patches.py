"""The one place that replaces attributes of vLLM, and that it is the only one."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

from nwor_compile.errors import ConfigError
from nwor_compile.vllm_adapter import contract_entries, patches
from nwor_compile.vllm_adapter.contract_forms import Function
from nwor_compile.vllm_adapter.patches import PATCHES, wrap

ADAPTER = Path(inspect.getsourcefile(patches) or "").parent


class Runner:
    """Has one method of the shape that is known, and one of another."""

    def _sample(self, logits: int, spec_decode_metadata: int, more: int = 0) -> int:
        return logits + spec_decode_metadata + more

    def _model_forward(self, tokens: int) -> int:
        return tokens

    def initialize_kv_cache(self, *args: Any) -> int:
        return len(args)


def doubled(original: Any, *args: Any, **kwargs: Any) -> Any:
    return 2 * original(*args, **kwargs)


@pytest.mark.parametrize("of_class", [False, True])
def test_a_hook_gets_the_original_and_all_arguments(of_class: bool) -> None:
    class Mine(Runner):
        pass

    runner = Mine()
    owner: Any = Mine if of_class else runner
    wrap(owner, "GPUModelRunner._sample", doubled)
    wrap(owner, "GPUModelRunner._sample", doubled)  # once
    assert runner._sample(1, 2, more=3) == 12
    assert runner._sample.__name__ == "_sample"
    assert Runner()._sample(1, 2) == 3


def test_another_hook_is_called_around_those_before() -> None:
    runner, seen = Runner(), []

    def outer(original: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(args)
        return 1 + original(*args, **kwargs)

    for _ in range(2):
        wrap(runner, "GPUModelRunner._sample", doubled)
        wrap(runner, "GPUModelRunner._sample", outer)
    assert runner._sample(1, 2) == 2 * 3 + 1
    assert seen == [(1, 2)]


def test_a_function_that_takes_anything_has_any_shape() -> None:
    runner = Runner()
    wrap(runner, "GPUModelRunner.initialize_kv_cache", doubled)
    assert runner.initialize_kv_cache(1, 2) == 4


@pytest.mark.parametrize(
    ("key", "named"),
    [
        (
            "GPUModelRunner._model_forward",
            r"expected \(input_ids, positions, ...\), got \(tokens\)",
        ),
        ("drafter.load_model", "there is no such function"),
        ("GPUModelRunner.step", "it is not among EngineArgs.create_engine_config"),
    ],
)
def test_unknown_shapes_are_refused(key: str, named: str) -> None:
    runner = Runner()
    with pytest.raises(ConfigError, match=named) as raised:
        wrap(runner, key, doubled)
    assert key in str(raised.value)
    assert "Runner" in str(raised.value)
    assert not vars(runner)


def test_what_is_patched_in_vllm_is_in_the_contract() -> None:
    checked: dict[str, list[tuple[str, ...]]] = {}
    for entry in contract_entries.CONTRACT:
        if isinstance(entry, Function):
            given = tuple(name for name in entry.parameters if name != "self")
            checked.setdefault(entry.name.split(".")[-1], []).append(given)
    for key, patch in PATCHES.items():
        if key.startswith("MultiProcessCollector"):
            continue  # of prometheus_client
        size = len(patch.parameters)
        assert patch.parameters in [given[:size] for given in checked[key.split(".")[-1]]], key


def test_no_other_module_of_the_adapter_replaces_attributes() -> None:
    """`setattr`, or an assignment to an attribute of something that was imported."""
    found = []
    for path in sorted(ADAPTER.glob("*.py")):
        if path.name == "patches.py":
            continue
        tree = ast.parse(path.read_text())
        imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                found.append(f"{path.name}:{node.lineno}")
            elif isinstance(node, ast.Assign):
                found += [
                    f"{path.name}:{node.lineno}"
                    for target in node.targets
                    if isinstance(target, ast.Attribute)
                    and ast.unparse(target.value).split(".")[0] in (imported - {"os"}) | {"sampler"}
                ]
    assert found == []


def test_prometheus_has_the_shape_that_is_known() -> None:
    from prometheus_client.multiprocess import MultiProcessCollector

    assert list(inspect.signature(MultiProcessCollector.collect).parameters) == ["self"]
