"""RoPE and a cache write before and after the pass, printed. EXPECTTEST_ACCEPT=1 rewrites them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from expecttest import TestCase
from graphs import HEADS, KV_HEADS, SIZE, Builder, compact
from torch._higher_order_ops.auto_functionalize import auto_functionalized, auto_functionalized_v2
from torch.fx import Graph, Node

from nwor_compile.passes import rewrite

aten = torch.ops.aten
rotary = torch.ops.nwor.rotary_embedding.default
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]


def rotated(b: Builder, x: Node, cos: Node, sin: Node) -> Any:
    first, second = (b.call(aten.slice.Tensor, x, 2, i, i + SIZE // 2) for i in (0, SIZE // 2))
    turned = b.call(aten.cat.default, [b.call(aten.neg.default, second), first], -1)
    return b.call(
        aten.add.Tensor, b.call(aten.mul.Tensor, x, cos), b.call(aten.mul.Tensor, turned, sin)
    )


def torch_graph() -> Graph:
    b = Builder()
    step, caches = b.step(), b.caches()
    cos, sin = b.input("cos", 4, 1, SIZE), b.input("sin", 4, 1, SIZE)
    step = step._replace(query=rotated(b, step.query, cos, sin), key=rotated(b, step.key, cos, sin))
    now = b.write(step, *caches, "v2")
    out = b.read(step, *now)
    b.write_back(*zip(caches, now, strict=True))
    return b.output(out, step.key)


def heads(b: Builder, rows: Any) -> Node:
    return b.call(aten.view.default, rows, [4, -1, SIZE])


def op_graph(form: str) -> Graph:
    """q, k, v are slices of one product, flat, as vLLM has them."""
    b = Builder()
    step, caches = b.step(), b.caches()
    qkv, table = b.input("qkv", 4, sum(WIDTHS)), b.input("table", 9, SIZE)
    positions = b.input("positions", 4, dtype=torch.int64)
    constant = {"head_size": SIZE, "cos_sin_cache": table, "is_neox": True}
    bounds = [0, WIDTHS[0], WIDTHS[0] + WIDTHS[1], sum(WIDTHS)]
    parts = list(itertools.pairwise(bounds))
    if form == "v1":
        q, k, v = (b.call(aten.slice.Tensor, qkv, 1, *part) for part in parts)
        call = b.call(auto_functionalized, rotary, positions=positions, query=q, key=k, **constant)
        q, k = b.versions(call, 2)
    else:
        views = {}
        for name, (start, end) in zip(("query", "key"), parts, strict=False):
            views[f"_{name}_base_index"] = 0
            views[f"_{name}_slice_dim"] = 1
            views[f"_{name}_slice_start"] = start
            views[f"_{name}_slice_end"] = end
        call = b.call(
            auto_functionalized_v2, rotary, positions=positions, **constant, **views,
            _all_bases=[qkv],
        )  # fmt: skip
        (now,) = b.versions(call, 1)
        q, k, v = (b.call(aten.slice.Tensor, now, 1, *part) for part in parts)
    step = step._replace(query=heads(b, q), key=heads(b, k), value=heads(b, v))
    caches_now = b.write(step, *caches, form)
    out = b.read(step, *caches_now)
    b.write_back(*zip(caches, caches_now, strict=True))
    return b.output(out)


class TestRopeGoldens(TestCase):
    def check(self, graph: Graph) -> str:
        assert rewrite(graph).decisions[0].fused
        return compact(graph)

    def test_plain_torch_becomes_one_call_with_two_results(self) -> None:
        graph = torch_graph()
        self.assertExpectedInline(
            compact(graph),
            """\
slice_tensor = aten.slice.Tensor(query, 2, 0, 4)
slice_tensor_1 = aten.slice.Tensor(query, 2, 4, 8)
neg_default = aten.neg(slice_tensor_1)
cat_default = aten.cat([neg_default, slice_tensor], -1)
mul_tensor = aten.mul.Tensor(query, cos)
mul_tensor_1 = aten.mul.Tensor(cat_default, sin)
add_tensor = aten.add.Tensor(mul_tensor, mul_tensor_1)
slice_tensor_2 = aten.slice.Tensor(key, 2, 0, 4)
slice_tensor_3 = aten.slice.Tensor(key, 2, 4, 8)
neg_default_1 = aten.neg(slice_tensor_3)
cat_default_1 = aten.cat([neg_default_1, slice_tensor_2], -1)
mul_tensor_2 = aten.mul.Tensor(key, cos)
mul_tensor_3 = aten.mul.Tensor(cat_default_1, sin)
add_tensor_1 = aten.add.Tensor(mul_tensor_2, mul_tensor_3)
auto_functionalized_v2 = auto_functionalized_v2(nwor.reshape_and_cache, key=add_tensor_1,
    value=value, slot_mapping=slots, kv_cache_dtype=auto, _key_cache_base_index=0,
    _value_cache_base_index=1, _all_bases=[key_cache, value_cache])
getitem = getitem(auto_functionalized_v2, 1)
getitem_1 = getitem(auto_functionalized_v2, 2)
paged_attention_default = nwor.paged_attention(add_tensor, getitem, getitem_1, table, lens,
    starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem)
copy__default_1 = aten.copy_(value_cache, getitem_1)
return [paged_attention_default, add_tensor_1]""",
        )
        self.assertExpectedInline(
            self.check(graph),
            """\
select_int = aten.select.int(cos, 1, 0)
select_int_1 = aten.select.int(sin, 1, 0)
auto_functionalized_v2_1 = auto_functionalized_v2(nwor.rope_stage_kv.window, value=value,
    slot_mapping=slots, kv_cache_dtype=auto, query=query, key=key, cos=select_int,
    sin=select_int_1, rotary_dim=8, is_neox=True, _key_cache_base_index=0,
    _value_cache_base_index=1, _all_bases=[key_cache, value_cache])
getitem_2 = getitem(auto_functionalized_v2_1, 0)
getitem_3 = getitem(auto_functionalized_v2_1, 1)
getitem = getitem(auto_functionalized_v2_1, 2)
getitem_1 = getitem(auto_functionalized_v2_1, 3)
verify_attention_window = nwor.verify_attention.window(getitem_2, getitem, getitem_1, table,
    lens, starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem)
copy__default_1 = aten.copy_(value_cache, getitem_1)
return [verify_attention_window, getitem_3]""",
        )

    def test_a_rotary_op_in_auto_functionalized_v1(self) -> None:
        graph = op_graph("v1")
        self.assertExpectedInline(
            compact(graph),
            """\
slice_tensor = aten.slice.Tensor(qkv, 1, 0, 32)
slice_tensor_1 = aten.slice.Tensor(qkv, 1, 32, 48)
slice_tensor_2 = aten.slice.Tensor(qkv, 1, 48, 64)
auto_functionalized = auto_functionalized(nwor.rotary_embedding, positions=positions,
    query=slice_tensor, key=slice_tensor_1, head_size=8, cos_sin_cache=table_1,
    is_neox=True)
getitem = getitem(auto_functionalized, 1)
getitem_1 = getitem(auto_functionalized, 2)
view_default = aten.view(getitem, [4, -1, 8])
view_default_1 = aten.view(getitem_1, [4, -1, 8])
view_default_2 = aten.view(slice_tensor_2, [4, -1, 8])
auto_functionalized_1 = auto_functionalized(nwor.reshape_and_cache, key=view_default_1,
    value=view_default_2, key_cache=key_cache, value_cache=value_cache, slot_mapping=slots,
    kv_cache_dtype=auto)
getitem_2 = getitem(auto_functionalized_1, 1)
getitem_3 = getitem(auto_functionalized_1, 2)
paged_attention_default = nwor.paged_attention(view_default, getitem_2, getitem_3, table,
    lens, starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem_2)
copy__default_1 = aten.copy_(value_cache, getitem_3)
return [paged_attention_default]""",
        )
        self.assertExpectedInline(
            self.check(graph),
            """\
slice_tensor = aten.slice.Tensor(qkv, 1, 0, 32)
slice_tensor_1 = aten.slice.Tensor(qkv, 1, 32, 48)
slice_tensor_2 = aten.slice.Tensor(qkv, 1, 48, 64)
view_default_2 = aten.view(slice_tensor_2, [4, -1, 8])
auto_functionalized_2 = auto_functionalized(nwor.rope_stage_kv.window_, positions=positions,
    query=slice_tensor, key=slice_tensor_1, value=view_default_2, head_size=8,
    cos_sin_cache=table_1, is_neox=True, key_cache=key_cache, value_cache=value_cache,
    slot_mapping=slots, kv_cache_dtype=auto)
getitem = getitem(auto_functionalized_2, 1)
getitem_1 = getitem(auto_functionalized_2, 2)
view_default = aten.view(getitem, [4, -1, 8])
getitem_2 = getitem(auto_functionalized_2, 3)
getitem_3 = getitem(auto_functionalized_2, 4)
verify_attention_window = nwor.verify_attention.window(view_default, getitem_2, getitem_3,
    table, lens, starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem_2)
copy__default_1 = aten.copy_(value_cache, getitem_3)
return [verify_attention_window]""",
        )

    def test_a_rotary_op_in_auto_functionalized_v2(self) -> None:
        graph = op_graph("v2")
        self.assertExpectedInline(
            compact(graph),
            """\
auto_functionalized_v2 = auto_functionalized_v2(nwor.rotary_embedding, positions=positions,
    head_size=8, cos_sin_cache=table_1, is_neox=True, _query_base_index=0,
    _query_slice_dim=1, _query_slice_start=0, _query_slice_end=32, _key_base_index=0,
    _key_slice_dim=1, _key_slice_start=32, _key_slice_end=48, _all_bases=[qkv])
getitem = getitem(auto_functionalized_v2, 1)
slice_tensor = aten.slice.Tensor(getitem, 1, 0, 32)
slice_tensor_1 = aten.slice.Tensor(getitem, 1, 32, 48)
slice_tensor_2 = aten.slice.Tensor(getitem, 1, 48, 64)
view_default = aten.view(slice_tensor, [4, -1, 8])
view_default_1 = aten.view(slice_tensor_1, [4, -1, 8])
view_default_2 = aten.view(slice_tensor_2, [4, -1, 8])
auto_functionalized_v2_1 = auto_functionalized_v2(nwor.reshape_and_cache,
    key=view_default_1, value=view_default_2, slot_mapping=slots, kv_cache_dtype=auto,
    _key_cache_base_index=0, _value_cache_base_index=1, _all_bases=[key_cache, value_cache])
getitem_1 = getitem(auto_functionalized_v2_1, 1)
getitem_2 = getitem(auto_functionalized_v2_1, 2)
paged_attention_default = nwor.paged_attention(view_default, getitem_1, getitem_2, table,
    lens, starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem_1)
copy__default_1 = aten.copy_(value_cache, getitem_2)
return [paged_attention_default]""",
        )
        self.assertExpectedInline(
            self.check(graph),
            """\
slice_tensor_3 = aten.slice.Tensor(qkv, 1, 48, 64)
view_default_3 = aten.view(slice_tensor_3, [4, -1, 8])
auto_functionalized_v2_2 = auto_functionalized_v2(nwor.rope_stage_kv.window_,
    value=view_default_3, slot_mapping=slots, kv_cache_dtype=auto, positions=positions,
    head_size=8, cos_sin_cache=table_1, is_neox=True, _query_base_index=0,
    _query_slice_dim=1, _query_slice_start=0, _query_slice_end=32, _key_base_index=0,
    _key_slice_dim=1, _key_slice_start=32, _key_slice_end=48, _key_cache_base_index=1,
    _value_cache_base_index=2, _all_bases=[qkv, key_cache, value_cache])
getitem = getitem(auto_functionalized_v2_2, 1)
slice_tensor = aten.slice.Tensor(getitem, 1, 0, 32)
view_default = aten.view(slice_tensor, [4, -1, 8])
getitem_1 = getitem(auto_functionalized_v2_2, 2)
getitem_2 = getitem(auto_functionalized_v2_2, 3)
verify_attention_window = nwor.verify_attention.window(view_default, getitem_1, getitem_2,
    table, lens, starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem_1)
copy__default_1 = aten.copy_(value_cache, getitem_2)
return [verify_attention_window]""",
        )
