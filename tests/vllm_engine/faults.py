"""Phases in which something goes wrong on purpose: faults that must cost drafts and no tokens, and
mistakes that the tests must be able to see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from vllm import SamplingParams

STEPS_AT_MOST = 200


class Faults:
    """Mixed into `Phases`, whose members it uses."""

    llm: Any
    worker: Any
    audit: Any
    generate: Any
    audited: Any
    recompute: Any

    @property
    def hooks(self) -> Any:
        """NWOR's hooks on the model runner; None in mode off."""
        return getattr(self.worker, "nwor", None)

    @property
    def context(self) -> dict[str, Any]:
        """The attention layers by name."""
        return dict(self.worker.model_runner.compilation_config.static_forward_context)

    @contextlib.contextmanager
    def replaced(self, owner: Any, name: str, value: Any) -> Iterator[None]:
        """`owner.name` is `value` inside."""
        original = getattr(owner, name)
        setattr(owner, name, value)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def phase_naive(self) -> dict[str, Any]:
        """Staged, but attention reads the cache alone: what everybody tries first."""
        window = self.hooks.window
        begin = window.begin

        def blind(*args: Any, **kwargs: Any) -> None:
            begin(*args, **kwargs)
            window.redirection.pass_through(kwargs["block_table"])

        with self.replaced(window, "begin", blind):
            return self.generate()

    @contextlib.contextmanager
    def _staged_by(self, layer: Any, instead: Any) -> Iterator[None]:
        """`instead(write, staging, cache, key, value, slots)` does the staged writes of `layer`."""
        from nwor_compile.vllm_adapter import staged_write

        stage_write = staged_write.stage_write

        def chosen(name: str, which: Any, cache: Any, staging: Any) -> Any:
            write = stage_write(name, which, cache, staging)
            if which is not layer:
                return write
            return lambda *rows: instead(write, staging, cache, *rows)

        with self.replaced(staged_write, "stage_write", chosen):
            yield

    @contextlib.contextmanager
    def _poisoned(self) -> Iterator[None]:
        window = self.hooks.window
        config = window.config.model_copy(update={"poison": "nan"})
        with self.replaced(window, "config", config):
            yield

    def phase_poison(self) -> dict[str, Any]:
        with self._poisoned():
            return self.generate()

    @contextlib.contextmanager
    def _early_write(self) -> Iterator[None]:
        """The target's second layer writes its draft rows at once, besides staging them."""
        layer = self.context[self.hooks.window.layer_names[1]]

        def early(write: Any, staging: Any, cache: Any, key: Any, value: Any, slots: Any) -> None:
            layer.impl.do_kv_cache_update(layer, key, value, cache, slots)
            write(key, value, slots)

        with self._staged_by(layer, early):
            yield

    def phase_early_write(self) -> dict[str, Any]:
        with self._early_write(), self.audited() as audit:
            return {**self.generate(), "audit": audit}

    def phase_early_write_poisoned(self) -> dict[str, Any]:
        with self._early_write(), self._poisoned():
            return self.generate()

    def phase_tampered(self) -> dict[str, Any]:
        """Somebody else writes, every third step: one row of a block that no request owns, and one
        that is computed. And no layer but the first commits the keys that were accepted."""
        runner = self.worker.model_runner
        forward, calls = runner._model_forward, [0]
        cache = self.context[self.hooks.window.layer_names[0]].kv_cache
        batches = self.hooks.window.tensors.batches
        table = runner.input_batch.block_table[0].block_table
        known = runner.vllm_config.cache_config.num_gpu_blocks

        def tampering(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            calls[0] += 1
            if calls[0] % 3 == 0:
                cache[known - 1, :, 7] += 1.0  # the last that the scheduler knows
                cache[int(table.gpu[0, 0]), :, 2] += 1.0
            return result

        commit = self.hooks.window.commit

        def lossy(*args: Any) -> Any:
            caches = [[c.clone() for c in batch.key_caches[1:]] for batch in batches]
            done = commit(*args)
            for batch, kept in zip(batches, caches, strict=True):
                for now, before in zip(batch.key_caches[1:], kept, strict=True):
                    now.copy_(before)
            return done

        with (
            self.replaced(runner, "_model_forward", tampering),
            self.replaced(self.hooks.window, "commit", lossy),
            self.audited() as audit,
        ):
            result = self.generate()
        rows = dict(self.audit.rows)
        return {**result, "audit": audit, "recomputed": self.recompute(result, rows)}

    def phase_error_flag(self) -> dict[str, Any]:
        """The error flag is up in every second window."""
        window = self.hooks.window
        commit, calls = window.commit, [0]

        def faulty(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] % 2:
                window.tensors.error.fill_(1)
            return commit(*args)

        with self.replaced(window, "commit", faulty), self.audited() as audit:
            return {**self.generate(), "audit": audit}

    def phase_one_layer_fails(self) -> dict[str, Any]:
        """One layer of four loses its drafts: nothing may be committed in any."""
        layer = self.context[self.hooks.window.layer_names[2]]

        def lossy(write: Any, staging: Any, cache: Any, *rows_given: Any) -> None:
            write(*rows_given)
            rows = staging.routing.row_map
            staging.key[rows[rows >= 0].long()] = torch.nan
            staging.state.zero_()

        with self._staged_by(layer, lossy), self.audited() as audit:
            return {**self.generate(), "audit": audit}

    def phase_aborts(self) -> dict[str, Any]:
        """Two requests are aborted, one between steps and one inside its window, after the forward
        pass and before the commit. Two others take their blocks. What a window staged is NaN for
        the next, but for committed rows, which its tail blocks keep: so a row read or committed for
        another would be seen."""
        engine = self.llm.llm_engine
        window, runner = self.hooks.window, self.worker.model_runner
        from phases import prompts

        texts = prompts()[:4]

        def add(name: str, text: str, limit: int) -> None:
            params = SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=True)
            engine.add_request(name, text, params)

        for name, text in zip("abcd", texts, strict=True):
            add(name, text, 12 if name in "bd" else 90)  # a and c would go on for long
        begin, commit, forward = window.begin, window.commit, runner._model_forward
        layout = window.redirection.layout
        inside = {"abort": False, "open": 0}
        kept: list[int] = []  # committed rows in each request's first tail block

        def noting(*args: Any, **kwargs: Any) -> Any:
            place = window.tensors.routing.tail_start % layout.block_size
            drafts = window.tensors.drafts.clone()
            result = commit(*args, **kwargs)
            requests = result.accepted.shape[0]
            rows = (place[:requests] + result.accepted).clamp(max=layout.block_size)
            kept[:] = torch.where(drafts[:requests] > 0, rows, 0).tolist()
            return result

        def forgetful(*args: Any, **kwargs: Any) -> None:
            for batch in window.tensors.batches:
                for staged in (*batch.staged_keys, *batch.staged_values):
                    gone = torch.ones(staged.shape[0], dtype=torch.bool)
                    for r, rows in enumerate(kept):
                        gone[r * layout.rows : r * layout.rows + rows] = False
                    staged[gone] = torch.nan
            kept.clear()
            begin(*args, **kwargs)

        def aborting(*args: Any, **kwargs: Any) -> Any:
            result = forward(*args, **kwargs)
            if inside["abort"] and window.state.value == "open":
                inside["abort"] = False
                inside["open"] += 1
                engine.abort_request(["c"])
            return result

        done: dict[str, list[int]] = {}
        with (
            self.replaced(window, "begin", forgetful),
            self.replaced(window, "commit", noting),
            self.replaced(runner, "_model_forward", aborting),
            self.audited() as audit,
        ):
            for step in range(STEPS_AT_MOST):
                if step == 6:
                    engine.abort_request(["a"])
                    add("after_a", texts[2], 12)
                elif step == 8:
                    inside["abort"] = True
                    add("after_c", texts[0], 12)
                if not engine.has_unfinished_requests():
                    break
                for out in engine.step():
                    if out.finished:
                        done[out.request_id] = list(out.outputs[0].token_ids)
        names = sorted(done)
        ids = [done[name] for name in names]
        return {"ids": ids, "names": names, "audit": audit, "inside_windows": inside["open"]}
