"""`reshape_and_cache` and `stage_kv`: what is written, where, in which bits, and what is not."""

from __future__ import annotations

import random
from dataclasses import replace

import oracle
import pytest
import torch
from cases import (
    FORMATS,
    LAYOUTS,
    SCALES,
    Batch,
    Geometry,
    Span,
    bits,
    make_batch,
    make_step,
    same_bits,
    stage_arguments,
    write_arguments,
)

from nwor_compile import ops
from nwor_compile.ops.cache_write import STAGE_WRITE
from nwor_compile.ops.library import Implementation, pick

SPANS = [Span(0, 7), Span(5, 1, 3), Span(0, 0), Span(9, 1), Span(2, 1, 5)]
FORMAT_IDS = [f"{str(d)[6:]}-{n}{'-uint8' * u}" for d, n, u in FORMATS]


def geometry_of(form: tuple[torch.dtype, str, bool], **options: object) -> Geometry:
    dtype, name, as_uint8 = form
    return Geometry(model_dtype=dtype, kv_cache_dtype=name, as_uint8=as_uint8, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_direct_write_stores_every_row_in_its_slot_and_nothing_else(
    layout: str, form: tuple[torch.dtype, str, bool]
) -> None:
    scale = "none" if form[1] == "auto" else "head"
    batch = make_batch(SPANS, geometry_of(form, layout=layout, scale=scale), padding=2)
    layer = make_step(batch).layers[0]
    expected = layer.cache.rows()
    oracle.write(expected, layer.key, layer.value, batch.slot_mapping.tolist(), *layer.format)
    ops.reshape_and_cache(**write_arguments(layer, batch))
    assert layer.cache.holds(expected)


@pytest.mark.parametrize("how", ["reference", "triton"])
@pytest.mark.parametrize("form", FORMATS, ids=FORMAT_IDS)
def test_a_prepared_write_stages_as_the_op_does_call_after_call(
    form: tuple[torch.dtype, str, bool], how: Implementation
) -> None:
    if how == "triton":
        pytest.importorskip("triton")
    scale = "none" if form[1] == "auto" else "head"
    batch = make_batch(SPANS, geometry_of(form, scale=scale), padding=2)
    ours, apart = (make_step(batch).layers[0] for _ in range(2))
    staging = (ours.staged_key, ours.staged_value, ours.state, batch.row_map)
    with ops.implementation(how):
        write = pick(STAGE_WRITE, batch.slot_mapping.device)(
            ours.cache.key, ours.cache.value, staging, *ours.format
        )
        for seed, dtype in enumerate((torch.int64, torch.int32, torch.int64)):
            rows = make_step(batch, seed=seed).layers[0]
            key = rows.key if seed else rows.key.transpose(0, 1).contiguous().transpose(0, 1)
            write(key, rows.value, batch.slot_mapping.to(dtype))
            arguments = {**stage_arguments(apart, batch), "key": rows.key, "value": rows.value}
            with ops.implementation("reference"):
                ops.stage_kv(**arguments)
            for mine, theirs in (
                *zip(ours.cache.stored, apart.cache.stored, strict=True),
                (ours.staged_key, apart.staged_key), (ours.staged_value, apart.staged_value),
                (ours.state, apart.state),
            ):  # fmt: skip
                assert same_bits(mine, theirs)


@pytest.mark.parametrize("form", FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_certain_rows_go_to_the_cache_and_draft_rows_to_staging_only(
    layout: str, form: tuple[torch.dtype, str, bool]
) -> None:
    scale = "none" if form[1] == "auto" else "tensor"
    batch = make_batch(SPANS, geometry_of(form, layout=layout, scale=scale), padding=2)
    step = make_step(batch)
    layer = step.layers[0]
    expected, staging = layer.cache.rows(), oracle.Rows()
    before = layer.cache.rows()
    staged, overflow = oracle.stage(
        expected, staging, step.capacity, layer.key, layer.value, batch.slot_mapping.tolist(),
        batch.row_map.tolist(), *layer.format,
    )  # fmt: skip
    ops.stage_kv(**stage_arguments(layer, batch))
    assert (staged, overflow) == (8, False)
    assert layer.state.tolist() == [8, 0]
    assert layer.cache.holds(expected)
    for slot in batch.draft_slots.tolist():  # the same, said on its own: invariant 1
        assert same_bits(expected[slot][0], before[slot][0])
    for row, (key, value) in staging.items():
        assert torch.equal(bits(layer.staged_key[row]), bits(key))
        assert torch.equal(bits(layer.staged_value[row]), bits(value))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_element_lies_where_its_layout_says(layout: str) -> None:
    """The layouts spelled out index by index, without views or permutes."""
    batch = make_batch([Span(0, 6)], Geometry(layout=layout))
    layer = make_step(batch).layers[0]
    ops.reshape_and_cache(**write_arguments(layer, batch))
    stored, size, x = layer.cache.stored, 8, 4
    for token, slot in enumerate(batch.slot_mapping.tolist()):
        b, o = divmod(slot, 4)
        for h in range(2):
            for d in range(size):
                key, value = {
                    "nhd": lambda b, o, h, d: (stored[0][b, o, h, d], stored[1][b, o, h, d]),
                    "hnd": lambda b, o, h, d: (stored[0][b, h, o, d], stored[1][b, h, o, d]),
                    "packed": lambda b, o, h, d: (stored[0][b, o, h, d], stored[0][b, o, h, 8 + d]),
                    "packed_hnd": lambda b, o, h, d: (
                        stored[0][b, h, o, d],
                        stored[0][b, h, o, 8 + d],
                    ),
                    "5d": lambda b, o, h, d: (
                        stored[0][b, h, d // x, o, d % x],
                        stored[1][b, h, d, o],
                    ),
                }[layout](b, o, h, d)
                assert key == layer.key[token, h, d]
                assert value == layer.value[token, h, d]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_may_come_in_any_order(dtype: torch.dtype) -> None:
    batch = make_batch(SPANS, Geometry(model_dtype=dtype))
    order = list(range(batch.tokens))
    random.Random(3).shuffle(order)
    one, other = make_step(batch).layers[0], make_step(batch).layers[0]
    ops.stage_kv(**stage_arguments(one, batch))
    ops.stage_kv(**stage_arguments(other, batch, order))
    assert other.cache.holds(one.cache.rows())
    assert same_bits(one.staged_key, other.staged_key)
    assert same_bits(one.staged_value, other.staged_value)
    assert torch.equal(one.state, other.state)


def test_slots_outside_the_cache_are_skipped() -> None:
    batch = make_batch([Span(0, 6)])
    layer = make_step(batch).layers[0]
    arguments = write_arguments(layer, batch)
    slots = batch.slot_mapping.clone()
    slots[0], slots[2], slots[3] = -1, layer.cache.slots, -(10**9)
    expected = layer.cache.rows()
    oracle.write(expected, layer.key, layer.value, slots.tolist())
    ops.reshape_and_cache(**{**arguments, "slot_mapping": slots})
    assert layer.cache.holds(expected)


@pytest.mark.parametrize("op", ["write", "stage"])
def test_all_slots_missing_writes_nothing(op: str) -> None:
    batch = make_batch([Span(0, 6)])
    layer = make_step(batch).layers[0]
    before = layer.cache.rows()
    slots = torch.full_like(batch.slot_mapping, -1)
    if op == "write":
        ops.reshape_and_cache(**{**write_arguments(layer, batch), "slot_mapping": slots})
    else:
        ops.stage_kv(**{**stage_arguments(layer, batch), "slot_mapping": slots})
    assert layer.cache.holds(before)


def test_slot_zero_is_a_slot_like_any_other() -> None:
    batch = make_batch([Span(0, 1)])
    layer = make_step(batch).layers[0]
    arguments = write_arguments(layer, batch) | {"slot_mapping": torch.tensor([0])}
    before = layer.cache.rows()
    ops.reshape_and_cache(**arguments)
    assert layer.cache.holds({**before, 0: (layer.key[0], layer.value[0])})


def test_a_draft_row_with_a_valid_slot_still_never_touches_the_cache() -> None:
    batch = make_batch([Span(0, 0), Span(4, 0, 5)])
    layer = make_step(batch).layers[0]
    before = layer.cache.rows()
    assert min(batch.slot_mapping.tolist()) >= 0
    ops.stage_kv(**stage_arguments(layer, batch))
    assert layer.cache.holds(before)


def test_a_draft_row_without_a_slot_is_staged() -> None:
    batch = make_batch([Span(4, 1, 3)], without_slot=1.0)
    layer = make_step(batch).layers[0]
    before = layer.cache.rows()
    ops.stage_kv(**stage_arguments(layer, batch))
    assert layer.cache.holds(before)
    assert torch.equal(layer.staged_key[:3], layer.key[1:])


def mirrored(batch: Batch, tokens: dict[int, int]) -> Batch:
    """The batch with some certain tokens mirrored: token to staging row."""
    row_map = batch.row_map.clone()
    for token, row in tokens.items():
        row_map[token] = -(row + 2)
    return replace(batch, row_map=row_map)


@pytest.mark.parametrize("form", FORMATS, ids=FORMAT_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mirrored_rows_go_to_the_cache_and_to_staging_and_are_not_counted(
    layout: str, form: tuple[torch.dtype, str, bool]
) -> None:
    scale = "none" if form[1] == "auto" else "head"
    plain = make_batch(SPANS, geometry_of(form, layout=layout, scale=scale), padding=2)
    batch = mirrored(plain, {0: 9, 6: 11, 7: 8})
    layer = make_step(batch, spare_rows=4).layers[0]
    cache, staging = layer.cache.rows(), oracle.Rows()
    slots = batch.slot_mapping.tolist()
    # Certain rows are written as if they were not mirrored; mirrored ones are staged like drafts.
    oracle.stage(
        cache, staging, 12, layer.key, layer.value, slots, plain.row_map.tolist(), *layer.format
    )
    drafts = len(staging)
    for token, row in ((0, 9), (6, 11), (7, 8)):
        assert slots[token] in cache
        staging[row] = cache[slots[token]]
    ops.stage_kv(**stage_arguments(layer, batch))
    assert layer.state.tolist() == [drafts, 0]
    assert layer.cache.holds(cache)
    for row in range(12):
        if row in staging:
            assert torch.equal(bits(layer.staged_key[row]), bits(staging[row][0]))
            assert torch.equal(bits(layer.staged_value[row]), bits(staging[row][1]))
        else:
            assert (bits(layer.staged_key[row]) == bits(layer.staged_key[10])).all()


def test_a_mirrored_row_without_a_slot_is_staged_all_the_same() -> None:
    batch = mirrored(make_batch([Span(4, 1, 3)], without_slot=1.0), {0: 4})
    layer = make_step(batch).layers[0]
    before = layer.cache.rows()
    ops.stage_kv(**stage_arguments(layer, batch))
    assert layer.cache.holds(before)
    assert torch.equal(layer.staged_key[[4, 0, 1, 2]], layer.key)
    assert torch.equal(layer.staged_value[[4, 0, 1, 2]], layer.value)
    assert layer.state.tolist() == [3, 0]


@pytest.mark.parametrize("code", [-(5 + 2), -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_mirrored_row_past_the_last_one_is_written_and_raises_the_flag(
    dtype: torch.dtype, code: int
) -> None:
    batch = make_batch([Span(4, 1, 3)], index_dtype=dtype)
    layer = make_step(batch).layers[0]
    row_map = batch.row_map.clone()
    row_map[0] = code
    before = layer.cache.rows()
    ops.stage_kv(**{**stage_arguments(layer, batch), "row_map": row_map})
    assert layer.state.tolist() == [3, 1]
    assert layer.cache.holds({**before, batch.slot(0, 4): (layer.key[0], layer.value[0])})
    assert layer.staged_key[3:].isnan().all()


@pytest.mark.parametrize("layout", ["nhd", "packed"])
def test_staging_rows_may_be_blocks_of_the_cache_itself(layout: str) -> None:
    """Two blocks that no slot is in; K and V of a packed cache lie in one row."""
    batch = mirrored(
        make_batch([Span(2, 1, 3), Span(5, 2)], Geometry(layout=layout, spare_blocks=8)),
        {0: 6, 4: 3},
    )
    layer = make_step(batch).layers[0]
    taken = {int(slot) // 4 for slot in batch.slot_mapping}
    free = [block for block in range(batch.blocks - 1) if not taken & {block, block + 1}][-1]
    staged = [
        rows.as_strided((8, 2, 8), rows.stride()[1:], rows[free].storage_offset())
        for rows in (layer.cache.key, layer.cache.value)
    ]
    expected = layer.cache.rows()
    for token, (slot, code) in enumerate(
        zip(batch.slot_mapping.tolist(), batch.row_map.tolist(), strict=True)
    ):
        row = layer.key[token], layer.value[token]
        if code < 0:
            expected[slot] = row
        if code != -1:
            expected[4 * free + (code if code >= 0 else -code - 2)] = row
    arguments = stage_arguments(layer, batch)
    ops.stage_kv(**{**arguments, "staged_key": staged[0], "staged_value": staged[1]})
    assert layer.cache.holds(expected)
    assert layer.state.tolist() == [3, 0]


def test_without_drafts_staging_is_the_direct_write() -> None:
    batch = make_batch([Span(0, 5), Span(3, 1), Span(0, 0)], padding=3)
    one, other = make_step(batch).layers[0], make_step(batch).layers[0]
    ops.stage_kv(**stage_arguments(one, batch))
    ops.reshape_and_cache(**write_arguments(other, batch))
    assert one.cache.holds(other.cache.rows())
    assert one.state.tolist() == [0, 0]
    assert one.staged_key.isnan().all()


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_mapping_shorter_than_the_rows_writes_the_first_ones(tokens: int) -> None:
    """Padded graphs pass more rows than tokens; a persistent row map is longer still."""
    batch = make_batch([Span(0, 1), Span(2, 1, 3)])
    layer = make_step(batch).layers[0]
    expected, staging = layer.cache.rows(), oracle.Rows()
    slots, rows = batch.slot_mapping[:tokens], batch.row_map.tolist()
    oracle.stage(expected, staging, 5, layer.key, layer.value, slots.tolist(), rows)
    ops.stage_kv(**{**stage_arguments(layer, batch), "slot_mapping": slots})
    assert layer.cache.holds(expected)
    assert layer.state.tolist() == [len(staging), 0]
    assert layer.staged_key[len(staging) :].isnan().all()


def test_overflow_sets_the_flag_and_writes_the_row_nowhere() -> None:
    batch = make_batch([Span(4, 1, 4)])
    layer = make_step(batch, spare_rows=0).layers[0]
    row_map = batch.row_map.clone()
    row_map[1], row_map[2] = 4, 2**31 - 1  # one past the end, and far past it
    before = layer.cache.rows()
    ops.stage_kv(**{**stage_arguments(layer, batch), "row_map": row_map})
    assert layer.state.tolist() == [2, 1]
    certain = batch.slot(0, 4)
    assert layer.cache.holds({**before, certain: (layer.key[0], layer.value[0])})
    assert layer.staged_key[:2].isnan().all()
    assert torch.equal(layer.staged_key[2:], layer.key[3:])


def test_overflow_of_every_row_leaves_staging_as_it_was() -> None:
    batch = make_batch([Span(4, 0, 3)])
    layer = make_step(batch, spare_rows=0).layers[0]
    before = layer.cache.rows()
    ops.stage_kv(**{**stage_arguments(layer, batch), "row_map": batch.row_map + 3})
    assert layer.state.tolist() == [0, 1]
    assert layer.cache.holds(before)
    assert layer.staged_key.isnan().all()
    assert layer.staged_value.isnan().all()


def test_the_overflow_flag_stays_until_it_is_cleared() -> None:
    batch = make_batch([Span(4, 1, 2)])
    layer = make_step(batch).layers[0]
    ops.stage_kv(**{**stage_arguments(layer, batch), "row_map": batch.row_map + 100})
    ops.stage_kv(**stage_arguments(layer, batch))
    assert layer.state.tolist() == [2, 1]


def test_eight_staged_rows_count_as_8_not_4096() -> None:
    """Old failure: every thread of a block incremented, 8 rows x 8 heads x 64 elements = 4096."""
    geometry = Geometry(kv_heads=8, heads=8, head_size=64)
    batch = make_batch([Span(3, 1, 4), Span(5, 1, 4)], geometry)
    step = make_step(batch)
    layer = step.layers[0]
    ops.stage_kv(**stage_arguments(layer, batch))
    assert layer.state.tolist() == [8, 0]


def test_negative_zero_and_nan_of_the_model_survive_unquantised() -> None:
    batch = make_batch([Span(0, 2)])
    layer = make_step(batch).layers[0]
    layer.key[0, 0, 0], layer.key[1, 1, 1] = -0.0, float("nan")
    expected = layer.cache.rows()
    oracle.write(expected, layer.key, layer.value, batch.slot_mapping.tolist())
    ops.reshape_and_cache(**write_arguments(layer, batch))
    assert layer.cache.holds(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_bits_equal_the_table_for_every_16_bit_value(kind: str, dtype: torch.dtype) -> None:
    """All 65536 values: ties, subnormals, saturation, infinities, both zeros."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = every.view(64, 2, 512)
    keys, values = (torch.zeros(16, 4, 2, 512, dtype=torch.uint8) for _ in range(2))
    ops.reshape_and_cache(rows, rows.flip(0), keys, values, torch.arange(64), kind)
    expected = oracle.fp8_codes(rows, kind)
    for stored, want in zip((keys, values), (expected, expected.flip(0)), strict=True):
        codes = stored.view(64, 2, 512)
        number = ~oracle.fp8_table(kind)[want.long()].isnan()
        assert torch.equal(codes[number], want[number])
        assert oracle.fp8_table(kind)[codes[~number].long()].isnan().all()
    first_nan = {torch.bfloat16: 0x7F81, torch.float16: 0x7C01}[dtype]
    assert int((~number).sum()) == 2 * (2**15 - first_nan)


@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_fp8_ties_of_float32_rows_go_to_the_even_code(kind: str) -> None:
    table = oracle.fp8_table(kind)[:128]
    table = table[table.isfinite()]
    middle = (table[1:] + table[:-1]) / 2
    nudge = torch.tensor([1 - 2.0**-23, 1.0, 1 + 2.0**-22], dtype=torch.float64)
    values = (middle.unsqueeze(1) * nudge).flatten().float().view(-1, 1, 1)
    keys, negated = (torch.zeros(len(values), 1, 1, 1, dtype=torch.uint8) for _ in range(2))
    ops.reshape_and_cache(values, -values, keys, negated, torch.arange(len(values)), kind)
    low = torch.arange(len(middle))
    even = low + low % 2
    want = torch.stack([low, even, low + 1], 1).flatten().to(torch.uint8)
    assert torch.equal(keys.flatten(), want)
    assert torch.equal(negated.flatten(), want + 128)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("op", ["write", "stage"])
def test_fp8_rows_are_divided_by_their_scale(op: str, kind: str, scale: str) -> None:
    geometry = Geometry(model_dtype=torch.float32, kv_cache_dtype=kind, scale=scale, kv_heads=3,
                        heads=3)  # fmt: skip
    batch = make_batch([Span(0, 0, 9)], geometry)
    layer = make_step(batch, seed=5).layers[0]
    layer.key.mul_(100)  # saturates some of e4m3
    if op == "write":
        ops.reshape_and_cache(**write_arguments(layer, batch))
        key, value = layer.cache.dump()
        got = [(key[s], value[s]) for s in batch.slot_mapping.tolist()]
    else:
        ops.stage_kv(**stage_arguments(layer, batch))
        got = list(zip(bits(layer.staged_key), bits(layer.staged_value), strict=True))
    for token in range(9):
        assert torch.equal(got[token][0], oracle.encode(layer.key[token], kind, layer.k_scale))
        assert torch.equal(got[token][1], oracle.encode(layer.value[token], kind, layer.v_scale))


def test_staged_rows_keep_the_bits_of_a_direct_write() -> None:
    """Commit copies bits, so the cache after it must not depend on the route."""
    geometry = Geometry(model_dtype=torch.bfloat16, kv_cache_dtype="fp8", scale="head")
    batch = make_batch([Span(4, 1, 6)], geometry)
    one, other = make_step(batch).layers[0], make_step(batch).layers[0]
    ops.stage_kv(**stage_arguments(one, batch))
    ops.reshape_and_cache(**write_arguments(other, batch))
    key, value = other.cache.dump()
    for row, slot in enumerate(batch.draft_slots.tolist()):
        assert torch.equal(bits(one.staged_key[row]), key[slot])
        assert torch.equal(bits(one.staged_value[row]), value[slot])


def test_rows_may_be_strided_slices_of_a_fused_qkv() -> None:
    batch = make_batch([Span(0, 3), Span(4, 1, 4)])
    layer = make_step(batch).layers[0]
    qkv = torch.randn(8, 4 + 2 + 2, 8)
    key, value = qkv[:, 4:6], qkv[:, 6:]
    assert not key.is_contiguous()
    expected, staging = layer.cache.rows(), oracle.Rows()
    slots, rows = batch.slot_mapping.tolist(), batch.row_map.tolist()
    oracle.stage(expected, staging, 6, key, value, slots, rows)
    ops.stage_kv(**{**stage_arguments(layer, batch), "key": key, "value": value})
    assert layer.cache.holds(expected)
    assert all(torch.equal(layer.staged_value[row], kv[1]) for row, kv in staging.items())


def test_layers_of_one_staging_buffer_do_not_disturb_each_other() -> None:
    batch = make_batch([Span(4, 1, 3)])
    step = make_step(batch, layers=3)
    ops.stage_kv(**stage_arguments(step.layers[1], batch))
    assert step.staged_key[[0, 2]].isnan().all()
    assert torch.equal(step.staged_key[1, :3], step.layers[1].key[1:])
