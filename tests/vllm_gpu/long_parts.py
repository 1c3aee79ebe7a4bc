"""The parts of a long run: which engines, and the plans that each of them is driven through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from matrix_cases import KINDS

BASELINE = {"stage": "stock", "nan": "stock", "auto": "auto off"}
"""An engine's tokens and cached rows must be those of the other kind's engine."""
DRAFTS = 4
GRAPHS = (5, 10, 20, 40, 80, 160, 240, 320, 480)
"""Fewer than vLLM's 50 sizes, since a dozen engines start at once. FULL up to 64 requests of five
tokens, PIECEWISE for mixed batches, and larger ones without a graph."""


@dataclass(frozen=True)
class Part:
    """Engines of some kinds, each driven through the same runs in the same order.

    blocks: of the KV cache. runs: name and plan. every: steps between two looks. goal: new tokens
    of each run, at least. endless: the run ends with the time, and memory is sampled.
    """

    name: str
    kinds: tuple[str, ...]
    blocks: int
    runs: dict[str, dict[str, Any]]
    every: int = 8
    endless: bool = False

    def options(self, kind: str, device: str) -> dict[str, Any]:
        """Options of `engine_process.py`."""
        llm: dict[str, Any] = {
            "max_model_len": 1024, "max_num_seqs": 64, "max_num_batched_tokens": 1024,
            "block_size": 16, "num_gpu_blocks_override": self.blocks,
            "kv_cache_memory_bytes": 1 << 30, "attention_backend": "FLASH_ATTN",
            "compilation_config": {"cudagraph_capture_sizes": list(GRAPHS)},
        }  # fmt: skip
        if device == "cpu":
            # Blocks of its kernel, and prompts in one step: its sampler cannot seed parts of one.
            llm |= {"block_size": 32, "max_num_seqs": 8, "kv_cache_memory_bytes": 1 << 28}
            del llm["attention_backend"], llm["compilation_config"]
        nwor = KINDS[kind]
        if device == "cpu":
            # Stock's cache there is no cache of rows; this kernel on direct writes has one.
            nwor = nwor or {"mode": "off"}
        return {
            "model": "tiny", "nwor": nwor, "llm": llm,
            "speculative": {"num_speculative_tokens": DRAFTS},
        }  # fmt: skip

    def commands(self) -> list[dict[str, Any]]:
        """Of `long_engine.py`, without `seconds`."""
        sample = 5 if self.endless else 0
        return [
            {"name": name, "plan": plan, "every": self.every, "sample_every": sample}
            for name, plan in self.runs.items()
        ]


SAMPLED = {"temperature": 0.8, "seed": 1}
STORM = {"chance": 0.004, "storm": 50, "length": [50, 300], "mixed": True, "temperature": 0.8}
FOLLOW = {"tokens": 0, "length": [50, 200], "follow": "sampled", "seed": 2}  # still in the cache
SOAK = {
    "tokens": 0, "prompt": [2, 300], "length": [1, 600], "mixed": True, "temperature": 0.8,
    "chance": 0.001, "storm": 500, "share": 0.3, "seed": 4,
}  # fmt: skip


def parts(tokens: int, device: str) -> dict[str, Part]:
    """All parts. tokens: of the greedy and of the sampled run, each."""
    few = {"in_flight": 4, "logprobs": 2}
    found = (
        Part("soak", ("stage", "stock"), 4096, {"soak": SOAK}, every=16, endless=True),
        Part(
            "few", ("auto", "auto off", "stock"), 4096, every=32,
            runs={
                "greedy": {"tokens": tokens * 6 // 10, **few},
                "sampled": {"tokens": tokens * 2 // 10, **few, **SAMPLED},
                "many": {"tokens": tokens * 2 // 10, "seed": 5},
            },
        ),
        Part(
            "tokens", ("stock", "stage", "nan"), 4096,
            runs={
                "greedy": {"tokens": tokens},
                "sampled": {"tokens": tokens, **SAMPLED},
                "follow": FOLLOW,
                "storm": {"tokens": tokens * 3 // 2, "in_flight": 96, **STORM, "seed": 3},
            },
        ),
        Part(
            "small", ("stock", "stage", "nan"), 700,
            runs={
                "greedy": {"tokens": tokens // 2},
                "sampled": {"tokens": tokens // 2, **SAMPLED},
                "follow": {**FOLLOW, "followed": 16},
                "storm": {"tokens": tokens // 2, "in_flight": 96, **STORM, "seed": 3},
            },
        ),
    )  # fmt: skip
    if device == "cpu":
        return {part.name: _on_cpu(part) for part in found}
    return {part.name: part for part in found}


def _on_cpu(part: Part) -> Part:
    """Of a size that its engine works off in a minute."""
    small: dict[str, Any] = {"prompt": [10, 60], "length": [20, 60]}
    fewer = {64: 8, 96: 12, 4: 2}
    runs = {
        name: {
            **plan, **small, "in_flight": fewer[plan.get("in_flight", 64)], "followed": 6,
            **({"storm": 10} if plan.get("storm") else {}),
        }
        for name, plan in part.runs.items()
    }  # fmt: skip
    return replace(part, runs=runs, blocks=18 if part.name == "small" else 120, every=3)
