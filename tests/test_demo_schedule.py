"""Blocks, slots and the flat batches of mixed steps."""

import pytest

from nwor_compile.demo.drafters import NgramDrafter
from nwor_compile.demo.model import LlamaConfig
from nwor_compile.demo.paged import OutOfBlocksError, PagedCache
from nwor_compile.demo.schedule import Request, Scheduler, build_batch, plan

CONFIG = LlamaConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=4,
)  # fmt: skip


def small_cache(num_blocks=8, table_width=4):
    return PagedCache(CONFIG, num_blocks=num_blocks, block_size=4, table_width=table_width)


def test_slots_follow_the_block_table_and_belong_to_one_request():
    cache = small_cache()
    cache.grow(0, 6)
    cache.grow(1, 9)
    first, second = cache.slots(0, 0, 6), cache.slots(1, 0, 9)
    assert len({*first, *second}) == 15
    table = cache.block_table([0, None, 1])
    assert table.shape == (3, 4)
    assert first == [int(table[0, p // 4]) * 4 + p % 4 for p in range(6)]
    assert table[1].tolist() == [0, 0, 0, 0]


def test_released_blocks_are_used_again_and_growth_is_all_or_nothing():
    cache = small_cache(num_blocks=3)
    cache.grow(0, 8)
    with pytest.raises(OutOfBlocksError, match="1 are free"):
        cache.grow(1, 8)
    assert cache.free_blocks == 1
    cache.release(0)
    cache.grow(1, 8)
    assert cache.free_blocks == 1
    with pytest.raises(OutOfBlocksError, match="block table has 4"):
        cache.grow(1, 17)


def test_a_batch_mixes_prefill_decode_verify_and_empty_rows():
    cache = small_cache(num_blocks=16)
    prefill = Request(0, [1, 2, 3, 4, 5], 4)
    verify = Request(1, [6, 7], 5)
    verify.tokens, verify.computed, verify.drafts = [6, 7, 8], 2, [9, 10, 1]
    decode = Request(2, [3], 3)
    decode.tokens, decode.computed = [3, 4], 1
    spans = [plan(prefill, 3), None, plan(verify, 3), plan(decode, 3)]
    batch = build_batch(spans, cache, 4)
    assert batch.token_ids.tolist() == [1, 2, 3, 8, 9, 10, 1, 4]
    assert batch.positions.tolist() == [0, 1, 2, 2, 3, 4, 5, 1]
    assert batch.query_start_loc.tolist() == [0, 3, 3, 7, 8]
    assert batch.seq_lens.tolist() == [3, 0, 6, 2]
    assert batch.num_drafts.tolist() == [0, 0, 3, 0]
    assert batch.samples.tolist() == [False, False, True, True]
    assert batch.draft_ids[2].tolist() == [9, 10, 1, -1]
    assert batch.flat_draft_ids.tolist() == [9, 10, 1] + [-1] * 13
    assert batch.slot_mapping.tolist()[3:7] == cache.slots(1, 2, 6)


def test_a_single_token_is_padded_to_two():
    request = Request(0, [5], 2)
    batch = build_batch([plan(request, 4), None], small_cache(), 4)
    assert batch.token_ids.shape == (2,)
    assert batch.slot_mapping.tolist()[1] == -1
    assert batch.query_start_loc.tolist() == [0, 1, 1]


def test_drafts_never_pass_the_last_wanted_token():
    request = Request(0, [1, 2], max_new_tokens=3)
    request.tokens, request.computed, request.drafts = [1, 2, 3], 2, [4, 5, 6, 7]
    assert plan(request, 8).tokens == [3, 4]


def test_a_late_request_joins_and_takes_a_freed_row():
    early, late, later = Request(0, [1] * 5, 1), Request(1, [1], 1, 1), Request(2, [1], 1, 1)
    scheduler = Scheduler([later, early, late], rows=2, chunk=2)
    first = scheduler.next_spans()
    assert [span and span.request.id for span in first] == [0, None]
    second = scheduler.next_spans()
    assert [span and span.request.id for span in second] == [0, 1]
    scheduler.finish(late)
    assert [span and span.request.id for span in scheduler.next_spans()] == [0, 2]
    scheduler.finish(early)
    scheduler.finish(later)
    assert scheduler.done


def test_time_skips_to_the_next_arrival_when_nothing_runs():
    scheduler = Scheduler([Request(0, [1], 1, arrival=50)], rows=1, chunk=2)
    assert scheduler.next_spans()[0] is not None


def test_prompt_lookup_continues_the_latest_longest_match():
    drafter = NgramDrafter(max_drafts=3)
    assert drafter.lookup([1, 2, 3, 4, 1, 2, 9, 8, 7, 6, 1, 2]) == [9, 8, 7]
    assert drafter.lookup([5, 1, 2, 3, 9, 1, 2, 7, 5, 1, 2]) == [3, 9, 1]
    assert drafter.lookup([1, 2, 3]) == []


@pytest.mark.parametrize(("prompt", "new"), [([], 1), ([1], 0)])
def test_an_empty_request_is_refused(prompt, new):
    with pytest.raises(ValueError, match="at least one prompt token"):
        Request(0, prompt, new)
