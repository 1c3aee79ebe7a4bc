"""RoPE and the staged write in one call: where the pass fuses, where it must not, and numerics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import graphs
import pytest
import rope_models as models
import torch
from graphs import FORMS, trace
from rope_models import FUSED, HEADS, KV_HEADS, SIZE, Step
from torch import Tensor
from torch.fx import Graph

import nwor_compile
from nwor_compile import NworConfig, Window
from nwor_compile.passes import NworPass, last_reports, rewrite
from nwor_compile.passes.calls import callee

OPS = ("rotary op", "rotary op, part, pairs")


def names(graph: Graph) -> list[str]:
    """Everything that is called, functionalized or not."""
    return [str(callee(node)) for node in graph.nodes if node.op == "call_function"]


def traced(case: str, form: str, *, dynamic: bool, dtype: torch.dtype = torch.bfloat16) -> Graph:
    fn, width = FUSED[case]
    step = models.make_step(dtype, width=width)
    if dynamic:
        for tensor in (step.x, step.positions, step.slots):
            torch._dynamo.mark_dynamic(tensor, 0)
    return trace(fn, step, form=form)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("case", "form"),
    # In v1 torch copies a rotary op's q and k back into their product; see the next test.
    [(case, form) for case in FUSED for form in FORMS if case not in OPS or form != "v1"],
)
def test_every_way_to_write_rope_becomes_one_call(case: str, form: str, dynamic: bool) -> None:
    graph = traced(case, form, dynamic=dynamic)
    decision = rewrite(graph).decisions[0]
    assert (decision.fused, decision.rope, decision.reason) == (True, "", "")
    overload = "window_" if case in OPS else "window"
    called = names(graph)
    assert called.count(f"nwor.rope_stage_kv.{overload}") == 1
    assert called.count("nwor.verify_attention.window") == 1
    assert not [name for name in called if "reshape_and_cache" in name or "rotary_emb" in name]
    # AOTAutograd drops what is left in Dynamo's graph. Elsewhere only normalisation and Hugging
    # Face's angles calculate.
    if form != "plain" and case not in ("normalised", "hugging_face"):
        assert not [name for name in called if "mul" in name.split(".") or "neg" in name]
    before = graphs.compact(graph)
    again = rewrite(graph)
    assert again.decisions == []
    assert graphs.compact(graph) == before


def test_functionalization_v1_of_a_rotary_op_on_slices_stays_apart() -> None:
    """Its results go through slice_scatter; vLLM removes that before its own fusions."""
    graph = traced("rotary op", "v1", dynamic=False)
    decision = rewrite(graph).decisions[0]
    assert decision.staged
    assert not decision.fused
    assert decision.rope == "nothing rotates it in this graph"


def test_without_rope_the_pass_leaves_the_rotation_alone() -> None:
    graph = traced("rotate_half", "v2", dynamic=False)
    decision = rewrite(graph, rope=False).decisions[0]
    assert (decision.staged, decision.fused, decision.rope) == (True, False, "")
    assert graphs.targets(graph) == graphs.STAGED
    assert NworPass(rope=False).uuid() != NworPass().uuid()


def test_a_write_without_rope_says_nothing_rotates_it() -> None:
    report = rewrite(graphs.canonical("v2"))
    assert report.decisions[0].rope == "nothing rotates it in this graph"
    assert "RoPE apart" in str(report)


def test_the_report_says_that_a_write_rotates() -> None:
    report = rewrite(traced("halves", "v2", dynamic=False))
    assert "with RoPE" in str(report)


# ---- must not fire -----------------------------------------------------------------------------


def changed(edit: Callable[..., Any]) -> Callable[[Step], Any]:
    """A layer with rotate_half, whose steps `edit(s, q, k, v, cos, sin)` writes differently."""

    def run(s: Step) -> Any:
        q, k, v = models.project(s)
        return edit(s, q, k, v, s.cos[s.positions], s.sin[s.positions])

    return run


def wrong_sign(s: Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((second, -first), dim=-1) * sin

    models.write(s, turn(k), v)
    return models.attend(s, turn(q))


def one_head_differs(s: Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = models.rotate_half(k, cos, sin)
    models.write(s, torch.cat((turned[:, :1], k[:, 1:]), dim=1), v)
    return models.attend(s, models.rotate_half(q, cos, sin))


def only_the_key(s: Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    models.write(s, models.rotate_half(k, cos, sin), v)
    return models.attend(s, q)


def other_tables(s: Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    models.write(s, models.rotate_half(k, cos, sin), v)
    return models.attend(s, models.rotate_half(q, sin, cos))


def used_before_the_write(
    s: Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    k = models.rotate_half(k, cos, sin)
    models.write(s, k, v * k.sum())
    return models.attend(s, models.rotate_half(q, cos, sin))


def a_scaled_key(s: Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    models.write(s, models.rotate_half(k, cos, sin) * 2, v)
    return models.attend(s, models.rotate_half(q, cos, sin))


def rounds_between(s: Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        half = torch.cat((-second, first), dim=-1)
        return (x.float() * cos.float()).to(x.dtype) + half * sin

    models.write(s, turn(k), v)
    return models.attend(s, turn(q))


def tables_by_head(s: Step, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.repeat(1, KV_HEADS, 1).contiguous(), sin.repeat(1, KV_HEADS, 1).contiguous()
    many = HEADS // KV_HEADS
    models.write(s, models.rotate_half(k, cos, sin), v)
    return models.attend(
        s, models.rotate_half(q, cos.repeat(1, many, 1), sin.repeat(1, many, 1))
    )  # fmt: skip


NO_ROPE = "what computes it is no RoPE by tables of one row a token"
APART: dict[str, tuple[Callable[..., Any], str]] = {
    "wrong sign": (wrong_sign, NO_ROPE),
    "one head differs": (one_head_differs, NO_ROPE),
    "only the key": (only_the_key, "its query: nothing rotates it in this graph"),
    "other tables": (other_tables, "query and key are rotated in different ways"),
    "used before the write": (used_before_the_write, "uses what is rotated before the write"),
    "a scaled key": (a_scaled_key, NO_ROPE),
    "rounds between": (rounds_between, "rounds in the middle of its rotation"),
    "tables by head": (tables_by_head, NO_ROPE),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", APART)
def test_what_is_no_rope_or_cannot_move_stays_apart(case: str, form: str) -> None:
    fn, reason = APART[case]
    step = models.make_step(torch.bfloat16)
    graph = trace(changed(fn), step, form=form)
    decision = rewrite(graph).decisions[0]
    assert decision.staged
    assert not decision.fused
    assert reason in decision.rope
    assert graphs.targets(graph) == graphs.STAGED


def q_changes_before_the_write(s: Step) -> Tensor:
    q, k, v = models.project(s)
    cos, sin = s.cos[s.positions], s.sin[s.positions]
    rotated_q, rotated_k = models.rotate_half(q, cos, sin), models.rotate_half(k, cos, sin)
    k.mul_(2)
    models.write(s, rotated_k, v)
    return models.attend(s, rotated_q)


def op_result_used_before_the_write(s: Step) -> tuple[Tensor, Tensor]:
    q, k, v = (s.x @ s.weight).split(models.WIDTHS, dim=-1)
    table = torch.cat([s.cos, s.sin], -1)[:, 0]
    torch.ops.nwor.rotary_embedding(s.positions, q, k, SIZE, table, True)
    total = k.sum()
    k.add_(1)
    models.write(s, k.view(-1, KV_HEADS, SIZE), v.view(-1, KV_HEADS, SIZE))
    return models.attend(s, q.view(-1, HEADS, SIZE)), total


def op_rotates_the_value_too(s: Step) -> Tensor:
    q, kv = (s.x @ s.weight).split([models.WIDTHS[0], 2 * models.WIDTHS[1]], dim=-1)
    table = torch.cat([s.cos, s.sin], -1)[:, 0]
    torch.ops.nwor.rotary_embedding(s.positions, q, kv, SIZE, table, True)
    k, v = kv.unflatten(-1, (-1, SIZE)).split(KV_HEADS, dim=1)
    models.write(s, k, v)
    return models.attend(s, q.view(-1, HEADS, SIZE))


MUTATING: dict[str, tuple[Callable[..., Any], str]] = {
    "x changes": (q_changes_before_the_write, "changes what the rotation reads"),
    "op result used": (op_result_used_before_the_write, "uses what is rotated before the write"),
    "op rotates the value": (op_rotates_the_value_too, "may overlap"),
}


@pytest.mark.parametrize("case", MUTATING)
def test_memory_that_changes_in_between_keeps_rope_apart(case: str) -> None:
    fn, reason = MUTATING[case]
    step = models.make_step(width=SIZE if case == "x changes" else SIZE // 2)
    graph = trace(fn, step, form="plain")
    decision = rewrite(graph).decisions[0]
    assert decision.staged
    assert not decision.fused
    assert reason in decision.rope


def test_eager_rounding_in_inductor_keeps_rope_apart() -> None:
    graph = traced("rotate_half", "v2", dynamic=False)
    with torch._inductor.config.patch(emulate_precision_casts=True):
        decision = rewrite(graph).decisions[0]
    assert not decision.fused
    assert "round as eager code does" in decision.rope


def test_a_fixed_and_huge_number_of_tokens_is_not_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nwor_compile.passes.rope_match._MAX_ELEMENTS", 200)
    decision = rewrite(traced("rotate_half", "v2", dynamic=False)).decisions[0]
    assert "too large to check" in decision.rope
    assert rewrite(traced("rotate_half", "v2", dynamic=True)).decisions[0].fused


def test_a_write_that_stays_direct_is_not_fused() -> None:
    def fn(s: Step) -> tuple[Tensor, Tensor]:
        out = models.layer(models.rotate_half)(s)
        return out, s.key_cache.sum()

    graph = trace(fn, models.make_step(), form="v2")
    decision = rewrite(graph).decisions[0]
    assert (decision.staged, decision.fused, decision.rope) == (False, False, "")
    assert graphs.targets(graph) == graphs.DIRECT


def test_two_layers_are_fused_each() -> None:
    def fn(s: Step, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        out = models.layer(models.rotate_half)(s)
        x = s.x + out.flatten(1)[:, : models.HIDDEN]
        second = s._replace(x=x, key_cache=key_cache, value_cache=value_cache)
        return models.layer(models.rotate_half)(second)

    step = models.make_step()
    for form in FORMS:
        graph = trace(fn, step, step.key_cache + 1, step.value_cache + 1, form=form)
        assert [d.fused for d in rewrite(graph).decisions] == [True, True]


# ---- numerics ----------------------------------------------------------------------------------

DRAFTS = torch.tensor([2, 0, 0])


def staged_run(run: Callable[[Step], Any], step: Step) -> tuple[Any, list[Tensor]]:
    """One window in which request 0 has two drafts of which one is accepted; result and caches."""
    window = Window(
        {"layer": (step.key_cache, step.value_cache)}, max_requests=3, max_drafts=2, max_tokens=8,
        config=NworConfig(mode="stage", scv="off"),
    )  # fmt: skip
    try:
        with torch.no_grad(), window.step(DRAFTS, step.starts, step.slots):
            out = run(step)
            before = [step.key_cache.clone(), step.value_cache.clone()]
            sampled = torch.tensor([[7, 5, -1], [5, -1, -1], [5, -1, -1]])
            done = window.commit(sampled, torch.tensor([7, 8]))
        assert done.accepted.tolist() == [1, 0, 0]
        assert done.error.item() == 0
    finally:
        window.close()
    return out, [*before, step.key_cache, step.value_cache]


def expected_caches(step: Step, direct: Step) -> list[Tensor]:
    """Before and after the commit: the rows of a direct run, where they may be there."""
    found = []
    for slots in ((0, 8, 9, 16), (0, 1, 8, 9, 16)):
        for old, new in (
            (step.key_cache, direct.key_cache),
            (step.value_cache, direct.value_cache),
        ):
            rows = old.clone().view(-1, KV_HEADS, SIZE)
            for slot in slots:
                rows[slot] = new.view(-1, KV_HEADS, SIZE)[slot]
            found.append(rows.view(old.shape))
    return found


def check_numerics(case: str, run: Callable[[Step], Any], dtype: torch.dtype) -> None:
    fn, width = FUSED[case]
    step = models.make_step(dtype, width=width)
    direct, untouched = models.clone(step), models.clone(step)
    want = fn(direct)
    out, caches = staged_run(run, step)
    torch.testing.assert_close(out, want)
    for got, expected in zip(caches, expected_caches(untouched, direct), strict=True):
        torch.testing.assert_close(got, expected)
        assert not torch.equal(got, direct.key_cache)
    assert last_reports()[-1].decisions[0].fused


@pytest.mark.parametrize("case", FUSED)
def test_fused_graphs_equal_eager_in_python(case: str) -> None:
    check_numerics(case, graphs.rewritten(FUSED[case][0]), torch.float32)


@pytest.fixture
def no_caches() -> Iterator[None]:
    """The pass reports what it does; on a hit in Inductor's cache it does nothing."""
    with torch._inductor.config.patch(force_disable_caches=True):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("no_caches")
@pytest.mark.parametrize("kind", ["options", "backend"])
@pytest.mark.parametrize("case", FUSED)
def test_compiled_fused_graphs_equal_eager(case: str, kind: str) -> None:
    torch._dynamo.reset()
    options: dict[str, Any] = {"options": nwor_compile.compile_options(NworConfig())}
    if kind == "backend":
        options = {"backend": "nwor"}
    run = torch.compile(FUSED[case][0], fullgraph=True, **options)
    check_numerics(case, run, torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("no_caches")
def test_fused_bits_in_bfloat16_are_those_of_inductor_without_fusion() -> None:
    """Rounding: RoPE that Inductor compiles rounds once, and so does the fused op."""
    caches = []
    for rope in (True, False):
        torch._dynamo.reset()
        options: dict[str, Any] = {"post_grad_custom_pre_pass": NworPass(rope=rope)}
        run = torch.compile(FUSED["rotate_half"][0], options=options, fullgraph=True)
        _, after = staged_run(run, models.make_step(torch.bfloat16))
        assert last_reports()[-1].decisions[0].fused == rope
        caches.append(after)
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
