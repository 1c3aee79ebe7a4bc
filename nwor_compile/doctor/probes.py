"""Every op on a tiny problem, by every implementation."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from nwor_compile.doctor.diagnosis import OpStatus, one_line
from nwor_compile.doctor.sample import BLOCK_SIZE, BLOCKS, HEAD_SIZE, HEADS, KV_HEADS, TOKENS
from nwor_compile.ops import OP_NAMES, counter_size, implementation
from nwor_compile.ops import kernels as kernel_package
from nwor_compile.ops.library import Implementation
from nwor_compile.passes.table import resolve

DRAFTS = TOKENS - 1


def probe_ops() -> list[OpStatus]:
    """Call every registered op: the reference, under fake tensors, and Triton where it can run."""
    statuses = []
    for name in OP_NAMES:
        op = resolve(f"nwor::{name}")
        if op is None:
            continue
        statuses.append(
            OpStatus(
                op=name,
                reference=_attempt(_run, op, name, "reference", "cpu"),
                fake=_attempt(_run_fake, op, name),
                triton=_probe_triton(op, name),
                signature=str(op._schema),
            )
        )
    return statuses


def arguments_of(name: str, device: str = "cpu") -> tuple[Any, ...]:
    """Small valid arguments of an op: one request of three tokens, the last two of them drafts.

    Raises NotImplementedError for an op that is not known here.
    """
    cache = [torch.zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_SIZE, device=device) for _ in "kv"]
    staged = [torch.zeros(DRAFTS, KV_HEADS, HEAD_SIZE, device=device) for _ in "kv"]
    rows = [torch.ones(TOKENS, KV_HEADS, HEAD_SIZE, device=device) for _ in "kv"]

    def ints(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    query = torch.ones(TOKENS, HEADS, HEAD_SIZE, device=device)
    batch = (ints(0, 1, 2, 3).view(1, 4), ints(TOKENS), ints(0, TOKENS))
    state, mask = ints(0, 0), torch.ones(DRAFTS, dtype=torch.bool, device=device)
    counters = torch.zeros(counter_size(DRAFTS), dtype=torch.int64, device=device)
    cos, sin = (torch.ones(TOKENS, HEAD_SIZE // 2, device=device) for _ in range(2))
    rotary = (HEAD_SIZE, torch.ones(TOKENS, HEAD_SIZE, device=device), True)
    turned = (query, *rows, cos, sin, HEAD_SIZE, True, *cache)
    known: dict[str, tuple[Any, ...]] = {
        "reshape_and_cache": (*rows, *cache, ints(0, 1, 2)),
        "stage_kv": (*rows, *cache, *staged, state, ints(0, 1, 2), ints(-1, 0, 1)),
        "stage_kv.window": (*rows, *cache, ints(0, 1, 2)),
        "accept_mask": (ints(7, 8, 9).view(1, 3), ints(7, 8), ints(DRAFTS)),
        "commit_kv": (
            *([tensor] for tensor in (*cache, *staged)), ints(1, 2), mask, ints(0), ints(2),
            ints(2), counters,
        ),
        "paged_attention": (query, *cache, *batch, 0.25),
        "paged_attention_out": (torch.empty_like(query), query, *cache, *batch, 0.25),
        "verify_attention": (query, *cache, *staged, *batch, ints(DRAFTS), ints(0), 0.25),
        "verify_attention.window": (query, *cache, *batch, 0.25),
        "rotary_embedding": (ints(0, 1, 2), query, rows[0], *rotary),
        "rope_stage_kv": (*turned, *staged, state, ints(0, 1, 2), ints(-1, 0, 1)),
        "rope_stage_kv.window": (*turned, ints(0, 1, 2)),
        "rope_stage_kv.window_": (ints(0, 1, 2), query, *rows, *rotary, *cache, ints(0, 1, 2)),
    }  # fmt: skip
    if name not in known:
        raise NotImplementedError(f"no probe for nwor::{name}")
    return known[name]


def _attempt(call: Callable[..., object], *arguments: object) -> str:
    try:
        call(*arguments)
    except NotImplementedError:
        return "no probe for this op"
    except Exception as error:  # noqa: BLE001  a doctor reports whatever it meets
        return f"failed: {one_line(error)}"
    return "ok"


def _run(op: OpOverload, name: str, kind: Implementation, device: str) -> None:
    with implementation(kind):
        op(*arguments_of(name, device))
    if device == "cuda":
        torch.cuda.synchronize()


def _run_fake(op: OpOverload, name: str) -> None:
    arguments = arguments_of(name)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments)
        op(*fakes)


def _probe_triton(op: OpOverload, name: str) -> str:
    if ".window" in name:
        return "through the op it routes to"
    try:
        triton = importlib.import_module("triton")
        module = _launcher_module(name)
    except ImportError as error:
        return f"not importable: {error}"
    if module is None:
        return "no kernel"
    if torch.cuda.is_available():
        return _attempt(_run, op, name, "triton", "cuda")
    if triton.knobs.runtime.interpret:
        text = _attempt(_run, op, name, "triton", "cpu")
        return "ok (interpreter)" if text == "ok" else text
    return f"kernel in {module}; needs a CUDA GPU"


def _launcher_module(name: str) -> str | None:
    """The module of `ops/kernels` whose launcher has the op's name."""
    for info in pkgutil.iter_modules(kernel_package.__path__):
        if info.name == "testing":
            continue
        module = importlib.import_module(f"{kernel_package.__name__}.{info.name}")
        launcher = getattr(module, name, None)
        if launcher is not None and launcher.__module__ == module.__name__:
            return info.name
    return None
