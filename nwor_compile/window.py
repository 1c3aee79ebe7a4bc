"""One verification step: begin -> forward -> commit, or abort.

Between begin and commit everything stays on the device: routing, staging, acceptance and the error
flag are tensors in persistent buffers, and Python never branches on what they hold. (SCV mode
`off` is the exception; it is the oracle.)
"""

from __future__ import annotations

import contextlib
import enum
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nwor_compile.capture import CAPTURE_ERRORS, capture
from nwor_compile.config import NworConfig
from nwor_compile.debug import WindowLog
from nwor_compile.errors import WindowInputError, WindowOrderError
from nwor_compile.groups import Caches, build_batches, check_layers, check_sizes
from nwor_compile.metrics import Metrics, read_metrics
from nwor_compile.opening import Limits, Opening, Recorded, by_group, form_of, opening_of
from nwor_compile.ops import counter_size
from nwor_compile.ops.counters import COUNTERS
from nwor_compile.ops.library import pick, uses_triton
from nwor_compile.ops.ranges import span
from nwor_compile.ops.staging import (
    LayerStaging,
    register_direct,
    register_layer,
    unregister_direct,
    unregister_layer,
    window_closed,
    window_opened,
)
from nwor_compile.poison import poison_open_slots, touched_early
from nwor_compile.routing import BEGIN, BeginPlan, Kept, allocate_routing, clear
from nwor_compile.sampled import Expected, problem_of
from nwor_compile.scv import Committed, WindowTensors, finish, host_loop
from nwor_compile.tail_blocks import Redirection, TailBlocks, layout_of, tail_blocks_needed
from nwor_compile.validator import GraphValidator

log = logging.getLogger("nwor_compile")


class State(enum.Enum):
    """Where a window stands."""

    IDLE = "idle"
    OPEN = "open"
    CLOSED = "closed"


class Window:
    """Staging of one model's layers, and the steps that run through it.

    All calls come from one thread and, on CUDA, with one current stream. All memory is allocated
    here, once, but for the counts that `commit` hands out. Ops that the pass put into a graph find
    their layer by its key cache, so the graph needs no change when a window opens, commits or is
    closed.

    Args:
        layers: name to (key cache, value cache), the target model's layers and no others. Caches
            have one of the forms of `nwor_compile.ops.layout` and must stay where they are.
        max_requests, max_drafts: most requests a step, most drafts a request; staging has
            `max_requests * max_drafts` rows a layer (with tail blocks, whole blocks of them).
        max_tokens: most tokens a step (prefill included), padding too.
        config: settings; from the environment if None.
        kv_cache_dtype: as for `reshape_and_cache`; poison mode and byte counts need it.
        groups: name to slot group, where layers do not share one slot mapping.
        direct_caches: key caches of a drafter that runs rewritten ops inside windows.
        by_name: the engine's ops find their staging by layer name, in `layers`. Caches are not
            registered then, and layers of different slot groups may share memory.
        share_error: for a model that is split over ranks, each with a window of its own: called at
            every commit, before anything is written, with the error flag int32 `[1]`, to leave the
            largest flag of all ranks in it (a MAX all-reduce). Else a fault that one rank alone
            sees would make the ranks commit different rows.
        tail_blocks: the caches have spare blocks at their ends, and staging lies there, so that
            stock attention kernels read it by `block_tables`; see `nwor_compile.tail_blocks`.
    Raises:
        WindowInputError, StagingAllocationError, ConfigError, ValueError: nothing stays registered.
    """

    def __init__(
        self,
        layers: Caches,
        *,
        max_requests: int,
        max_drafts: int,
        max_tokens: int,
        config: NworConfig | None = None,
        kv_cache_dtype: str = "auto",
        groups: Mapping[str, str] | None = None,
        direct_caches: Iterable[Tensor] = (),
        by_name: bool = False,
        share_error: Callable[[Tensor], None] | None = None,
        tail_blocks: TailBlocks | None = None,
    ) -> None:
        check_sizes(max_requests=max_requests, max_drafts=max_drafts, max_tokens=max_tokens)
        self.config = config if config is not None else NworConfig.load()
        poison = self.config.poison != "off"
        check_layers(
            layers, groups or {}, poison=poison, kv_cache_dtype=kv_cache_dtype, by_name=by_name
        )
        self.max_requests, self.max_drafts, self.max_tokens = max_requests, max_drafts, max_tokens
        self.capacity = max_requests * max_drafts
        self.kv_cache_dtype = kv_cache_dtype
        self.fallbacks = 0
        device = next(iter(layers.values()))[0].device
        state = torch.zeros(len(layers), 2, dtype=torch.int32, device=device)
        self.redirection, rows = None, None
        self.staging_rows, blocks = self.capacity, 0
        if tail_blocks is not None:
            layout = layout_of(layers, max_drafts)
            names = dict.fromkeys((groups or {}).get(name, "kv") for name in layers)
            self.redirection = Redirection(tail_blocks, names, layout, max_requests, device)
            blocks = tail_blocks_needed(max_requests, max_drafts, layout.block_size)
            self.staging_rows = blocks * layout.block_size
            rows = torch.zeros(self.capacity, dtype=torch.int32, device=device)
        batches = build_batches(layers, groups or {}, self.capacity, state, tail_blocks, blocks)
        self.tensors = WindowTensors(
            routing=allocate_routing(max_tokens, max_requests, device),
            drafts=torch.zeros(max_requests, dtype=torch.int32, device=device),
            error=torch.zeros(1, dtype=torch.int32, device=device),
            state=state,
            counters=torch.zeros(counter_size(max_drafts), dtype=torch.int64, device=device),
            batches=batches,
            staging=self.config.mode == "stage",
            share_error=share_error,
            rows=rows,
            draft_ids=torch.zeros(self.capacity, dtype=torch.int64, device=device),
        )
        own_slots = {batch.group: batch.slots for batch in batches}
        self.groups = tuple(own_slots)
        self.opening = self._begin_plan(list(own_slots.values()))
        if self.redirection is not None:
            self.redirection.over(batches, self.tensors.routing.num_drafts)
        self.validator = GraphValidator(
            self.tensors, max_drafts, adaptive=self.config.scv == "adaptive"
        )
        self._layer_names = tuple(name for batch in batches for name in batch.names)
        self._limits = Limits(max_requests, max_tokens, self.groups, device, self.redirection)
        self._recorded: dict[Hashable, Recorded] = {}
        self._log = WindowLog(enabled=self.config.debug)
        self._state = State.IDLE
        self._fake = False
        self._requests = 0
        self._knows_ids = False
        # Of the last arguments that were found right: another step's mostly look the same.
        self._right_begin: Hashable = None
        self._right_commit: Hashable = None
        self._said_commit: Hashable = None  # what the caller called them
        self._right_pass: Hashable = None
        self._registered: list[Tensor] = []
        self._direct: list[Tensor] = []
        self._layers: dict[str, LayerStaging] = {}
        self._register(direct_caches, by_name=by_name)
        self._announce()

    @property
    def state(self) -> State:
        """idle, open (begun, not committed) or closed."""
        return self._state

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The registered layers, in the order of their staging state."""
        return self._layer_names

    @property
    def layers(self) -> dict[str, LayerStaging]:
        """Staging by layer name; empty once the window is closed."""
        return dict(self._layers)

    @property
    def staging_bytes(self) -> int:
        """Device memory of the staging rows."""
        return self.staging_rows * self.row_bytes

    @property
    def block_tables(self) -> dict[str, Tensor]:
        """By slot group, the block tables that stock attention kernels read with tail blocks: int32
        `[max_requests, columns]`; empty without. Persistent, for CUDA graphs to record."""
        return {} if self.redirection is None else dict(self.redirection.tables)

    @property
    def row_bytes(self) -> int:
        """Bytes of one token row, K and V of all layers."""
        return sum(batch.row_bytes for batch in self.tensors.batches)

    def begin(
        self,
        num_drafts: Tensor | None,
        query_start_loc: Tensor,
        slot_mapping: Tensor | Mapping[str, Tensor],
        *,
        block_table: Tensor | Mapping[str, Tensor] | None = None,
        seq_lens: Tensor | None = None,
        token_ids: Tensor | None = None,
        logit_starts: Tensor | None = None,
        one_certain: bool = False,
    ) -> None:
        """Open a window for one forward pass. Enqueues device work only.

        Args:
            num_drafts: `[R]` integer on the device: drafts at the end of each request's span; 0
                for prefill and plain decode. None where one of the last two arguments says it.
            query_start_loc: `[R + 1]` integer on the device, first token of each request.
            slot_mapping: `[T]` integer on the device, slot of each token (-1: none), padding
                included; with several slot groups, one a group name.
            block_table, seq_lens: needed with tail blocks: int32 `[>= R, columns]`, by group name
                as above; and `[R]` integer, tokens of each request with this step's.
            token_ids: `[>= T]` integer, the step's tokens: `commit` then needs no draft ids.
            logit_starts: `[R + 1]` integer on the device, the first logit of each request, which
                has one more than it has drafts.
            one_certain: the first token of each request is certain and all its others are drafts.
        Raises:
            WindowOrderError: a window is open, or this one was closed.
            WindowInputError: an argument does not fit; nothing changed.
        Counts that cannot be (more than max_drafts, no certain token, more rows than staging has)
        raise the device-side error flag: the window stages nothing and accepts nothing.
        """
        self._expect(State.IDLE, "begin")
        opening = opening_of(
            num_drafts, query_start_loc, slot_mapping, block_table=block_table, seq_lens=seq_lens,
            token_ids=token_ids, logit_starts=logit_starts, one_certain=one_certain,
        )  # fmt: skip
        form = opening.form
        if form != self._right_begin:
            opening.check(self._limits)
            self._right_begin = form
        self._fake = opening.fake
        self._open(opening, opening.requests, lambda: self._route(opening))

    def record_begin(self, name: Hashable, *args: Any, **kwargs: Any) -> None:
        """Prepare `begin_recorded(name)`, which is a `begin` with these very arguments, whatever
        the tensors hold by then; they must stay where they are. Replaces another one of that name.

        On CUDA what a begin enqueues is captured as a graph; where that fails, or settings want
        more in a begin than a graph can hold (poison, debug, mode `off`), it is enqueued each time.
        Synchronises, and reads the tensors as they are: every slot and block number in them must be
        one of the cache's. Counters are unchanged.

        Raises as `begin`.
        """
        self._expect(State.IDLE, "record_begin")
        opening = opening_of(*args, **kwargs)
        opening.check(self._limits)
        config, graph = self.config, None
        plain = self.tensors.staging and config.poison == "off" and not config.debug
        if plain and self._can_capture():
            kept = self.tensors.counters.clone()
            try:
                graph = capture(lambda: self._route(opening), device=opening.starts.device)
            except CAPTURE_ERRORS as error:  # NWOR goes on without
                log.warning("NWOR: %r begins without a graph: capture failed: %s", name, error)
            finally:
                self._drop()
                self.tensors.counters.copy_(kept)
        self._recorded[name] = Recorded(opening, graph)

    def begin_recorded(self, name: Hashable, requests: int | None = None) -> None:
        """`begin` as recorded under `name`. Enqueues device work only.

        requests: how many the step has, if fewer than the tensors have room for; the others must be
            empty spans at the end.

        Raises WindowOrderError as `begin`, WindowInputError for an unknown name or a number of
        requests that was not recorded.
        """
        self._expect(State.IDLE, "begin_recorded")
        recorded = self._recorded.get(name)
        if recorded is None:
            raise WindowInputError(
                f"begin_recorded: nothing is recorded as {name!r}, only {list(self._recorded)}: "
                "call record_begin first"
            )
        opening, graph = recorded
        most = opening.requests
        if requests is not None and not 1 <= requests <= most:
            raise WindowInputError(
                f"begin_recorded: expected 1 to {most} requests, as recorded, got {requests}"
            )
        self._fake = False
        if graph is None or torch.cuda.is_current_stream_capturing():  # graphs do not nest
            self._open(opening, requests or most, lambda: self._route(opening))
        else:
            self._open(opening, requests or most, graph.replay)

    def _can_capture(self) -> bool:
        return self.tensors.error.is_cuda

    def _open(self, opening: Opening, requests: int, run: Callable[[], None]) -> None:
        self._knows_ids = opening.ids is not None
        self._requests = requests
        if not self._fake:
            try:
                with span("nwor.begin"):
                    run()
            except BaseException:
                # Half a window would stage the rows of the next forward pass, and lose them.
                self._drop()
                raise
            window_opened()
        self._state = State.OPEN

    def commit(
        self,
        sampled_ids: Tensor,
        draft_ids: Tensor | None = None,
        num_sampled: Tensor | None = None,
        num_rejected: Tensor | None = None,
        *,
        form: Hashable = None,
    ) -> Committed:
        """Validate the sampler's ids and commit the accepted rows. Enqueues device work only.

        Arguments as for `nwor_compile.ops.accept_mask`; `draft_ids` has one id a draft of this
        window, request after request, possibly padded; None where `begin` was given the token ids.
        With `num_rejected` `[R]` too, the result has both counts as the committed rows allow them.
        Ids of a wrong shape, dtype or device are logged, accept nothing and count a fallback. The
        result is valid until the next `begin`.

        form: for callers in a hurry: where it equals that of the call before, the arguments have
        the shapes, dtypes and devices of that call, and are not looked at again.

        Raises WindowOrderError if no window is open.
        """
        self._expect(State.OPEN, "commit")
        if self._fake:
            return self._close_fake(sampled_ids, draft_ids)
        closed = False
        try:
            self._check_poison()
            result = self._validate(sampled_ids, draft_ids, num_sampled, num_rejected, form)
            closed = True  # validation ends the routing too
            self._log.committed(self.tensors, self._requests, result, self.layer_names)
        finally:
            self._finish(closed=closed)
        return result

    def pass_through(self, block_table: Tensor | Mapping[str, Tensor]) -> None:
        """With tail blocks, before a step without a window: attention reads the engine's own table.

        block_table: as for `begin`.
        Raises WindowOrderError while a window is open, WindowInputError without tail blocks.
        """
        self._expect(State.IDLE, "pass_through")
        if self.redirection is None:
            raise WindowInputError("pass_through: this window has no tail blocks")
        form, tables = form_of(block_table), by_group(block_table)
        if form != self._right_pass:
            self.redirection.check(tables)
            self._right_pass = form
        self.redirection.pass_through(tables)

    def caches_changed(self) -> None:
        """Say that committed rows were written by other means than steps of this window (loaded
        from elsewhere, moved to other blocks): tail blocks then keep nothing of the step before.
        Without tail blocks it does nothing.

        Raises WindowOrderError while a window is open.
        """
        self._expect(State.IDLE, "caches_changed")
        if self.redirection is not None:
            self.redirection.forget()

    def abort(self) -> None:
        """Drop the open window: its staged rows are never committed. The caches keep its certain
        rows, which are as if the step had run without drafts.

        Raises WindowOrderError if no window is open.
        """
        self._expect(State.OPEN, "abort")
        if not self._fake:
            self._finish()
        self._state = State.IDLE

    @contextlib.contextmanager
    def step(
        self,
        num_drafts: Tensor | None,
        query_start_loc: Tensor,
        slot_mapping: Tensor | Mapping[str, Tensor],
        **more: Any,
    ) -> Iterator[Window]:
        """`begin`, and `abort` if the block is left without a commit (an exception, say)."""
        self.begin(num_drafts, query_start_loc, slot_mapping, **more)
        try:
            yield self
        finally:
            if self._state is State.OPEN:
                self.abort()

    @property
    def sizes(self) -> list[int]:
        """Numbers of requests, powers of two and the most, by which kernels and graphs differ."""
        powers = [1 << i for i in range(self.max_requests.bit_length())]
        return sorted({*powers, self.max_requests})

    def warm_up(
        self,
        sizes: Iterable[int] | None = None,
        steps: Sequence[Mapping[str, Any]] = (),
        others: Callable[[], None] | None = None,
    ) -> None:
        """Compile kernels, and capture the SCV graphs for these numbers of requests (by default for
        `sizes`).

        steps: arguments of `begin`, of steps without drafts: what opens windows of their kinds is
            compiled too and, with tail blocks, what `pass_through` launches. Tensors are read as by
            `record_begin`.
        others: calls more kernels, of the layers that write to this window, say; they are compiled
            at the same time as its own, and not launched. Where no kernel is compiled it is not
            called.

        Synchronises; call it before the first window. Stages nothing; counters are unchanged.

        Raises WindowOrderError while a window is open, WindowInputError for an impossible size, and
        as `begin` for the steps.
        """
        self._expect(State.IDLE, "warm_up")
        sizes = self.sizes if sizes is None else list(sizes)
        if any(not 1 <= size <= self.max_requests for size in sizes):
            raise WindowInputError(
                f"sizes: expected 1 to {self.max_requests} (max_requests), got {sizes}"
            )
        openings = [opening_of(**step) for step in steps]
        for opening in openings:
            opening.check(self._limits)
        device = self.tensors.error.device
        if _compiles(device):
            from nwor_compile.ops.kernels.launch import compile_together

            def calls() -> None:
                self._call_kernels(sizes, openings)
                if others is not None:
                    others()

            compile_together(calls)
        if self.config.scv != "off":
            self.validator.warm_up(sizes)
        kept = self.tensors.counters.clone()
        try:
            for step in steps:
                self.begin(**step)
                self.abort()
                if self.redirection is not None:
                    self.pass_through(step["block_table"])
        finally:
            self.tensors.counters.copy_(kept)

    def _call_kernels(self, sizes: Iterable[int], openings: Iterable[Opening]) -> None:
        """Each kernel that such windows need, for `compile_together`: poison and log are not to
        look at windows that were never opened."""
        if self.config.scv != "off":
            self.validator.compile(sizes)
        for opening in openings:
            self._call_begin(opening)
            self._call_redirect(opening)
            if self.redirection is not None and opening.tables is not None:
                self.redirection.pass_through(opening.tables)
        self._drop()

    def mirror_counters(self, host: Tensor) -> None:
        """From now on leave a copy of the counters in `host`, like `tensors.counters`, after every
        commit; SCV graphs make it too. What an aborted window counted comes with the next commit.
        On CUDA it must be memory that the device can write to (pinned): a capture fails without,
        and no window is decided in one launch.

        Raises WindowOrderError while a window is open, if there is a mirror, and once there are SCV
        graphs, which would not know it; WindowInputError if it does not fit.
        """
        self._expect(State.IDLE, "mirror_counters")
        counters = self.tensors.counters
        if self.validator.graphs:
            raise WindowOrderError("mirror_counters: graphs were captured: call it before warm_up")
        if self.tensors.mirrors:
            raise WindowOrderError("mirror_counters: this window has a mirror: stop_mirror first")
        fits = (host.shape, host.dtype) == (counters.shape, torch.int64) and host.is_contiguous()
        if host.device.type != "cpu" or not fits:
            raise WindowInputError(
                f"mirror_counters: expected int64 {list(counters.shape)} on the host, contiguous, "
                f"got {host.dtype} {list(host.shape)}, strides {host.stride()}, on {host.device}"
            )
        self.tensors.mirrors.append(host)
        self.validator.prepared.clear()

    def stop_mirror(self) -> None:
        """Leave no more copies of the counters. SCV graphs, which make them, are dropped."""
        if self.tensors.mirrors:
            self.tensors.mirrors.clear()
            self.validator.forget()

    def metrics(self) -> Metrics:
        """The counters now. Synchronises with the device."""
        return read_metrics(
            self.tensors,
            row_bytes=self.row_bytes,
            fallbacks=self.fallbacks,
            vectorised=sum(self.validator.vectorised.values()),
        )

    def flush_log(self) -> None:
        """Print the debug lines of the last window, which otherwise wait for the next one.

        Does nothing while a window is open: its lines are not complete.
        """
        if self._state is not State.OPEN:
            self._log.flush()

    def close(self) -> None:
        """Take the layers out of the registry: graphs that were rewritten write directly again."""
        if self._state is State.OPEN:
            self.abort()
        self._log.flush()
        for cache in self._registered:
            unregister_layer(cache)
        for cache in self._direct:
            unregister_direct(cache)
        self._registered.clear()
        self._direct.clear()
        self._layers.clear()
        self._recorded.clear()
        self._state = State.CLOSED

    def _begin_plan(self, slots: list[Tensor]) -> BeginPlan:
        tensors, redirection = self.tensors, self.redirection
        return BeginPlan(
            tensors.routing,
            Kept(
                tensors.drafts, tensors.error, tensors.state, tensors.counters, tensors.rows,
                tensors.draft_ids, None if redirection is None else redirection.epoch,
            ),
            slots, self.max_drafts, self.capacity, self.staging_rows,
            None if redirection is None else redirection.layout,
        )  # fmt: skip

    def _register(self, direct_caches: Iterable[Tensor], *, by_name: bool) -> None:
        try:
            for batch in self.tensors.batches:
                for index, name in enumerate(batch.names):
                    staging = LayerStaging(
                        name=name,
                        key=batch.staged_keys[index],
                        value=batch.staged_values[index],
                        state=batch.state[index],
                        routing=self.tensors.routing,
                        block_table=self.block_tables.get(batch.group),
                    )
                    self._layers[name] = staging
                    if by_name:
                        continue
                    register_layer(batch.key_caches[index], batch.value_caches[index], staging)
                    self._registered.append(batch.key_caches[index])
            for cache in direct_caches:
                register_direct(cache)
                self._direct.append(cache)
        except BaseException:
            self.close()
            raise

    def _announce(self) -> None:
        names = self.layer_names
        log.info(
            "NWOR mode=%s scv=%s debug=%s poison=%s: staging %d rows (%d requests x %d drafts), "
            "%d bytes, %d layers: %s",
            self.config.mode, self.config.scv, self.config.debug, self.config.poison,
            self.staging_rows, self.max_requests, self.max_drafts, self.staging_bytes, len(names),
            ", ".join(names),
        )  # fmt: skip

    def _expect(self, state: State, call: str) -> None:
        if self._state is state:
            return
        advice = {
            State.OPEN: "a window is open: commit() or abort() it first",
            State.IDLE: "no window is open: begin() one first",
            State.CLOSED: "this Window was closed: make a new one",
        }[self._state]
        raise WindowOrderError(f"{call}: {advice}")

    def _route(self, opening: Opening) -> None:
        tensors, routing = self.tensors, self.tensors.routing
        self._log.flush()
        self._call_begin(opening)
        if not tensors.staging:  # every row is certain, those that would be drafts too
            tensors.counters[COUNTERS["certain"]] += (routing.row_map >= 0).sum()
            clear(routing)
        # By the routing that holds now: in mode `off` there are no drafts to lead to.
        self._call_redirect(opening)
        if self.config.poison != "off":
            poison_open_slots(tensors.batches, self.config.poison, self.kv_cache_dtype)
        self._log.begun(tensors, self._requests)

    def _call_begin(self, opening: Opening) -> None:
        pick(BEGIN, self.tensors.error.device)(
            self.opening, opening.counts, opening.starts,
            [opening.slots[group] for group in self.groups], opening.lengths, opening.ids,
        )  # fmt: skip

    def _call_redirect(self, opening: Opening) -> None:
        tables, lengths = opening.tables, opening.lengths
        if self.redirection is not None and tables is not None and lengths is not None:
            self.redirection.redirect(tables, lengths, opening.starts)

    def _check_poison(self) -> None:
        """Invariant 1 in debug: the open slots of every layer still hold the poison."""
        if self.config.poison != "off":
            touched = touched_early(self.tensors.batches, self.config.poison, self.kv_cache_dtype)
            self.tensors.error.bitwise_or_(touched)

    def _validate(
        self,
        sampled_ids: Tensor,
        draft_ids: Tensor | None,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
        form: Hashable,
    ) -> Committed:
        given = (sampled_ids, draft_ids, num_sampled, num_rejected)
        short = None if form is None else (self._requests, self._knows_ids, form)
        if short is None or short != self._said_commit:
            whole = (self._requests, self._knows_ids, *[form_of(each) for each in given])
            if whole != self._right_commit:
                known = Expected(
                    self._requests, self.capacity, self.tensors.error.device, self._knows_ids
                )
                problem = problem_of(known, *given)
                if problem:
                    return self._fall_back(problem, draft_ids, num_sampled, num_rejected)
                self._right_commit = whole
                columns = sampled_ids.shape[1]
                # The counts are on the device; this many drafts are the most that one request can
                # have.
                ids = self.capacity if draft_ids is None else draft_ids.shape[0]
                longest = min(self.max_drafts, ids)
                if columns < longest + 1:
                    self._log.warn_columns(columns, longest)
            self._said_commit = short
        if self.config.scv == "off":
            return host_loop(self.tensors, *given)
        return self.validator(*given, form=self._right_commit)

    def _fall_back(
        self,
        problem: str,
        draft_ids: Tensor | None,
        num_sampled: Tensor | None,
        num_rejected: Tensor | None,
    ) -> Committed:
        log.error("NWOR: %s. This window accepts nothing.", problem)
        self.fallbacks += 1
        device = self.tensors.error.device
        rows = min(draft_ids.numel(), self.capacity) if isinstance(draft_ids, Tensor) else 0
        counts = [
            count if isinstance(count, Tensor) and list(count.shape) == [self._requests] else None
            for count in (num_sampled, num_rejected)
        ]
        return finish(
            self.tensors,
            torch.zeros(rows, dtype=torch.bool, device=device),
            torch.zeros(self._requests, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
            *counts,
        )

    def _close_fake(self, sampled_ids: Tensor, draft_ids: Tensor | None) -> Committed:
        self._state = State.IDLE
        rows = self._requests * self.max_drafts if draft_ids is None else draft_ids.shape[0]
        return Committed(
            accepted=sampled_ids.new_zeros(self._requests, dtype=torch.int32),
            mask=sampled_ids.new_zeros(rows, dtype=torch.bool),
            error=sampled_ids.new_zeros(1, dtype=torch.int32),
        )

    def _finish(self, *, closed: bool = False) -> None:
        """Back to direct mode: a forward pass outside a window stages nothing."""
        if not closed:
            self._drop()
        window_closed()
        self._state = State.IDLE

    def _drop(self) -> None:
        """End a step that was not committed: its routing, and what tail blocks would keep of it."""
        clear(self.tensors.routing)
        if self.redirection is not None:
            self.redirection.forget()


def _compiles(device: torch.device) -> bool:
    """Whether kernels are compiled for `device`, and not interpreted."""
    return device.type == "cuda" and uses_triton(device)
