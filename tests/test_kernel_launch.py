"""Launches that keep their compiled kernel: never another one than Triton would take."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Geometry, Span, make_batch, make_step, paged_arguments
from torch import Tensor
from window_support import MIXED, Rig, rig

pytest.importorskip("triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction, create_function_from_signature

from nwor_compile.ops.attention import paged_attention
from nwor_compile.ops.cache_write import STAGE_WRITE
from nwor_compile.ops.decide import DECIDING
from nwor_compile.ops.kernels import (
    attention,
    begin,
    cache_write,
    decide,
    launch,
    merge,
    redirect,
    rope,
    scv,
)
from nwor_compile.ops.kernels.launch import KeptLaunch
from nwor_compile.ops.library import implementation, pick
from nwor_compile.ops.rope import ROPE_WRITE
from nwor_compile.ops.scv import JUDGE, verdict_buffers
from nwor_compile.scv import ids_of
from nwor_compile.validator import GraphValidator

Launches = list[tuple[Any, ...]]


class Compiled:
    """A compiled kernel that notes how it was launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, name: int, log: Launches) -> None:
        self.name, self.log = name, log

    def run(self, *arguments: Any) -> None:
        self.log.append(("kept", self.name, *arguments))

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.log.append(("hooked", self.name, grid, *arguments))


class Function:
    """A kernel that compiles anew at every ordinary launch."""

    def __init__(self) -> None:
        self.log: Launches = []
        self.refuses = self.loads = False
        self.kernels: dict[tuple[Any, ...], Loaded] = {}
        self.together = threading.Barrier(2, timeout=30)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: int) -> Compiled | None:
            self.log.append(("ordinary", grid, arguments, options))
            return None if self.refuses else Compiled(len(self.log), self.log)

        return run

    def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: int) -> Any:
        self.log.append(("compiled", grid, arguments, options))
        return Pending(self, arguments) if self.loads else None


class Pending:
    """A kernel that is being compiled; those of equal arguments are the same one."""

    def __init__(self, function: Function, arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments

    def result(self, ignore_errors: bool) -> Loaded | None:
        assert ignore_errors
        found = self.function.kernels.setdefault(self.arguments, Loaded(self))
        return None if -1 in self.arguments else found


class Loaded:
    """A compiled kernel that notes when it is loaded, which takes a while."""

    def __init__(self, pending: Pending) -> None:
        self.pending = pending

    @property
    def run(self) -> None:
        function, arguments = self.pending.function, self.pending.arguments
        if arguments == (13,):
            raise OSError("no compiler")
        if arguments == (14,):
            raise OutOfResources(300, 200, "shared memory")
        function.together.wait()
        function.log.append(("loaded", torch.cuda.current_device(), arguments))


@pytest.fixture
def function(monkeypatch: pytest.MonkeyPatch) -> Function:
    """On a machine whose current device is 0, in every thread, and whose current stream is 7 there,
    8 on device 1."""

    class Current(threading.local):
        device = 0

    current = Current()

    class On:
        def __init__(self, device: torch.device) -> None:
            self.before, self.device = current.device, device

        def __enter__(self) -> None:
            current.device = self.device.index

        def __exit__(self, *error: object) -> None:
            current.device = self.before

    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.device)
    monkeypatch.setattr(torch.cuda, "device", On)
    streams = {0: 7, 1: 8}

    def stream(device: int) -> int:
        assert device == current.device
        return streams[device]

    active = SimpleNamespace(active=SimpleNamespace(get_current_stream=stream))
    monkeypatch.setattr(launch, "driver", active)
    return Function()


def kept_launch(function: Function, fixed: Sequence[Any] = (), device: int = 0) -> KeptLaunch:
    return KeptLaunch(function, torch.device("cuda", device), fixed, num_warps=2)


def kinds(function: Function) -> list[str]:
    return [entry[0] for entry in function.log]


def test_the_second_launch_gets_addresses_and_goes_to_the_current_stream(
    function: Function,
) -> None:
    counts, ids = torch.zeros(3, dtype=torch.int32), torch.zeros(4)
    kept = kept_launch(function, (counts, None, 5))
    kept(9, (ids, None), (2,), (30,), (64,))
    kept(8, (ids, None), (2,), (31,), (64,))
    assert function.log == [
        ("ordinary", (9,), (counts, None, 5, ids, None, 2, 30, 64), {"num_warps": 2}),
        (
            "kept", 1, 8, 1, 1, 7, "function", "metadata", None, None, None,
            counts.data_ptr(), None, 5, ids.data_ptr(), None, 2, 31, 64,
        ),
    ]  # fmt: skip


def other(pointers: list[Tensor | None], place: int, value: Tensor | None) -> list[Tensor | None]:
    return [*pointers[:place], value, *pointers[place + 1 :]]


def test_whatever_calls_for_another_kernel_gets_another_one_and_keeps_it(
    function: Function,
) -> None:
    ids = torch.zeros(64, dtype=torch.int64)
    assert ids.data_ptr() % 16 == 0
    plain: list[Tensor | None] = [ids, None]
    calls: list[tuple[list[Tensor | None], tuple[int, ...], tuple[int, ...]]] = [
        (plain, (1,), (64, 1)),
        (other(plain, 0, ids.int()), (1,), (64, 1)),  # dtype
        (other(plain, 0, ids[1:]), (1,), (64, 1)),  # alignment
        (other(plain, 0, None), (1,), (64, 1)),  # missing
        (other(plain, 1, ids), (1,), (64, 1)),  # there
        (plain, (2,), (64, 1)),  # stride
        (plain, (1,), (128, 1)),  # constants
        (plain, (1,), (64, 0)),
    ]
    kept = kept_launch(function)
    for pointers, strides, constants in calls:
        kept(1, pointers, strides, (3,), constants)
    assert kinds(function) == ["ordinary"] * len(calls)
    for pointers, strides, constants in reversed(calls):
        kept(1, pointers, strides, (4,), constants)
    again = function.log[len(calls) :]
    # In the reverse order, each with the kernel that its own first launch was given.
    assert [entry[:2] for entry in again] == [("kept", n) for n in range(len(calls), 0, -1)]


def test_numbers_other_addresses_and_sizes_call_for_no_other_kernel(function: Function) -> None:
    kept = kept_launch(function)
    for n in (1, 16, 17, 2**30):
        kept(n, (torch.zeros(n % 100 + 1),), (), (n,))
    assert kinds(function) == ["ordinary", "kept", "kept", "kept"]


def test_a_window_on_another_device_launches_there(function: Function) -> None:
    kept = kept_launch(function, device=1)
    kept(1)
    kept(1)
    assert function.log[1][:6] == ("kept", 1, 1, 1, 1, 8)
    assert torch.cuda.current_device() == 0


def test_together_kernels_are_compiled_and_nothing_is_launched(function: Function) -> None:
    kept = kept_launch(function)
    kept(3, numbers=(1,))

    def calls() -> None:
        kept(3, numbers=(1,))  # known, and not launched either
        kept((4, 2), constants=(5,))
        assert launch.launch(function, (6,), 7, num_warps=1) is None

    launch.compile_together(calls)
    assert kinds(function) == ["ordinary", "compiled", "compiled", "compiled"]
    assert function.log[1:] == [
        ("compiled", (3,), (1,), {"num_warps": 2}),
        ("compiled", (4, 2), (5,), {"num_warps": 2}),
        ("compiled", (6,), (7,), {"num_warps": 1}),
    ]
    kept((4, 2), constants=(5,))
    kept((4, 2), constants=(5,))
    assert kinds(function)[4:] == ["ordinary", "kept"]


@pytest.mark.parametrize(("context", "names"), [(200, ["attention", "merge"]), (9, ["attention"])])
def test_attention_is_launched_where_it_can_be_only_compiled(
    context: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `launch`, cut into pieces or whole."""
    batch = make_batch([Span(context, 1, 4)], Geometry())
    arguments = paged_arguments(make_step(batch).layers[0], batch)
    out = torch.full_like(arguments["query"], float("nan"))
    kernels = {attention._attention_kernel: "attention", merge.merge_kernel: "merge"}
    found: list[str] = []
    monkeypatch.setattr(
        attention, "launch", lambda kernel, *given, **more: found.append(kernels[kernel])
    )
    with implementation("triton"):
        paged_attention(**arguments, out=out)
    assert found == names
    assert out.isnan().all()


def test_together_kernels_are_loaded_at_the_same_time(function: Function) -> None:
    """Where they will run, each once, and those alone that could be compiled."""
    function.loads = True

    def calls() -> None:
        for device, arguments in ((1, (6, 7)), (0, (8, 9)), (1, (6, 7)), (0, (5, -1))):
            with launch.on_device(torch.device("cuda", device)):
                launch.launch(function, (1,), *arguments)

    launch.compile_together(calls)
    assert kinds(function) == ["compiled"] * 4 + ["loaded"] * 2
    assert sorted(function.log[4:]) == [("loaded", 0, (8, 9)), ("loaded", 1, (6, 7))]


def test_a_kernel_that_cannot_be_loaded_says_so(function: Function) -> None:
    function.loads = True
    with pytest.raises(OSError, match="no compiler"):
        launch.compile_together(lambda: launch.launch(function, (1,), 13))
    launch.compile_together(lambda: launch.launch(function, (1,), 14))  # its launch says so


def test_what_fails_while_kernels_are_compiled_leaves_nothing_behind(
    function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*rest: object) -> None:
        raise RuntimeError("no step")

    with pytest.raises(RuntimeError, match="no step"):
        launch.compile_together(fail)
    with monkeypatch.context() as patch:
        patch.setattr(launch.triton.AsyncCompileMode, "__exit__", fail)  # before it has cleaned up
        with pytest.raises(RuntimeError, match="no step"):
            launch.compile_together(lambda: None)
    launch.compile_together(lambda: kept_launch(function)(3))
    kept_launch(function)(3)
    assert kinds(function) == ["compiled", "ordinary"]


def test_a_profilers_hooks_are_called(function: Function, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = kept_launch(function)
    kept(3, numbers=(1,))
    for hooks in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(knobs.runtime, hooks, SimpleNamespace(calls=[print]))
            kept(3, numbers=(2,))
            patch.setattr(knobs.runtime, hooks, print)  # one alone, not a chain
            kept(3, numbers=(2,))
    assert function.log[1:] == [("hooked", 1, (3, 1, 1), 2)] * 4
    kept(3, numbers=(2,))
    assert function.log[-1][0] == "kept"


def test_a_kernel_that_was_not_compiled_is_not_kept(function: Function) -> None:
    kept = kept_launch(function)
    function.refuses = True
    kept(1)
    function.refuses = False
    kept(1)
    kept(1)
    assert kinds(function) == ["ordinary", "ordinary", "kept"]


def test_what_is_kept_has_a_bound(function: Function) -> None:
    kept = kept_launch(function)
    for stride in range(1000):
        kept(1, strides=(stride,))
    assert len(kept.kept) <= 64
    kept(1, strides=(999,))
    assert function.log[-1][0] == "kept"


def test_the_interpreter_takes_the_ordinary_way(
    function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    kept = kept_launch(function)
    kept(1)
    kept(1)
    assert kinds(function) == ["ordinary", "ordinary"]


# Against Triton's own decision -------------------------------------------------------------------


class Recorder:
    """A kernel that notes what Triton would specialise each ordinary launch of it on."""

    def __init__(self, kernel: Any) -> None:
        real = (
            kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
        )
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(real.signature, real.params, backend)
        self.specializations: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **options: int) -> None:
            self.specializations.append((self.bind(*arguments)[1], options))

        return run


def step(r: Rig, form: dict[str, Any], tail: bool) -> None:
    """Begin, commit and a step without a window, with arguments of these dtypes and strides."""

    def like(tensor: Tensor) -> Tensor:
        """The same numbers as `form` says."""
        tensor = tensor.to(form["dtype"])
        if form["strided"]:
            tensor = torch.stack((tensor, tensor), -1)[..., 0]
        elif not form["aligned"] and tensor.dim() == 1:
            tensor = torch.cat((tensor[:1], tensor))[1:]
        return tensor

    batch, sampling = r.batch, r.sampling([0] * len(r.batch.spans))
    more: dict[str, Any] = {}
    if tail:
        more = {"seq_lens": like(batch.seq_lens), "block_table": batch.block_table}
        if form["strided"]:
            more["block_table"] = torch.cat([batch.block_table] * 2, 1)[:, ::2]
    counts = like(batch.num_drafts)
    if form["by"] == "logits":
        more["logit_starts"] = like(torch.nn.functional.pad((counts + 1).cumsum(0), (1, 0)))
    if form["ids"]:
        more["token_ids"] = like(torch.zeros_like(batch.slot_mapping))
    more["one_certain"] = form["by"] == "span"
    r.window.begin(
        counts if form["by"] == "count" else None, like(batch.query_start_loc),
        like(batch.slot_mapping), **more,
    )  # fmt: skip
    said = like(sampling.num_sampled) if sampling.num_sampled is not None else None
    r.window.commit(
        like(sampling.sampled_ids), None if form["ids"] else like(batch.draft_ids),
        said if form["counted"] else None,
        said if form["counted"] else None,
    )  # fmt: skip
    if tail:
        r.window.pass_through(more["block_table"])


def test_programs_may_be_in_two_dimensions(
    function: Function, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = kept_launch(function)
    kept((3, 5))
    kept((3, 5))
    assert function.log[0][1] == (3, 5)
    assert function.log[1][2:5] == (3, 5, 1)


@pytest.mark.parametrize("tail", [True, False])
def test_launches_of_one_key_are_one_kernel_to_triton(
    tail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every launch of a window's steps goes the ordinary way here, and for all that have a key in
    common Triton must decide the same."""
    decided: dict[Any, list[Any]] = {}
    first = KeptLaunch._launch_first

    def noted(self: KeptLaunch, programs: int, key: Any, arguments: Any) -> None:
        first(self, programs, key, arguments)
        decided.setdefault((id(self), key), []).append(self.kernel.specializations.pop())

    for module, name in (
        (begin, "_begin_kernel"), (redirect, "_redirect_kernel"), (redirect, "_pass_kernel"),
        (scv, "_judge_kernel"), (decide, "_decide_kernel"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    monkeypatch.setattr(KeptLaunch, "_launch_first", noted)
    monkeypatch.setattr(GraphValidator, "__call__", launch_alone)
    choices = {
        "dtype": (torch.int32, torch.int64), "strided": (False, True), "aligned": (True, False),
        "by": ("count", "logits", "span"), "ids": (False, True), "counted": (False, True),
    }  # fmt: skip
    forms = [dict(zip(choices, form, strict=True)) for form in product(*choices.values())]
    with implementation("triton"), rig(tail=tail, max_requests=20) as r:
        for spans in (MIXED, [Span(8, 1, 3)], [Span(0, 12, 0), *[Span(3, 1, 1)] * 16]):
            r.change_batch(make_batch(spans, Geometry(), padding=3))
            for form in forms:
                step(r, form, tail)
    launches = sum(len(each) for each in decided.values())
    assert launches > 2 * len(decided) > 20
    for (_, key), specializations in decided.items():
        assert all(each == specializations[0] for each in specializations), key


@pytest.mark.parametrize("rotated", [True, False])
def test_writes_of_one_key_are_one_kernel_to_triton(
    rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, for the writes that are prepared once a layer."""
    decided: dict[Any, list[Any]] = {}
    first = KeptLaunch._launch_first

    def noted(self: KeptLaunch, programs: Any, key: Any, arguments: Any) -> None:
        first(self, programs, key, arguments)
        decided.setdefault((id(self), key), []).append(self.kernel.specializations.pop())

    module, name = (rope, "_rope_kernel") if rotated else (cache_write, "_write_kernel")
    monkeypatch.setattr(module, name, Recorder(getattr(module, name)))
    monkeypatch.setattr(KeptLaunch, "_launch_first", noted)
    batch = make_batch(MIXED, Geometry(), padding=3)
    layer, tokens = make_step(batch).layers[0], batch.slot_mapping.shape[0]
    caches = layer.cache.key, layer.cache.value
    staging = (layer.staged_key, layer.staged_value, layer.state, batch.row_map)
    table = torch.zeros(2, 64, layer.key.shape[2] // 2)
    with implementation("triton"):
        if rotated:
            write = pick(ROPE_WRITE, table.device)(
                *table, layer.key.shape[2], True, *caches, staging, *layer.format
            )
        else:
            write = pick(STAGE_WRITE, table.device)(*caches, staging, *layer.format)
    forms = list(product((torch.int32, torch.int64), (0, 1, 2), (1, 3, tokens)))
    for dtype, offset, count in [*forms, *forms]:
        rows = torch.zeros(tokens * 3 * layer.key[0].numel() + 2, dtype=layer.key.dtype)[offset:]
        packed = rows[: tokens * 3 * layer.key[0].numel()].view(tokens, -1)
        q, k, v = (x.unflatten(1, layer.key.shape[1:]) for x in packed.chunk(3, 1))
        slots = torch.zeros(tokens + 2, dtype=dtype)[offset:]
        numbers = torch.zeros(tokens + 2, dtype=dtype)[offset:][:count]
        given = (k[:count], v[:count], slots[:count])
        write(q[:count], *given[:2], numbers, given[2]) if rotated else write(*given)
    assert sum(len(each) for each in decided.values()) == 2 * len(forms)
    assert len(decided) >= 4
    for (_, key), specializations in decided.items():
        assert all(each == specializations[0] for each in specializations), key


def launch_alone(
    self: GraphValidator,
    sampled_ids: Tensor,
    draft_ids: Tensor | None = None,
    num_sampled: Tensor | None = None,
    num_rejected: Tensor | None = None,
    *,
    form: object = None,
) -> Any:
    """What graph mode launches before its graph, and where requests are few in its place."""
    ids = ids_of(self.tensors, draft_ids, sampled_ids.shape[0])
    verdict = verdict_buffers(sampled_ids.shape[0], ids.shape[0], ids.device)
    judge = pick(JUDGE, ids.device)
    judge(self.tensors.judging, sampled_ids, ids, num_sampled, num_rejected, verdict)
    plan, given = self.tensors.deciding, (sampled_ids, ids, num_sampled, num_rejected)
    assert plan is not None
    numbers = torch.empty(3, sampled_ids.shape[0], dtype=torch.int32)
    for mirror in (None, torch.zeros_like(self.tensors.counters)):
        pick(DECIDING, ids.device)(plan, *given)(*given, numbers, mirror)
    return verdict
