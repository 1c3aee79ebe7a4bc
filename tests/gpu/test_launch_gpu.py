"""Launches that keep their compiled kernel, on a GPU: whose kernel, which stream, captures."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from cases import Geometry, make_batch, make_step, same_bits, write_arguments
from recorded import FIRST, SECOND, THIRD, Kept, take
from torch import Tensor
from triton.runtime.jit import JITFunction
from window_support import ALL, MIXED, NONE, SOME, Rig, rig

from nwor_compile.ops import stage_kv_window
from nwor_compile.ops.cache_write import STAGE_WRITE
from nwor_compile.ops.kernels import begin, commit, decide, redirect, scv
from nwor_compile.ops.library import implementation, pick
from nwor_compile.ops.rope import ROPE_WRITE
from nwor_compile.routing import BEGIN

pytestmark = pytest.mark.gpu

GEOMETRY = Geometry(
    model_dtype=torch.bfloat16, head_size=64, kv_heads=2, heads=8, block_size=16, device="cuda"
)


def like(tensor: Tensor, dtype: torch.dtype, how: str) -> Tensor:
    """The same numbers in another form."""
    tensor = tensor.to(dtype)
    if how == "strided":
        return torch.stack((tensor, tensor), -1)[..., 0]
    if how == "unaligned" and tensor.dim() == 1:
        return torch.cat((tensor[:1], tensor))[1:]
    return tensor


def step(r: Rig, accepted: list[int], dtype: torch.dtype, how: str, counted: bool) -> Any:
    batch, sampling = r.batch, r.sampling(accepted, counted=counted)
    said = sampling.num_sampled
    r.begin(
        num_drafts=like(batch.num_drafts, dtype, how),
        query_start_loc=like(batch.query_start_loc, dtype, how),
        slot_mapping=like(batch.slot_mapping, dtype, how),
        seq_lens=like(batch.seq_lens, dtype, how),
    )
    for layer in r.layers:
        stage_kv_window(**write_arguments(layer, batch))
    return r.window.commit(
        like(sampling.sampled_ids, dtype, how), like(batch.draft_ids, dtype, how),
        None if said is None else like(said, dtype, how),
    )  # fmt: skip


FORMS = list(product((torch.int32, torch.int64), ("plain", "strided", "unaligned"), (True, False)))


@pytest.mark.usefixtures("deciding")
def test_steps_of_any_form_commit_the_same_rows() -> None:
    """Each form twice: the second time by kernels that were kept."""
    with rig(geometries=(GEOMETRY,), tail=True) as r:
        r.window.warm_up()
        for seed in range(2):
            for form in FORMS:
                for accepted in (SOME, ALL, NONE):
                    r.new_rows(seed)
                    before = r.rows()
                    result = step(r, accepted, *form)
                    assert (result.accepted.tolist(), result.error.item()) == (accepted, 0), form
                    assert r.holds(r.expected(before, accepted)), form
        assert r.window.validator.vectorised == {}


def test_kept_kernels_are_those_that_triton_takes(
    deciding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = compare_launches(monkeypatch)
    with rig(geometries=(GEOMETRY,), tail=True) as r:
        r.window.warm_up()
        for form in (*FORMS, *FORMS):
            step(r, SOME, *form)
            r.window.pass_through(r.batch.block_table)
    assert set(compared) == {
        "_begin_kernel", "_redirect_kernel", "_pass_kernel",
        "_decide_kernel" if deciding == "one launch" else "_judge_kernel",
    }  # fmt: skip


@pytest.mark.parametrize("rotated", [True, False])
def test_prepared_writes_are_those_of_the_references(
    rotated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called again and again, and from a graph; by the kernels that Triton would take."""
    compared = compare_launches(monkeypatch)
    batch = make_batch(MIXED, GEOMETRY, padding=3)
    tokens, size = batch.slot_mapping.shape[0], GEOMETRY.head_size
    table = torch.randn(2, tokens, size // 2, device="cuda").to(torch.bfloat16)
    results = []
    for how in ("triton", "reference"):
        layer = make_step(batch).layers[0]
        target = (
            layer.cache.key, layer.cache.value,
            (layer.staged_key, layer.staged_value, layer.state, batch.row_map), *layer.format,
        )  # fmt: skip
        rows = torch.empty(0)
        with implementation(how):
            write = (
                pick(ROPE_WRITE, table.device)(*table, size, True, *target)
                if rotated
                else pick(STAGE_WRITE, table.device)(*target)
            )
        for seed, (dtype, form, _) in enumerate((*FORMS, *FORMS)):
            torch.manual_seed(seed)
            rows = torch.randn(tokens, 3 * GEOMETRY.kv_heads * size, device="cuda")
            rows = rows.to(torch.bfloat16)
            q, k, v = (x.unflatten(1, (-1, size)) for x in rows.chunk(3, 1))
            slots = like(batch.slot_mapping, dtype, form)
            positions = like(torch.arange(tokens, device="cuda").flip(0), dtype, form)
            given = (q, k, v, positions, slots) if rotated else (k, v, slots)
            if how == "triton" and seed == 2 * len(FORMS) - 1:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    write(*given)
                graph.replay()
            else:
                write(*given)
        results.append([*layer.cache.stored, *target[2][:3], rows])
    for mine, theirs in zip(*results, strict=True):
        assert same_bits(mine, theirs)
    assert set(compared) == {"_rope_kernel" if rotated else "_write_kernel"}


def compare_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From now on each launch of a kept kernel is held against Triton's choice; names of those."""
    from nwor_compile.ops.kernels import launch

    call, raw, used, compared = launch.KeptLaunch.__call__, launch._launch, [], []

    def noted(kernel: Any, *rest: Any) -> None:
        used.append(kernel)
        raw(kernel, *rest)

    def checked(
        self: Any, programs: Any, pointers: Any = (), strides: Any = (), numbers: Any = (),
        constants: Any = (),
    ) -> None:  # fmt: skip
        used.clear()
        call(self, programs, pointers, strides, numbers, constants)
        if used:
            arguments = (*self.fixed, *pointers, *strides, *numbers, *constants)
            grid = programs if isinstance(programs, tuple) else (programs,)
            wanted = self.kernel.run(*arguments, grid=grid, warmup=True, **self.options)
            assert used == [wanted]
            compared.append(wanted.name)

    monkeypatch.setattr(launch, "_launch", noted)
    monkeypatch.setattr(launch.KeptLaunch, "__call__", checked)
    return compared


def test_a_kept_kernel_is_launched_on_the_current_stream() -> None:
    with rig(geometries=(GEOMETRY,), tail=True) as r:
        for _ in range(2):  # nothing is left to compile
            r.begin()
            r.window.abort()
        row_map, side = r.window.tensors.routing.row_map, torch.cuda.Stream()
        row_map.fill_(-1)  # an abort leaves it as it was
        torch.cuda._sleep(1)  # a kernel that is not loaded yet waits for the device when it is
        assert int((row_map >= 0).sum()) == 0
        with torch.cuda.stream(side):
            torch.cuda._sleep(6_000_000_000)  # three seconds, for machines that others load too
            r.begin()
        early = int((row_map >= 0).sum())  # on the stream that does not wait
        assert not side.query()
        torch.cuda.synchronize()
        assert early == 0
        assert int((row_map >= 0).sum()) == sum(ALL)
        r.window.abort()


def test_a_kept_kernel_is_captured_and_reads_its_arguments_at_the_replay() -> None:
    with rig(geometries=(GEOMETRY,), tail=True) as r:
        batch, plan = r.batch, r.window.opening
        r.begin()
        r.window.abort()
        counts = batch.num_drafts.clone()
        begin = pick(BEGIN, counts.device)
        assert plan.launches[0].kept
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            begin(plan, counts, batch.query_start_loc, [batch.slot_mapping], batch.seq_lens)
        for drafts in (1, 0, 1):
            counts.copy_(batch.num_drafts * drafts)
            graph.replay()
            assert plan.routing.num_drafts[: counts.shape[0]].tolist() == counts.tolist()
        r.window.tensors.routing.row_map.fill_(-1)
        r.window.tensors.routing.num_drafts.zero_()


@pytest.mark.usefixtures("deciding")
def test_warm_up_compiles_all_kernels_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the commit, of openings as recorded and anew, and of steps without a window."""
    kernels = [
        kernel
        for module in (begin, redirect, decide, scv, commit)
        for kernel in vars(module).values()
        if isinstance(kernel, JITFunction) and kernel.__name__.endswith("_kernel")
    ]
    for kernel in kernels:
        kernel.device_caches.clear()

    def compiled() -> dict[str, int]:
        found = {kernel.__name__: len(kernel.device_caches[0][0]) for kernel in kernels}
        return {name: count for name, count in found.items() if count}

    with rig(THIRD, geometries=(GEOMETRY,), tail=True) as r:
        kept, batch, together = Kept(r), r.batch, []
        steps = [kept.arguments(size) for size in r.window.sizes]
        steps.append({
            "num_drafts": torch.zeros_like(batch.num_drafts),
            "query_start_loc": batch.query_start_loc, "slot_mapping": batch.slot_mapping,
            "block_table": batch.block_table, "seq_lens": batch.seq_lens,
        })  # fmt: skip
        warm_up = r.window.validator.warm_up

        def spy(sizes: Any) -> None:
            together.append(compiled())
            assert not r.window.opening.launches[0].kept
            warm_up(sizes)

        monkeypatch.setattr(r.window.validator, "warm_up", spy)
        before = r.rows()
        r.window.warm_up(steps=steps)
        assert together == [compiled()]
        assert {"_begin_kernel", "_redirect_kernel", "_pass_kernel"} < set(together[0])
        assert r.window.opening.launches[0].kept
        assert not r.window.tensors.counters.any()
        assert r.holds(before)
        for spans, accepted in ((FIRST, [3, 0, 2, 0]), (SECOND, [0, 4]), (THIRD, [5, 1, 0, 0, 1])):
            take(r, kept, spans, 1)
            r.begin()
            for layer in r.layers:
                stage_kv_window(**write_arguments(layer, r.batch))
            sampling = r.sampling(accepted)
            r.window.commit(sampling.sampled_ids, r.batch.draft_ids, sampling.num_sampled)
        new = {name for name, count in compiled().items() if count != together[0].get(name)}
        assert not new & {"_decide_kernel", "_judge_kernel", "_commit_kernel", "_pass_kernel"}
