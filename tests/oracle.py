"""A dense oracle for the ops: per-request Python loops, float64, dictionaries instead of paging.

It shares no code with `nwor_compile.ops`, and takes the long way on purpose: fp8 is rounded by
searching the table of all 256 codes, a cache is `{slot: (key row, value row)}`, attention visits
one token and one head at a time, acceptance is a loop on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

# K and V of one token as a cache stores them, `[kv_heads, head_size]`: fp8 as codes (uint8).
Row = tuple[Tensor, Tensor]
Rows = dict[int, Row]

# name: (exponent bits, mantissa bits, bias, has infinities)
_FP8 = {
    "fp8": (4, 3, 7, False),
    "fp8_e4m3": (4, 3, 7, False),
    "fp8_e5m2": (5, 2, 15, True),
}
NAN_CODE = 0x7F  # a NaN in both fp8 formats

# How many `Attention.unit`s the float32 reference may be off. Measured over 700 random batches of
# all dtypes and layouts: at most 0.73 in float32 and 1.00 in 16 bits, where the rounding of the
# output is the whole unit. Three leaves room for another order of summation on other hardware;
# zeroed tail values gave at least 210 (bfloat16), 2000 (float16) and 86000 (float32).
ERROR_UNITS = 3.0


@cache
def fp8_table(kind: str) -> Tensor:
    """The value of each of the 256 codes, float64, from the definition of the bits."""
    exponent_bits, mantissa_bits, bias, has_inf = _FP8[kind]
    values = []
    for code in range(256):
        sign = -1.0 if code & 0x80 else 1.0
        exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
        mantissa = code & ((1 << mantissa_bits) - 1)
        last = exponent == (1 << exponent_bits) - 1
        if has_inf and last:
            value = math.nan if mantissa else math.inf
        elif last and mantissa == (1 << mantissa_bits) - 1:
            value = math.nan
        elif exponent == 0:
            value = mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias)
        else:
            value = (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)
        values.append(sign * value)
    return torch.tensor(values, dtype=torch.float64)


def fp8_codes(values: Tensor, kind: str) -> Tensor:
    """The nearest finite code of each value (uint8), ties to the even code, NaN to NAN_CODE."""
    positive = fp8_table(kind)[:128]
    positive = positive[positive.isfinite()]  # codes 0 .. n-1, ascending
    wide = values.double().flatten()
    distance = (wide.abs().clamp(max=float(positive[-1])).unsqueeze(1) - positive).abs()
    nearest = distance == distance.min(dim=1, keepdim=True).values
    is_odd = torch.arange(len(positive)) % 2
    code = torch.where(nearest, is_odd, 2).argmin(dim=1)
    code = code + 128 * torch.signbit(wide)
    code = torch.where(wide.isnan(), NAN_CODE, code)
    return code.to(torch.uint8).view(values.shape)


def head_scales(scale: Tensor | None, heads: int) -> list[float]:
    if scale is None:
        return [1.0] * heads
    values = scale.flatten().tolist()
    return values * heads if len(values) == 1 else values


def encode(row: Tensor, kv_cache_dtype: str, scale: Tensor | None) -> Tensor:
    """A model row `[kv_heads, head_size]` as the cache stores it."""
    row = row.detach().cpu()
    if kv_cache_dtype == "auto":
        return row.clone()
    # The quotient is a float32 number by definition; the search then is exact.
    heads = [
        fp8_codes(row[h].float() / torch.tensor(s, dtype=torch.float32), kv_cache_dtype)
        for h, s in enumerate(head_scales(scale, row.shape[0]))
    ]
    return torch.stack(heads)


def decode(row: Tensor, kv_cache_dtype: str, scale: Tensor | None) -> Tensor:
    """A stored row as float64."""
    if kv_cache_dtype == "auto":
        return row.double()
    wide = fp8_table(kv_cache_dtype)[row.long()]
    return torch.stack([wide[h] * s for h, s in enumerate(head_scales(scale, row.shape[0]))])


def write(
    rows: Rows,
    key: Tensor,
    value: Tensor,
    slots: Sequence[int],
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """The direct write: every token whose slot exists in `rows`."""
    for token, slot in enumerate(slots):
        if slot in rows:
            rows[slot] = (
                encode(key[token], kv_cache_dtype, k_scale),
                encode(value[token], kv_cache_dtype, v_scale),
            )


def stage(
    rows: Rows,
    staging: Rows,
    capacity: int,
    key: Tensor,
    value: Tensor,
    slots: Sequence[int],
    row_map: Sequence[int],
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[int, bool]:
    """Certain tokens to `rows`, drafts to `staging`; how many were staged, and overflow."""
    staged, overflow = 0, False
    for token, slot in enumerate(slots):
        row = (
            encode(key[token], kv_cache_dtype, k_scale),
            encode(value[token], kv_cache_dtype, v_scale),
        )
        place = row_map[token]
        if place < 0:
            if slot in rows:
                rows[slot] = row
        elif place < capacity:
            staging[place] = row
            staged += 1
        else:
            overflow = True
    return staged, overflow


@dataclass(frozen=True)
class Verdict:
    mask: list[bool]
    accepted: list[int]
    mismatch: bool


def accept(
    sampled: Sequence[Sequence[int]],
    draft_ids: Sequence[int],
    cumulative: Sequence[int],
    num_sampled: Sequence[int] | None = None,
) -> Verdict:
    """What a host loop over requests accepts; it never looks at an id past the sampler's count."""
    mask = [False] * len(draft_ids)
    accepted, mismatch, start = [], False, 0
    for r, end in enumerate(cumulative):
        ids = list(sampled[r])
        if num_sampled is None:
            count = next((i for i, token in enumerate(ids) if token < 0), len(ids))
        else:
            count = max(0, min(num_sampled[r], len(ids)))
        ids = ids[:count]
        drafts = list(draft_ids[start:end])
        prefix = 0
        while prefix < len(drafts) and prefix < len(ids) and drafts[prefix] == ids[prefix]:
            prefix += 1
        taken = max(0, min(prefix, count - 1))
        mismatch = mismatch or prefix < count - 1
        accepted.append(taken)
        for j in range(taken):
            mask[start + j] = True
        start = end
    return Verdict(mask, accepted, mismatch)


def commit(
    rows: Rows, staging: Rows, slots: Sequence[int], mask: Sequence[bool], error: bool
) -> None:
    """Accepted staged rows to their slots, none at all with `error`."""
    if error:
        return
    for place, taken in enumerate(mask):
        if taken and slots[place] in rows:
            rows[slots[place]] = staging[place]


def count(
    drafts: Sequence[int], accepted: Sequence[int], error: bool, layers: int, max_drafts: int
) -> dict[str, int | list[int]]:
    """What one window adds to the counters."""
    taken = [0 if error else a for a in accepted]
    return {
        "windows": int(sum(drafts) > 0),
        "staged": sum(drafts),
        "committed": sum(taken),
        "rejected": sum(drafts) - sum(taken),
        "stage_operations": sum(drafts) * layers,
        "errors": int(error),
        "certain": 0,
        "drafted_at": [sum(1 for d in drafts if d > k) for k in range(max_drafts)],
        "accepted_at": [sum(1 for a in taken if a > k) for k in range(max_drafts)],
    }


@dataclass(frozen=True)
class Attention:
    """Float64 result, and for each element the rounding error that float32 may make (1 unit)."""

    out: Tensor
    unit: Tensor

    def units(self, got: Tensor) -> float:
        """The largest error of `got`, in units. See ERROR_UNITS."""
        error = (got.detach().cpu().double() - self.out).abs() / self.unit.clamp(min=1e-30)
        return float(error.nan_to_num(nan=math.inf).max()) if error.numel() else 0.0


def attention(
    query: Tensor,
    rows: Rows,
    staging: Rows | None,
    block_table: Tensor,
    block_size: int,
    seq_lens: Sequence[int],
    query_start_loc: Sequence[int],
    num_drafts: Sequence[int],
    tail_start: Sequence[int],
    scale: float,
    sliding_window: int = 0,
    softcap: float = 0.0,
    kv_cache_dtype: str = "auto",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Attention:
    """Token by token, head by head. With `staging`, the last positions are read from it.

    The unit is `eps32 * (1 + max |q||k|) * sum(weight * |v|)`: a relative error of eps in a score
    s is an absolute one of eps * |s| in the exponent, hence a relative one in its weight; the sum
    over V adds a relative eps of its own. Rounding the output adds half an ulp of its dtype.
    """
    out = torch.zeros(query.shape, dtype=torch.float64)
    unit = torch.zeros_like(out)
    tables = block_table.tolist()
    wide = query.detach().cpu().double()
    for r, length in enumerate(seq_lens):
        keys, values = [], []
        for position in range(length):
            draft = position - (length - num_drafts[r])
            if staging is not None and draft >= 0:
                key, value = staging[tail_start[r] + draft]
            else:
                block = tables[r][position // block_size]
                key, value = rows[block * block_size + position % block_size]
            keys.append(decode(key, kv_cache_dtype, k_scale))
            values.append(decode(value, kv_cache_dtype, v_scale))
        first, end = query_start_loc[r], query_start_loc[r + 1]
        for token in range(first, end):
            position = length - (end - token)
            low = max(0, position - sliding_window + 1) if sliding_window else 0
            if position < 0:
                continue
            seen_keys = torch.stack(keys[low : position + 1])
            seen_values = torch.stack(values[low : position + 1])
            for head in range(query.shape[1]):
                kv_head = head * seen_keys.shape[1] // query.shape[1]
                out[token, head], unit[token, head] = _attend(
                    wide[token, head],
                    seen_keys[:, kv_head],
                    seen_values[:, kv_head],
                    scale,
                    softcap,
                )
    unit += torch.finfo(query.dtype).eps / 2 * out.abs()
    return Attention(out, unit)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    scores = (keys * query).sum(1) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.exp(scores - scores.max())
    weights = weights / weights.sum()
    magnitude = 1 + ((keys * query).abs().sum(1) * abs(scale)).max()
    spread = (weights.unsqueeze(1) * values.abs()).sum(0)
    return (weights.unsqueeze(1) * values).sum(0), torch.finfo(
        torch.float32
    ).eps * magnitude * spread
