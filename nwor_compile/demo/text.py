"""The demo's models, tokenizer and prompts, from the files that come with the package."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from nwor_compile.demo.schedule import Request

WEIGHTS = Path(__file__).parent / "weights"
PROMPT_TOKENS = (14, 32, 58, 84, 22, 46, 70)  # lengths differ, so prefill and decode get mixed
LATE_ARRIVAL = 5  # the last request joins at this step


def weights_folder(folder: Path = WEIGHTS) -> Path:
    """The folder, checked. Raises FileNotFoundError naming what is missing."""
    files = ("config.json", "model.safetensors", "tokenizer.json")
    wanted = [
        "heldout.txt",
        *(f"{model}/{file}" for model in ("target", "draft") for file in files),
    ]
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: reinstall the package, or train the models with "
            "examples/train_tiny_models.py"
        )
    return folder


def load_tokenizer(folder: Path = WEIGHTS) -> Tokenizer:
    """The byte-level BPE that both models share."""
    return Tokenizer.from_file(str(folder / "target" / "tokenizer.json"))


def held_out_prompts(tokenizer: Tokenizer, count: int, folder: Path = WEIGHTS) -> list[list[int]]:
    """Beginnings of held-out chapters, of different lengths, each ending before a new word."""
    lines = (folder / "heldout.txt").read_text().splitlines()
    chapters = [line for line in lines if len(line) > 400]
    prompts = []
    for index in range(count):
        # Past the last chapter the next prompt starts further into the text.
        turn, chapter = divmod(index, len(chapters))
        ids = tokenizer.encode(chapters[chapter]).ids[turn * 150 :]
        stop = PROMPT_TOKENS[index % len(PROMPT_TOKENS)]
        while stop < len(ids) and not tokenizer.decode([ids[stop]]).startswith(" "):
            stop += 1
        prompts.append(ids[:stop])
    return prompts


def make_requests(prompts: list[list[int]], max_new_tokens: int) -> list[Request]:
    """Fresh requests; all are there at the first step but the last, which joins later."""
    last = len(prompts) - 1
    return [
        Request(index, prompt, max_new_tokens, arrival=LATE_ARRIVAL if 0 < index == last else 0)
        for index, prompt in enumerate(prompts)
    ]
