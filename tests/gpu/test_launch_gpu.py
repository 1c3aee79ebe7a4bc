"""Launches that keep their compiled kernel, on a GPU: whose kernel, which stream, captures."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from cases import Geometry, write_arguments
from torch import Tensor
from window_support import ALL, NONE, SOME, Rig, rig

from nwor_compile.ops import stage_kv_window
from nwor_compile.ops.library import pick
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


def test_kept_kernels_are_those_that_triton_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    from nwor_compile.ops.kernels import launch

    call, raw, used, compared = launch.KeptLaunch.__call__, launch._launch, [], []

    def noted(kernel: Any, *rest: Any) -> None:
        used.append(kernel)
        raw(kernel, *rest)

    def checked(
        self: Any, programs: int, pointers: Any = (), strides: Any = (), numbers: Any = (),
        constants: Any = (),
    ) -> None:  # fmt: skip
        used.clear()
        call(self, programs, pointers, strides, numbers, constants)
        if used:
            arguments = (*self.fixed, *pointers, *strides, *numbers, *constants)
            wanted = self.kernel.run(*arguments, grid=(programs,), warmup=True, **self.options)
            assert used == [wanted]
            compared.append(wanted.name)

    monkeypatch.setattr(launch, "_launch", noted)
    monkeypatch.setattr(launch.KeptLaunch, "__call__", checked)
    with rig(geometries=(GEOMETRY,), tail=True) as r:
        r.window.warm_up()
        for form in (*FORMS, *FORMS):
            step(r, SOME, *form)
            r.window.pass_through(r.batch.block_table)
    assert set(compared) == {
        "_begin_kernel", "_redirect_kernel", "_judge_kernel", "_pass_kernel"
    }  # fmt: skip


def test_a_kept_kernel_is_launched_on_the_current_stream() -> None:
    with rig(geometries=(GEOMETRY,), tail=True) as r:
        for _ in range(2):  # nothing is left to compile
            r.begin()
            r.window.abort()
        row_map, side = r.window.tensors.routing.row_map, torch.cuda.Stream()
        row_map.fill_(-1)  # an abort leaves it as it was
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(400_000_000)  # a fifth of a second
            r.begin()
        early = int((row_map >= 0).sum())  # on the stream that does not wait
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
