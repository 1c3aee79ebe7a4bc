"""What `tensor_parallel.py` needs inside each worker: vLLM mixes `RankProbe` into its worker class.

Methods are called by name through `collective_rpc`, so they answer for every rank. Importing this
module makes the load format known, in the engine's process and in each worker's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import zlib
from collections.abc import Callable
from typing import Any

import torch
from engine_process import fill_uninitialised_memory
from step_audit import StepAudit, audited_layers, drafters_layers
from torch import nn
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

FORMAT = "scaled_random_shards"
SPLIT = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)
if os.environ.get("TENSOR_PARALLEL_FILLED"):
    fill_uninitialised_memory()

IN_ONE_GRAPH = 20  # commits whose device time is measured together
REPEATS = 30


@register_model_loader(FORMAT)
class ShardLoader(BaseModelLoader):
    """Random weights of `matrix_weights`' sizes, drawn on the device, for one rank's share."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to fetch."""

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        """Ranks get different values where they hold different parts of a matrix, equal ones else:
        with equal shares a rank that took the other's would not be noticed."""
        group = get_tp_group()
        split = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, SPLIT)
            for parameter in module.parameters(recurse=False)
        }
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not parameter.is_floating_point():
                    continue
                rank = group.rank_in_group if id(parameter) in split else 0
                generator = torch.Generator(device=parameter.device)
                generator.manual_seed(zlib.crc32(f"{name} {rank}".encode()))
                if parameter.dim() < 2:
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.1, generator=generator)
                else:
                    size = 0.1 if "embed_tokens" in name else 1.0
                    parameter.normal_(0, size / parameter.shape[-1] ** 0.5, generator=generator)


class RankProbe:
    """Audit, faults and timings of one rank."""

    rank: int
    model_runner: Any
    vllm_config: Any

    def probe_install(self, blocks: int) -> dict[str, Any]:
        """Put cut and audit around the runner. Returns what it found."""
        self.probe_flagged = self.probe_verified = 0
        self.probe_every = 0
        name = "sample" if hasattr(self.model_runner, "prepare_attn") else "_sample"
        cut = self._probe_cut_v2 if name == "sample" else self._probe_cut_v1
        original = getattr(self.model_runner, name)
        setattr(self.model_runner, name, functools.partial(cut, original))
        # Around the cut, since it looks at what was handed on.
        self.probe_audit = StepAudit(self, blocks)
        runner = type(self.model_runner)
        context = self.vllm_config.compilation_config.static_forward_context
        nccl = getattr(get_tp_group().device_communicator, "pynccl_comm", None)
        custom = getattr(get_tp_group().device_communicator, "ca_comm", None)
        return {
            "rank": self.rank,
            "worker": type(self).__name__,
            "runner": f"{runner.__module__}.{runner.__name__}",
            "attention": sorted({type(layer.impl).__name__ for layer in context.values()}),
            "target_layers": len(audited_layers(self.model_runner)),
            "drafter_layers": len(drafters_layers(self.model_runner)),
            "kv_heads": int(next(iter(context.values())).impl.num_kv_heads),
            "nccl": nccl is not None and not nccl.disabled,
            "custom_all_reduce": custom is not None and not custom.disabled,
        }

    def probe_begin(self, audit: bool, cut_every: int = 0) -> None:
        """Forget the totals. With `cut_every` the counts of that many-th verification are cut, as
        NWOR cuts them when its flag is up: what a stock engine is compared with."""
        self.probe_flagged = self.probe_verified = 0
        self.probe_every = cut_every
        self.probe_audit.begin(audit=audit)

    def probe_end(self) -> dict[str, Any]:
        """Totals since `probe_begin`."""
        self.probe_every = 0
        return {
            **self.probe_audit.end(),
            "verified": self.probe_verified,
            "flagged": self.probe_flagged,
        }

    def _probe_staged(self) -> bool:
        return getattr(self, "nwor", None) is not None

    def _probe_turn(self) -> bool:
        """Whether it is this verification's turn to be cut or flagged."""
        self.probe_verified += 1
        turn = bool(self.probe_every) and self.probe_verified % self.probe_every == 0
        self.probe_flagged += turn
        return turn

    def _probe_cut_v2(
        self, original: Any, hidden: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        output, sampled, rejected = original(hidden, batch, *args, **kwargs)
        if not self._probe_staged() and batch.num_draft_tokens > 0 and self._probe_turn():
            kept = sampled.clamp(max=1)
            rejected = rejected + sampled - kept
            output.num_sampled, output.num_rejected = kept, rejected
        return output, output.num_sampled, output.num_rejected

    def _probe_cut_v1(self, original: Any, logits: Any, metadata: Any) -> Any:
        output = original(logits, metadata)
        if not self._probe_staged() and metadata is not None and self._probe_turn():
            output.sampled_token_ids[:, 1:] = -1
        return output

    def _probe_window(self) -> Any:
        return self.nwor.window  # type: ignore[attr-defined]

    def probe_fault(self, every: int, alone: bool = False) -> None:
        """From now on the last rank, and no other, sees a fault in every `every`-th window: by
        turns its flag goes up, or a layer of its has staged a row more than it should. `alone`:
        and the ranks do not tell each other."""
        window = self._probe_window()
        if alone:
            object.__setattr__(window.tensors, "share_error", None)
            window.validator.graphs.clear()  # they have recorded the sharing
            window.validator.prepared.clear()
        if self.rank != self.vllm_config.parallel_config.tensor_parallel_size - 1:
            return
        self.probe_every = every
        commit = window.commit

        def faulty(*args: Any) -> Any:
            if self._probe_turn():
                if self.probe_flagged % 2:
                    window.tensors.error.bitwise_or_(1)
                else:
                    window.tensors.state[1, 0].add_(1)
            return commit(*args)

        window.commit = faulty

    def probe_heal(self) -> None:
        """No more faults."""
        self._probe_window().__dict__.pop("commit", None)

    @torch.inference_mode()
    def probe_cost(self, requests: int) -> dict[str, Any]:
        """Microseconds that a commit without drafts takes on the device, alone and with a shared
        flag, or why that failed. settle_us: many in one graph, one after the other; commit_us: as
        a step launches it. All ranks must be asked at once."""
        from nwor_compile.validator import GraphValidator

        window = self._probe_window()
        tensors = window.tensors
        persistent = (tensors.counters, tensors.error, tensors.drafts)
        kept = [tensor.clone() for tensor in persistent]
        tensors.drafts.zero_()
        found: dict[str, dict[str, float | str]] = {"settle_us": {}, "commit_us": {}}
        # In vLLM's custom all-reduce, which waits for the end of a capture to learn its buffers, a
        # flag cannot be shared by graphs like these.
        for name, share in (("none", None), ("nccl", tensors.share_error)):
            variant = dataclasses.replace(tensors, share_error=share)
            validator = GraphValidator(variant, window.max_drafts, adaptive=False)
            try:
                validator.warm_up([requests])
                found["settle_us"][name] = _settled_us(variant, requests, window.max_drafts)
                found["commit_us"][name] = _committed_us(validator, requests, window.max_drafts)
            except RuntimeError as error:
                found["settle_us"][name] = found["commit_us"][name] = str(error)
        torch.cuda.synchronize()
        for tensor, value in zip(persistent, kept, strict=True):
            tensor.copy_(value)
        return found


def _settled_us(tensors: Any, requests: int, drafts: int) -> float:
    from nwor_compile.ops.scv import verdict_buffers
    from nwor_compile.scv import settle

    verdict = verdict_buffers(requests, requests * drafts, tensors.error.device)
    verdict.mask.zero_()
    verdict.numbers.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_ONE_GRAPH):
            settle(tensors, verdict)
    graph.replay()
    return _median_us(graph.replay) / IN_ONE_GRAPH


def _committed_us(validator: Any, requests: int, drafts: int) -> float:
    device = validator.tensors.error.device
    ids = torch.zeros(requests, drafts + 1, dtype=torch.int64, device=device)
    given = torch.zeros(requests * drafts, dtype=torch.int64, device=device)
    ones = torch.ones(requests, dtype=torch.int32, device=device)
    zeros = torch.zeros_like(ones)
    if not validator.graphs and not validator.in_one_launch(requests, given.shape[0]):
        raise RuntimeError(f"the commit was not captured: {validator.vectorised}")
    return _median_us(lambda: validator(ids, given, ones, zeros))


def _median_us(call: Callable[[], object]) -> float:
    """Device time of `call` alone: everything is enqueued while the device sleeps, and the ranks
    begin together, or the first would count its wait for the last."""
    group = get_tp_group()
    together = torch.zeros(1, device=group.device)
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        torch.distributed.barrier(group=group.cpu_group)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # cycles: half a millisecond
        torch.distributed.all_reduce(together, group=group.device_group)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(1000 * start.elapsed_time(stop))
    return statistics.median(times)
