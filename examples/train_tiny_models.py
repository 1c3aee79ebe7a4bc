"""Train the two tiny Llama models of the demo: a target, and a draft distilled from it.

The data is the King James Bible, one verse a line, as Debian's `bible` program prints it:

    apt-get install bible-kjv bible-kjv-text
    bible -f gen1:1-rev22:21 > kjv.txt          # 31102 lines, 4404412 bytes

Train both models into `nwor_compile/demo/weights`, then measure how often the target accepts
the draft's tokens (the second command needs only the weights folder):

    pip install torch transformers tokenizers safetensors rich typer
    python examples/train_tiny_models.py kjv.txt
    python examples/train_tiny_models.py --measure

Training uses `torch.compile` and so a C++ compiler; `--no-compile` does without, more slowly.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "nwor_compile" / "demo" / "weights"

END_OF_TEXT = "<|endoftext|>"  # id 0; stands between books, and is BOS, EOS and padding
VOCAB_SIZE = 512
MAX_POSITIONS = 2048

COMMON_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "head_dim": 32,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
TARGET_SHAPE: dict[str, Any] = COMMON_SHAPE | {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "intermediate_size": 384,
}
DRAFT_SHAPE: dict[str, Any] = COMMON_SHAPE | {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}

# Every 33rd chapter (Genesis 17, Genesis 50, ...) is kept out of both the models' and the
# tokenizer's training: 36 of 1189 chapters.
HELD_OUT_PERIOD, HELD_OUT_PHASE = 33, 16
SAMPLE_SIZES = range(2000, 3601)  # heldout.txt: every other held-out chapter of this many bytes

TOKENS_PER_STEP = 4096
SHORT_WINDOW = 256
# RoPE does not extrapolate, so one step in 16 sees the longest window the config promises.
LONG_WINDOW, LONG_EVERY = MAX_POSITIONS, 16
WARMUP_STEPS = 100

BOOKS = {
    "Ge": "Genesis", "Exo": "Exodus", "Lev": "Leviticus", "Num": "Numbers",
    "Deu": "Deuteronomy", "Josh": "Joshua", "Jdgs": "Judges", "Ruth": "Ruth",
    "1Sm": "1 Samuel", "2Sm": "2 Samuel", "1Ki": "1 Kings", "2Ki": "2 Kings",
    "1Chr": "1 Chronicles", "2Chr": "2 Chronicles", "Ezra": "Ezra", "Neh": "Nehemiah",
    "Est": "Esther", "Job": "Job", "Psa": "Psalm", "Prv": "Proverbs", "Eccl": "Ecclesiastes",
    "SSol": "Song of Solomon", "Isa": "Isaiah", "Jer": "Jeremiah", "Lam": "Lamentations",
    "Eze": "Ezekiel", "Dan": "Daniel", "Hos": "Hosea", "Joel": "Joel", "Amos": "Amos",
    "Obad": "Obadiah", "Jonah": "Jonah", "Mic": "Micah", "Nahum": "Nahum", "Hab": "Habakkuk",
    "Zep": "Zephaniah", "Hag": "Haggai", "Zec": "Zechariah", "Mal": "Malachi",
    "Mat": "Matthew", "Mark": "Mark", "Luke": "Luke", "John": "John", "Acts": "Acts",
    "Rom": "Romans", "1Cor": "1 Corinthians", "2Cor": "2 Corinthians", "Gal": "Galatians",
    "Eph": "Ephesians", "Phi": "Philippians", "Col": "Colossians", "1Th": "1 Thessalonians",
    "2Th": "2 Thessalonians", "1Tim": "1 Timothy", "2Tim": "2 Timothy", "Titus": "Titus",
    "Phmn": "Philemon", "Heb": "Hebrews", "Jas": "James", "1Pet": "1 Peter", "2Pet": "2 Peter",
    "1Jn": "1 John", "2Jn": "2 John", "3Jn": "3 John", "Jude": "Jude", "Rev": "Revelation",
}  # fmt: skip

console = Console(soft_wrap=True)

LossFn = Callable[[Tensor], Tensor]


# ---- text -----------------------------------------------------------------------------------


class Chapter(NamedTuple):
    """One chapter as prose: a heading, the verses as running text, a blank line."""

    book: str
    text: str


def read_chapters(path: Path) -> list[Chapter]:
    """Parse the output of `bible -f` ("Ge1:1 In the beginning ...") into chapters."""
    verses: dict[tuple[str, str], list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), start=1):
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line)
        if match is None or match[1] not in BOOKS:
            raise typer.BadParameter(
                f"{path}:{number}: expected a line such as 'Ge1:1 In the beginning ...', got "
                f"{line[:40]!r}; make the file with `bible -f gen1:1-rev22:21 > kjv.txt`"
            )
        verses.setdefault((BOOKS[match[1]], match[2]), []).append(match[3].strip())
    return [
        Chapter(book, f"{book} {chapter}\n{' '.join(lines)}\n\n")
        for (book, chapter), lines in verses.items()
    ]


def split_chapters(chapters: list[Chapter]) -> tuple[list[Chapter], list[Chapter]]:
    """Return (training, held-out) chapters by a rule that needs no seed."""
    train: list[Chapter] = []
    held_out: list[Chapter] = []
    for index, chapter in enumerate(chapters):
        (held_out if index % HELD_OUT_PERIOD == HELD_OUT_PHASE else train).append(chapter)
    return train, held_out


def held_out_sample(held_out: list[Chapter]) -> str:
    """Six whole chapters (16 KB) from law, history, poetry, prophets, letters and Revelation."""
    chapters = [chapter for chapter in held_out if len(chapter.text) in SAMPLE_SIZES]
    return "".join(chapter.text for chapter in chapters[::2])


# ---- tokenizer ------------------------------------------------------------------------------


def train_tokenizer(chapters: list[Chapter]) -> Tokenizer:
    """Byte-level BPE: all 256 bytes, the end-of-text token, and the 255 commonest merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((chapter.text for chapter in chapters), trainer=trainer)
    return tokenizer


def encode_chapters(tokenizer: Tokenizer, chapters: list[Chapter]) -> Tensor:
    """One long token stream, with the end-of-text token (id 0) where the book changes."""
    ids: list[int] = []
    book = None
    for chapter in chapters:
        if chapter.book != book:
            ids.append(0)
            book = chapter.book
        ids += tokenizer.encode(chapter.text).ids
    return torch.tensor(ids)


# ---- training -------------------------------------------------------------------------------


def sample_batches(tokens: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` batches of random windows, each (TOKENS_PER_STEP // window, window)."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        window = LONG_WINDOW if step % LONG_EVERY == LONG_EVERY - 1 else SHORT_WINDOW
        rows = TOKENS_PER_STEP // window
        starts = torch.randint(len(tokens) - window + 1, (rows, 1), generator=generator)
        yield tokens[starts + torch.arange(window)]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to 2 % of the peak."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """(batch, length) ids -> (batch, length, vocab) float32 logits, matmuls in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of each token given those before it, in nats."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def fit(
    model: LlamaForCausalLM,
    loss_fn: LossFn,
    batches: Iterator[Tensor],
    steps: int,
    peak_lr: float,
    title: str,
) -> float:
    """Minimise `loss_fn` with AdamW; return its mean over the last tenth of the steps."""
    # Norm gains are vectors; decaying them towards 0 only fights the layer that follows.
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    losses: list[float] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, loss=math.nan)
        for step, ids in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak_lr)
            loss = loss_fn(ids)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            progress.update(task, advance=1, loss=losses[-1])
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def train_target(
    tokens: Tensor, steps: int, seed: int, compiled: bool, device: str
) -> LlamaForCausalLM:
    """Train the target by next-token prediction."""
    torch.manual_seed(seed)
    model = torch.nn.Module.to(LlamaForCausalLM(LlamaConfig(**TARGET_SHAPE)), device)

    def loss_fn(ids: Tensor) -> Tensor:
        ids = ids.to(model.device)
        return next_token_loss(logits_of(model, ids), ids)

    step_fn = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn
    loss = fit(model, step_fn, sample_batches(tokens, steps, seed), steps, 3e-3, "target")
    console.print(f"target: training loss {loss:.4f} nats/token (last tenth of the steps)")
    return model


def train_draft(
    target: LlamaForCausalLM, tokens: Tensor, steps: int, seed: int, compiled: bool, device: str
) -> LlamaForCausalLM:
    """Distil the draft: match the target's next-token distributions on the training text."""
    torch.manual_seed(seed)
    model = torch.nn.Module.to(LlamaForCausalLM(LlamaConfig(**DRAFT_SHAPE)), device)
    torch.nn.Module.to(target.requires_grad_(False), device)

    def loss_fn(ids: Tensor) -> Tensor:
        ids = ids.to(model.device)
        wanted = logits_of(target, ids).log_softmax(-1)
        got = logits_of(model, ids).log_softmax(-1)
        return F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean()

    step_fn = torch.compile(loss_fn, dynamic=False) if compiled else loss_fn
    loss = fit(model, step_fn, sample_batches(tokens, steps, seed + 1), steps, 4e-3, "draft")
    console.print(f"draft: KL(target || draft) {loss:.4f} nats/token (last tenth of the steps)")
    return model


# ---- files ----------------------------------------------------------------------------------


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a folder that `from_pretrained` and vLLM load: bfloat16 weights and tokenizer."""
    torch.nn.Module.to(model, "cpu", torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # save_pretrained leaves it private
    (folder / "generation_config.json").unlink(missing_ok=True)  # repeats config.json's ids
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: Path) -> LlamaForCausalLM:
    """Load a saved model, its bfloat16 weights widened to float32 for exact CPU arithmetic."""
    if not (folder / "model.safetensors").is_file():
        raise typer.BadParameter(
            f"expected model.safetensors in {folder}; train the models first: "
            "python examples/train_tiny_models.py kjv.txt"
        )
    model: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


# ---- measurement ----------------------------------------------------------------------------


@torch.inference_mode()
def mean_loss(model: LlamaForCausalLM, tokens: Tensor, window: int) -> float:
    """Nats per token over consecutive windows of `tokens`, the short last one left out."""
    windows = tokens[: len(tokens) // window * window].view(-1, window)
    total = 0.0
    for ids in windows.split(TOKENS_PER_STEP // window):
        logits = model(input_ids=ids, use_cache=False).logits
        total += float(next_token_loss(logits, ids)) * len(ids)
    return total / len(windows)


def report_losses(name: str, model: LlamaForCausalLM, tokens: Tensor, n_bytes: int) -> None:
    """Print one line: loss at both window lengths, and bits per byte at the shorter."""
    short, long = (mean_loss(model, tokens, window) for window in (SHORT_WINDOW, LONG_WINDOW))
    bits = short / math.log(2) * len(tokens) / n_bytes
    console.print(
        f"{name}: {short:.4f} nats/token, {bits:.4f} bits/byte ({SHORT_WINDOW}-token windows); "
        f"{long:.4f} nats/token ({LONG_WINDOW}-token windows)"
    )


class Workload(NamedTuple):
    """What to measure: `prompts` prompts, each continued with k drafts a round."""

    k: int
    prompts: int
    prompt_tokens: int
    new_tokens: int


class Acceptance(NamedTuple):
    """Counts over all rounds of greedy speculative decoding."""

    rounds: int
    proposed: int
    accepted: int
    first_accepted: int
    generated: int


def greedy(model: LlamaForCausalLM, ids: Tensor, last: int) -> Tensor:
    """The argmax next token after each of the `last` final positions of `ids` (1-D)."""
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, -last:]
    return logits.argmax(-1)


@torch.inference_mode()
def speculate(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, prompt: Tensor, k: int, new_tokens: int
) -> tuple[Acceptance, Tensor]:
    """Greedy speculative decoding without caches: propose k, keep the agreed prefix plus one."""
    ids, rounds, accepted, first = prompt, 0, 0, 0
    while len(ids) < len(prompt) + new_tokens:
        proposal = ids
        for _ in range(k):
            proposal = torch.cat([proposal, greedy(draft, proposal, 1)])
        verified = greedy(target, proposal, k + 1)  # the target's token after 0, 1, ... k drafts
        agrees = (verified[:k] == proposal[-k:]).long()
        kept = int(agrees.cumprod(0).sum())
        ids = torch.cat([ids, verified[: kept + 1]])
        rounds, accepted, first = rounds + 1, accepted + kept, first + int(agrees[0])
    return Acceptance(rounds, rounds * k, accepted, first, len(ids) - len(prompt)), ids


def measure(out: Path, work: Workload) -> Acceptance:
    """Speculate from evenly spaced prompts of heldout.txt; print and return the sums."""
    target, draft = load_model(out / "target"), load_model(out / "draft")
    tokenizer = Tokenizer.from_file(str(out / "target" / "tokenizer.json"))
    text = (out / "heldout.txt").read_text(encoding="ascii")
    tokens = torch.tensor(tokenizer.encode(text).ids)
    report_losses("target, heldout.txt", target, tokens, len(text))
    report_losses("draft, heldout.txt", draft, tokens, len(text))
    results = []
    for start in torch.linspace(0, len(tokens) - work.prompt_tokens, work.prompts).long():
        prompt = tokens[start : start + work.prompt_tokens]
        counts, ids = speculate(target, draft, prompt, work.k, work.new_tokens)
        results.append(counts)
        if len(results) in (1, work.prompts // 2):  # two continuations to look at
            prefix, answer = tokenizer.decode(prompt.tolist()), tokenizer.decode(ids.tolist())
            console.print(Text(prefix, "dim"), Text("|", "bold"), Text(answer[len(prefix) :]))
    total = Acceptance(*(sum(column) for column in zip(*results, strict=True)))
    print_acceptance(total, work)
    return total


def print_acceptance(total: Acceptance, work: Workload) -> None:
    """Print the measured rates as a table."""
    table = Table(
        title=f"greedy acceptance, k={work.k}, {work.prompts} prompts of {work.prompt_tokens} "
        f"tokens, {work.new_tokens} new tokens each"
    )
    for heading in ("accepted / proposed", "first position", "tokens per round"):
        table.add_column(heading)
    table.add_row(
        f"{total.accepted} / {total.proposed} = {total.accepted / total.proposed:.1%}",
        f"{total.first_accepted} / {total.rounds} = {total.first_accepted / total.rounds:.1%}",
        f"{total.generated / total.rounds:.2f}",
    )
    console.print(table)


# ---- command line ---------------------------------------------------------------------------


class Recipe(NamedTuple):
    """How long and how to train."""

    target_steps: int
    draft_steps: int
    seed: int
    compiled: bool
    keep_target: bool
    device: str


def train(text: Path, out: Path, recipe: Recipe) -> None:
    """Train tokenizer, target and draft, save them, and print the held-out losses."""
    training, held_out = split_chapters(read_chapters(text))
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(held_out_sample(held_out), encoding="ascii")
    tokenizer = train_tokenizer(training)
    train_tokens, test_tokens = (encode_chapters(tokenizer, part) for part in (training, held_out))
    test_bytes = sum(len(chapter.text) for chapter in held_out)
    console.print(
        f"{len(training)} training chapters, {len(train_tokens)} tokens; "
        f"{len(held_out)} held out, {len(test_tokens)} tokens, {test_bytes} bytes"
    )
    if not recipe.keep_target:
        model = train_target(
            train_tokens, recipe.target_steps, recipe.seed, recipe.compiled, recipe.device
        )
        save_model(model, tokenizer, out / "target")
    target = load_model(out / "target")  # the draft learns from the weights that ship
    report_losses("target, held out", target, test_tokens, test_bytes)
    draft = train_draft(
        target, train_tokens, recipe.draft_steps, recipe.seed, recipe.compiled, recipe.device
    )
    save_model(draft, tokenizer, out / "draft")
    report_losses("draft, held out", load_model(out / "draft"), test_tokens, test_bytes)


def main(
    text: Annotated[
        Path | None,
        typer.Argument(help="Output of `bible -f gen1:1-rev22:21`.", exists=True, dir_okay=False),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the weights.")] = DEFAULT_OUT,
    only_measure: Annotated[bool, typer.Option("--measure", help="Only measure OUT.")] = False,
    keep_target: Annotated[bool, typer.Option(help="Train only a draft for OUT/target.")] = False,
    target_steps: Annotated[int, typer.Option(help="Steps of 4096 tokens.", min=1)] = 2600,
    draft_steps: Annotated[int, typer.Option(help="Steps of 4096 tokens.", min=1)] = 6000,
    seed: int = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda.")] = "cpu",
    k: Annotated[int, typer.Option(help="Drafts per round.", min=1)] = 4,
    prompts: Annotated[int, typer.Option(help="Prompts to measure with.", min=2)] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=1)] = 128,
) -> None:
    """Train the demo's target and draft models on TEXT, or measure the ones in OUT."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    if text is None and not only_measure:
        raise typer.BadParameter("expected TEXT to train on, or --measure to measure OUT")
    if text is not None and not only_measure:
        started = time.perf_counter()
        train(text, out, Recipe(target_steps, draft_steps, seed, compiled, keep_target, device))
        console.print(f"training took {time.perf_counter() - started:.0f} s")
    measure(out, Workload(k, prompts, prompt_tokens, new_tokens))


if __name__ == "__main__":
    typer.run(main)
