"""The twins of vLLM's layer ops: decorators as on the originals, and which layers stage."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.vllm

NAME = "model.layers.0.self_attn.attn"


class Impl:
    """An attention implementation that says what was called."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def forward(self, *args: Any, output: Tensor, **options: Any) -> None:
        self.calls.append(("forward", sorted(k for k, v in options.items() if v is not None)))
        self.metadata = args[5]

    def do_kv_cache_update(self, *args: Any) -> None:
        self.calls.append("direct")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A forward context with one layer; what its implementation is asked to do."""
    from vllm import forward_context

    from nwor_compile.vllm_adapter import staged_write

    found: list[Any] = []

    def stage_write(*layer: Any) -> Any:
        return lambda *rows: found.append("staged")

    monkeypatch.setattr(staged_write, "stage_write", stage_write)
    layer = SimpleNamespace(
        impl=Impl(found), kv_cache=torch.zeros(1), kv_sharing_target_layer_name=None
    )
    context = SimpleNamespace(
        attn_metadata={NAME: SimpleNamespace(block_table=torch.zeros(1, 1))},
        no_compile_layers={NAME: layer},
        slot_mapping={NAME: torch.zeros(1, dtype=torch.int64)},
    )
    monkeypatch.setattr(forward_context, "_forward_context", context)
    return found


def decorators(path: Path, function: str) -> list[str]:
    """Outermost first."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return [ast.unparse(decorator) for decorator in node.decorator_list]
    raise AssertionError(f"{function} is not in {path}")


def test_the_twins_have_their_originals_decorators_in_order() -> None:
    from vllm.model_executor.layers.attention import attention

    from nwor_compile.vllm_adapter import ops

    theirs, ours = Path(inspect.getfile(attention)), Path(inspect.getfile(ops))
    pairs = (
        ("unified_attention_with_output", "_verify"),
        ("unified_kv_cache_update", "_stage"),
    )
    for original, twin in pairs:
        assert decorators(ours, twin) == decorators(theirs, original)
    assert decorators(ours, "_verify") == ["eager_break_during_capture", "maybe_transfer_kv_layer"]


def test_a_kv_connector_is_called_around_the_twin(
    monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    from vllm.model_executor.layers.attention import kv_transfer_utils

    from nwor_compile.vllm_adapter import ops

    connector = SimpleNamespace(
        has_connector_metadata=lambda: True,
        wait_for_layer_load=lambda name: calls.append(("load", name)),
        save_kv_layer=lambda name, *rest: calls.append(("save", name)),
    )
    monkeypatch.setattr(kv_transfer_utils, "has_kv_transfer_group", lambda: True)
    monkeypatch.setattr(kv_transfer_utils, "is_v1_kv_transfer_group", lambda: True)
    monkeypatch.setattr(kv_transfer_utils, "get_kv_transfer_group", lambda: connector)
    tensor = torch.zeros(1)
    ops._verify(tensor, tensor, tensor, tensor, NAME)
    assert calls == [("load", NAME), ("forward", []), ("save", NAME)]


@pytest.mark.parametrize("staged", [False, True])
def test_only_layers_of_a_window_stage(calls: list[Any], staged: bool) -> None:
    """A drafter's layer, which no window knows, takes vLLM's own path through the same graph."""
    from nwor_compile.vllm_adapter import ops

    staging: Any = SimpleNamespace(block_table=torch.zeros(1, 1))
    ops.set_layers({NAME: staging} if staged else {})
    before = ops.executions()
    try:
        tensor = torch.zeros(1)
        torch.ops.nwor.vllm_stage(tensor, tensor, NAME)
        torch.ops.nwor.vllm_verify(tensor, tensor, tensor, tensor, NAME)
    finally:
        ops.set_layers({})
    assert calls == [
        "staged" if staged else "direct",
        ("forward", []),
    ]
    counted = ops.executions()
    assert counted["staged"] - before["staged"] == staged
    assert counted["direct"] - before["direct"] == (not staged)


@pytest.mark.parametrize("idle", [False, True])
def test_stock_attention_gets_the_windows_table_and_an_idle_window_the_engines_write(
    calls: list[Any], idle: bool
) -> None:
    from vllm.forward_context import get_forward_context

    from nwor_compile.vllm_adapter import ops

    context = get_forward_context()
    impl = context.no_compile_layers[NAME].impl
    table, redirected = torch.zeros(2, 3), torch.ones(4, 3)
    metadata = SimpleNamespace(block_table=table, seq_lens="lengths")
    context.attn_metadata[NAME] = metadata
    staging: Any = SimpleNamespace(block_table=redirected)
    ops.set_layers({NAME: staging}, lambda: idle)
    try:
        tensor = torch.zeros(1)
        torch.ops.nwor.vllm_stage(tensor, tensor, NAME)
        torch.ops.nwor.vllm_verify(tensor, tensor, tensor, tensor, NAME)
        first = impl.metadata
        torch.ops.nwor.vllm_verify(tensor, tensor, tensor, tensor, NAME)
    finally:
        ops.set_layers({})
    assert calls == ["direct" if idle else "staged", ("forward", []), ("forward", [])]
    assert torch.equal(first.block_table, redirected[:2])
    assert first.seq_lens == "lengths"
    assert impl.metadata is first  # one copy a step and group
    assert metadata.block_table is table


def test_a_layer_without_a_block_table_to_its_staged_rows_is_refused() -> None:
    from nwor_compile.errors import ConfigError
    from nwor_compile.vllm_adapter import ops

    staging: Any = SimpleNamespace(block_table=None)
    with pytest.raises(ConfigError, match=f"staged rows of {NAME}"):
        ops.set_layers({NAME: staging})
