"""Attention of sequences that context-parallel ranks share: around a ring, or to gathered keys and values.

Each rank holds two chunks of a sequence, an early and a late one (`parallel.mesh.ContextAxis`), so that every rank has
the same part of the causal triangle to compute (Llama 3, arXiv 2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from megatron_mup.kernels.segments import Segments, segment_attention, segment_attention_backward
from megatron_mup.layers.info import Context
from megatron_mup.layers.partial import Partial, merge_, packed, unpacked
from megatron_mup.parallel.collectives import finish, gather_context, start_shift


def gathered(context: Context, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Keys and values ``[batch, groups, seq / cp, width]`` of all ranks as ``[batch, groups, seq, width]``, in order.

    One collective for all tensors; gradients come back by a reduce-scatter.
    """
    widths = [x.shape[-1] for x in tensors]
    joined = gather_context(torch.cat(tensors, -1).permute(2, 0, 1, 3), context.axis)
    order = context.places.flatten().argsort()
    return list(joined.index_select(0, order).permute(1, 2, 0, 3).split(widths, -1))


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, context: Context
) -> torch.Tensor:
    """Causal attention of this rank's queries ``[batch, heads, seq / cp, width]`` to all keys, each chunk to those up
    to its end.
    """
    outputs = []
    for queries, end in _chunks(query, context):
        outputs.append(
            F.scaled_dot_product_attention(
                queries,
                key[:, :, :end],
                value[:, :, :end],
                attn_mask=causal_lower_right(queries.shape[2], end),
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(outputs, 2)


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, context: Context
) -> torch.Tensor:
    """The same inside documents and windows, without a mask in memory."""
    outputs = []
    for queries, end in _chunks(query, context):
        everyone = torch.arange(end, device=query.device)
        # Keys end where the chunk does, so that its queries are the last ones of their documents.
        segments = context.segments(len(query), everyone[-queries.shape[2] :], everyone, causal=True)
        rows = (packed(x) for x in (queries, key[:, :, :end], value[:, :, :end]))
        outputs.append(unpacked(_SegmentAttention.apply(*rows, segments, scale), len(query)))
    return torch.cat(outputs, 2)


def _chunks(query: torch.Tensor, context: Context) -> list[tuple[torch.Tensor, int]]:
    """This rank's two chunks of queries, with the place in the sequence at which each ends."""
    length, axis = query.shape[2] // 2, context.axis
    numbers = axis.rank, 2 * axis.size - 1 - axis.rank
    return [(queries, (n + 1) * length) for queries, n in zip(query.split(length, 2), numbers, strict=True)]


class _SegmentAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
    ) -> torch.Tensor:
        output, lse = segment_attention(query, key, value, segments, scale)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.segments, ctx.scale = segments, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        *inputs, output, lse = ctx.saved_tensors
        grads = segment_attention_backward(grad, tuple(inputs), output, lse, ctx.segments, ctx.scale)
        return *grads, None, None


def ring_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, partial: Partial, context: Context
) -> torch.Tensor:
    """Attention in which keys and values go once around the ranks (Ring Attention, arXiv 2310.01889).

    Each step computes with those of one rank while the next ones travel; backward goes around once more, and the
    gradients of keys and values travel with them, in fp32, until they are home.

    Args:
        query: ``[batch, heads, seq / cp, width]``.
        key, value: ``[batch, groups, seq / cp, width]``.
        partial: how parts are computed.
        context: how ranks share the sequences.
    """
    return _Ring.apply(query, key, value, partial, context)


def needed(rank: int, source: int, length: int) -> tuple[slice, slice]:
    """Which queries of a rank need which keys of another, of ``length`` each: the same area for any two ranks.

    Of an earlier source the late chunk comes after both chunks here; all keys of a later one come after the early
    chunk here and before the late one.
    """
    whole, half = slice(0, length), length // 2
    if source == rank:
        return whole, whole
    return (whole, slice(0, half)) if source < rank else (slice(half, length), whole)


class _Visit(NamedTuple):
    """Keys and values of a rank as they come by, ``[batch, groups, needed keys, width]``.

    Attributes:
        rows, columns: queries here and keys there that need each other.
        places: of these in the sequence.
        own: whether this is the rank's own visit, in which causality is left to mask.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rows: slice
    columns: slice
    places: tuple[torch.Tensor, torch.Tensor]
    own: bool


def _visits(pair: torch.Tensor, widths: tuple[int, int], context: Context) -> Iterator[_Visit]:
    """Every rank's keys and values side by side, ``[batch, groups, seq / cp, width]``, from this rank's on; while one
    visit is worked on the next one travels.
    """
    axis = context.axis
    for step in range(axis.size):
        coming = start_shift(pair, axis) if step + 1 < axis.size else None
        source = (axis.rank - step) % axis.size
        rows, columns = needed(axis.rank, source, pair.shape[2])
        keys, values = pair[:, :, columns].split(widths, -1)
        places = context.here[rows], context.places[source][columns]
        yield _Visit(keys, values, rows, columns, places, source == axis.rank)
        if coming is not None:
            pair = finish(coming)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, partial: Partial, context: Context
    ) -> torch.Tensor:
        widths = key.shape[-1], value.shape[-1]
        output = query.new_zeros(*query.shape[:3], widths[1], dtype=torch.float32)
        lse = query.new_full(query.shape[:3], -torch.inf, dtype=torch.float32)
        for visit in _visits(torch.cat([key, value], -1), widths, context):
            rows = visit.rows
            part = partial.forward(query[:, :, rows], visit.keys, visit.values, visit.places, visit.own)
            merge_(output[:, :, rows], lse[:, :, rows], *part)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.partial, ctx.context = partial, context
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        query, key, value, output, lse = ctx.saved_tensors
        axis, widths = ctx.context.axis, (key.shape[-1], value.shape[-1])
        grad_query = torch.zeros_like(query, dtype=torch.float32)
        pair = torch.cat([key, value], -1)
        grad_pair, travelling = torch.zeros_like(pair, dtype=torch.float32), None
        for visit in _visits(pair, widths, ctx.context):
            rows = visit.rows
            mine, *of_pair = ctx.partial.backward(
                grad[:, :, rows],
                query[:, :, rows],
                visit.keys,
                visit.values,
                output[:, :, rows],
                lse[:, :, rows],
                visit.places,
                visit.own,
            )
            grad_query[:, :, rows] += mine
            if travelling is not None:
                grad_pair = finish(travelling)
            grad_pair[:, :, visit.columns] += torch.cat(of_pair, -1)
            travelling = start_shift(grad_pair, axis)
        assert travelling is not None
        grad_key, grad_value = finish(travelling).split(widths, -1)
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None
