"""Losslessness on a tiny random model, eagerly, and an audit that can fail."""

import copy

import pytest
import torch

from nwor_compile.demo.audit import CacheAudit
from nwor_compile.demo.compiled import Runner
from nwor_compile.demo.drafters import Drafter, ModelDrafter, NgramDrafter
from nwor_compile.demo.engine import Engine, Mode, Settings
from nwor_compile.demo.model import STAGED, Llama, LlamaConfig
from nwor_compile.demo.paged import PagedCache
from nwor_compile.demo.schedule import Request, Span

CONFIG = LlamaConfig(
    vocab_size=23, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16,
)  # fmt: skip
DRAFTS = 3


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models():
    """A random target, and a draft model that is the target with noise: it is right at times."""
    torch.manual_seed(0)
    target = Llama(CONFIG, STAGED)
    for parameter in target.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 0.3)
    draft = copy.deepcopy(target)
    for parameter in draft.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.06)
    return target, draft


def new_cache():
    return PagedCache(CONFIG, num_blocks=40, block_size=4, table_width=10, seed=1)


def make_requests(count=3, new=14):
    source = torch.Generator().manual_seed(4)
    return [
        Request(
            i, torch.randint(23, (n,), generator=source).tolist(), new, arrival=4 * (i == count - 1)
        )
        for i, n in enumerate((3, 11, 7, 1)[:count])
    ]


def run(models, mode, drafter="model", *, rows=3, count=3, **settings):
    target, draft = models
    proposer: Drafter | None = None
    if drafter == "ngram":
        proposer = NgramDrafter(DRAFTS, shortest=1)
    elif drafter == "model" and mode is not Mode.PLAIN:
        proposer = ModelDrafter(
            Runner(draft, nwor=False, eager=True), new_cache(), max_drafts=DRAFTS,
            temperature=settings.get("temperature", 0.0),
        )  # fmt: skip
    engine = Engine(
        Runner(target, nwor=True, eager=True), target, new_cache(), proposer, mode,
        Settings(rows=rows, max_drafts=DRAFTS, chunk=4, **settings),
    )  # fmt: skip
    return engine.run(make_requests(count))


@pytest.fixture(scope="module")
def plain(models):
    return run(models, Mode.PLAIN)


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_greedy_staged_equals_direct_equals_plain(models, plain, drafter):
    direct = run(models, Mode.DIRECT, drafter)
    staged = run(models, Mode.STAGED, drafter)
    assert plain.tokens == direct.tokens == staged.tokens
    assert [len(tokens) for tokens in staged.tokens] == [14, 14, 14]
    assert direct.drafted_per_position == staged.drafted_per_position
    assert direct.accepted_per_position == staged.accepted_per_position
    assert 0 < staged.acceptance < 1
    assert direct.steps == staged.steps < plain.steps


@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_rejected_rows_reach_the_cache_directly_and_never_staged(models, drafter):
    direct, staged = (run(models, mode, drafter) for mode in (Mode.DIRECT, Mode.STAGED))
    assert staged.audit.clean
    assert staged.audit.checked_rows == 3 + 11 + 7 + 3 * 13
    assert staged.audit.rejected_offered > 0
    assert not direct.audit.clean
    assert direct.audit.rejected_rows == direct.audit.rejected_offered
    assert direct.audit.wrong_rows == 0
    assert staged.rows_per_token == 1.0
    assert direct.rows_per_token > 1.0
    assert staged.metrics is not None
    assert staged.metrics.nwor_cache_bytes == staged.audit.rows_written * staged.row_bytes
    assert staged.metrics.nwor_staging_bytes_moved == staged.staging_bytes > 0


def test_at_a_temperature_both_modes_draw_the_same_tokens(models, plain):
    warm = {"temperature": 1.0, "seed": 3}
    direct, staged = (run(models, mode, **warm) for mode in (Mode.DIRECT, Mode.STAGED))
    assert direct.tokens == staged.tokens != plain.tokens
    assert direct.accepted_per_position == staged.accepted_per_position
    assert 0 < staged.acceptance < 1
    assert staged.audit.clean
    assert run(models, Mode.STAGED, temperature=1.0, seed=4).tokens != staged.tokens


@pytest.mark.parametrize("settings", [{"poison": "nan"}, {"poison": "large"}, {"scv": "off"}])
def test_poison_and_the_host_oracle_change_nothing(models, plain, settings):
    staged = run(models, Mode.STAGED, **settings)
    assert staged.tokens == plain.tokens
    assert staged.audit.clean
    assert staged.fallbacks == 0


def test_requests_that_wait_for_a_row_reuse_blocks(models):
    tokens = run(models, Mode.PLAIN, rows=4, count=4).tokens
    staged = run(models, Mode.STAGED, rows=2, count=4)
    assert staged.tokens == tokens
    assert staged.audit.clean


def test_naive_staging_is_wrong_and_the_audit_says_so(models, plain):
    naive = run(models, Mode.NAIVE)
    assert naive.tokens != plain.tokens
    assert naive.audit.wrong_rows > 0
    assert not naive.audit.clean


def test_naive_staging_reads_what_poison_left(models):
    """The poison is where a naive reader looks: the staged run's immunity is not luck."""
    naive = run(models, Mode.NAIVE, poison="nan")
    assert naive.audit.wrong_rows > 0


@pytest.fixture
def audited(models):
    """A request with 5 rows in the cache and a step of 1 certain token and 2 drafts planned."""
    target, _ = models
    cache = new_cache()
    request = Request(0, [1, 2, 3, 4, 5], 8)
    request.tokens, request.computed = [1, 2, 3, 4, 5, 6], 5
    cache.grow(0, 8)
    write(cache, cache.slots(0, 0, 5), target.dense(torch.tensor([1, 2, 3, 4, 5]))[1])
    audit = CacheAudit(cache, target)
    audit.before()
    span = Span(request, 5, [6, 7, 8], 2, samples=True)
    rows = target.dense(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]))[1]
    return audit, span, [(key[5:], value[5:]) for key, value in rows]


def write(cache, slots, rows):
    for layer, (key, value) in enumerate(rows):
        cache.key_caches[layer].flatten(0, 1)[slots] = key[: len(slots)]
        cache.value_caches[layer].flatten(0, 1)[slots] = value[: len(slots)]


def test_the_audit_passes_a_right_step(audited):
    audit, span, rows = audited
    write(audit.cache, audit.cache.slots(0, 5, 7), rows)  # one of two drafts is accepted
    assert audit.after([span], [1]) == set()
    span.request.tokens, span.request.computed = [1, 2, 3, 4, 5, 6, 7, 9], 7
    audit.finish(span.request)
    assert audit.result.clean
    assert (audit.result.generated_rows, audit.result.checked_rows) == (2, 7)


def test_the_audit_finds_a_planted_rejected_row_in_one_layer(audited):
    audit, span, rows = audited
    write(audit.cache, audit.cache.slots(0, 5, 7), rows)
    planted = audit.cache.slots(0, 7, 8)
    audit.cache.value_caches[1].flatten(0, 1)[planted[0], 0, 3] = 1e-30
    assert audit.after([span], [1]) == set(planted)
    assert audit.result.rejected_rows == 1
    assert not audit.result.clean


def test_the_audit_finds_missing_repeated_and_stray_rows(audited):
    audit, span, rows = audited
    cache = audit.cache
    write(cache, cache.slots(0, 5, 6), rows)  # the accepted draft's row is not committed
    cache.key_caches[0].flatten(0, 1)[cache.slots(0, 2, 3)[0]] += 1.0
    owned = set(cache.slots(0, 0, 8))
    stray = next(slot for slot in range(cache.num_slots) if slot not in owned)
    cache.key_caches[0].flatten(0, 1)[stray] = 1.0
    audit.after([span], [1])
    result = audit.result
    assert (result.missing_rows, result.repeated_rows, result.stray_rows) == (1, 1, 1)


@pytest.mark.parametrize("value", [0.01, float("nan")])
def test_the_audit_finds_a_wrong_row(audited, value):
    audit, span, _ = audited
    slot = audit.cache.slots(0, 3, 4)[0]
    audit.cache.key_caches[1].flatten(0, 1)[slot, 0, 0] += value
    audit.finish(span.request)
    assert audit.result.wrong_rows == 1
    assert audit.result.checked_rows == 5
