"""Windows in compiled code on a GPU: CUDA graphs of Inductor, pieces, dynamic shapes, launches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture_model import (
    BLOCK,
    BLOCKS,
    DRAFTS,
    KV_HEADS,
    LAYERS,
    SIZE,
    VARIANTS,
    Model,
    Reference,
    Span,
    make_step,
    open_window,
    run_window,
    variants,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import nwor_compile
from nwor_compile import NworConfig, Window
from nwor_compile.ops import rope_stage_kv_window, staging
from nwor_compile.ops.staging import executions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def model() -> Iterator[Model]:
    torch._dynamo.reset()
    counters.clear()
    yield Model()
    torch._dynamo.reset()


@pytest.fixture
def window(model: Model) -> Iterator[Window]:
    opened = open_window(model)
    opened.warm_up([4])
    yield opened
    opened.close()


def compiled(model: Model, **options: Any) -> Callable[..., Tensor]:
    settings = nwor_compile.compile_options(NworConfig(strict=True), **options)
    run: Callable[..., Tensor] = torch.compile(model, options=settings, fullgraph=True)
    return run


def graphs_recorded() -> int:
    """CUDA graphs that Inductor holds, whatever they are graphs of."""
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    if manager is None:
        return 0

    def count(node: Any) -> int:
        below = [child for nodes in node.children.values() for child in nodes]
        return 1 + sum(count(child) for child in below)

    return sum(count(node) for nodes in manager.roots.values() for node in nodes)


def recorded_again() -> int:
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    times = manager.num_rerecord.values() if manager is not None else ()
    return sum(number for functions in times for number in functions.values())


WARM = 3  # steps until everything is recorded: one run to warm up, one that records, one replay


def test_reduce_overhead_replays_one_graph_for_every_window(model: Model, window: Window) -> None:
    """The options are those of mode="reduce-overhead", which cannot be given beside options."""
    reduce_overhead = torch._inductor.list_mode_options("reduce-overhead")
    run, reference = compiled(model, **reduce_overhead), Reference(model)
    ran = recorded = 0
    for i, (step, accepted) in enumerate(variants(WARM + 6)):
        if i == WARM:
            ran, recorded = executions(), graphs_recorded()
        torch.compiler.cudagraph_mark_step_begin()
        reference.start()
        out, done = run_window(run, window, step)
        assert (done.accepted.tolist(), done.error.item()) == (accepted, 0)
        reference.check(step, out)
    assert executions() == ran  # replays: no Python op ran
    assert (recorded, graphs_recorded(), recorded_again()) == (1, 1, 0)
    assert counters["inductor"]["cudagraph_skips"] == 0
    # Hidden states and the five index tensors are copied in; weights, tables and caches are not.
    assert counters["inductor"]["cudagraph_recorded_non_static_inputs"] == 6


def test_pieces_capture_the_staged_write_and_leave_attention_outside(
    model: Model, window: Window, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        **torch._inductor.list_mode_options("reduce-overhead"),
        "graph_partition": True,
        "custom_should_partition_ops": ["nwor::verify_attention.window"],
    }
    run, reference = compiled(model, **options), Reference(model)
    looked_up = []
    lookup = staging.lookup

    def counted(key_cache: Tensor, value_cache: Tensor) -> Any:
        looked_up.append(key_cache)
        return lookup(key_cache, value_cache)

    ran = 0
    for i, (step, accepted) in enumerate(variants(WARM + 4)):
        if i == WARM:
            ran = executions()
            # What still looks its layer up in Python is attention alone.
            monkeypatch.setattr(staging, "lookup", counted)
        torch.compiler.cudagraph_mark_step_begin()
        reference.start()
        out, done = run_window(run, window, step)
        assert (done.accepted.tolist(), done.error.item()) == (accepted, 0)
        reference.check(step, out)
    assert executions() == ran
    assert len(looked_up) == 4 * LAYERS
    assert graphs_recorded() == LAYERS + 1
    assert recorded_again() == 0
    assert counters["inductor"]["cudagraph_skips"] == 0


# ---- dynamic shapes ----------------------------------------------------------------------------

STEPS: dict[str, tuple[list[Span], list[int]]] = {
    "verify": ([(5, 1, 3), (2, 1, 2)], [2, 0]),
    "decode": ([(5, 1, 0), (2, 1, 0), (9, 1, 0)], [0, 0, 0]),
    "prefill": ([(0, 30, 0), (0, 17, 0)], [0, 0]),
    "mixed": ([(5, 1, 2), (0, 14, 0), (3, 1, 0), (8, 2, 1)], [1, 0, 0, 1]),
    "one verify, one chunk": ([(4, 1, 3), (2, 2, 0)], [3, 0]),
}


def test_one_graph_serves_every_kind_of_step_without_recompiling(
    model: Model, window: Window
) -> None:
    run, reference = compiled(model), Reference(model)
    for number, (spans, accepted) in enumerate(STEPS.values()):
        step = make_step(spans, accepted, seed=number)
        if number == 0:
            for tensor in step.inputs():
                torch._dynamo.mark_dynamic(tensor, 0)
        reference.start()
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            out, done = run_window(run, window, step)
        assert (done.accepted.tolist(), done.error.item()) == (accepted, 0)
        reference.check(step, out)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_dumped_code_copies_no_cache_and_calls_each_op_once_a_layer(
    model: Model, window: Window
) -> None:
    from torch._inductor.utils import run_and_get_code

    run = compiled(model)
    step = make_step(*STEPS["verify"])
    for tensor in step.inputs():
        torch._dynamo.mark_dynamic(tensor, 0)
    with window.step(step.num_drafts, step.starts, step.slots):
        _, (code,) = run_and_get_code(run, *step.inputs())
        window.commit(step.sampled, step.draft_ids)
    lines = [line for line in code.splitlines() if not line.lstrip().startswith("#")]
    calls = [line for line in lines if "= torch.ops.nwor" in line]
    assert len([line for line in calls if "nwor.rope_stage_kv.window(" in line]) == LAYERS
    assert len([line for line in calls if "nwor.verify_attention.window(" in line]) == LAYERS
    assert len(calls) == 2 * LAYERS
    shape = rf"\({BLOCKS}, {BLOCK}, {KV_HEADS}, {SIZE}\)"
    assert re.search(rf"assert_size_stride\(\w+, {shape}", code)  # so the pattern does match
    assert not re.search(rf"empty_strided\w*\({shape}", code)
    assert not [line for line in lines if re.search(r"\bclone\(|aten\.clone", line)]


# ---- launches ----------------------------------------------------------------------------------

MATMUL = re.compile(r"gemm|cublas|cutlass|nvjet|splitK", re.IGNORECASE)
ATTENTION = re.compile(r"attention|merge|reduce_kernel|attend", re.IGNORECASE)


def launched(call: Callable[[], object]) -> Counter[str]:
    """Names of all kernels and copies that a call puts on the device."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    names = (e.name for e in profile.events() if e.device_type == on_device)
    return Counter(name for name in names if not name.startswith("nwor."))  # NVTX ranges


@pytest.mark.parametrize("few", [True, False])
def test_launches_of_a_layer_and_of_a_step(
    model: Model, window: Window, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """few: requests, whose windows are decided in one launch."""
    if not few:
        monkeypatch.setattr("nwor_compile.validator.fits", lambda requests, ids: False)
    run = compiled(model)
    for step, _ in variants(2):
        run_window(run, window, step)
    step = make_step(*VARIANTS[0])
    window.begin(step.num_drafts, step.starts, step.slots)
    with torch.no_grad():
        forward = launched(lambda: run(*step.inputs()))
    commit = launched(lambda: window.commit(step.sampled, step.draft_ids))
    print("forward:", dict(forward))
    print("commit:", dict(commit))

    def number(names: Counter[str], pattern: str) -> int:
        return sum(count for name, count in names.items() if re.search(pattern, name))

    assert number(forward, "^_rope_kernel") == LAYERS
    assert number(forward, "_write_kernel|reshape_and_cache") == 0
    assert LAYERS <= number(forward, ATTENTION.pattern) <= 2 * LAYERS
    assert number(forward, "Memcpy|Memset|memcpy|memset") == 0
    rest = {
        name: count
        for name, count in forward.items()
        if name != "_rope_kernel"
        and not (ATTENTION.search(name) or MATMUL.search(name) or name.startswith("triton_"))
    }
    assert rest == {}
    # Pointwise kernels of Inductor: the residual of a layer, and the tables once.
    assert number(forward, "^triton_") <= LAYERS + 2
    deciding = ("_decide_kernel",) if few else ("_commit_kernel", "_judge_kernel")
    assert commit == Counter(deciding)


# ---- no waiting, and nothing staged by accident ------------------------------------------------


def test_nothing_waits_between_begin_and_commit_of_a_compiled_step(
    model: Model, window: Window
) -> None:
    run = compiled(model)
    for step, _ in variants(2):
        run_window(run, window, step)
    step = make_step(*VARIANTS[1], seed=9)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, done = run_window(run, window, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert done.accepted.tolist() == VARIANTS[1][1]


def test_a_warm_up_step_stages_and_writes_nothing(model: Model, window: Window) -> None:
    """Dummy batches have no slots, and maybe draft counts."""
    run = compiled(model)
    before = [cache.clone() for pair in model.caches() for cache in pair]
    metrics = window.metrics()
    spans, _ = VARIANTS[0]
    step = make_step(spans, [0] * 4)
    step = step._replace(slots=torch.full_like(step.slots, -1))
    for _ in range(2):
        _, done = run_window(run, window, step)
        assert done.error.item() == 0
        assert done.accepted.tolist() == [0] * 4
    after = [cache for pair in model.caches() for cache in pair]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert window.metrics() == metrics
    assert not window.tensors.state.any()


def test_fake_tensors_stage_nothing(model: Model, window: Window) -> None:
    step = make_step(*VARIANTS[0])
    key_cache, value_cache = model.caches()[0]
    before, metrics, ran = key_cache.clone(), window.metrics(), executions()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (step.num_drafts, step.starts, step.slots)]
        window.begin(*fake)
        tokens = step.slots.shape[0]
        rows = torch.empty(tokens, KV_HEADS, SIZE, device="cuda")
        table = torch.empty(tokens, SIZE, device="cuda")
        q, k = rope_stage_kv_window(
            rows, rows, rows, table, table, SIZE, True, mode.from_tensor(key_cache),
            mode.from_tensor(value_cache), fake[2],
        )  # fmt: skip
        assert q.shape == k.shape == rows.shape
        window.commit(mode.from_tensor(step.sampled), mode.from_tensor(step.draft_ids))
    assert executions() == ran
    assert torch.equal(key_cache, before)
    assert window.metrics() == metrics
    assert not window.tensors.state.any()
    assert staging._registry.open_windows == 0


def test_compiling_inside_a_window_stages_each_row_once(model: Model, window: Window) -> None:
    """Tracing runs the ops on fake tensors; had one staged, the layers' counts would not agree."""
    step = make_step(*VARIANTS[0])
    ran = executions()
    _, done = run_window(compiled(model), window, step)
    assert executions() - ran == LAYERS
    drafts = sum(span[2] for span in VARIANTS[0][0])
    assert window.tensors.state.tolist() == [[drafts, 0]] * LAYERS
    assert done.accepted.tolist() == VARIANTS[0][1]
    assert drafts == 4 * DRAFTS
