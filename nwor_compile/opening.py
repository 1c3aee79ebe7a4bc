"""What a window is opened with: the step's tensors, what must hold of them, and openings that are
recorded once and repeated.

In small models a step waits for the host, and to hand over five tensors, look at them and launch
two kernels takes longer there than the kernels do. An engine whose tensors stay where they are, as
CUDA graphs need them to, can have an opening recorded: repeating it is one graph replay.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nwor_compile.errors import WindowInputError
from nwor_compile.tail_blocks import Redirection


class Limits(NamedTuple):
    """What an opening must fit: sizes of the window, its slot groups, and where its tensors are."""

    max_requests: int
    max_tokens: int
    groups: tuple[str, ...]
    device: torch.device
    redirection: Redirection | None


class Opening(NamedTuple):
    """The arguments of `Window.begin`, with one tensor a slot group where there may be several.

    counted: which argument says how many drafts there are: num_drafts, logit_starts (both in
        `counts`) or one_certain.
    """

    counted: str
    counts: Tensor | None
    starts: Tensor
    slots: Mapping[str, Tensor]
    tables: Mapping[str, Tensor] | None
    lengths: Tensor | None
    ids: Tensor | None

    @property
    def requests(self) -> int:
        """Requests of the step."""
        return self.starts.shape[0] - 1

    @property
    def fake(self) -> bool:
        """Whether this is a step of a compiler, without data."""
        return isinstance(self.starts, FakeTensor)

    @property
    def form(self) -> Hashable:
        """All that `check` looks at: openings of one form are right or wrong together."""
        return (
            self.counted, form_of(self.counts), form_of(self.starts), form_of(self.slots),
            form_of(self.tables), form_of(self.lengths), form_of(self.ids),
        )  # fmt: skip

    def check(self, limits: Limits) -> None:
        """Raise WindowInputError unless every tensor has a shape, dtype and device that fits."""
        more = int(self.counted == "logit_starts")
        if self.counts is None:
            name, counted, more = "query_start_loc", self.starts, 1
        else:
            name, counted = self.counted, self.counts
        requests = counted.shape[0] - more if counted.dim() == 1 else -1
        if not 1 <= requests <= limits.max_requests:
            raise WindowInputError(
                f"{name}: expected shape [{1 + more} to {limits.max_requests + more}] "
                f"(max_requests{' and one' if more else ''}), got {list(counted.shape)}"
            )
        if list(self.starts.shape) != [requests + 1]:
            raise WindowInputError(
                f"query_start_loc: expected shape [{requests + 1}], got {list(self.starts.shape)}"
            )
        self._check_slots(limits)
        self._check_tails(limits, requests)
        tokens = max(mapping.shape[0] for mapping in self.slots.values())
        if self.ids is not None and (self.ids.dim() != 1 or self.ids.shape[0] < tokens):
            raise WindowInputError(
                f"token_ids: expected [at least {tokens}] (one a slot), got {list(self.ids.shape)}"
            )
        integers = {
            self.counted: self.counts, "query_start_loc": self.starts, "seq_lens": self.lengths,
            "token_ids": self.ids,
        }  # fmt: skip
        for given, tensor in integers.items():
            if tensor is not None:
                check_integer(given, tensor, limits.device)

    def _check_slots(self, limits: Limits) -> None:
        names, most = list(limits.groups), limits.max_tokens
        if set(self.slots) != set(names):
            raise WindowInputError(
                f"slot_mapping: expected one for each of {names}, got {list(self.slots)}"
            )
        for name in names:
            mapping = self.slots[name]
            check_integer(f"slot_mapping[{name}]", mapping, limits.device)
            if mapping.dim() != 1 or mapping.shape[0] > most:
                raise WindowInputError(
                    f"slot_mapping[{name}]: expected [at most {most}] (max_tokens), got "
                    f"{list(mapping.shape)}"
                )

    def _check_tails(self, limits: Limits, requests: int) -> None:
        if limits.redirection is None:
            return
        limits.redirection.check(self.tables, requests)
        if self.lengths is None or list(self.lengths.shape) != [requests]:
            raise WindowInputError(
                f"seq_lens: a window with tail blocks needs the lengths [{requests}], got "
                f"{None if self.lengths is None else list(self.lengths.shape)}"
            )


def opening_of(
    num_drafts: Tensor | None,
    query_start_loc: Tensor,
    slot_mapping: Tensor | Mapping[str, Tensor],
    *,
    block_table: Tensor | Mapping[str, Tensor] | None = None,
    seq_lens: Tensor | None = None,
    token_ids: Tensor | None = None,
    logit_starts: Tensor | None = None,
    one_certain: bool = False,
) -> Opening:
    """The opening that these arguments of `Window.begin` ask for; unchecked.

    Raises WindowInputError unless one of num_drafts, logit_starts and one_certain is given.
    """
    given = {"num_drafts": num_drafts, "logit_starts": logit_starts}
    counted = [name for name, counts in given.items() if counts is not None]
    counted += ["one_certain"] if one_certain else []
    if len(counted) != 1:
        raise WindowInputError(
            "begin: expected one of num_drafts, logit_starts and one_certain, got "
            f"{' and '.join(counted) or 'none'}"
        )
    return Opening(
        counted[0], given.get(counted[0]), query_start_loc, by_group(slot_mapping),
        None if block_table is None else by_group(block_table), seq_lens, token_ids,
    )  # fmt: skip


def by_group(given: Tensor | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """One tensor a slot group; a single one is that of the default group."""
    return {"kv": given} if isinstance(given, Tensor) else given


class Recorded(NamedTuple):
    """An opening to be repeated with whatever its tensors hold by then.

    graph: None where it could not be captured, or is not to be: it is then run again.
    """

    opening: Opening
    graph: torch.cuda.CUDAGraph | None


def check_integer(name: str, tensor: Tensor, device: torch.device) -> None:
    """Raise WindowInputError unless `tensor` holds int32 or int64 on `device`."""
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.device != device:
        raise WindowInputError(
            f"{name}: expected int32 or int64 on {device}, got {tensor.dtype} on {tensor.device}"
        )


_MAPPINGS = (dict, Mapping)  # the first is found much faster


def form_of(argument: object) -> tuple[object, ...]:
    """What can be seen of an argument without its data."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.dtype, argument.device
    if isinstance(argument, _MAPPINGS):
        return tuple([(name, form_of(value)) for name, value in argument.items()])
    return (type(argument),)
