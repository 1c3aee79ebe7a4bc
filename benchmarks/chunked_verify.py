"""Does it pay to verify many drafts in chunks, and to stop at the first that falls?

    python benchmarks/chunked_verify.py --json FILE

48 drafts are verified in one forward pass, or in chunks of 8 that stop at the first rejection; with
both, plain speculation with as many drafts as a chunk has, which makes new drafts after every
verification. Text, acceptance and the times of a forward pass come from this repository's tiny
models on this machine; verification is greedy, so all of them emit the same text, and a round's
accepted drafts are the longest prefix that agrees with it. Rates of acceptance that the tiny
drafter does not have are drawn.

Two prices of a forward pass: as measured here, where time grows with rows; and the same for any
number of rows, which is a GPU reading its weights (up to some hundred rows).
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel

from nwor_compile.bench.record import Machine, Spread, this_machine
from nwor_compile.demo.model import Llama

WEIGHTS = Path(__file__).resolve().parents[1] / "nwor_compile" / "demo" / "weights"
DRAFTS, CHUNK = 48, 8
CONTEXT, EMITTED, PROMPTS = 128, 120, 6
RATES = (0.5, 0.7, 0.8, 0.9, 0.95)  # chance that a draft is right, given that all before it were
ROUNDS = 4000
BLOCK, REPEATS = 16, 100

# Accepted drafts of the round that starts at a position, for at most so many drafts.
Accept = Callable[[int, int], int]
Price = Callable[[int], float]


class Strategy(BaseModel):
    """Per emitted token. forwards: of the target, and so its price where rows cost nothing;
    milliseconds: of the target's passes as measured here, and with the drafter's."""

    name: str
    forwards: float
    verified_rows: float
    drafted: float
    target_ms: float
    with_drafter_ms: float


class Record(BaseModel):
    """What the command writes."""

    command: str
    machine: Machine
    rows_ms: dict[int, Spread]
    draft_ms: Spread
    first_draft_accepted: float
    measured: list[Strategy]
    drawn: dict[float, list[Strategy]]


def call(model: Llama, rows: int) -> Callable[[], object]:
    """A forward pass over `rows` tokens of one request, after CONTEXT others."""
    config = model.config
    length = CONTEXT + rows
    blocks = -(-length // BLOCK)
    shape = (blocks, BLOCK, config.num_key_value_heads, config.head_dim)
    keys = [torch.zeros(shape) for _ in model.layers]
    values = [torch.zeros(shape) for _ in model.layers]
    token = torch.arange(rows)
    arguments = (
        token % config.vocab_size, CONTEXT + token, keys, values, CONTEXT + token,
        torch.arange(blocks, dtype=torch.int32)[None], torch.tensor([length], dtype=torch.int32),
        torch.tensor([0, rows], dtype=torch.int32),
    )  # fmt: skip
    return lambda: model(*arguments)


def milliseconds(calls: Sequence[Callable[[], object]]) -> list[Spread]:
    """Time of each call; they take turns, so that a busy machine slows all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(REPEATS + 3):
        for each, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            each()
            if repeat >= 3:
                found.append((time.perf_counter() - start) * 1e3)
    return [Spread.of(found) for found in times]


def greedy(model: Llama, ids: list[int], count: int) -> list[int]:
    """The `count` tokens that follow `ids`."""
    out = list(ids)
    for _ in range(count):
        out.append(int(model.dense(torch.tensor(out))[0][-1].argmax()))
    return out[len(ids) :]


def agreement(draft: Llama, text: list[int], position: int) -> int:
    """How many greedy drafts after `text[:position]` agree with `text`."""
    for count in range(min(DRAFTS, len(text) - position)):
        logits = draft.dense(torch.tensor(text[: position + count]))[0][-1]
        if int(logits.argmax()) != text[position + count]:
            return count
    return min(DRAFTS, len(text) - position)


def play(
    name: str,
    drafts: int,
    chunk: int,
    runs: Sequence[tuple[Accept, int]],
    price: Price,
    draft_ms: float,
) -> Strategy:
    """Emit all runs (accepted drafts by position, tokens to emit) and add up what it takes."""
    emitted = forwards = rows = drafted = 0
    spent = 0.0
    for accept, length in runs:
        position = 0
        while position < length:
            accepted = accept(position, drafts)
            drafted += drafts
            # A chunk is verified if all drafts of the chunks before it were accepted.
            for first in range(0, drafts, chunk):
                if first > accepted or (first == accepted and first > 0):
                    break
                width = min(chunk, drafts - first) + (1 if first == 0 else 0)
                forwards, rows, spent = forwards + 1, rows + width, spent + price(width)
            position += accepted + 1
        emitted += position
    return Strategy(
        name=name,
        forwards=forwards / emitted,
        verified_rows=rows / emitted,
        drafted=drafted / emitted,
        target_ms=spent / emitted,
        with_drafter_ms=(spent + drafted * draft_ms) / emitted,
    )


def compare(runs: Sequence[tuple[Accept, int]], price: Price, draft_ms: float) -> list[Strategy]:
    """The three ways on the same text."""
    ways = (
        (f"{DRAFTS} drafts, one pass", DRAFTS, DRAFTS),
        (f"{DRAFTS} drafts, chunks of {CHUNK}", DRAFTS, CHUNK),
        (f"{CHUNK} drafts a round", CHUNK, CHUNK),
        (f"{CHUNK // 2} drafts a round", CHUNK // 2, CHUNK // 2),
    )
    return [play(name, drafts, chunk, runs, price, draft_ms) for name, drafts, chunk in ways]


def prefix_of(lengths: Sequence[int]) -> Accept:
    """Accepted drafts, from how far an unlimited round at each position agrees."""
    return lambda position, drafts: min(lengths[position], drafts)


def drawn_run(rate: float) -> tuple[Accept, int]:
    """A text in which each draft is right with chance `rate`."""
    source = random.Random(0)
    length = ROUNDS
    lengths = []
    for _ in range(length):
        run = 0
        while run < DRAFTS and source.random() < rate:
            run += 1
        lengths.append(run)
    return prefix_of(lengths), length


def table(title: str, strategies: Sequence[Strategy]) -> None:
    """Print one comparison."""
    print(f"\n{title}, per emitted token")
    print(f"{'':28}{'passes':>8}{'rows':>8}{'drafted':>9}{'target ms':>11}{'with drafter':>14}")
    for each in strategies:
        print(
            f"{each.name:28}{each.forwards:8.3f}{each.verified_rows:8.2f}{each.drafted:9.2f}"
            f"{each.target_ms:11.3f}{each.with_drafter_ms:14.3f}"
        )


def main(json: Annotated[Path | None, typer.Option(help="write the record here")] = None) -> None:
    """Measure, play, print."""
    torch.set_num_threads(1)
    from tokenizers import Tokenizer

    target, draft = Llama.load(WEIGHTS / "target"), Llama.load(WEIGHTS / "draft")
    tokenizer = Tokenizer.from_file(str(WEIGHTS / "target" / "tokenizer.json"))
    held_out = tokenizer.encode((WEIGHTS / "heldout.txt").read_text()).ids
    widths = sorted({DRAFTS + 1, CHUNK + 1, CHUNK, CHUNK // 2 + 1})
    *spreads, draft_ms = milliseconds([*(call(target, rows) for rows in widths), call(draft, 1)])
    rows_ms = dict(zip(widths, spreads, strict=True))
    runs: list[tuple[Accept, int]] = []
    first = []
    for index in range(PROMPTS):
        prompt = held_out[index * 900 : index * 900 + CONTEXT]
        text = prompt + greedy(target, prompt, EMITTED + DRAFTS)
        found = [agreement(draft, text, CONTEXT + place) for place in range(EMITTED)]
        first += [length > 0 for length in found]
        runs.append((prefix_of(found), EMITTED))

    def price(rows: int) -> float:
        return rows_ms[rows].median

    record = Record(
        command="python benchmarks/chunked_verify.py --json FILE",
        machine=this_machine(),
        rows_ms=rows_ms,
        draft_ms=draft_ms,
        first_draft_accepted=statistics.mean(first),
        measured=compare(runs, price, draft_ms.median),
        drawn={rate: compare([drawn_run(rate)], price, draft_ms.median) for rate in RATES},
    )
    for rows, spread in rows_ms.items():
        print(f"a forward pass over {rows} rows: {spread:.2f} ms")
    print(f"a draft: {draft_ms:.2f} ms; the first is accepted {record.first_draft_accepted:.0%}")
    table("tiny models", record.measured)
    for rate, strategies in record.drawn.items():
        table(f"acceptance {rate:.2f} drawn", strategies)
    if json is not None:
        json.write_text(record.model_dump_json(indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
