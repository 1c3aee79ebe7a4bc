"""Which requests a long run makes, when they come and when they are aborted: by step number alone.

Two engines that are driven by the same plan, and give the same tokens, go through the same steps.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """index: in the plan. prompt: ids. tokens: how many new ones. temperature 0: greedy."""

    index: int
    prompt: list[int]
    tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Plan:
    """Requests on passages of a text, each of its own place and length.

    Args:
        tokens: new tokens of all requests together, at least; 0: requests without end.
        in_flight: so many live at a time; a finished or aborted one is replaced at the next step.
        prompt, length: shortest and longest prompt and answer.
        mixed: every second request is greedy, whatever the temperature.
        chance: of each live request to be aborted before a step.
        storm, share: before every `storm`-th step (0: none), each live request is aborted with
            this probability.
        follow: name of an earlier run whose last `followed` answers are continued: each prompt
            gets the first half to all of its answer. Else empty.
        logprobs: so many a token are reported.
    """

    tokens: int
    in_flight: int = 64
    prompt: tuple[int, int] = (20, 170)
    length: tuple[int, int] = (200, 600)
    temperature: float = 0.0
    mixed: bool = False
    seed: int = 0
    chance: float = 0.0
    storm: int = 0
    share: float = 0.5
    follow: str = ""
    followed: int = 96
    logprobs: int = 0

    @classmethod
    def of(cls, values: dict[str, Any]) -> Plan:
        """From JSON."""
        arguments = dict(values)
        for name in ("prompt", "length"):
            if name in values:
                arguments[name] = tuple(values[name])
        return cls(**arguments)

    def requests(
        self, text: Sequence[int], earlier: Sequence[tuple[list[int], list[int]]] = ()
    ) -> Iterator[Request]:
        """In the order of their coming. text: ids. earlier: prompts and answers to continue.

        Raises ValueError for a text shorter than the longest prompt.
        """
        if len(text) <= self.prompt[1]:
            raise ValueError(f"a text of {len(text)} ids has no passage of {self.prompt[1]}")
        chooser = random.Random(self.seed)
        left = self.tokens
        for index in itertools.count():
            if self.follow:
                if index == len(earlier):
                    return
                prompt, answer = earlier[index]
                prompt = prompt + answer[: chooser.randint(len(answer) // 2, len(answer))]
            else:
                size = chooser.randint(*self.prompt)
                start = chooser.randrange(len(text) - size)
                prompt = list(text[start : start + size])
            tokens = chooser.randint(*self.length)
            seed = chooser.randrange(2**31)
            temperature = 0.0 if self.mixed and index % 2 else self.temperature
            yield Request(index, prompt, tokens, temperature, seed)
            left -= tokens
            if self.tokens and left <= 0 and not self.follow:
                return


@dataclass
class Aborts:
    """Draws which live requests end before a step, in their order of coming."""

    plan: Plan
    _chooser: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._chooser = random.Random(f"aborts {self.plan.seed}")

    def before(self, step: int, live: Sequence[int]) -> list[int]:
        """Indices of those to abort."""
        plan = self.plan
        if not plan.chance and not plan.storm:
            return []
        storm = bool(plan.storm) and step % plan.storm == plan.storm - 1
        chance = plan.share if storm else plan.chance
        return [index for index in live if self._chooser.random() < chance]
