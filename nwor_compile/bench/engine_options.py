"""What `nwor bench engine` was asked for: its options, the engines to run, their requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, field_validator

from nwor_compile.demo.text import WEIGHTS
from nwor_compile.errors import ConfigError

Scenario = Literal["short", "long", "mixed"]
NworMode = Literal["off", "stage", "stock"]
ScvMode = Literal["off", "graph", "adaptive"]
Method = Literal["ngram", "eagle", "draft_model"]

TINY = "the repository's tiny models"
TINY_CONTEXT = 2048
# The prompt lookup of the ngram drafter: at least this many tokens must repeat.
NGRAM = (2, 4)
SHORTEST_PROMPT = 8


class Shape(NamedTuple):
    """Tokens of one request."""

    prompt: int
    output: int


SHAPES = {"short": Shape(32, 32), "long": Shape(512, 128)}


class EngineKey(NamedTuple):
    """One engine of the matrix."""

    mode: str
    scv: str | None

    @property
    def label(self) -> str:
        """Its name in tables and file names: `off`, `stage-graph`."""
        return self.mode if self.scv is None else f"{self.mode}-{self.scv}"


class Options(BaseModel):
    """Every option of the command; see its help for what each means."""

    model_config = ConfigDict(extra="forbid")

    scenario: Scenario = "short"
    requests: int = 8
    batches: int = 2
    draft_tokens: int = 4
    temperature: float = 0.0
    max_model_len: int = 1024
    max_tokens: int | None = None
    nwor_modes: list[NworMode] = ["off", "stage"]
    scv_modes: list[ScvMode] = ["off", "graph", "adaptive"]
    model: str | None = None
    draft_model: str | None = None
    method: Method | None = None
    dummy_weights: bool = False
    synthetic_acceptance_length: float | None = None
    synthetic_acceptance_rates: list[float] | None = None
    seeds: list[int] = [0]
    repeats: int = 3
    dtype: str | None = None
    threads: int | None = None
    one_at_a_time: bool = False
    memory_share: float = 0.9
    timeout: float = 1800.0

    @field_validator("nwor_modes", "scv_modes", "seeds")
    @classmethod
    def _once_each(cls, values: list[Any]) -> list[Any]:
        if not values:
            raise ValueError("expected at least one value")
        return list(dict.fromkeys(values))

    @property
    def tiny(self) -> bool:
        """True without a model: then the tiny models of this package run."""
        return self.model is None

    @property
    def target(self) -> str:
        """Path or name of the target model."""
        return self.model or str(WEIGHTS / "target")

    def names(self) -> tuple[str, str]:
        """Target and drafter for a report: no folders of this machine."""
        target = TINY if self.tiny else _plain_name(self.target)
        drafter = self.draft_model or (str(WEIGHTS / "draft") if self._tiny_drafter else None)
        return target, f"{self.method or 'vLLM chooses'}: " + (
            _plain_name(drafter) if drafter else f"repeats of {NGRAM[0]} to {NGRAM[1]} tokens"
        )

    @property
    def _tiny_drafter(self) -> bool:
        return self.tiny and self.draft_model is None and self.method == "draft_model"

    def speculative_config(self) -> dict[str, Any]:
        """What vLLM is given as `speculative_config`."""
        config: dict[str, Any] = {"num_speculative_tokens": self.draft_tokens}
        if self.method is not None:
            config["method"] = self.method
        if self.method == "ngram":
            config["prompt_lookup_min"], config["prompt_lookup_max"] = NGRAM
        else:
            config["model"] = self.draft_model or str(WEIGHTS / "draft")
        if self.method == "draft_model":
            config["draft_tensor_parallel_size"] = 1
        if self.synthetic_acceptance_length is not None:
            config["rejection_sample_method"] = "synthetic"
            config["synthetic_acceptance_length"] = self.synthetic_acceptance_length
        if self.synthetic_acceptance_rates is not None:
            config["rejection_sample_method"] = "synthetic"
            config["synthetic_acceptance_rates"] = self.synthetic_acceptance_rates
        return config

    def llm_arguments(self, engine: EngineKey) -> dict[str, Any]:
        """Arguments of `vllm.LLM` for one engine of the matrix.

        Prefix caching is off: repeats send the same prompts, and must do the same work.
        """
        arguments: dict[str, Any] = {
            "model": self.target,
            "dtype": self.dtype or ("float32" if self.tiny else "auto"),
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.requests,
            "seed": self.seeds[0],
            "speculative_config": self.speculative_config(),
            "enable_prefix_caching": False,
            "disable_log_stats": False,
        }
        if self.dummy_weights:
            arguments["load_format"] = "dummy"
        if engine.mode != "stock":
            nwor = {"mode": engine.mode}
            if engine.scv is not None:
                nwor["scv"] = engine.scv
            arguments["additional_config"] = {"nwor": nwor}
        return arguments

    def engines(self) -> list[EngineKey]:
        """The engines that cover every combination of the modes.

        SCV validates what was staged: with NWOR `off` (or `stock`, an untouched vLLM) there is
        nothing to validate and its setting changes nothing. So such an engine runs once and stands
        for its combination with every SCV mode. It comes first, being the baseline.
        """
        found = [EngineKey(m, None) for m in ("off", "stock") if m in self.nwor_modes]
        if "stage" in self.nwor_modes:
            found += [EngineKey("stage", scv) for scv in self.scv_modes]
        return found

    def combinations(self) -> dict[str, str]:
        """`nwor x scv` to the label of the engine that measured it."""
        return {
            f"{mode} x {scv}": EngineKey(mode, scv if mode == "stage" else None).label
            for mode in self.nwor_modes
            for scv in self.scv_modes
        }

    def shapes(self) -> list[Shape]:
        """Prompt and output lengths of one batch; `mixed` alternates short and long."""
        names = {"mixed": ("short", "long")}.get(self.scenario, (self.scenario,))
        return [self._shape(names[i % len(names)]) for i in range(self.requests)]

    def _shape(self, name: str) -> Shape:
        shape = SHAPES[name]
        output = self.max_tokens or shape.output
        # The drafter stops where its drafts could pass the model's end.
        room = self.max_model_len - output - self.draft_tokens - 1
        if room < SHORTEST_PROMPT:
            raise ConfigError(
                f"--max-model-len {self.max_model_len} leaves {room} tokens for a prompt beside "
                f"{output} new ones and {self.draft_tokens} drafts; expected at least "
                f"{SHORTEST_PROMPT}: raise it or lower --max-tokens"
            )
        return Shape(min(shape.prompt, room), output)

    def workload(self) -> dict[str, Any]:
        """What must be equal for rows of two runs to be comparable; `--resume` checks it."""
        free = {"nwor_modes", "scv_modes", "repeats", "seeds", "batches", "one_at_a_time",
                "memory_share", "timeout"}  # fmt: skip
        return self.model_dump(exclude=free)

    def public(self) -> dict[str, Any]:
        """The options without folders of this machine, for a record."""
        values = self.model_dump()
        for name in ("model", "draft_model"):
            if values[name] is not None:
                values[name] = _plain_name(values[name])
        return values


def _plain_name(model: str) -> str:
    """A hub name as it is; of a path, its last folder."""
    return Path(model).name if Path(model).is_absolute() or Path(model).exists() else model


def flag(name: str) -> str:
    """The option's name on the command line."""
    return "--" + name.replace("_", "-")
