"""Watches what vLLM's OffloadingConnector copies to the host: is every block what its tokens make?

Wraps the connector's scheduler and worker from outside; it knows nothing of windows and staging.
Each block is read from the host memory when its copy has ended. Afterwards the tokens before and in
it are prefilled again, with neither prefix cache nor loads, and row is compared with row.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from row_audit import AuditedLayer
from step_audit import audited_layers
from torch import Tensor

# A row of the same token in another batch differs by the rounding of its type, some ten times of it
# in deep layers (fp16: 0.007); a row of another token, or of none, by about its own size, and by
# 0.1 in the rare case that the two tokens are equal neighbours (see `another`).
LIMIT = 0.05
SHOWN = 8


@dataclass(frozen=True)
class StoredBlock:
    """One block of a request, as its store job has it.

    tokens: the request's, up to the block's end. generated: of them, in this block, not of the
    prompt. finished: the request was, when the job was made.
    """

    group: int
    index: int
    tokens: tuple[int, ...]
    generated: int
    finished: bool


def page_rows(page: Tensor, layer: AuditedLayer, offset: int) -> Tensor:
    """The rows of `layer` in the bytes of one stored block: float32 `[block, ...]`.

    page: `[bytes]`. offset: of the layer's first byte in it.
    """
    cache = layer.cache
    raw = page[offset:].clone().view(cache.dtype)
    rows = torch.as_strided(raw, cache.shape[1:], cache.stride()[1:])
    return _numbers(rows, layer)


def differences(stored: Tensor, computed: Tensor) -> Tensor:
    """Of each token's K and V: `[block, 2]`, the norm of the difference over that of `computed`.

    Both `[block, heads, 2 * D]`, K before V.
    """
    one, two = (
        rows.unflatten(-1, (2, -1)).transpose(1, 2).flatten(2) for rows in (stored, computed)
    )
    found = (one - two).norm(dim=-1) / two.norm(dim=-1).clamp_min(1e-30)
    # NaN and infinity are no row at all.
    return torch.where(found.isfinite(), found, torch.inf)


class StoreAudit:
    """Records stores while `on`; `compare` recomputes them.

    Args:
        llm: with its engine core in this process, a connector, and full attention alone.
    """

    def __init__(self, llm: Any) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self.llm, self.on = llm, True
        self.totals: Counter[str] = Counter()
        self.scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector
        self.offload = self.scheduler.connector_scheduler
        self.worker = get_kv_transfer_group().connector_worker.worker
        self.layers = audited_layers(llm.collective_rpc(_runner)[0])
        self.block_sizes = [
            group.tokens_per_block for group in self.offload.config.kv_group_configs
        ]
        for group in self.offload.config.kv_group_configs:
            if group.sliding_window_size_in_chunks is not None:
                raise ValueError("blocks outside a window are freed, and cannot be compared")
        for layer in self.layers:
            if layer.cache.shape[1] != layer.block_size:
                raise ValueError(f"{layer.name}: a block is cut into smaller ones")
        self._places = {layer.name: self._place(layer) for layer in self.layers}
        self._jobs: dict[int, list[StoredBlock]] = {}
        self._targets: dict[int, list[int]] = {}
        self._blocks: dict[str, list[list[int]]] = {}
        self.kept: list[tuple[StoredBlock, dict[str, Tensor]]] = []
        for owner, name, hook in (
            (self.offload, "_build_store_jobs", self._build),
            (self.worker, "submit_store", self._store),
            (self.worker, "submit_load", self._load),
            (self.worker, "get_finished", self._finished),
        ):
            setattr(owner, name, functools.partial(hook, getattr(owner, name)))

    def _place(self, layer: AuditedLayer) -> tuple[int, int]:
        """Which of the worker's tensors has this layer, and at which byte of a block."""
        address = layer.cache.data_ptr()
        for index, tensor in enumerate(self.worker._store_handler.src_tensors):
            offset = address - tensor.data_ptr()
            if 0 <= offset < tensor.shape[1]:
                return index, offset
        raise ValueError(f"{layer.name}: the connector does not know its cache")

    def _build(self, original: Any, scheduler_output: Any) -> Any:
        jobs = original(scheduler_output)
        for request in scheduler_output.num_scheduled_tokens:
            if (status := self.offload._req_status.get(request)) is not None:
                self._blocks[request] = [list(state.block_ids) for state in status.group_states]
        for job, transfer in jobs.items() if self.on else ():
            self._jobs[job] = self._blocks_of(transfer)
        return jobs

    def _blocks_of(self, transfer: Any) -> list[StoredBlock]:
        status = self.offload._req_status[transfer.req_id]
        request, found, start = status.req, [], 0
        known = list(request.all_token_ids)
        for group, count in enumerate(transfer.src_spec.group_sizes):
            size = self.block_sizes[group]
            for block in transfer.src_spec.block_ids[start : start + count]:
                index = status.group_states[group].block_ids.index(int(block))
                end = (index + 1) * size
                found.append(
                    StoredBlock(
                        group, index, tuple(known[:end]),
                        generated=min(size, max(0, end - request.num_prompt_tokens)),
                        finished=request.is_finished(),
                    )
                )  # fmt: skip
            start += count
        return found

    def _store(self, original: Any, job: int, src: Any, dst: Any) -> Any:
        if job in self._jobs:
            self._targets[job] = [int(block) for block in dst.block_ids]
        return original(job, src, dst)

    def _load(self, original: Any, job: int, src: Any, dst: Any) -> Any:
        self.totals["loads"] += 1
        self.totals["loaded_blocks"] += len(dst.block_ids)
        return original(job, src, dst)

    def _finished(self, original: Any) -> Any:
        results = original()
        for result in results:
            if result.job_id in self._targets:
                self._keep(result.job_id)
        return results

    def _keep(self, job: int) -> None:
        pages = self.worker._store_handler.dst_tensors
        for block, target in zip(self._jobs.pop(job), self._targets.pop(job), strict=True):
            self.totals["stored_blocks"] += 1
            self.totals["generated_blocks"] += block.generated > 0
            self.totals["finished_blocks"] += block.finished
            if len(block.tokens) < (block.index + 1) * self.block_sizes[block.group]:
                self.totals["unknown_tokens"] += 1
                continue
            rows = {
                layer.name: page_rows(pages[place][target], layer, offset)
                for layer in self.layers
                if layer.group == block.group
                for place, offset in (self._places[layer.name],)
            }
            self.kept.append((block, rows))

    def compare(self) -> dict[str, Any]:
        """Recompute and compare all that was stored, and forget it.

        wrong_rows: further from the recomputed than `LIMIT`. wrong_last: of them, the last token
        that a finished request has. wrong_behind: of them, those of tokens behind such a last one,
        which are computed from its row once that is loaded again. worst: largest difference of the
        others. another: smallest difference of a row from that of the token before it, which is
        what a wrong one looks like.
        """
        for _ in range(3):  # what waits for a next step
            self._generate([1, 2, 3])
        self.on = False
        found = _Found()
        kept, self.kept = self.kept, []
        for tokens in longest(block.tokens for block, _ in kept):
            mine = [(b, rows) for b, rows in kept if tokens[: len(b.tokens)] == b.tokens]
            kept = [(b, rows) for b, rows in kept if tokens[: len(b.tokens)] != b.tokens]
            blocks = self._recompute(tokens)
            for block, rows in mine:
                found.add(block, rows, self._computed(block, blocks))
        self.on = True
        totals, self.totals = self.totals, Counter()
        return {**totals, **found.result(), "waiting": len(self._jobs)}

    def _recompute(self, tokens: tuple[int, ...]) -> list[list[int]]:
        self._blocks.clear()
        self._generate(list(tokens))
        ((_, blocks),) = self._blocks.items()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return blocks

    def _computed(self, block: StoredBlock, blocks: list[list[int]]) -> Mapping[str, Tensor]:
        """The rows that the last prefill left in the cache."""
        place = blocks[block.group][block.index]
        return {
            layer.name: _numbers(layer.cache[place], layer).cpu()
            for layer in self.layers
            if layer.group == block.group
        }

    def _generate(self, tokens: list[int]) -> None:
        from vllm import SamplingParams, TokensPrompt

        parameters = SamplingParams(
            temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False,
            skip_reading_prefix_cache=True,
        )  # fmt: skip
        prompt = TokensPrompt(prompt_token_ids=tokens)
        self.llm.generate([prompt], [parameters], use_tqdm=False)


class _Found:
    """Sums of `StoreAudit.compare`."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter()
        self.worst, self.another = 0.0, float("inf")
        self.lasts: list[tuple[int, ...]] = []
        self.others: list[tuple[tuple[int, ...], int]] = []  # and how many rows
        self.shown: list[dict[str, Any]] = []

    def add(
        self, block: StoredBlock, stored: Mapping[str, Tensor], computed: Mapping[str, Tensor]
    ) -> None:
        """One block, all its layers."""
        wrong: set[int] = set()
        for name, rows in computed.items():
            apart = differences(stored[name], rows).amax(-1)
            other = differences(rows.roll(1, 0), rows).amax(-1)[1:]
            bad = (apart > LIMIT).nonzero().flatten().tolist()
            self.worst = max(self.worst, *apart[apart <= LIMIT].tolist(), 0.0)
            # The same token twice in a row may have two equal rows of V, never of K.
            self.another = min(self.another, float(other.min()))
            wrong.update(bad)
            if bad and len(self.shown) < SHOWN:
                self.shown.append(
                    {
                        "layer": name, "block": block.index, "rows": bad,
                        "difference": [round(float(apart[row]), 3) for row in bad],
                        "generated": block.generated, "finished": block.finished,
                    }
                )  # fmt: skip
        size = next(iter(computed.values())).shape[0]
        self.totals["compared_rows"] += size
        self.totals["compared_generated"] += block.generated
        self.totals["wrong_rows"] += len(wrong)
        if block.finished and wrong == {size - 1}:
            self.lasts.append(block.tokens)
        elif wrong:
            self.others.append((block.tokens, len(wrong)))

    def result(self) -> dict[str, Any]:
        """As `StoreAudit.compare` says."""
        counts = ("compared_rows", "compared_generated", "wrong_rows")
        behind = sum(
            rows
            for tokens, rows in self.others
            if any(len(last) < len(tokens) and tokens[: len(last)] == last for last in self.lasts)
        )
        return {
            **{name: self.totals[name] for name in counts},
            "wrong_last": len(self.lasts), "wrong_behind": behind,
            "worst": self.worst, "another": self.another, "wrong": self.shown,
        }  # fmt: skip


def longest(prefixes: Iterable[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Those that are no prefix of another, longest first."""
    chosen: list[tuple[int, ...]] = []
    for tokens in sorted(set(prefixes), key=len, reverse=True):
        if not any(other[: len(tokens)] == tokens for other in chosen):
            chosen.append(tokens)
    return chosen


def _numbers(rows: Tensor, layer: AuditedLayer) -> Tensor:
    return (rows if layer.dtype is None else rows.view(layer.dtype)).float()


def _runner(worker: Any) -> Any:
    return worker.model_runner
