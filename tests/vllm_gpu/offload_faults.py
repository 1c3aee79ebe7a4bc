"""Faults that the audit of stores must find, and one change that it must not mind, put into a
running engine on purpose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from offload_audit import StoreAudit


def uncommitted(audit: StoreAudit) -> None:
    """Every second commit never reaches the cache: stores overtake it for good."""
    runner = audit.llm.collective_rpc(_runner)[0]
    blocks = audit.llm.llm_engine.engine_core.engine_core.scheduler.cache_config.num_gpu_blocks
    steps = [0]

    def sample(original: Any, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] % 2:
            return original(*args, **kwargs)
        before = [layer.cache[:blocks].clone() for layer in audit.layers]
        result = original(*args, **kwargs)
        for layer, rows in zip(audit.layers, before, strict=True):
            layer.cache[:blocks].copy_(rows)
        return result

    name = _sampling(runner)
    setattr(runner, name, functools.partial(sample, getattr(runner, name)))


def early(audit: StoreAudit) -> None:
    """A step's own stores are copied before its forward, not after it."""
    connector = _connector()
    original = connector.handle_preemptions

    def handle(metadata: Any) -> None:
        original(metadata)
        _submit(connector, metadata)

    connector.handle_preemptions = handle


def before_commit(audit: StoreAudit) -> None:
    """No fault: a step's own stores are copied after its forward and before its commit. They hold
    no draft of their step, so nothing may be wrong; see NOTE [offload], 1."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector, group = _connector(), get_kv_transfer_group()
    runner = audit.llm.collective_rpc(_runner)[0]

    def sample(original: Any, *args: Any, **kwargs: Any) -> Any:
        for job, source, target in connector._unsubmitted_store_jobs:
            connector.worker.submit_store(job, source, target)
        connector._unsubmitted_store_jobs.clear()
        if group.has_connector_metadata():
            _submit(connector, group._get_connector_metadata())
        return original(*args, **kwargs)

    name = _sampling(runner)
    setattr(runner, name, functools.partial(sample, getattr(runner, name)))


def unclamped(audit: StoreAudit) -> None:
    """vLLM issue 54193: the last token of a finished request counts as stored."""
    del audit.offload._calc_num_offloadable_tokens


FAULTS: dict[str, Callable[[StoreAudit], None]] = {
    "uncommitted": uncommitted,
    "early": early,
    "before_commit": before_commit,
    "unclamped": unclamped,
}


def _connector() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().connector_worker


def _submit(connector: Any, metadata: Any) -> None:
    """Copy the stores of this step now."""
    for job, entry in metadata.store_jobs.items():
        connector.worker.submit_store(job, entry.src_spec, entry.dst_spec)
    metadata.store_jobs.clear()


def _sampling(runner: Any) -> str:
    return "sample" if hasattr(runner, "prepare_attn") else "_sample"


def _runner(worker: Any) -> Any:
    return worker.model_runner
