"""Hooks on one V1 model runner: where a window begins and where it is committed.

Methods of the runner instance that are wrapped, with what each is needed for:

- `drafter.load_model`: layers known before it are the target's, those after are the drafter's;
- `initialize_kv_cache`: the caches exist, so the window can be made;
- `_calc_spec_decode_metadata`: the step's draft counts and ids, on the device;
- `_model_forward`: begin before it, abort if it raises;
- `_sample`: commit after it, before the drafter runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import get_forward_context

from nwor_compile.config import NworConfig
from nwor_compile.errors import ConfigError, WindowInputError
from nwor_compile.tail_blocks import TailBlocks
from nwor_compile.vllm_adapter import ops, patches
from nwor_compile.vllm_adapter.packed_cache import is_packed, split_cache
from nwor_compile.vllm_adapter.refusals import layer_refusal
from nwor_compile.vllm_adapter.spare_blocks import enlarged
from nwor_compile.window import State, Window

log = logging.getLogger("nwor_compile")

WRONG_GROUP = (
    "the draft model's layer {layer} is in KV-cache group {group}, but vLLM's V1 runner hands a "
    "draft model the slots of group 0: what it writes can overwrite rows of the target, staged "
    "or not. Use another method, or a target whose layers are all of one kind"
)


class RunnerHooks:
    """Wraps a runner's methods; owns its window."""

    HOOKED = ("initialize_kv_cache", "_calc_spec_decode_metadata", "_model_forward", "_sample")

    def __init__(self, runner: Any, config: Any, settings: NworConfig) -> None:
        missing = [name for name in self.HOOKED if not hasattr(runner, name)]
        if missing:
            raise ConfigError(
                f"NWOR does not know this model runner ({type(runner).__name__}): it has no "
                f"{', '.join(missing)}. Supported: vLLM's V1 and V2 runners, 0.26 to 0.33"
            )
        self.runner, self.config, self.settings = runner, config, settings
        self.window: Window | None = None
        self._target: set[str] | None = None
        self._first: list[int] = []
        self._metadata: Any = None
        ops.take_called()  # those of an earlier engine of this process
        self._attach()

    def _attach(self) -> None:
        runner = self.runner
        if hasattr(runner, "drafter") and hasattr(runner.drafter, "load_model"):
            patches.wrap(runner.drafter, "drafter.load_model", self._load_drafter)
        for name, hook in (
            ("initialize_kv_cache", self._initialize_kv_cache),
            ("_calc_spec_decode_metadata", self._calc_metadata),
            ("_model_forward", self._model_forward),
            ("_sample", self._sample),
        ):
            patches.wrap(runner, f"GPUModelRunner.{name}", hook)

    def metrics(self) -> dict[str, Any]:
        """Counters of the window and of the twins; empty before the caches exist."""
        if self.window is None:
            return {}
        return {**self.window.metrics().model_dump(), "executions": ops.executions()}

    def warm_up(self, others: Callable[[Window], None] | None = None) -> None:
        """Before the engine's warm-up, which may sample: capture the graphs of the commit, and
        compile what opens a window, which the first request with drafts would wait for.

        others: calls more kernels, for this window; see `Window.warm_up`.
        """
        window = self.window
        if window is None:
            return
        start = time.perf_counter()
        calls = None if others is None else partial(others, window)
        window.warm_up(steps=self._steps(window), others=calls)
        log.info("NWOR warm-up: %.1f s", time.perf_counter() - start)

    def _steps(self, window: Window) -> list[dict[str, Any]]:
        """Arguments of `Window.begin`, one for each kind of step to come."""
        return [self._empty_step(window, requests) for requests in window.sizes]

    def _empty_step(self, window: Window, requests: int) -> dict[str, Any]:
        """What `Window.begin` is given in this runner's steps, of requests without drafts."""
        device = window.tensors.error.device
        ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
        slots = torch.full((requests,), -1, dtype=torch.int64, device=device)
        return {
            "num_drafts": torch.zeros(requests, **ints),
            "query_start_loc": torch.arange(requests + 1, **ints),
            "slot_mapping": dict.fromkeys(window.groups, slots),
            "block_table": {
                name: torch.zeros(requests, self._columns(int(name)), **ints)
                for name in window.groups
            },
            "seq_lens": torch.ones(requests, **ints),
        }

    def warmed_up(self) -> None:
        """After the engine's warm-up: raise ConfigError if a layer ran no staged write in it.

        Judged by executions, not by what the pass rewrote: on a warm compile cache no pass runs.
        """
        if self.window is None:
            if self.settings.strict:
                self._refuse("the engine never initialised its caches by the hooked model runner")
            return  # refused before, and running direct
        called = ops.take_called()
        missing = [name for name in self.window.layer_names if name not in called]
        if missing and len(missing) < len(self.window.layer_names):
            self._refuse(
                f"no staged write ran in warm-up for {', '.join(missing)}: a fusion swallowed the "
                "cache write of these layers. Turn it off, or unset the nwor flag"
            )
        elif missing:
            self._refuse(
                "no staged write ran in warm-up: the graph was not rewritten (eager mode, another "
                "attention backend, or a fusion that swallowed the cache write). Compile the "
                "model, or unset the nwor flag"
            )

    def close(self) -> None:
        """Stage nothing from here on."""
        ops.set_layers({})
        if self.window is not None:
            self.window.close()
            self.window = None

    def _refuse(self, reason: str) -> None:
        """Raise ConfigError, or with `"strict": false` run direct from here on."""
        if self.settings.strict:
            raise ConfigError(f"NWOR cannot stage: {reason}")
        log.error("NWOR cannot stage: %s. It runs direct.", reason)
        self.close()

    def _load_drafter(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._target = set(self.config.compilation_config.static_forward_context)
        return original(*args, **kwargs)

    @property
    def sizes(self) -> tuple[int, int]:
        """Most requests of a step, most drafts of a request."""
        drafts = self.config.speculative_config.num_speculative_tokens
        return self.config.scheduler_config.max_num_seqs, drafts

    def _initialize_kv_cache(
        self, original: Callable[..., Any], kv_cache_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if kwargs.get("is_profiling", args[0] if args else False):
            return original(kv_cache_config, *args, **kwargs)
        allocated = self._allocate(kv_cache_config)
        result = original(allocated, *args, **kwargs)
        self._open(kv_cache_config)
        return result

    def _allocate(self, kv_cache_config: Any) -> Any:
        """What the runner is to allocate: caches with tail blocks at their ends."""
        config, self._first = enlarged(kv_cache_config, *self.sizes)
        return config

    def _tail_blocks(self, kv_cache_config: Any) -> TailBlocks:
        """Where staging lies in the caches."""
        sizes = self._kernel_block_sizes()
        first, columns = {}, 0
        for index, group in enumerate(kv_cache_config.kv_cache_groups):
            # Kernels may see a block of the scheduler's as several smaller ones.
            ratio = group.kv_cache_spec.block_size // sizes[index]
            first[str(index)] = self._first[index] * ratio
            columns = max(columns, self._columns(index))
        return TailBlocks(first=first, columns=columns)

    def _kernel_block_sizes(self) -> list[int]:
        return list(self.runner._kernel_block_sizes)

    def _columns(self, group: int) -> int:
        """Width of the block table of one KV-cache group."""
        return int(self.runner.input_batch.block_table[group].get_device_tensor(1).shape[1])

    def _open(self, kv_cache_config: Any) -> None:
        if self.window is not None:
            self.window.close()
            self.window = None
        layers, groups, problem = self._target_layers(kv_cache_config)
        if problem:
            self._refuse(problem)
            return
        scheduler = self.config.scheduler_config
        requests, drafts = self.sizes
        try:
            self.window = Window(
                layers,
                max_requests=requests,
                max_drafts=drafts,
                max_tokens=scheduler.max_num_batched_tokens + scheduler.max_num_seqs,
                config=self.settings,
                kv_cache_dtype=_stored_dtype(self.config.cache_config.cache_dtype),
                groups=groups,
                by_name=True,
                share_error=_sharing(self.config.parallel_config.tensor_parallel_size),
                tail_blocks=self._tail_blocks(kv_cache_config),
            )
        except WindowInputError as error:  # a layout, or block sizes, that only the caches show
            self._refuse(str(error))
            return
        window = self.window
        ops.set_layers(window.layers, lambda: window.state is not State.OPEN)

    def _target_layers(
        self, kv_cache_config: Any
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, str], str]:
        """Caches and slot groups of the target's layers by name, and what prevents staging."""
        context = self.config.compilation_config.static_forward_context
        layers: dict[str, tuple[Tensor, Tensor]] = {}
        groups: dict[str, str] = {}
        for index, group in enumerate(kv_cache_config.kv_cache_groups):
            for name in group.layer_names:
                layer = context[name]
                drafters = self._target is not None and name not in self._target
                shared = getattr(layer, "kv_sharing_target_layer_name", None)
                if drafters and shared in (self._target or ()):
                    return {}, {}, f"the drafter's layer {name} reads the target's cache ({shared})"
                if drafters and index and _takes_first_group(self.runner):
                    return {}, {}, WRONG_GROUP.format(layer=name, group=index)
                if drafters or shared is not None:
                    continue
                reason = layer_refusal(name, layer)
                if reason:
                    return {}, {}, reason
                if not is_packed(layer.kv_cache):
                    return {}, {}, f"layer {name}: its cache is not packed as this adapter knows it"
                layers[name] = split_cache(layer.kv_cache)
                groups[name] = str(index)
        return layers, groups, "" if layers else "the target has no attention layers"

    def _calc_metadata(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._metadata = original(*args, **kwargs)
        return self._metadata

    def _model_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        metadata, self._metadata = self._metadata, None
        window = self.window
        if window is None:
            return original(*args, **kwargs)
        abort_unsampled(window)
        if metadata is None:
            tables = _block_tables(window)
            if tables:
                window.pass_through(tables)
            return original(*args, **kwargs)
        self._begin(window, metadata)
        try:
            return original(*args, **kwargs)
        except BaseException:
            window.abort()
            raise

    def _begin(self, window: Window, metadata: Any) -> None:
        ends = metadata.cu_num_draft_tokens
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        requests = counts.shape[0]
        mapping = get_forward_context().slot_mapping
        slots = {batch.group: mapping[batch.names[0]] for batch in window.tensors.batches}
        starts = self.runner.query_start_loc.gpu[: requests + 1]
        lengths = get_forward_context().attn_metadata[window.layer_names[0]].seq_lens
        tables = _block_tables(window)
        window.begin(counts, starts, slots, block_table=tables, seq_lens=lengths[:requests])

    def _sample(self, original: Callable[..., Any], logits: Any, spec_decode_metadata: Any) -> Any:
        window = self.window
        if window is None or window.state is not State.OPEN:
            return original(logits, spec_decode_metadata)
        try:
            output = original(logits, spec_decode_metadata)
        except BaseException:
            window.abort()
            raise
        sampled = output.sampled_token_ids
        # As wide as the step's longest draft; the window expects room for the most drafts.
        missing = max(0, window.max_drafts + 1 - sampled.shape[1])
        padded = torch.nn.functional.pad(sampled, (0, missing), value=-1)
        done = window.commit(padded, spec_decode_metadata.draft_token_ids)
        # Emit what was committed and the token after it. That is all of `sampled`, or after a
        # fault, when nothing was committed, the first sampled token alone.
        column = torch.arange(sampled.shape[1], device=sampled.device)
        output.sampled_token_ids = torch.where(column > done.accepted[:, None], -1, sampled)
        return output


def _takes_first_group(runner: Any) -> bool:
    """Whether the drafter is one that `_build_attention_metadata` of vLLM's V1 runner always gives
    the slots and block tables of the first KV-cache group; others get their own group's."""
    return type(getattr(runner, "drafter", None)).__name__ == "DraftModelProposer"


def abort_unsampled(window: Window) -> None:
    """If the step before this one never sampled: its drafts are lost, its certain rows stand."""
    if window.state is State.OPEN:
        log.error("NWOR: a window was never committed; aborted")
        window.abort()


def _block_tables(window: Window) -> dict[str, Tensor]:
    """The step's tables by slot group; empty in a step without attention."""
    metadata = get_forward_context().attn_metadata
    if not isinstance(metadata, dict):
        return {}
    return {b.group: metadata[b.names[0]].block_table for b in window.tensors.batches}


def _sharing(ranks: int) -> Callable[[Tensor], None] | None:
    """What `Window` needs to share the error flag of a model split over tensor-parallel ranks.

    Every rank commits every window, so each takes part in the reduction.
    """
    if ranks == 1:
        return None
    group = get_tp_group()
    largest = torch.distributed.ReduceOp.MAX
    nccl = getattr(group.device_communicator, "pynccl_comm", None)
    if nccl is None or nccl.disabled:

        def share(error: Tensor) -> None:
            torch.distributed.all_reduce(error, largest, group=group.device_group)

        return share

    # On CUDA the communicator that vLLM records in its own graphs. It works on the current stream,
    # so ranks cannot start this reduction and one of the model's in different orders; and nothing
    # watches it from another thread, as torch's groups are, which a capture would not bear.
    def share_by_nccl(error: Tensor) -> None:
        nccl.all_reduce(error, error, op=largest, stream=torch.cuda.current_stream())

    return share_by_nccl


def _stored_dtype(cache_dtype: str) -> str:
    return cache_dtype if cache_dtype.startswith("fp8") else "auto"
