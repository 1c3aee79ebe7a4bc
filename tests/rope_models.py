"""Layers with RoPE, a cache write and attention, in the ways that models write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

HEADS, KV_HEADS, SIZE, BLOCKS, BLOCK, HIDDEN, POSITIONS = 4, 2, 16, 6, 4, 32, 64
WIDTHS = [HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE]
SCALE = SIZE**-0.5


class Step(NamedTuple):
    """Inputs of one layer call: hidden states, weights, tables, caches, and the batch."""

    x: Tensor
    weight: Tensor
    positions: Tensor
    cos: Tensor
    sin: Tensor
    key_cache: Tensor
    value_cache: Tensor
    slots: Tensor
    block_table: Tensor
    seq_lens: Tensor
    starts: Tensor


def make_step(
    dtype: torch.dtype = torch.float32, *, width: int = SIZE, device: str = "cpu", seed: int = 0
) -> Step:
    """Three requests of 3, 2 and 1 tokens, all of them new; tables of `width` columns."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype).to(device)

    def index(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return Step(
        randn(6, HIDDEN), randn(HIDDEN, sum(WIDTHS)) / HIDDEN**0.5,
        torch.tensor([0, 1, 2, 0, 1, 0], device=device),
        randn(POSITIONS, 1, width), randn(POSITIONS, 1, width),
        randn(BLOCKS, BLOCK, KV_HEADS, SIZE), randn(BLOCKS, BLOCK, KV_HEADS, SIZE),
        torch.tensor([0, 1, 2, 8, 9, 16], device=device),
        index(0, 1, 2, 3, 4, 5).view(3, 2), index(3, 2, 1), index(0, 3, 5, 6),
    )  # fmt: skip


def clone(step: Step) -> Step:
    return Step(*(tensor.clone() for tensor in step))


def project(s: Step) -> list[Tensor]:
    """q, k, v `[T, heads, SIZE]`, views of one product."""
    return [part.unflatten(-1, (-1, SIZE)) for part in (s.x @ s.weight).split(WIDTHS, dim=-1)]


def write(s: Step, key: Tensor, value: Tensor) -> None:
    torch.ops.nwor.reshape_and_cache(key, value, s.key_cache, s.value_cache, s.slots)


def attend(s: Step, query: Tensor) -> Tensor:
    out: Tensor = torch.ops.nwor.paged_attention(
        query, s.key_cache, s.value_cache, s.block_table, s.seq_lens, s.starts, SCALE
    )
    return out


# ---- rotations -----------------------------------------------------------------------------------


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's: tables of full width."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def rotate_every_two(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J's: pairs of neighbours, tables of full width."""
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + turned * sin


def halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """vLLM's native form: tables of half width."""
    x1, x2 = torch.chunk(x, 2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


def pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """vLLM's native form for GPT-J: neighbours, tables of half width."""
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)


def in_float32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Calculated in float32 and rounded once."""
    return rotate_half(x.float(), cos.float(), sin.float()).to(x.dtype)


def other_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same sum written differently."""
    first, second = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return sin * torch.cat([second.neg(), first], -1) + cos * x


def part(rotation: Callable[..., Tensor], width: int) -> Callable[..., Tensor]:
    """Only the first elements of a head are rotated."""

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((rotation(x[..., :width], cos, sin), x[..., width:]), dim=-1)

    return run


def layer(rotation: Callable[..., Tensor]) -> Callable[[Step], Tensor]:
    """A layer in plain torch."""

    def run(s: Step) -> Tensor:
        q, k, v = project(s)
        cos, sin = s.cos[s.positions], s.sin[s.positions]
        q, k = rotation(q, cos, sin), rotation(k, cos, sin)
        write(s, k, v)
        return attend(s, q)

    return run


def vllm_native(s: Step) -> Tensor:
    """As vLLM's `forward_static` has it: one table, flat rows, q before k."""
    q, k, v = (s.x @ s.weight).split(WIDTHS, dim=-1)
    tokens = s.positions.shape[0]
    cos, sin = torch.cat([s.cos, s.sin], -1)[:, 0].index_select(0, s.positions).chunk(2, dim=-1)
    rotated = []
    for x in (q, k):
        shape = x.shape
        heads = x.view(tokens, -1, SIZE)
        turn = halves(heads[..., :8], cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype))
        rotated.append(torch.cat((turn, heads[..., 8:]), dim=-1).reshape(shape))
    q, k = rotated
    write(s, k.view(-1, KV_HEADS, SIZE), v.view(-1, KV_HEADS, SIZE))
    return attend(s, q.view(-1, HEADS, SIZE))


def hugging_face(s: Step) -> Tensor:
    """Angles from the positions, in the graph."""
    q, k, v = project(s)
    angle = s.positions.unsqueeze(-1).float() * s.cos[0, :, : SIZE // 2].float()
    angle = torch.cat((angle, angle), dim=-1)
    cos, sin = angle.cos().to(q.dtype).unsqueeze(1), angle.sin().to(q.dtype).unsqueeze(1)
    q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
    write(s, k, v)
    return attend(s, q)


def normalised(s: Step) -> Tensor:
    """q and k are normalised first (Qwen 3)."""
    q, k, v = project(s)
    q, k = (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) for x in (q, k))
    cos, sin = s.cos[s.positions], s.sin[s.positions]
    q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
    write(s, k, v)
    return attend(s, q)


def rotary_op(is_neox: bool, *, flat: bool) -> Callable[[Step], Tensor]:
    """A layer with an op that rotates q and k in place, as vLLM's does."""

    def run(s: Step) -> Tensor:
        q, k, v = (s.x @ s.weight).split(WIDTHS, dim=-1)
        table = torch.cat([s.cos, s.sin], -1)[:, 0]
        if not flat:
            q, k = q.unflatten(-1, (-1, SIZE)), k.unflatten(-1, (-1, SIZE))
        torch.ops.nwor.rotary_embedding(s.positions, q, k, SIZE, table, is_neox)
        write(s, k.view(-1, KV_HEADS, SIZE), v.view(-1, KV_HEADS, SIZE))
        return attend(s, q.view(-1, HEADS, SIZE))

    return run


# name: (layer, width of cos and of sin)
FUSED: dict[str, tuple[Callable[[Step], Any], int]] = {
    "rotate_half": (layer(rotate_half), SIZE),
    "rotate_every_two": (layer(rotate_every_two), SIZE),
    "halves": (layer(halves), SIZE // 2),
    "pairs": (layer(pairs), SIZE // 2),
    "in_float32": (layer(in_float32), SIZE),
    "other_order": (layer(other_order), SIZE),
    "part of rotate_half": (layer(part(rotate_half, 8)), 8),
    "part of pairs": (layer(part(pairs, 12)), 6),
    "vllm_native": (vllm_native, 4),
    "hugging_face": (hugging_face, SIZE),
    "normalised": (normalised, SIZE),
    "rotary op": (rotary_op(True, flat=True), 8),
    "rotary op, part, pairs": (rotary_op(False, flat=False), 4),
}
