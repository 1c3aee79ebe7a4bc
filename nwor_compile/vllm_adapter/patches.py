"""All that this package replaces in vLLM, and the one place that replaces it.

`PATCHES` lists every attribute that is wrapped, with the parameters by which its shape is known.
Whatever is not listed, or has another shape in the installed version, is refused with ConfigError:
a wrapped function that means something else now must not be called as if it did not. That these
shapes are those of the supported versions is checked on the published packages, see
`contract_entries.py`.

What vLLM offers for the purpose is used as it is and is no patch: the entry point
`vllm.general_plugins`, `worker_cls`, the pass in `inductor_compile_config`, `register_backend`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nwor_compile.errors import ConfigError

_MARK = "_nwor_hooks"  # their names


@dataclass(frozen=True)
class Patch:
    """parameters: the first ones, without `self`; none where the hook hands on whatever came. A
    function that takes `*args` has any shape."""

    parameters: tuple[str, ...]
    why: str


PATCHES: dict[str, Patch] = {
    # In every process, from the plugin's entry point.
    "EngineArgs.create_engine_config": Patch((), "the configuration hook"),
    # In a frontend, when an engine was asked to stage. prometheus_client's, not vLLM's own.
    "MultiProcessCollector.collect": Patch((), "metrics with several API servers"),
    # In a worker that stages, on its model runner and drafter alone.
    "drafter.load_model": Patch((), "which layers are the target's"),
    "GPUModelRunner.initialize_kv_cache": Patch(("kv_cache_config",), "allocate staging"),
    "GPUModelRunner._calc_spec_decode_metadata": Patch(
        ("num_draft_tokens", "cu_num_scheduled_tokens"), "draft counts and ids of a step"
    ),
    "GPUModelRunner._model_forward": Patch(
        ("input_ids", "positions"), "begin before it, abort if it raises"
    ),
    "GPUModelRunner._sample": Patch(("logits", "spec_decode_metadata"), "commit after it"),
    # In a worker on a GPU that stages.
    "backends.split_graph": Patch(("graph", "splitting_ops"), "rewrite graphs before the cut"),
    # The same of the V2 model runner.
    "speculator.load_model": Patch(("target_model",), "which layers are the target's"),
    "GPUModelRunner.prepare_attn": Patch(("input_batch",), "begin: slots and counts are there"),
    "GPUModelRunner.execute_model": Patch(("scheduler_output",), "abort if it raises"),
    "GPUModelRunner.sample": Patch(
        ("hidden_states", "input_batch", "grammar_output"), "commit after it"
    ),
    "ModelCudaGraphManager.capture": Patch((), "steps whose kernel goes by contexts: twice"),
    "ModelCudaGraphManager.run_fullgraph": Patch(("desc",), "which of the two"),
    # In the scheduler of a staged engine with vLLM's OffloadingConnector.
    "OffloadingConnectorScheduler._calc_num_offloadable_tokens": Patch(
        ("req_status", "num_computed_tokens"), "store no row that was never computed"
    ),
    # In engines of the benchmark harness and of the tests, on vLLM's CPU engine.
    "rejection_sampler.expand_batch_to_tokens": Patch(
        ("x", "cu_num_tokens", "num_tokens"), "repairs the temperatures of drafts"
    ),
    "rejection_sampler.rejection_sample": Patch(
        ("draft_token_ids", "num_draft_tokens", "max_spec_len"), "synthetic acceptance on CPU"
    ),
}


def wrap(owner: Any, key: str, hook: Callable[..., Any]) -> None:
    """Make `owner`'s attribute (the part of `key` after the dot) call `hook(original, ...)`.

    owner: a class, an instance or a module. On a class the instance follows the original. Nothing
        happens where the same hook is there already; another one is called around those before.

    Raises ConfigError if `key` is not listed, if the attribute is missing, or if its parameters
    are not those listed.
    """
    name = key.rpartition(".")[2]
    original: Any = getattr(owner, name, None)
    hooks: frozenset[str] = getattr(original, _MARK, frozenset())
    function: Any = hook.func if isinstance(hook, functools.partial) else hook
    mine = f"{function.__module__}.{function.__qualname__}"
    if mine in hooks:
        return
    problem = _unknown(key, original, is_class=inspect.isclass(owner))
    if problem:
        raise ConfigError(
            f"NWOR cannot patch {key} of {_called(owner)}: {problem}. This vLLM is not as the "
            "adapter knows it; use a version that docs/vllm.md lists, or unset the nwor flag"
        )

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(patched, _MARK, hooks | {mine})
    setattr(owner, name, patched)


def announce_variables(variables: Any) -> None:
    """Add to vLLM's table of environment variables, or it warns of each.

    vLLM hashes every variable that it knows into its compile-cache key. What changes the graph gets
    there through `additional_config`; the rest must not. So all it ever reads here is None.
    """
    from vllm import envs

    for variable in variables:
        envs.environment_variables.setdefault(variable, _nothing)


def _unknown(key: str, original: Any, *, is_class: bool) -> str:
    if key not in PATCHES:
        return f"it is not among {', '.join(PATCHES)}"
    if not callable(original):
        return "there is no such function"
    wanted = PATCHES[key].parameters
    parameters = list(inspect.signature(original).parameters.values())[is_class:]
    given = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            return ""
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            given.append(parameter.name)
    if tuple(given[: len(wanted)]) == wanted:
        return ""
    return f"expected ({', '.join(wanted)}, ...), got ({', '.join(given)})"


def _called(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__name__)


def _nothing() -> None:
    return None
