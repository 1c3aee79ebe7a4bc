"""What `nwor bench kernels` writes."""

from __future__ import annotations

from pydantic import BaseModel

from nwor_compile.bench.kernels_bytes import BytesRow
from nwor_compile.bench.kernels_rope import RopeRow
from nwor_compile.bench.record import Machine, Spread


class AttentionRow(BaseModel):
    """One point: microseconds a layer.

    Paths are attention with all KV writing. Ratios are the direct path's time (FA3 at its best
    split count and vLLM's write) over that of the staged path with the attention that `auto` takes:
    `ratio` with a stage launch of its own, `ratio_in_rope` with staging in RoPE's kernel, as what
    the path with RoPE takes beyond the faster RoPE alone; `ratio_with_rope` has RoPE on both sides.
    `sums` are the parts added up.
    """

    group: str
    case: str
    requests: int
    span: int
    heads: int
    kv_heads: int
    head_size: int
    layers: int
    aliased: bool  # requests share blocks, because the point exceeds memory
    floor_us: float
    runs: dict[str, Spread]
    split_sweep: dict[int, float]
    best_splits: int | None
    error: float | None
    chosen: str
    equal: dict[str, bool]
    sums: dict[str, float] = {}
    ratio: float | None = None
    ratio_in_rope: float | None = None
    ratio_with_rope: float | None = None
    fused_over_fa3: float | None = None  # attention alone, over tail blocks: below 1 fused is ahead


class WriteRow(BaseModel):
    """One size of the write path: microseconds a step of 32 layers."""

    rows: int
    runs: dict[str, Spread]
    commit_floor_us: dict[str, float]
    ratios: dict[str, float]  # vLLM's 32 writes over a commit, or over the step with tail blocks


class ScvRow(BaseModel):
    """One batch: microseconds of acceptance and commit over 32 layers."""

    requests: int
    device: dict[str, Spread]
    host: dict[str, Spread]


class KernelsRecord(BaseModel):
    """Everything that one run measured."""

    benchmark: str = "kernels-gpu"
    command: str
    machine: Machine
    device: str
    triton: str
    vllm: str | None
    baselines_missing: str | None
    clocks: list[str]
    copy_bytes_per_us: Spread
    launch_floor_us: Spread
    attention: list[AttentionRow] = []
    writes: list[WriteRow] = []
    scv: list[ScvRow] = []
    rope: list[RopeRow] = []
    moves: list[BytesRow] = []
    failures: dict[str, str] = {}
