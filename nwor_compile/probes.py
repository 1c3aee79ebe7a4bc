"""What `nwor doctor` runs: every op on a tiny problem, and the pass on a small sample model."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from nwor_compile.ops import OP_NAMES, counter_size, implementation
from nwor_compile.ops import kernels as kernel_package
from nwor_compile.ops.library import Implementation
from nwor_compile.passes.table import resolve

BLOCKS, BLOCK_SIZE, KV_HEADS, HEADS, HEAD_SIZE = 4, 4, 1, 2, 16
TOKENS, DRAFTS = 3, 2


class OpStatus(BaseModel):
    """One overload: `ok`, why it was not tried, or the error, for each way to run it."""

    op: str
    reference: str
    fake: str
    triton: str
    schema_: str

    @property
    def failed(self) -> bool:
        """True if some way to run it was tried and failed."""
        return any(text.startswith("failed") for text in (self.reference, self.fake, self.triton))


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
                reference=_attempt(lambda op=op, n=name: _run(op, n, "reference", "cpu")),
                fake=_attempt(lambda op=op, n=name: _run_fake(op, n)),
                triton=_probe_triton(op, name),
                schema_=str(op._schema),
            )
        )
    return statuses


def arguments_of(name: str, device: str = "cpu") -> tuple[Any, ...]:
    """Small valid arguments of an op: one request of three tokens, the last two of them drafts.

    Raises KeyError for an op that is not known here.
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
    layers = [tensor.unsqueeze(0) for tensor in staged]
    known: dict[str, tuple[Any, ...]] = {
        "reshape_and_cache": (*rows, *cache, ints(0, 1, 2)),
        "stage_kv": (*rows, *cache, *staged, state, ints(0, 1, 2), ints(-1, 0, 1)),
        "stage_kv.window": (*rows, *cache, ints(0, 1, 2)),
        "accept_mask": (ints(7, 8, 9).view(1, 3), ints(7, 8), ints(DRAFTS)),
        "commit_kv": (
            [cache[0]], [cache[1]], *layers, ints(1, 2), mask, ints(0), ints(2), ints(2), counters,
        ),
        "paged_attention": (query, *cache, *batch, 0.25),
        "verify_attention": (query, *cache, *staged, *batch, ints(DRAFTS), ints(0), 0.25),
        "verify_attention.window": (query, *cache, *batch, 0.25),
    }  # fmt: skip
    return known[name]


def one_line(error: BaseException) -> str:
    """Type and first line of an error, cut to what fits a table."""
    first = (str(error).strip().splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first}"
    return text if len(text) <= 240 else text[:240] + " ..."


def _attempt(call: Callable[[], object]) -> str:
    try:
        call()
    except KeyError:
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
    if name.endswith(".window"):
        return "through the op it routes to"
    try:
        triton = importlib.import_module("triton")
        module = _launcher_module(name)
    except ImportError as error:
        return f"not importable: {error}"
    if module is None:
        return "no kernel"
    if torch.cuda.is_available():
        return _attempt(lambda: _run(op, name, "triton", "cuda"))
    if triton.knobs.runtime.interpret:
        text = _attempt(lambda: _run(op, name, "triton", "cpu"))
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


@dataclass(frozen=True)
class SampleExpectation:
    """What the pass must decide on `SampleModel`."""

    staged: int = 2
    direct: int = 1


class SampleModel(nn.Module):
    """Three cached layers. The last one's cache is also read by plain indexing, which would miss
    staged rows: the pass must stage the first two and leave the last one direct.
    """

    def __init__(self) -> None:
        super().__init__()
        size = HEADS * HEAD_SIZE
        self.query = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        self.cached = nn.ModuleList(nn.Linear(size, 2 * KV_HEADS * HEAD_SIZE) for _ in range(3))
        self.requires_grad_(False)

    def forward(
        self,
        x: Tensor,
        caches: list[Tensor],
        slot_mapping: Tensor,
        block_table: Tensor,
        seq_lens: Tensor,
        query_start_loc: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Hidden states, and a value that an ordinary op read from the last layer's cache."""
        for index, (project_q, project_kv) in enumerate(zip(self.query, self.cached, strict=True)):
            key_cache, value_cache = caches[2 * index], caches[2 * index + 1]
            query = project_q(x).view(-1, HEADS, HEAD_SIZE)
            key, value = project_kv(x).view(-1, 2, KV_HEADS, HEAD_SIZE).unbind(1)
            torch.ops.nwor.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping)
            out = torch.ops.nwor.paged_attention(
                query, key_cache, value_cache, block_table, seq_lens, query_start_loc, 0.25
            )
            x = x + out.flatten(1)
        return x, caches[-1][0].sum()


def sample() -> tuple[SampleModel, tuple[Any, ...]]:
    """The sample model and its inputs, as a `--model` factory returns them."""
    torch.manual_seed(0)
    caches = [torch.zeros(BLOCKS, BLOCK_SIZE, KV_HEADS, HEAD_SIZE) for _ in range(6)]
    batch = (torch.tensor([[0, 1, 2, 3]]), torch.tensor([TOKENS]), torch.tensor([0, TOKENS]))
    x = torch.randn(TOKENS, HEADS * HEAD_SIZE)
    return SampleModel(), (x, caches, torch.arange(TOKENS), *batch)
