"""Random batches for the ops: caches of every layout, ragged spans, samplers. No ops code here."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import oracle
import torch
from hypothesis import strategies as st
from torch import Tensor

LAYOUTS = ("nhd", "hnd", "packed", "packed_hnd", "5d")
FP8 = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# (model dtype, kv_cache_dtype, fp8 kept as uint8)
FORMATS = (
    (torch.float32, "auto", False),
    (torch.float16, "auto", False),
    (torch.bfloat16, "auto", False),
    (torch.bfloat16, "fp8", False),
    (torch.bfloat16, "fp8_e4m3", True),
    (torch.float16, "fp8_e5m2", False),
    (torch.float32, "fp8_e5m2", True),
)
SCALES = ("none", "scalar", "tensor", "head")
GARBAGE = 10**6  # far outside any cache


def bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor as integers: equality that tells -0 from 0 and NaN from nothing."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous()
    return flat.view(integers[tensor.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(bits(left).cpu(), bits(right).cpu())


@dataclass(frozen=True)
class Geometry:
    """Everything static about a cache group. `layout` is one of LAYOUTS, `scale` of SCALES."""

    layout: str = "nhd"
    model_dtype: torch.dtype = torch.float32
    kv_cache_dtype: str = "auto"
    as_uint8: bool = False
    scale: str = "none"
    block_size: int = 4
    kv_heads: int = 2
    heads: int = 4
    head_size: int = 8
    spare_blocks: int = 3
    device: str = "cpu"

    @property
    def stored_dtype(self) -> torch.dtype:
        if self.kv_cache_dtype == "auto":
            return self.model_dtype
        return torch.uint8 if self.as_uint8 else FP8[self.kv_cache_dtype]

    @property
    def softmax_scale(self) -> float:
        return float(self.head_size**-0.5)

    def random_rows(self, rows: int, generator: torch.Generator) -> Tensor:
        """K or V of `rows` tokens in the model's dtype."""
        shape = (rows, self.kv_heads, self.head_size)
        return torch.randn(shape, generator=generator).to(self.model_dtype).to(self.device)

    def random_scale(self, generator: torch.Generator) -> Tensor | None:
        shapes: dict[str, tuple[int, ...]] = {
            "scalar": (),
            "tensor": (1,),
            "head": (self.kv_heads,),
        }
        if self.scale == "none":
            return None
        # Small enough that some values saturate in e4m3.
        return (0.004 + 0.2 * torch.rand(shapes[self.scale], generator=generator)).to(self.device)


@dataclass(frozen=True)
class Cache:
    """One layer's cache: what an op takes (`key`, `value`) and how its bytes lie in memory."""

    geometry: Geometry
    blocks: int
    stored: tuple[Tensor, ...]  # (key, value), or (packed,)

    @property
    def key(self) -> Tensor:
        return self._views()[0]

    @property
    def value(self) -> Tensor:
        return self._views()[1]

    @property
    def slots(self) -> int:
        return self.blocks * self.geometry.block_size

    def _views(self) -> tuple[Tensor, Tensor]:
        size, layout = self.geometry.head_size, self.geometry.layout
        if layout == "packed":
            return self.stored[0][..., :size], self.stored[0][..., size:]
        if layout == "packed_hnd":
            rows = self.stored[0].permute(0, 2, 1, 3)
            return rows[..., :size], rows[..., size:]
        if layout == "hnd":
            return self.stored[0].permute(0, 2, 1, 3), self.stored[1].permute(0, 2, 1, 3)
        return self.stored[0], self.stored[1]

    def dump(self) -> tuple[Tensor, Tensor]:
        """Copies of all rows, `[slots, kv_heads, head_size]`; fp8 as its codes (uint8)."""
        key, value = self._by_slot()
        fp8 = self.geometry.kv_cache_dtype != "auto"
        shape = (self.slots, self.geometry.kv_heads, self.geometry.head_size)
        out = []
        for rows in (key, value):
            flat = rows.reshape(shape).clone().cpu()
            out.append(flat.view(torch.uint8) if fp8 else flat)
        return out[0], out[1]

    def _by_slot(self) -> tuple[Tensor, Tensor]:
        """Views `[blocks, block_size, kv_heads, ...]` made from the stored tensors."""
        if self.geometry.layout == "5d":
            return self.stored[0].permute(0, 3, 1, 2, 4), self.stored[1].permute(0, 3, 1, 2)
        return self._views()

    def fill(self, slots: Sequence[int] | Tensor, key: Tensor, value: Tensor) -> None:
        """Store rows (as `dump` gives them) in the given slots."""
        place = torch.as_tensor(slots, dtype=torch.long)
        block, offset = place // self.geometry.block_size, place % self.geometry.block_size
        for view, rows in zip(self._by_slot(), (key, value), strict=True):
            shaped = rows.to(view.device).reshape(len(place), *view.shape[2:])
            if view.element_size() == 1:
                view, shaped = view.view(torch.uint8), shaped.view(torch.uint8)
            view[block, offset] = shaped

    def poison(self, slots: Sequence[int]) -> None:
        """NaN in every element of the given slots."""
        shape = (len(slots), self.geometry.kv_heads, self.geometry.head_size)
        if self.geometry.kv_cache_dtype == "auto":
            rows = torch.full(shape, float("nan"), dtype=self.geometry.model_dtype)
        else:
            rows = torch.full(shape, oracle.NAN_CODE, dtype=torch.uint8)
        self.fill(slots, rows, rows)

    def rows(self) -> oracle.Rows:
        """The cache as the oracle sees it."""
        key, value = self.dump()
        return {slot: (key[slot], value[slot]) for slot in range(self.slots)}

    def holds(self, rows: oracle.Rows, slots: int | None = None) -> bool:
        """Whether every slot, or each of the first `slots`, has exactly the bits of `rows`."""
        key, value = self.dump()
        return all(
            same_bits(key[slot], rows[slot][0]) and same_bits(value[slot], rows[slot][1])
            for slot in range(self.slots if slots is None else slots)
        )

    def clone(self) -> Cache:
        return replace(self, stored=tuple(t.clone() for t in self.stored))


def make_cache(geometry: Geometry, blocks: int, generator: torch.Generator) -> Cache:
    """A cache full of finite stale rows: what a pool looks like after some use."""
    g, dtype, dev = geometry, geometry.stored_dtype, geometry.device
    shape: tuple[int, ...] = (blocks, g.block_size, g.kv_heads, g.head_size)
    if g.layout == "packed":
        stored = [torch.empty(*shape[:3], 2 * g.head_size, dtype=dtype, device=dev)]
    elif g.layout == "packed_hnd":
        size = (blocks, g.kv_heads, g.block_size, 2 * g.head_size)
        stored = [torch.empty(size, dtype=dtype, device=dev)]
    elif g.layout == "hnd":
        shape = (blocks, g.kv_heads, g.block_size, g.head_size)
        stored = [torch.empty(shape, dtype=dtype, device=dev) for _ in range(2)]
    elif g.layout == "5d":
        x = min(g.head_size, 16 // dtype.itemsize)
        outer = (blocks, g.kv_heads)
        stored = [
            torch.empty(*outer, g.head_size // x, g.block_size, x, dtype=dtype, device=dev),
            torch.empty(*outer, g.head_size, g.block_size, dtype=dtype, device=dev),
        ]
    else:
        stored = [torch.empty(shape, dtype=dtype, device=dev) for _ in range(2)]
    cache = Cache(g, blocks, tuple(stored))
    everything = torch.arange(cache.slots)
    rows = [g.random_rows(cache.slots, generator).cpu() for _ in range(2)]
    if g.kv_cache_dtype != "auto":
        rows = [oracle.fp8_codes(r, g.kv_cache_dtype) for r in rows]
    cache.fill(everything, rows[0], rows[1])
    return cache


@dataclass(frozen=True)
class Span:
    """One request of a step: rows it has in the cache, certain tokens and drafts of this step.

    (7, 1, 0) is plain decode, (0, 5, 0) prefill, (7, 1, 3) a verify span, (0, 0, 0) a padded
    request.
    """

    context: int
    certain: int
    drafts: int = 0

    @property
    def tokens(self) -> int:
        return self.certain + self.drafts

    @property
    def length(self) -> int:
        return self.context + self.tokens


@dataclass(frozen=True)
class Batch:
    """What all layers of a step share. T tokens, R requests, N drafts."""

    geometry: Geometry
    spans: tuple[Span, ...]
    blocks: int
    block_table: Tensor  # int32 [R, width], garbage past each request's blocks
    seq_lens: Tensor  # int32 [R]
    query_start_loc: Tensor  # int32 [R + 1]
    slot_mapping: Tensor  # int64 [T + padding], -1 for padding
    row_map: Tensor  # int32 [T + padding], -1 for certain rows
    num_drafts: Tensor  # int32 [R]
    cu_num_drafts: Tensor  # int32 [R]
    tail_start: Tensor  # int32 [R], row of each request's first draft
    draft_slots: Tensor  # int64 [N], slot of each staging row
    draft_ids: Tensor  # int32 [N]

    @property
    def tokens(self) -> int:
        return sum(span.tokens for span in self.spans)

    @property
    def drafts(self) -> int:
        return sum(span.drafts for span in self.spans)

    @property
    def draft_tokens(self) -> list[int]:
        """Token index of each draft, in staging order."""
        rows = self.row_map.tolist()
        return sorted((t for t, row in enumerate(rows) if row >= 0), key=rows.__getitem__)

    def slot(self, request: int, position: int) -> int:
        block = int(self.block_table[request, position // self.geometry.block_size])
        return block * self.geometry.block_size + position % self.geometry.block_size

    def used_slots(self, request: int, start: int = 0, end: int | None = None) -> list[int]:
        """Slots of positions [start, end) of a request, by default all of them."""
        stop = self.spans[request].length if end is None else end
        return [self.slot(request, position) for position in range(start, stop)]


def make_batch(
    spans: Sequence[Span],
    geometry: Geometry = Geometry(),
    seed: int = 0,
    *,
    padding: int = 0,
    without_slot: float = 0.0,
    index_dtype: torch.dtype = torch.int32,
) -> Batch:
    """A step over `spans`: shuffled blocks with garbage behind them, `padding` unused tokens.

    `without_slot` is the chance that a token, certain or draft, has slot -1.
    """
    rng = random.Random(seed)
    size, device = geometry.block_size, geometry.device
    needed = [-(-span.length // size) for span in spans]
    blocks = sum(needed) + geometry.spare_blocks
    free = rng.sample(range(blocks), blocks)
    width = max(needed, default=0) + 2
    table = [
        [free.pop() for _ in range(n)]
        + [rng.choice((-1, -GARBAGE, GARBAGE, blocks)) for _ in range(width - n)]
        for n in needed
    ]
    slots: list[int] = []
    rows: list[int] = []
    draft_slots: list[int] = []
    starts = [0]
    for r, span in enumerate(spans):
        for j in range(span.tokens):
            position = span.context + j
            slot = table[r][position // size] * size + position % size
            slot = -1 if rng.random() < without_slot else slot
            slots.append(slot)
            rows.append(-1 if j < span.certain else len(draft_slots))
            if j >= span.certain:
                draft_slots.append(slot)
        starts.append(starts[-1] + span.tokens)
    drafts = torch.tensor([span.drafts for span in spans], dtype=torch.int64)
    ends = drafts.cumsum(0)

    def index(values: Any, dtype: torch.dtype = index_dtype) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device)

    return Batch(
        geometry=geometry,
        spans=tuple(spans),
        blocks=blocks,
        block_table=index(table).reshape(len(spans), width),
        seq_lens=index([span.length for span in spans]),
        query_start_loc=index(starts),
        slot_mapping=index(slots + [-1] * padding, torch.int64),
        row_map=index(rows + [-1] * padding),
        num_drafts=index(drafts),
        cu_num_drafts=index(ends),
        tail_start=index(ends - drafts),
        draft_slots=index(draft_slots, torch.int64),
        draft_ids=index([rng.randrange(1000) for _ in draft_slots]),
    )


@dataclass(frozen=True)
class Layer:
    """One layer's tensors in a step; rows of `query`, `key` and `value` as in the batch."""

    cache: Cache
    query: Tensor
    key: Tensor
    value: Tensor
    staged_key: Tensor
    staged_value: Tensor
    state: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def format(self) -> tuple[str, Tensor | None, Tensor | None]:
        """The last arguments of every cache-writing op."""
        return self.cache.geometry.kv_cache_dtype, self.k_scale, self.v_scale


@dataclass(frozen=True)
class Step:
    """A batch and its layers, whose staging rows `[layers, S, ...]` are one tensor."""

    batch: Batch
    layers: tuple[Layer, ...]
    staged_key: Tensor
    staged_value: Tensor

    @property
    def capacity(self) -> int:
        return self.staged_key.shape[1]

    def key_caches(self) -> list[Tensor]:
        return [layer.cache.key for layer in self.layers]

    def value_caches(self) -> list[Tensor]:
        return [layer.cache.value for layer in self.layers]


def make_step(batch: Batch, layers: int = 1, seed: int = 0, spare_rows: int = 2) -> Step:
    """Random K, V and Q for every token; staging holds NaN until something is staged."""
    g = batch.geometry
    generator = torch.Generator().manual_seed(seed)
    shape = (layers, max(1, batch.drafts + spare_rows), g.kv_heads, g.head_size)
    staged = [torch.empty(shape, dtype=g.stored_dtype, device=g.device) for _ in range(2)]
    for tensor in staged:
        if g.kv_cache_dtype == "auto":
            tensor.fill_(float("nan"))
        else:
            tensor.view(torch.uint8).fill_(oracle.NAN_CODE)
    rows = batch.slot_mapping.shape[0]
    made = []
    for i in range(layers):
        query = torch.randn(rows, g.heads, g.head_size, generator=generator)
        made.append(
            Layer(
                cache=make_cache(g, batch.blocks, generator),
                query=query.to(g.model_dtype).to(g.device),
                key=g.random_rows(rows, generator),
                value=g.random_rows(rows, generator),
                staged_key=staged[0][i],
                staged_value=staged[1][i],
                state=torch.zeros(2, dtype=torch.int32, device=g.device),
                k_scale=g.random_scale(generator),
                v_scale=g.random_scale(generator),
            )
        )
    return Step(batch, tuple(made), staged[0], staged[1])


Arguments = dict[str, Any]


def write_arguments(layer: Layer, batch: Batch, order: Sequence[int] | None = None) -> Arguments:
    """`reshape_and_cache`; `order` is another order of the tokens."""
    kv_cache_dtype, k_scale, v_scale = layer.format
    index = slice(None) if order is None else torch.as_tensor(order, dtype=torch.long)
    return {
        "key": layer.key[index],
        "value": layer.value[index],
        "key_cache": layer.cache.key,
        "value_cache": layer.cache.value,
        "slot_mapping": batch.slot_mapping[index],
        "kv_cache_dtype": kv_cache_dtype,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }


def stage_arguments(layer: Layer, batch: Batch, order: Sequence[int] | None = None) -> Arguments:
    """`stage_kv`."""
    index = slice(None) if order is None else torch.as_tensor(order, dtype=torch.long)
    return {
        **write_arguments(layer, batch, order),
        "staged_key": layer.staged_key,
        "staged_value": layer.staged_value,
        "stage_state": layer.state,
        "row_map": batch.row_map[index],
    }


def paged_arguments(layer: Layer, batch: Batch, **options: Any) -> Arguments:
    """`paged_attention`."""
    kv_cache_dtype, k_scale, v_scale = layer.format
    return {
        "query": layer.query,
        "key_cache": layer.cache.key,
        "value_cache": layer.cache.value,
        "block_table": batch.block_table,
        "seq_lens": batch.seq_lens,
        "query_start_loc": batch.query_start_loc,
        "scale": batch.geometry.softmax_scale,
        "kv_cache_dtype": kv_cache_dtype,
        "k_scale": k_scale,
        "v_scale": v_scale,
        **options,
    }


def verify_arguments(layer: Layer, batch: Batch, **options: Any) -> Arguments:
    """`verify_attention`."""
    return {
        **paged_arguments(layer, batch, **options),
        "staged_key": layer.staged_key,
        "staged_value": layer.staged_value,
        "num_drafts": batch.num_drafts,
        "tail_start": batch.tail_start,
    }


def accept_arguments(batch: Batch, sampling: Sampling) -> Arguments:
    """`accept_mask`."""
    return {
        "sampled_ids": sampling.sampled_ids,
        "draft_ids": batch.draft_ids,
        "cu_num_drafts": batch.cu_num_drafts,
        "num_sampled": sampling.num_sampled,
    }


def commit_arguments(
    step: Step,
    mask: Tensor,
    accepted: Tensor,
    error: Tensor | int = 0,
    counters: Tensor | None = None,
) -> Arguments:
    """`commit_kv`, without a table of addresses."""
    device = step.batch.geometry.device
    flag = error if isinstance(error, Tensor) else torch.tensor([error], dtype=torch.int32)
    return {
        "key_caches": step.key_caches(),
        "value_caches": step.value_caches(),
        "staged_keys": [layer.staged_key for layer in step.layers],
        "staged_values": [layer.staged_value for layer in step.layers],
        "slots": step.batch.draft_slots,
        "mask": mask,
        "error": flag.to(device),
        "num_drafts": step.batch.num_drafts,
        "accepted": accepted,
        "counters": counters,
        "num_layers": len(step.layers),
    }


def stage_exactly(layer: Layer, batch: Batch) -> tuple[oracle.Rows, oracle.Rows]:
    """Fill cache and staging of a layer as `stage_kv` would, without any op; the oracle's rows."""
    rows: oracle.Rows = layer.cache.rows()
    staging: oracle.Rows = {}
    oracle.stage(
        rows, staging, layer.staged_key.shape[0], layer.key, layer.value,
        batch.slot_mapping.tolist(), batch.row_map.tolist(), *layer.format,
    )  # fmt: skip
    if rows:
        layer.cache.fill(list(rows), *_stack(rows))
    if staging:
        for tensor, filled in zip(
            (layer.staged_key, layer.staged_value), _stack(staging), strict=True
        ):
            target = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
            target[list(staging)] = filled.to(target.device)
    return rows, staging


def _stack(rows: oracle.Rows) -> tuple[Tensor, Tensor]:
    return torch.stack([r[0] for r in rows.values()]), torch.stack([r[1] for r in rows.values()])


def commit_exactly(layer: Layer, batch: Batch, staging: oracle.Rows) -> None:
    """Put every staged row into the cache, without any op: what a direct write leaves behind."""
    if staging:
        layer.cache.fill(batch.draft_slots[list(staging)].cpu(), *_stack(staging))


def attend_exactly(
    layer: Layer, batch: Batch, rows: oracle.Rows, staging: oracle.Rows | None, **options: Any
) -> oracle.Attention:
    """The oracle's attention for this layer; `staging` None reads everything from `rows`."""
    kv_cache_dtype, k_scale, v_scale = layer.format
    return oracle.attention(
        layer.query, rows, staging, batch.block_table, batch.geometry.block_size,
        batch.seq_lens.tolist(), batch.query_start_loc.tolist(), batch.num_drafts.tolist(),
        batch.tail_start.tolist(), batch.geometry.softmax_scale, kv_cache_dtype=kv_cache_dtype,
        k_scale=k_scale, v_scale=v_scale, **options,
    )  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """What a sampler returned: `accepted` drafts of each request were taken."""

    sampled_ids: Tensor  # [R, C]
    num_sampled: Tensor | None  # [R]; None: V1's placeholders
    accepted: tuple[int, ...]


def make_sampling(
    batch: Batch,
    accepted: Sequence[int],
    *,
    counted: bool = True,
    echo: bool = False,
    columns: int | None = None,
) -> Sampling:
    """A sampler that takes `accepted[r]` drafts of request r, then emits one token of its own.

    Args:
        counted: give `num_sampled` and poison everything past it with the draft ids themselves,
            so that reading there accepts too much; else placeholders of -1.
        echo: the token after the accepted ones is the draft's own id (synthetic rejection).
        columns: width of the ids; default: most drafts plus one.
    """
    drafts = batch.draft_ids.split(batch.num_drafts.tolist())
    most = max((span.drafts for span in batch.spans), default=0)
    width = most + 1 if columns is None else columns
    table, counts = [], []
    for r, taken in enumerate(accepted):
        ids = drafts[r].tolist()
        count = min(taken + 1, width) if batch.spans[r].tokens else 0
        row = ids[:taken]
        if taken < len(ids):
            row.append(ids[taken] if echo else 1000 + ids[taken])
        else:
            row.append(2000)  # the bonus token
        row = row[:count]
        row += (ids[count:] + [7] * (width + 1))[: width - count] if counted else [-1] * width
        table.append(row[:width])
        counts.append(count)
    device, dtype = batch.draft_ids.device, batch.draft_ids.dtype
    ids = torch.tensor(table, dtype=dtype, device=device).reshape(len(accepted), width)
    numbers = torch.tensor(counts, dtype=dtype, device=device) if counted else None
    return Sampling(ids, numbers, tuple(accepted))


# Hypothesis strategies -------------------------------------------------------------------------


def geometries(layouts: Sequence[str] = LAYOUTS) -> st.SearchStrategy[Geometry]:
    def build(
        layout: str, form: tuple[torch.dtype, str, bool], scale: str, shape: tuple[int, int, int]
    ) -> Geometry:
        dtype, name, as_uint8 = form
        return Geometry(
            layout, dtype, name, as_uint8, scale if name != "auto" else "none",
            block_size=shape[0], kv_heads=shape[1], heads=shape[1] * shape[2],
        )  # fmt: skip

    return st.builds(
        build,
        st.sampled_from(layouts),
        st.sampled_from(FORMATS),
        st.sampled_from(SCALES),
        st.sampled_from([(1, 1, 2), (4, 2, 2), (4, 2, 1), (8, 1, 4)]),
    )


def span_lists(max_requests: int = 6, max_drafts: int = 6) -> st.SearchStrategy[list[Span]]:
    """Prefill chunks, decode, verify spans and padded requests, in any order."""
    context = st.integers(0, 20)
    kinds = [
        st.builds(Span, context, st.integers(1, 12)),
        st.builds(Span, context, st.just(1)),
        st.builds(Span, context, st.just(1), st.integers(1, max_drafts)),
        st.just(Span(0, 0)),
    ]
    return st.lists(st.one_of(*kinds), min_size=1, max_size=max_requests)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    return make_batch(
        draw(span_lists()),
        draw(geometries()),
        draw(st.integers(0, 2**16)),
        padding=draw(st.integers(0, 3)),
        without_slot=draw(st.sampled_from([0.0, 0.2])),
        index_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )


@st.composite
def samplings(draw: st.DrawFn, batch: Batch) -> Sampling:
    """Nothing, everything or some of each request's drafts accepted."""
    kind = draw(st.sampled_from(["none", "full", "partial"]))
    accepted = [
        {"none": 0, "full": s.drafts}.get(kind, draw(st.integers(0, s.drafts))) for s in batch.spans
    ]
    return make_sampling(batch, accepted, counted=draw(st.booleans()), echo=draw(st.booleans()))
