"""`nwor::vllm_rope_stage`: what it writes where, and the graph that vLLM cuts around it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.vllm

NAME = "model.layers.0.self_attn.attn"
HEADS, KV_HEADS, SIZE, BLOCK, BLOCKS, TOKENS, HIDDEN = 3, 1, 8, 4, 6, 5, 16
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]


class Impl:
    """An attention implementation with plain arithmetic in the place of attention."""

    kv_cache_dtype, attn_type = "auto", "decoder"

    def __init__(self) -> None:
        self.direct: list[Tensor] = []

    def do_kv_cache_update(self, layer: Any, key: Tensor, *rest: Any) -> None:
        self.direct.append(key.clone())

    def forward(
        self, layer: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any
    ) -> None:
        named["output"].copy_(q * k.sum(1, keepdim=True) + v.sum(1, keepdim=True))


def step(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    packed = torch.randn(TOKENS, sum(WIDTHS), generator=rng).to(dtype)
    q, k, v = (part.unflatten(1, (-1, SIZE)) for part in packed.split(WIDTHS, 1))
    table = torch.randn(32, SIZE, generator=rng).to(dtype)
    positions = torch.randint(0, 32, (TOKENS,), generator=rng)
    return {"query": q, "key": k, "value": v, "positions": positions, "cos_sin_cache": table}


@pytest.fixture
def layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The one layer of a forward context."""
    from vllm import forward_context

    from nwor_compile.vllm_adapter import ops

    cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, 2 * SIZE, dtype=torch.bfloat16)
    made = SimpleNamespace(
        impl=Impl(), kv_cache=cache, kv_sharing_target_layer_name=None,
        attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"),
    )  # fmt: skip
    context = SimpleNamespace(
        attn_metadata={NAME: "metadata"},
        no_compile_layers={NAME: made},
        slot_mapping={NAME: torch.tensor([4, 5, 6, 7, 9])},
    )
    monkeypatch.setattr(forward_context, "_forward_context", context)
    yield made
    ops.set_layers({})


def staging() -> Any:
    from nwor_compile.ops.staging import LayerStaging, Routing

    rows = torch.zeros(2, 4, KV_HEADS, SIZE, dtype=torch.bfloat16)
    row_map = torch.tensor([-1, 0, 2, -2 - 3, -1], dtype=torch.int32)  # the fourth: to both
    index = torch.zeros(1, dtype=torch.int32)
    routing = Routing(row_map, index, index)
    state, table = torch.zeros(2, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    return LayerStaging(NAME, rows[0], rows[1], state, routing, table)


def rotated(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """vLLM's own rotation, compiled: as a graph without NWOR has it."""
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    flat = [given[name].flatten(1) for name in ("query", "key")]
    run = torch.compile(RotaryEmbedding.forward_static, fullgraph=True)
    q, k = run(given["positions"], *flat, SIZE, SIZE, given["cos_sin_cache"], True)
    return q.unflatten(1, (-1, SIZE)), k.unflatten(1, (-1, SIZE))


def rope_stage(given: dict[str, Tensor], is_neox: bool = True) -> None:
    from nwor_compile.vllm_adapter import rope_ops  # noqa: F401

    dep = torch.ops.nwor.vllm_rope_stage(*given.values(), is_neox, NAME)
    assert dep.shape == (0,)


def test_rows_are_rotated_and_staged_or_written(layer: Any) -> None:
    from nwor_compile.vllm_adapter import ops
    from nwor_compile.vllm_adapter.packed_cache import split_cache

    given, stage = step(), staging()
    want_q, want_k = rotated(given)
    ops.set_layers({NAME: stage})
    before = ops.executions()
    rope_stage(given)
    assert torch.equal(given["query"], want_q)
    assert torch.equal(given["key"], want_k)
    keys, values = (cache.flatten(0, 1) for cache in split_cache(layer.kv_cache))
    for token, slot in ((0, 4), (3, 7), (4, 9)):
        assert torch.equal(keys[slot], want_k[token])
        assert torch.equal(values[slot], given["value"][token])
    assert not keys[[5, 6]].any()
    for token, row in ((1, 0), (2, 2), (3, 3)):
        assert torch.equal(stage.key[row], want_k[token])
        assert torch.equal(stage.value[row], given["value"][token])
    assert layer.impl.direct == []
    assert ops.executions()["staged"] - before["staged"] == 1


def test_a_layers_write_is_prepared_once_and_anew_with_another_cache_staging_or_table(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nwor_compile.ops import library
    from nwor_compile.vllm_adapter import ops, staged_write
    from nwor_compile.vllm_adapter.packed_cache import split_cache

    made = []

    def counted(launcher: Any, device: torch.device) -> Any:
        return prepare

    def prepare(*arguments: Any) -> Any:
        made.append(arguments)
        return library.pick(staged_write.ROPE_WRITE, layer.kv_cache.device)(*arguments)

    monkeypatch.setattr(staged_write, "pick", counted)
    ops.set_layers({NAME: staging()})
    given = step()

    def prepared() -> int:
        before = len(made)
        rope_stage({**given, "query": given["query"].clone(), "key": given["key"].clone()})
        return len(made) - before

    assert [prepared(), prepared()] == [1, 0]
    given["cos_sin_cache"] = given["cos_sin_cache"].view_as(given["cos_sin_cache"])
    assert prepared() == 0  # the same memory
    given["cos_sin_cache"] = given["cos_sin_cache"].clone()
    assert [prepared(), prepared()] == [1, 0]
    layer.kv_cache = layer.kv_cache.clone()
    assert [prepared(), prepared()] == [1, 0]
    keys = split_cache(layer.kv_cache)[0].flatten(0, 1)
    assert torch.equal(keys[4], rotated(given)[1][0])  # the new cache
    ops.set_layers({NAME: staging()})
    assert [prepared(), prepared()] == [1, 0]
    ops.set_layers({})
    assert staged_write._kept == {}
    assert [prepared(), prepared()] == [1, 0]  # directly


@pytest.fixture(params=[True, False], ids=["neox", "gptj"])
def is_neox(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def profiled(layer: Any, is_neox: bool, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A step, and the layer has run in it without slots, as vLLM profiles it; then with slots, by
    other strides."""
    from vllm.forward_context import get_forward_context

    given = step()
    with monkeypatch.context() as patch:
        patch.setattr(get_forward_context(), "slot_mapping", {})
        rope_stage({**given, "query": given["query"].clone()}, is_neox)
    rope_stage({name: tensor.clone() for name, tensor in given.items()}, is_neox)
    layer.kv_cache.zero_()
    return given


def called(layers: dict[str, Any], staging: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What `call_writes` prepares and calls: name, staging and the tensors' forms of each. What was
    noted is kept."""
    from nwor_compile.vllm_adapter import layer_calls

    calls: list[tuple[Any, ...]] = []

    def prepared(name: str, layer: Any, cache: Tensor, to: Any, *rest: Any) -> Any:
        assert cache is layer.kv_cache
        return lambda *tensors: calls.append((name, to, rest, [form(t) for t in tensors]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_calls, "rope_write", prepared)
        patch.setattr(layer_calls, "stage_write", prepared)
        patch.setattr(layer_calls, "forget", lambda: None)
        layer_calls.call_writes(layers, staging)
    return calls


def form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def test_the_writes_to_come_are_called_as_the_profiling_run_was(
    layer: Any, profiled: dict[str, Tensor], is_neox: bool
) -> None:
    from nwor_compile.vllm_adapter import layer_calls, ops

    forms = [form(profiled[name]) for name in ("query", "key", "value", "positions")]
    forms = [((1, *shape[1:]), stride, dtype) for shape, stride, dtype in forms]
    forms[0] = ((1, HEADS, SIZE), (HEADS * SIZE, SIZE, 1), torch.bfloat16)  # a clone there
    forms.append(((1,), (1,), torch.int64))
    rotation, to = (profiled["cos_sin_cache"], is_neox), staging()
    direct, staged = (NAME, None, rotation, forms), (NAME, to, rotation, forms)
    layers = {NAME: layer, "other": layer}
    assert called(layers, {NAME: to}) == [direct, staged]
    assert called(layers, {}) == [direct]
    assert called({"other": layer}, {}) == []  # what an engine before this one ran
    layer.impl.attn_type = "encoder_only"  # written by vLLM
    assert called(layers, {}) == []
    layer.impl.attn_type = "decoder"
    ops.set_layers({NAME: to})
    assert called(layers, {NAME: to}) == [direct, staged]
    layer_calls.call_writes(layers, {NAME: to})
    assert not layer.kv_cache.any()  # no slot, no row
    assert not to.key.any()
    assert called(layers, {NAME: to}) == []  # once


def test_an_engine_that_ends_before_its_warm_up_leaves_nothing_noted(
    layer: Any, profiled: dict[str, Tensor]
) -> None:
    from nwor_compile.vllm_adapter import ops

    assert called({NAME: layer}, {})
    ops.set_layers({})
    assert called({NAME: layer}, {}) == []


def test_a_write_without_a_rotation_is_called_where_it_stages(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.forward_context import get_forward_context

    from nwor_compile.vllm_adapter import ops  # noqa: F401

    given, to = step(), staging()
    with monkeypatch.context() as patch:
        patch.setattr(get_forward_context(), "slot_mapping", {})
        torch.ops.nwor.vllm_stage(given["key"], given["value"], NAME)
    assert layer.impl.direct == []
    # With slots it is not noted again.
    torch.ops.nwor.vllm_stage(given["key"].clone(), given["value"].clone(), NAME)
    assert len(layer.impl.direct) == 1
    row = ((1, KV_HEADS, SIZE), given["key"].stride(), torch.bfloat16)
    slot = ((1,), (1,), torch.int64)
    assert called({NAME: layer}, {NAME: to}) == [(NAME, to, (), [row, row, slot])]
    assert called({NAME: layer}, {}) == []


@pytest.mark.parametrize("known", [False, True])
def test_layers_that_no_window_knows_are_written_whole(layer: Any, known: bool) -> None:
    """By the same launch where the cache's form is known, else by vLLM's own write."""
    from nwor_compile.vllm_adapter.packed_cache import split_cache

    given = step()
    want_q, want_k = rotated(given)
    if not known:
        layer.impl.attn_type = "encoder_only"
    rope_stage(given)
    assert torch.equal(given["query"], want_q)
    assert torch.equal(given["key"], want_k)
    keys = split_cache(layer.kv_cache)[0].flatten(0, 1)
    if known:
        assert torch.equal(keys[[4, 5, 6, 7, 9]], want_k)
        assert layer.impl.direct == []
    else:
        assert not keys.any()
        assert torch.equal(layer.impl.direct[0], want_k)


def test_without_slots_it_rotates_alone(layer: Any) -> None:
    from vllm.forward_context import get_forward_context

    get_forward_context().slot_mapping = {}
    given = step()
    want_q, want_k = rotated(given)
    rope_stage(given)
    assert torch.equal(given["query"], want_q)
    assert torch.equal(given["key"], want_k)
    assert not layer.kv_cache.any()


def test_the_op_is_well_declared(layer: Any) -> None:
    from nwor_compile.vllm_adapter import rope_ops  # noqa: F401

    op = torch.ops.nwor.vllm_rope_stage.default
    torch.library.opcheck(op, (*step().values(), True, NAME))


def model(x: Tensor, weights: tuple[Tensor, Tensor], positions: Tensor, table: Tensor) -> Tensor:
    """Two layers as vLLM traces them, one cache for both."""
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    for weight in weights:
        q, k, v = torch.nn.functional.linear(x, weight).split(WIDTHS, dim=-1)
        q, k = RotaryEmbedding.forward_static(positions, q, k, SIZE, SIZE, table, True)
        output = torch.empty(torch.Size((q.shape[0], WIDTHS[0])), dtype=q.dtype, device=q.device)
        q, output = q.view(-1, HEADS, SIZE), output.view(-1, HEADS, SIZE)
        k, v = k.view(-1, KV_HEADS, SIZE), v.view(-1, KV_HEADS, SIZE)
        dep = torch.ops.vllm.unified_kv_cache_update(k, v, NAME)
        torch.ops.vllm.unified_attention_with_output(q, k, v, output, NAME, kv_cache_dummy_dep=dep)
        x = torch.tanh(output.view(-1, WIDTHS[0])[:, :HIDDEN]) + x
    return x


class Compiled(torch.nn.Module):
    """A piece compiled by Inductor when it is first called: Dynamo is off inside a backend."""

    def __init__(self, piece: torch.fx.GraphModule) -> None:
        super().__init__()
        self.piece = torch.fx.GraphModule(piece, piece.graph)
        self.made: Any = None

    def forward(self, *args: Any) -> Any:
        if self.made is None:
            self.made = torch._inductor.compile(self.piece, list(args))
        return self.made(*args)


@pytest.mark.parametrize("rope", [False, True])
def test_pieces_between_compiled_apart_give_the_bits_of_stock_pieces(
    layer: Any, rope: bool
) -> None:
    """vLLM's cut, each piece compiled by Inductor, the layer ops run between them."""
    from vllm.compilation import backends

    from nwor_compile.passes.layer_ops import LayerOps
    from nwor_compile.vllm_adapter import graph_split
    from nwor_compile.vllm_adapter.cuda_configure import ROPE_STAGE_OP, STAGE_OP, VERIFY_OP
    from nwor_compile.vllm_adapter.graph_pass import VllmNworPass

    theirs = ["vllm::unified_kv_cache_update", "vllm::unified_attention_with_output"]
    cut_at = [*theirs, STAGE_OP, ROPE_STAGE_OP, VERIFY_OP]
    rng = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, sum(WIDTHS), HIDDEN, generator=rng).bfloat16()
    x = torch.randn(TOKENS, HIDDEN, generator=rng).bfloat16()
    given = step()
    shape: list[list[list[str]]] = []

    def cut(module: torch.fx.GraphModule, example_inputs: Any) -> Any:
        whole, items = backends.split_graph(module, cut_at)
        shape.append([
            [str(n.target).split(".")[1] for n in item.graph.graph.nodes if "vllm" in str(n.target)]
            for item in items if item.is_splitting_graph
        ])  # fmt: skip
        for item in items:
            if not item.is_splitting_graph:
                piece = getattr(whole, item.submod_name)
                setattr(whole, item.submod_name, Compiled(piece))
        return whole.forward

    def run() -> Tensor:
        torch._dynamo.reset()
        layer.kv_cache.zero_()
        with torch.inference_mode():
            compiled = torch.compile(model, backend=cut, fullgraph=True)
            out: Tensor = compiled(x, (first, second), given["positions"], given["cos_sin_cache"])
        return out

    original = backends.split_graph
    try:
        stock = run()
        graph_split.use(VllmNworPass(LayerOps(), strict=True, rope=rope))
        ours = run()
    finally:
        graph_split.forget()
        backends.split_graph = original
    assert torch.equal(stock, ours)
    # One cut a layer, with both ops, and nothing compiled between them.
    write = "vllm_rope_stage" if rope else "vllm_stage"
    assert shape[1] == [[write, "vllm_verify"]] * 2
