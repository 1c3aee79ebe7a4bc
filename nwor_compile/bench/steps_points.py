"""What `nwor bench steps` measures: models by name, configurations, modes, points."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from typing import Any

from nwor_compile.errors import ConfigError

# Llama dimensions by name. `toy` is for trying the command out, on a CPU as well.
MODELS: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "3b": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
        "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 128256, "tie_word_embeddings": False,
    },
    "toy": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
        "vocab_size": 512, "tie_word_embeddings": True,
    },
}  # fmt: skip
LONGEST = 131072  # positions of every model
CACHES = ("auto", "fp8")
# How many tokens of a step may be prompt: a long context is filled in chunks of this.
TOKEN_BUDGET = 8192
# Of a prompt that is in the prefix cache, what is computed again (EAGLE drops a block).
RECOMPUTED = 32
# Steps until every request of a point decodes, beyond those that its recomputed rows need.
SETTLING = 6


@dataclass(frozen=True)
class Configuration:
    """One thing to start engines for. All its points are served by the same engines."""

    model: str = "3b"
    k: int = 4
    acceptance: float = 2.5
    cache: str = "auto"
    tp: int = 1

    @property
    def label(self) -> str:
        """As it is written on the command line: `3b`, `3b:k=8:tp=2`."""
        parts = [self.model]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "model" and value != field.default:
                parts.append(
                    f"{field.name}={value:g}" if field.name != "cache" else f"cache={value}"
                )
        return ":".join(parts)

    @property
    def compiled_as(self) -> str:
        """Equal for configurations that need the same code."""
        return replace(self, acceptance=Configuration.acceptance).label

    @property
    def weight_bytes(self) -> int:
        """Of target and EAGLE head on one GPU, in bfloat16; embeddings are shared."""
        d = MODELS[self.model]
        hidden, size = d["hidden_size"], d["head_dim"]
        heads, kv_heads = d["num_attention_heads"], d["num_key_value_heads"]
        layer = 2 * hidden * size * (heads + kv_heads) + 3 * hidden * d["intermediate_size"]
        tables = d["vocab_size"] * hidden * (1 if d["tie_word_embeddings"] else 2)
        return 2 * (layer * (d["num_hidden_layers"] + 1) + tables + 2 * hidden**2) // self.tp

    def speculative_config(self, head: str) -> dict[str, Any]:
        """What vLLM is given, with the folder of the EAGLE head."""
        return {
            "model": head, "method": "eagle", "num_speculative_tokens": self.k,
            "rejection_sample_method": "synthetic",
            "synthetic_acceptance_length": self.acceptance,
        }  # fmt: skip

    def hf_config(self, *, head: bool) -> dict[str, Any]:
        """config.json of the target or of its one-layer EAGLE head."""
        dims = dict(MODELS[self.model])
        if head:
            dims["num_hidden_layers"] = 1
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
            "torch_dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "max_position_embeddings": LONGEST, "rope_theta": 500000.0, **dims,
        }  # fmt: skip


@dataclass(frozen=True)
class Mode:
    """One engine of a configuration. nwor: its settings, or None for vLLM untouched."""

    label: str
    settings: str = ""  # JSON, so that a mode can be a key

    @property
    def nwor(self) -> dict[str, Any] | None:
        """What goes into additional_config["nwor"]."""
        return json.loads(self.settings) if self.settings else None

    @property
    def staged(self) -> bool:
        """Whether its windows must be counted by NWOR."""
        return (self.nwor or {}).get("mode") == "stage"


@dataclass(frozen=True, order=True)
class Point:
    """So many requests, each with so many tokens when the measurement begins."""

    batch: int
    context: int

    @property
    def label(self) -> str:
        """As it is written on the command line."""
        return f"{self.batch}x{self.context}"

    def longest(self, configuration: Configuration, steps: int) -> int:
        """Tokens of a request after a window of `steps`, with room for what is drafted."""
        settling = SETTLING + math.ceil(self.batch * RECOMPUTED / TOKEN_BUDGET)
        grown = (settling + steps) * min(1.3 * configuration.acceptance, 1 + configuration.k)
        return self.context + math.ceil(grown) + 2 * (1 + configuration.k)

    def blocks(self, configuration: Configuration, steps: int, block_size: int) -> int:
        """KV-cache blocks that it takes."""
        return self.batch * math.ceil(self.longest(configuration, steps) / block_size)


def parse_configuration(text: str) -> Configuration:
    """`3b`, `3b:k=8`, `1b:cache=fp8:tp=2`. Raises ConfigError."""
    model, *settings = text.strip().split(":")
    if model not in MODELS:
        raise ConfigError(f"--configs: got {text!r}; expected one of {', '.join(MODELS)} first")
    kinds: dict[str, type] = {"k": int, "acceptance": float, "cache": str, "tp": int}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in kinds:
            raise ConfigError(f"--configs: got {setting!r}; expected {'=, '.join(kinds)}=")
        try:
            values[name] = kinds[name](value)
        except ValueError:
            raise ConfigError(f"--configs: {name} got {value!r}; expected a number") from None
    found = Configuration(model, **values)
    if not 1 <= found.k <= 64 or not 1 <= found.acceptance <= found.k + 1 or found.tp < 1:
        raise ConfigError(
            f"--configs: got {text!r}; expected k of 1 to 64, acceptance (a step's tokens) of 1 to "
            "k+1, tp of at least 1"
        )
    if found.cache not in CACHES:
        raise ConfigError(f"--configs: cache got {found.cache!r}; expected {' or '.join(CACHES)}")
    return found


def parse_mode(text: str) -> Mode:
    """`stock`, `off`, `stage`, `stage:attention=stock:scv=graph`; values are JSON or plain words.

    Raises ConfigError.
    """
    name, *settings = text.strip().split(":")
    if name not in ("stock", "off", "stage"):
        raise ConfigError(f"--modes: got {text!r}; expected stock, off or stage first")
    if name == "stock":
        if settings:
            raise ConfigError(f"--modes: got {text!r}; stock is vLLM untouched and has no settings")
        return Mode("stock")
    nwor: dict[str, Any] = {"mode": name}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise ConfigError(f"--modes: got {setting!r} in {text!r}; expected NAME=VALUE")
        try:
            nwor[key] = json.loads(value)
        except json.JSONDecodeError:
            nwor[key] = value
    return Mode(text.strip(), json.dumps(nwor))


def parse_point(text: str) -> Point:
    """`16x512`. Raises ConfigError."""
    batch, _, context = text.strip().partition("x")
    if not (batch.isdigit() and context.isdigit() and int(batch) and 16 <= int(context) < LONGEST):
        raise ConfigError(f"got {text!r}; expected BATCHxCONTEXT, such as 16x512")
    return Point(int(batch), int(context))


def grid(configuration: Configuration) -> list[Point]:
    """The points of a configuration: the full grid of plain `3b`, else one of few."""
    full = configuration == Configuration()
    batches = (1, 4, 16, 64, 256) if full else (1, 16, 64)
    contexts = (512, 4096, 32768) if full else (512, 4096)
    return [Point(batch, context) for context in contexts for batch in batches]


def unique(names: str, parse: Any) -> list[Any]:
    """Parse a list separated by commas. Raises ConfigError if it is empty or names one twice."""
    found = [parse(part) for part in names.split(",") if part.strip()]
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"got {names!r}; expected names separated by commas, each once")
    return found
