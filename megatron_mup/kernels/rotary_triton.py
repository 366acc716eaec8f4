"""The Triton kernel behind :mod:`megatron_mup.kernels.rotary`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_HEADS = 32  # at a time


@triton.jit
def _turn_back(
    source, stride, out, cos, sin, heads, PER: tl.constexpr, FIRST: tl.constexpr, PERIOD: tl.constexpr,
    WIDTH: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """Heads of one token; ``PER`` of them, from ``FIRST`` on, are neighbours in each period of the result."""
    channel = tl.arange(0, HALF)[None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        here, there = source + head * stride, out + ((head // PER) * PERIOD + head % PER + FIRST) * DIM
        inside = (head < heads) & (channel < WIDTH // 2)
        first = tl.load(here + channel, mask=inside).to(tl.float32)
        second = tl.load(here + WIDTH // 2 + channel, mask=inside).to(tl.float32)
        turns = channel < WIDTH // 2
        cos_first, sin_first = tl.load(cos + channel, mask=turns), tl.load(sin + channel, mask=turns)
        cos_second = tl.load(cos + WIDTH // 2 + channel, mask=turns)
        sin_second = tl.load(sin + WIDTH // 2 + channel, mask=turns)
        tl.store(there + channel, (first * cos_first + second * sin_second).to(out.dtype.element_ty), mask=inside)
        back = second * cos_second - first * sin_first
        tl.store(there + WIDTH // 2 + channel, back.to(out.dtype.element_ty), mask=inside)
        if WIDTH < DIM:
            rest = WIDTH + tl.arange(0, REST)[None, :]
            inside = (head < heads) & (rest < DIM)
            tl.store(there + rest, tl.load(here + rest, mask=inside), mask=inside)


@triton.jit
def _copy(
    source, stride, out, heads, FIRST: tl.constexpr, PERIOD: tl.constexpr, DIM: tl.constexpr, WHOLE: tl.constexpr,
    HEADS: tl.constexpr
):  # fmt: skip
    channel = tl.arange(0, WHOLE)[None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (channel < DIM)
        moved = tl.load(source + head * stride + channel, mask=inside)
        tl.store(out + (head * PERIOD + FIRST) * DIM + channel, moved, mask=inside)


@triton.jit
def _backward(
    query, key, value, cos, sin, out, batch, turn_seq, turn_batch,
    query_seq, query_batch, query_head, key_seq, key_batch, key_head, value_seq, value_batch, value_head,
    GROUPS: tl.constexpr, PER: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, WHOLE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    place, sample = token // batch, token % batch
    turn = place * turn_seq + sample * turn_batch
    cos, sin = cos + turn, sin + turn
    out += token * (GROUPS * (PER + 2) * DIM)
    query += place * query_seq + sample * query_batch
    _turn_back(query, query_head, out, cos, sin, GROUPS * PER, PER, 0, PER + 2, WIDTH, DIM, HALF, REST, QUERIES)
    key += place * key_seq + sample * key_batch
    _turn_back(key, key_head, out, cos, sin, GROUPS, 1, PER, PER + 2, WIDTH, DIM, HALF, REST, KEYS)
    value += place * value_seq + sample * value_batch
    _copy(value, value_head, out, GROUPS, PER + 1, PER + 2, DIM, WHOLE, KEYS)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See :func:`megatron_mup.kernels.rotary.rotary_backward`; the last dimensions of all are contiguous."""
    seq, batch, groups, per, dim = query.shape
    width = cos.shape[-1]
    heads = query.flatten(2, 3)  # a view if the heads of all groups lie in one rhythm, else a copy
    _backward[(seq * batch,)](
        heads,
        key,
        value,
        cos,
        sin,
        out,
        batch,
        cos.stride(0),
        cos.stride(1) if cos.shape[1] > 1 else 0,
        *heads.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        GROUPS=groups,
        PER=per,
        WIDTH=width,
        DIM=dim,
        HALF=triton.next_power_of_2(width // 2),
        REST=triton.next_power_of_2(max(1, dim - width)),
        WHOLE=triton.next_power_of_2(dim),
        QUERIES=min(_HEADS, triton.next_power_of_2(groups * per)),
        KEYS=min(_HEADS, triton.next_power_of_2(groups)),
    )
