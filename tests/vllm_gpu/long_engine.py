"""One engine of a long run, driven by JSON lines: `long_engine.py OPTIONS.json`.

Options: those of `engine_process.py`. Its process and its facts are that script's too. Command:
name; plan: of `long_plan.Plan`; every: steps between two looks at the cache (0: none); limit: no
longer than so many seconds; sample_every: seconds between two samples of memory (0: none).

The engine is stepped here, so requests come and are aborted between two steps, by step number.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import engine_process
import long_memory
from engine_process import COUNTED, Engine
from long_plan import Aborts, Plan, Request
from matrix_engine import TEXT, TOKENIZER


class LongEngine(Engine):
    """An engine whose cache is watched through every step."""

    counted = {  # noqa: RUF012
        **COUNTED,
        "vllm:spec_decode_num_draft_tokens": "vllm_drafts",
        "vllm:spec_decode_num_accepted_tokens": "vllm_accepted",
    }

    def __init__(self, *args: Any) -> None:
        import torch
        from tokenizers import Tokenizer

        if not torch.cuda.is_available():
            from nwor_compile.vllm_adapter import cpu_sampling

            cpu_sampling.repair()  # no two seeded runs are equal without, NWOR or not
        super().__init__(*args)
        blocks = engine_process._blocks(self.llm)
        self.watch = self.llm.collective_rpc(_long_watch, args=(blocks, self.drafts))[0]
        self.text = Tokenizer.from_file(str(TOKENIZER)).encode(TEXT.read_text()).ids
        self._earlier: dict[str, list[tuple[list[int], list[int]]]] = {}

    def generate(self, command: dict[str, Any]) -> dict[str, Any]:
        """Drive the engine through a plan; see `Drive.result` and `CacheShadow.result`."""
        plan = Plan.of(command["plan"])
        before = self._counters()
        self.audit.begin(audit=False)
        self.watch.begin(command["every"])
        earlier = self._earlier.get(plan.follow, [])[-plan.followed :]
        drive = Drive(self.llm.llm_engine, plan, plan.requests(self.text, earlier))
        seconds = drive.run(command["limit"], command["sample_every"])
        after = self._counters()
        watched = self.watch.end()
        self._earlier[command["name"]] = [
            (drive.requests[index].prompt, ids) for index, ids in sorted(drive.ids.items())
        ]
        counted = {name: int(after[name] - before[name]) for name in self.counted.values()}
        return {
            **drive.result(),
            "seconds": round(seconds, 1),
            **counted,
            "positions": [
                int(b - a) for a, b in zip(before["positions"], after["positions"], strict=True)
            ],
            "nwor": _difference(before["nwor"], after["nwor"]),
            "watched": watched,
            "graphs": self.audit.end()["graphs"],
        }


class Drive:
    """The engine's steps under one plan."""

    def __init__(self, engine: Any, plan: Plan, coming: Any) -> None:
        self.engine, self.plan, self.coming = engine, plan, coming
        self.aborts = Aborts(plan)
        self.endless = not plan.tokens and not plan.follow
        self.live: dict[int, list[int]] = {}
        self.requests: dict[int, Request] = {}
        self.ids: dict[int, list[int]] = {}
        self.scores: dict[int, list[tuple[float, float]]] = {}
        self.ended: list[tuple[int, str, int, int, str]] = []
        self.memory: list[dict[str, Any]] = []
        self.step = self.tokens = 0
        self.cut = False

    def run(self, seconds: float, sample_every: float) -> float:
        """Until the plan ends or time does; then what lives is aborted. Returns the seconds."""
        start, sampled = time.monotonic(), -1e9
        while self._fill() or self.live:
            now = time.monotonic() - start
            if now >= seconds:
                self.cut = True
                break
            if sample_every and now - sampled >= sample_every:
                self.memory.append(long_memory.sample(now, self.step))
                sampled = now
            if gone := self.aborts.before(self.step, list(self.live)):
                self._abort(gone, "aborted")
                self._fill()
            for output in self.engine.step():
                self._take(output)
            self.step += 1
        self._abort(list(self.live), "cut")
        # A step may still be under way that was scheduled before its requests ended.
        self.engine.step()
        return time.monotonic() - start

    def _fill(self) -> bool:
        """Add requests up to the plan's number; whether any came."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        came = False
        while len(self.live) < self.plan.in_flight:
            request = next(self.coming, None)
            if request is None:
                break
            parameters = SamplingParams(
                temperature=request.temperature, max_tokens=request.tokens, ignore_eos=True,
                seed=request.seed, detokenize=False, logprobs=self.plan.logprobs or None,
                output_kind=RequestOutputKind.DELTA,
            )  # fmt: skip
            prompt = TokensPrompt(prompt_token_ids=request.prompt)
            self.engine.add_request(str(request.index), prompt, parameters)
            self.live[request.index] = []
            if not self.endless:
                self.requests[request.index] = request
            came = True
        return came

    def _take(self, output: Any) -> None:
        index, new = int(output.request_id), output.outputs[0]
        if index not in self.live:
            return
        self.live[index] += new.token_ids
        self.tokens += len(new.token_ids)
        for chosen, at in zip(new.token_ids, new.logprobs or (), strict=False):
            best = sorted((entry.logprob for entry in at.values()), reverse=True)
            score = (round(at[chosen].logprob, 5), round(best[0] - best[1], 5))
            self.scores.setdefault(index, []).append(score)
        if output.finished:
            self._end(index, "finished")

    def _abort(self, indices: list[int], why: str) -> None:
        for index in indices:
            # One at a time: of several, the scheduler frees the blocks in the order of a set.
            self.engine.abort_request([str(index)])
            self._end(index, why)

    def _end(self, index: int, why: str) -> None:
        ids = self.live.pop(index)
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:12]
        self.ended.append((index, why, self.step, len(ids), digest))
        if not self.endless:
            self.ids[index] = ids

    def result(self) -> dict[str, Any]:
        """ended: index, how (finished, aborted, or cut by the time), step, tokens and hash of each
        request, in the order of their ends. ids, prompts, scores: by request, but for endless
        plans; a score is the log probability of a token, and the best one's lead over the second.
        """
        return {
            "calls": self.step,
            "tokens": self.tokens,
            "cut": self.cut,
            "ended": self.ended,
            "ids": [ids for _, ids in sorted(self.ids.items())],
            "prompts": [self.requests[index].prompt for index in sorted(self.ids)],
            "scores": [scores for _, scores in sorted(self.scores.items())],
            "memory": self.memory,
        }


def _long_watch(worker: Any, blocks: int, drafts: int) -> Any:
    from long_watch import LongWatch

    return LongWatch(worker, blocks, drafts)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Of counters; lists by place. Rates are left out."""
    found: dict[str, Any] = {}
    for name, value in after.items():
        if isinstance(value, int):
            found[name] = value - before[name]
        elif isinstance(value, list) and all(isinstance(v, int) for v in value):
            found[name] = [b - a for a, b in zip(before[name], value, strict=True)]
    return found


if __name__ == "__main__":
    engine_process.main(LongEngine)
