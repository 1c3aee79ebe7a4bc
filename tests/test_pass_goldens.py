"""The canonical graphs before and after the pass, printed. EXPECTTEST_ACCEPT=1 rewrites them."""

from __future__ import annotations

import graphs
import torch
from expecttest import TestCase
from graphs import Builder, canonical, compact
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch.fx import Graph

from nwor_compile.passes import rewrite


def packed_graph() -> Graph:
    """K and V are the halves of one tensor's last dimension; v2 describes them as slices."""
    b = Builder()
    step = b.step()
    size = graphs.SIZE
    packed = b.input("packed", graphs.BLOCKS, graphs.BLOCK, graphs.KV_HEADS, 2 * size)
    halves = {"key_cache": (0, size), "value_cache": (size, 2 * size)}
    views = {}
    for name, (start, end) in halves.items():
        views[f"_{name}_base_index"] = 0
        views[f"_{name}_slice_dim"] = 3
        views[f"_{name}_slice_start"] = start
        views[f"_{name}_slice_end"] = end
    call = b.call(
        auto_functionalized_v2, graphs.write, key=step.key, value=step.value,
        slot_mapping=step.slots, kv_cache_dtype="auto", k_scale=None, v_scale=None, **views,
        _all_bases=[packed],
    )  # fmt: skip
    (now,) = b.versions(call, 1)
    narrow = torch.ops.aten.slice.Tensor
    out = b.read(step, *(b.call(narrow, now, 3, *half) for half in halves.values()))
    b.write_back((packed, now))
    return b.output(out)


def refused_graph() -> Graph:
    """Something else reads the cache after the write."""
    b = Builder()
    step, caches = b.step(), b.caches()
    now = b.write(step, *caches, "v2")
    out = b.read(step, *now)
    total = b.call(torch.ops.aten.sum.default, now[1])
    b.write_back(*zip(caches, now, strict=True))
    return b.output(out, total)


class TestGoldens(TestCase):
    def test_plain_calls_become_their_staged_twins(self) -> None:
        graph = canonical("plain")
        self.assertExpectedInline(
            compact(graph),
            """\
reshape_and_cache_default = nwor.reshape_and_cache(key, value, key_cache, value_cache,
    slots)
paged_attention_default = nwor.paged_attention(query, key_cache, value_cache, table, lens,
    starts, 0.3536)
return [paged_attention_default]""",
        )
        rewrite(graph)
        self.assertExpectedInline(
            compact(graph),
            """\
stage_kv_window = nwor.stage_kv.window(key, value, key_cache, value_cache, slots)
verify_attention_window = nwor.verify_attention.window(query, key_cache, value_cache, table,
    lens, starts, 0.3536)
return [verify_attention_window]""",
        )

    def test_the_op_inside_auto_functionalized_v1_is_swapped(self) -> None:
        graph = canonical("v1")
        self.assertExpectedInline(
            compact(graph),
            """\
auto_functionalized = auto_functionalized(nwor.reshape_and_cache, key=key, value=value,
    key_cache=key_cache, value_cache=value_cache, slot_mapping=slots, kv_cache_dtype=auto)
getitem = getitem(auto_functionalized, 1)
getitem_1 = getitem(auto_functionalized, 2)
paged_attention_default = nwor.paged_attention(query, getitem, getitem_1, table, lens,
    starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem)
copy__default_1 = aten.copy_(value_cache, getitem_1)
return [paged_attention_default]""",
        )
        rewrite(graph)
        self.assertExpectedInline(
            compact(graph),
            """\
auto_functionalized_1 = auto_functionalized(nwor.stage_kv.window, key=key, value=value,
    key_cache=key_cache, value_cache=value_cache, slot_mapping=slots, kv_cache_dtype=auto)
getitem = getitem(auto_functionalized_1, 1)
getitem_1 = getitem(auto_functionalized_1, 2)
verify_attention_window = nwor.verify_attention.window(query, getitem, getitem_1, table,
    lens, starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem)
copy__default_1 = aten.copy_(value_cache, getitem_1)
return [verify_attention_window]""",
        )

    def test_the_op_inside_auto_functionalized_v2_is_swapped(self) -> None:
        graph = canonical("v2")
        self.assertExpectedInline(
            compact(graph),
            """\
auto_functionalized_v2 = auto_functionalized_v2(nwor.reshape_and_cache, key=key,
    value=value, slot_mapping=slots, kv_cache_dtype=auto, _key_cache_base_index=0,
    _value_cache_base_index=1, _all_bases=[key_cache, value_cache])
getitem = getitem(auto_functionalized_v2, 1)
getitem_1 = getitem(auto_functionalized_v2, 2)
paged_attention_default = nwor.paged_attention(query, getitem, getitem_1, table, lens,
    starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem)
copy__default_1 = aten.copy_(value_cache, getitem_1)
return [paged_attention_default]""",
        )
        rewrite(graph)
        self.assertExpectedInline(
            compact(graph),
            """\
auto_functionalized_v2_1 = auto_functionalized_v2(nwor.stage_kv.window, key=key,
    value=value, slot_mapping=slots, kv_cache_dtype=auto, _key_cache_base_index=0,
    _value_cache_base_index=1, _all_bases=[key_cache, value_cache])
getitem = getitem(auto_functionalized_v2_1, 1)
getitem_1 = getitem(auto_functionalized_v2_1, 2)
verify_attention_window = nwor.verify_attention.window(query, getitem, getitem_1, table,
    lens, starts, 0.3536)
copy__default = aten.copy_(key_cache, getitem)
copy__default_1 = aten.copy_(value_cache, getitem_1)
return [verify_attention_window]""",
        )

    def test_halves_of_a_packed_cache_stay_slices_of_one_base(self) -> None:
        graph = packed_graph()
        self.assertExpectedInline(
            compact(graph),
            """\
auto_functionalized_v2 = auto_functionalized_v2(nwor.reshape_and_cache, key=key,
    value=value, slot_mapping=slots, kv_cache_dtype=auto, _key_cache_base_index=0,
    _key_cache_slice_dim=3, _key_cache_slice_start=0, _key_cache_slice_end=8,
    _value_cache_base_index=0, _value_cache_slice_dim=3, _value_cache_slice_start=8,
    _value_cache_slice_end=16, _all_bases=[packed])
getitem = getitem(auto_functionalized_v2, 1)
slice_tensor = aten.slice.Tensor(getitem, 3, 0, 8)
slice_tensor_1 = aten.slice.Tensor(getitem, 3, 8, 16)
paged_attention_default = nwor.paged_attention(query, slice_tensor, slice_tensor_1, table,
    lens, starts, 0.3536)
copy__default = aten.copy_(packed, getitem)
return [paged_attention_default]""",
        )
        rewrite(graph)
        self.assertExpectedInline(
            compact(graph),
            """\
auto_functionalized_v2_1 = auto_functionalized_v2(nwor.stage_kv.window, key=key,
    value=value, slot_mapping=slots, kv_cache_dtype=auto, _key_cache_base_index=0,
    _key_cache_slice_dim=3, _key_cache_slice_start=0, _key_cache_slice_end=8,
    _value_cache_base_index=0, _value_cache_slice_dim=3, _value_cache_slice_start=8,
    _value_cache_slice_end=16, _all_bases=[packed])
getitem = getitem(auto_functionalized_v2_1, 1)
slice_tensor = aten.slice.Tensor(getitem, 3, 0, 8)
slice_tensor_1 = aten.slice.Tensor(getitem, 3, 8, 16)
verify_attention_window = nwor.verify_attention.window(query, slice_tensor, slice_tensor_1,
    table, lens, starts, 0.3536)
copy__default = aten.copy_(packed, getitem)
return [verify_attention_window]""",
        )

    def test_a_refused_write_leaves_the_graph_as_it_was(self) -> None:
        graph = refused_graph()
        before = compact(graph)
        self.assertExpectedInline(
            before,
            """\
auto_functionalized_v2 = auto_functionalized_v2(nwor.reshape_and_cache, key=key,
    value=value, slot_mapping=slots, kv_cache_dtype=auto, _key_cache_base_index=0,
    _value_cache_base_index=1, _all_bases=[key_cache, value_cache])
getitem = getitem(auto_functionalized_v2, 1)
getitem_1 = getitem(auto_functionalized_v2, 2)
paged_attention_default = nwor.paged_attention(query, getitem, getitem_1, table, lens,
    starts, 0.3536)
sum_default = aten.sum(getitem_1)
copy__default = aten.copy_(key_cache, getitem)
copy__default_1 = aten.copy_(value_cache, getitem_1)
return [paged_attention_default, sum_default]""",
        )
        report = rewrite(graph)
        assert compact(graph) == before
        assert report.refused[0].reason == (
            "sum_default (aten::sum) touches the cache after the write and does not read staging"
        )
