"""A window over random layers, and what the caches must hold after it. Used by test_window_*."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import oracle
import torch
from cases import (
    Batch,
    Cache,
    Geometry,
    Layer,
    Sampling,
    Span,
    Step,
    make_batch,
    make_sampling,
    make_step,
    paged_arguments,
    write_arguments,
)
from torch import Tensor

from nwor_compile import Committed, NworConfig, Window
from nwor_compile.ops import stage_kv_window, verify_attention_window
from nwor_compile.ops import staging as registry
from nwor_compile.tail_blocks import TailBlocks, tail_blocks_needed

# Verify spans, plain decode, a prefill chunk and a padded request in one batch.
MIXED = (Span(5, 1, 3), Span(9, 1), Span(0, 6), Span(7, 1, 5), Span(0, 0), Span(2, 2, 1))
NONE = [0] * len(MIXED)
SOME = [1, 0, 0, 5, 0, 0]
ALL = [3, 0, 0, 5, 0, 1]


def config(**settings: Any) -> NworConfig:
    """Settings that do not depend on the environment of the test run."""
    return NworConfig(**{"scv": "graph", **settings})


def registered() -> int:
    """Caches that the process-wide registry knows, direct ones included."""
    return len(registry._registry.layers) + len(registry._registry.direct)


def open_windows() -> int:
    return registry._registry.open_windows


class Rig:
    """One step's batch, its layers and a window over them.

    `steps` may hold layers of several geometries; all steps have the same spans, and so the same
    slots. Layer names count through: layers.0, layers.1, ...
    """

    def __init__(
        self,
        spans: Sequence[Span] = MIXED,
        *,
        layers: int = 2,
        geometries: Sequence[Geometry] = (Geometry(),),
        seed: int = 0,
        padding: int = 2,
        max_requests: int = 6,
        max_drafts: int = 5,
        max_tokens: int = 64,
        window: Mapping[str, Any] | None = None,
        tail: bool = False,
        **settings: Any,
    ) -> None:
        batch = make_batch(spans, geometries[0], seed, padding=padding)
        window = dict(window or {})
        # Slots that the engine hands out; a tail block is nobody's.
        self.slots = batch.blocks * geometries[0].block_size
        if tail:
            columns = batch.block_table.shape[1]
            window["tail_blocks"] = TailBlocks(first={"kv": batch.blocks}, columns=columns)
            more = tail_blocks_needed(max_requests, max_drafts, geometries[0].block_size)
            batch = replace(batch, blocks=batch.blocks + more)
        self.batch: Batch = batch
        self.steps: list[Step] = [
            make_step(replace(batch, geometry=geometry), layers, seed + i)
            for i, geometry in enumerate(geometries)
        ]
        self.layers: list[Layer] = [layer for step in self.steps for layer in step.layers]
        self.window = Window(
            self.caches(),
            max_requests=max_requests,
            max_drafts=max_drafts,
            max_tokens=max_tokens,
            config=config(**settings),
            kv_cache_dtype=geometries[0].kv_cache_dtype,
            **window,
        )

    def caches(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            f"layers.{i}": (layer.cache.key, layer.cache.value)
            for i, layer in enumerate(self.layers)
        }

    def begin(self, **changed: Any) -> None:
        batch = self.batch
        arguments = {
            "num_drafts": batch.num_drafts,
            "query_start_loc": batch.query_start_loc,
            "slot_mapping": batch.slot_mapping,
            **changed,
        }
        if self.window.block_tables:
            arguments.setdefault("block_table", batch.block_table)
            arguments.setdefault("seq_lens", batch.seq_lens)
        self.window.begin(**arguments)

    def forward(self, skip: Collection[int] = ()) -> list[Tensor]:
        """The cache write and the attention of every layer, as a rewritten graph calls them."""
        outputs = []
        for index, layer in enumerate(self.layers):
            if index in skip:
                continue
            stage_kv_window(**write_arguments(layer, self.batch))
            outputs.append(
                verify_attention_window(
                    **paged_arguments(layer, replace(self.batch, geometry=layer.cache.geometry))
                )
            )
        return outputs

    def sampling(self, accepted: Sequence[int], **options: Any) -> Sampling:
        """As wide as the window's drafts, so that no column is missing."""
        options.setdefault("columns", self.window.max_drafts + 1)
        return make_sampling(self.batch, accepted, **options)

    def commit(self, accepted: Sequence[int], **options: Any) -> Committed:
        sampling = self.sampling(accepted, **options)
        return self.window.commit(sampling.sampled_ids, self.batch.draft_ids, sampling.num_sampled)

    def run(self, accepted: Sequence[int], **options: Any) -> Committed:
        self.begin()
        self.forward()
        return self.commit(accepted, **options)

    def rows(self) -> list[oracle.Rows]:
        return [layer.cache.rows() for layer in self.layers]

    def expected(
        self, before: Sequence[oracle.Rows], accepted: Sequence[int], skip: Collection[int] = ()
    ) -> list[oracle.Rows]:
        """Caches after a step that accepted so many drafts: the rest of the drafts have no slot."""
        slots = self.batch.slot_mapping.tolist()
        starts = self.batch.query_start_loc.tolist()
        for r, span in enumerate(self.batch.spans):
            for token in range(starts[r] + span.certain + accepted[r], starts[r + 1]):
                slots[token] = -1
        after = []
        for index, (layer, rows) in enumerate(zip(self.layers, before, strict=True)):
            rows = dict(rows)
            if index not in skip:
                oracle.write(rows, layer.key, layer.value, slots, *layer.format)
            self._poison(rows, layer, accepted)
            after.append(rows)
        return after

    def rejected_slots(self, accepted: Sequence[int]) -> list[int]:
        """Slots of the drafts that were not accepted."""
        slots = draft_slots(self.batch)
        rejected, start = [], 0
        for span, taken in zip(self.batch.spans, accepted, strict=True):
            rejected += slots[start + taken : start + span.drafts]
            start += span.drafts
        return rejected

    def _poison(self, rows: oracle.Rows, layer: Layer, accepted: Sequence[int]) -> None:
        """Poison mode leaves its marker in rejected slots."""
        settings = self.window.config
        if settings.poison == "off" or settings.mode == "off":
            return
        value = float("nan") if settings.poison == "nan" else 3.0e4
        rejected = self.rejected_slots(accepted)
        marker = torch.full((len(rejected), *layer.key.shape[1:]), value, dtype=layer.key.dtype)
        oracle.write(rows, marker, marker, rejected, layer.format[0])

    def holds(self, rows: Sequence[oracle.Rows]) -> bool:
        """Every slot of every layer has exactly these bits, tail blocks aside."""
        return all(
            layer.cache.holds(wanted, self.slots)
            for layer, wanted in zip(self.layers, rows, strict=True)
        )

    def change_batch(self, batch: Batch, seed: int = 0) -> None:
        """Go on with another batch: the layers keep their caches and get its tokens' Q, K and V."""
        generator = torch.Generator().manual_seed(seed)
        tokens = batch.slot_mapping.shape[0]

        def another(layer: Layer) -> Layer:
            g = layer.cache.geometry
            query = torch.randn(tokens, g.heads, g.head_size, generator=generator)
            return replace(
                layer,
                query=query.to(g.model_dtype).to(g.device),
                key=g.random_rows(tokens, generator),
                value=g.random_rows(tokens, generator),
            )

        self.batch, self.layers = batch, [another(layer) for layer in self.layers]

    def new_rows(self, seed: int) -> None:
        """The K and V of another forward pass over the same tokens."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers:
            for rows in (layer.key, layer.value):
                rows.copy_(torch.randn(rows.shape, generator=generator))

    def assert_next_window_is_clean(self) -> None:
        """A whole window after whatever happened: right rows, no flag, its own counts."""
        self.new_rows(seed=99)
        before, counted = self.rows(), self.window.metrics()
        result = self.run(SOME)
        assert result.error.item() == 0
        assert result.accepted.tolist() == SOME
        assert self.holds(self.expected(before, SOME))
        after = self.window.metrics()
        assert after.nwor_total_committed - counted.nwor_total_committed == sum(SOME)
        assert after.nwor_total_staged - counted.nwor_total_staged == sum(ALL)
        assert after.nwor_error_windows == counted.nwor_error_windows
        assert open_windows() == 0


@contextlib.contextmanager
def rig(*args: Any, **settings: Any) -> Iterator[Rig]:
    """A Rig whose window is closed afterwards."""
    made = Rig(*args, **settings)
    try:
        yield made
    finally:
        made.window.close()


def draft_slots(batch: Batch) -> list[int]:
    return [int(slot) for slot in batch.draft_slots]


def slots_equal(cache: Cache, before: oracle.Rows, slots: Sequence[int]) -> bool:
    """These slots have the bits they had."""
    now = cache.rows()
    return all(
        torch.equal(now[slot][i].view(torch.uint8), before[slot][i].view(torch.uint8))
        for slot in slots
        for i in range(2)
    )
