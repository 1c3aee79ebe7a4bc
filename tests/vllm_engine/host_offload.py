"""Offloading for vLLM's CPU engine: `spec_name` HostSpec, `spec_module_path` host_offload.

Blocks are copied when the job is submitted, so anything that is written later is missing in them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class HostWorker(OffloadingWorker):
    """Copies between the engine's blocks and its own; one block a chunk."""

    def __init__(self, caches: list[torch.Tensor], blocks: int) -> None:
        stored = [torch.zeros(blocks, cache.shape[1], dtype=torch.int8) for cache in caches]
        self._store_handler = SimpleNamespace(src_tensors=caches, dst_tensors=stored)
        self._done: list[int] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._store_handler.src_tensors, src_spec,
                          self._store_handler.dst_tensors, dst_spec)  # fmt: skip

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        return self._copy(job_id, self._store_handler.dst_tensors, src_spec,
                          self._store_handler.src_tensors, dst_spec)  # fmt: skip

    def _copy(self, job: int, sources: Any, src: Any, targets: Any, dst: Any) -> bool:
        for one, two in zip(src.block_ids, dst.block_ids, strict=True):
            for source, target in zip(sources, targets, strict=True):
                target[int(two)] = source[int(one)]
        self._done.append(job)
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return [TransferResult(job_id=job, success=True) for job in done]

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is under way."""


class HostSpec(CPUOffloadingSpec):
    """The scheduler's side is vLLM's own."""

    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: Any) -> OffloadingWorker:
        if self._worker is None:
            caches = [
                entry.tensor.view(torch.int8).view(entry.tensor.shape[0], -1)
                for entry in kv_caches.tensors
            ]
            self._worker = HostWorker(caches, getattr(self, "num_chunks", 0) or self.num_blocks)
        return self._worker
