"""Checks what `nwor bench engine` was given: the command line, the environment, the defaults."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from nwor_compile.bench.engine_options import TINY, TINY_CONTEXT, Options, flag
from nwor_compile.errors import ConfigError

# The smallest and the largest value of a numeric option.
LIMITS: dict[str, tuple[float, float]] = {
    "requests": (1, 4096), "batches": (1, 10_000), "draft_tokens": (1, 64),
    "temperature": (0, 100), "max_model_len": (16, 10_000_000), "max_tokens": (2, 1_000_000),
    "repeats": (1, 10_000), "threads": (1, 1024), "memory_share": (0.05, 1),
    "timeout": (1, 1_000_000),
}  # fmt: skip


def load_options(environment: Mapping[str, str], **given: Any) -> tuple[Options, list[str]]:
    """Options from the command line (None: not given), the environment and the defaults, with
    notes on what was changed.

    Raises ConfigError naming the option, what came and what is expected.
    """
    values = {name: value for name, value in given.items() if value is not None}
    for name in ("nwor_modes", "scv_modes", "seeds", "synthetic_acceptance_rates"):
        if isinstance(values.get(name), str):
            values[name] = [part.strip() for part in values[name].split(",") if part.strip()]
    notes: list[str] = []
    _models_from_environment(values, environment, notes)
    try:
        options = Options(**values)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
    _check_limits(options)
    _choose_method(options)
    _check_synthetic(options)
    if options.tiny and options.max_model_len > TINY_CONTEXT:
        notes.append(
            f"--max-model-len {options.max_model_len} is more than {TINY} have: {TINY_CONTEXT} "
            "is used"
        )
        options.max_model_len = TINY_CONTEXT
    options.shapes()
    if "stage" in options.nwor_modes and "off" not in options.nwor_modes:
        notes.append("no ratios: --nwor-modes has no `off`, which is their baseline")
    return options, notes


def _models_from_environment(
    values: dict[str, Any], environment: Mapping[str, str], notes: list[str]
) -> None:
    """TARGET_MODEL and DRAFT_MODEL, where the command line names no other."""
    if "model" not in values and environment.get("TARGET_MODEL"):
        values["model"] = environment["TARGET_MODEL"]
    drafter = environment.get("DRAFT_MODEL")
    if "draft_model" not in values and drafter:
        if values.get("method") == "ngram":
            notes.append("DRAFT_MODEL is not used: --method ngram drafts without a model")
        else:
            values["draft_model"] = drafter
    for variable, option in (
        ("VLLM_NWOR_MODE", "--nwor-modes"),
        ("VLLM_SCV_MODE", "--scv-modes"),
    ):
        if environment.get(variable):
            notes.append(f"{variable} is not used here: {option} says which modes run")


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    annotation = Options.model_fields[name].annotation if name in Options.model_fields else None
    allowed = get_args(annotation)
    if allowed and get_args(allowed[0]):  # a list, or an optional, of literals
        allowed = get_args(allowed[0])
    literals = [value for value in allowed if isinstance(value, str)]
    expected = f"expected {', '.join(literals)}" if literals else first["msg"]
    return f"{flag(name)}: got {first['input']!r}; {expected}"


def _check_limits(options: Options) -> None:
    for name, (smallest, largest) in LIMITS.items():
        value = getattr(options, name)
        if value is not None and not smallest <= value <= largest:
            raise ConfigError(
                f"{flag(name)}: got {value}; expected {smallest:g} to {largest:g}"
                + (" (a request of one token has no draft)" if name == "max_tokens" else "")
            )


def _choose_method(options: Options) -> None:
    """Fill in the method where it follows from the models; else vLLM reads it from the drafter."""
    if options.method == "ngram" and options.draft_model is not None:
        raise ConfigError(
            f"--method ngram and --draft-model {options.draft_model}: expected one of them; ngram "
            "drafts without a model"
        )
    if options.method is None and options.draft_model is None:
        options.method = "draft_model" if options.tiny else "ngram"
    if options.draft_model is not None:
        return
    if options.method == "eagle" or (options.method == "draft_model" and not options.tiny):
        raise ConfigError(
            f"--method {options.method} needs a drafter: expected --draft-model or DRAFT_MODEL"
        )


def _check_synthetic(options: Options) -> None:
    length = options.synthetic_acceptance_length
    if length is not None and not 1 <= length <= options.draft_tokens + 1:
        raise ConfigError(
            f"--synthetic-acceptance-length: got {length:g}; expected 1 (nothing accepted) to "
            f"{options.draft_tokens + 1} (all {options.draft_tokens} drafts and the next token)"
        )
    rates = options.synthetic_acceptance_rates
    if rates is None:
        return
    if length is not None:
        raise ConfigError(
            "--synthetic-acceptance-length and --synthetic-acceptance-rates: expected one of them"
        )
    falling = all(a >= b for a, b in itertools.pairwise(rates))
    if len(rates) != options.draft_tokens or not falling or not 0 <= min(rates) <= max(rates) <= 1:
        raise ConfigError(
            f"--synthetic-acceptance-rates: got {','.join(f'{rate:g}' for rate in rates)}; "
            f"expected {options.draft_tokens} numbers from 0 to 1, none larger than the one before "
            "it: the share of drafts accepted at each position"
        )


def worker_environment(options: Options, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine's process.

    One process an engine, none below it, so that its figures are read where they are counted.
    """
    result = dict(environment)
    for variable in ("VLLM_NWOR_MODE", "VLLM_SCV_MODE", "TARGET_MODEL", "DRAFT_MODEL"):
        result.pop(variable, None)
    result["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    result.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if options.threads is not None:
        result["OMP_NUM_THREADS"] = str(options.threads)
    elif options.tiny:
        # Tensors so small bring a second thread no work, and on a busy machine every kernel then
        # waits for it: the same step took 20 ms or a second.
        result.setdefault("OMP_NUM_THREADS", "1")
    local = [options.target, options.draft_model or options.target]
    if all(os.path.isdir(path) for path in local):
        result.setdefault("HF_HUB_OFFLINE", "1")
    return result
