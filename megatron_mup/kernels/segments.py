"""Attention inside segments of packed rows: FlashAttention's kernel for sequences of any lengths, and its plain twin.

Segments are documents, or sequences. Causal attention inside a segment is aligned at its end: its last query sees its
last key, so that queries may be the last ones of a longer segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

aten = torch.ops.aten

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Packed queries, keys and values, or gradients of these."""


@dataclass(frozen=True)
class Segments:
    """Where segments lie among packed queries and keys; a segment may have none of either.

    Attributes:
        queries, keys: ``[segments + 1]`` int32, first row of each segment, and the number of rows.
        longest: no segment has more queries or keys.
        causal: whether attention looks back only.
        window: how many keys before its own a query may attend to; None: all. Needs ``causal``.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest: int
    causal: bool
    window: int | None = None

    @classmethod
    def between(
        cls,
        queries: torch.Tensor,
        keys: torch.Tensor,
        count: int,
        longest: int,
        causal: bool,
        window: int | None = None,
    ) -> Segments:
        """From the number of its segment, of ``count``, for each query and for each key; both must rise."""
        bounds = torch.arange(count + 1, device=queries.device)
        first, second = (torch.searchsorted(numbers, bounds).int() for numbers in (queries, keys))
        return cls(first, second, longest, causal, window)

    def visible(self) -> list[tuple[slice, slice, torch.Tensor]]:
        """For each segment with queries and keys their rows, and which see which ``[queries, keys]``; waits for the
        device."""
        found = []
        queries, keys = self.queries.tolist(), self.keys.tolist()
        for rows, columns in zip(pairwise(queries), pairwise(keys), strict=True):
            height, width = rows[1] - rows[0], columns[1] - columns[0]
            if height and width:
                back = torch.arange(width - height, width)[:, None] - torch.arange(width)
                seen = torch.ones_like(back, dtype=torch.bool)
                if self.causal:
                    seen = (back >= 0) & (back <= (width if self.window is None else self.window))
                found.append((slice(*rows), slice(*columns), seen.to(self.queries.device)))
        return found


def kernel_takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether FlashAttention's kernel computes such heads."""
    width = query.shape[-1]
    fits = query.dtype in (torch.bfloat16, torch.float16) and width % 8 == 0 and width <= 256
    return query.is_cuda and fits and width == value.shape[-1]


def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed rows inside their segments; no gradient is recorded.

    Args:
        query: ``[queries, heads, width]``.
        key, value: ``[keys, groups, width]``, values of any width in the plain twin.
        segments: who sees whom.
        scale: factor on the logits.

    Returns:
        Output ``[queries, heads, width]``, zero for a query that sees no key, and the logarithm of the sum of
        exponentials ``[queries, heads]`` fp32, there minus infinity.
    """
    if not kernel_takes(query, value):
        return segment_attention_reference(query, key, value, segments, scale)
    found = aten._flash_attention_forward(
        query, key, value, *_of_kernel(segments), return_debug_mask=False, scale=scale, **_window(segments)
    )
    # Infinity is the kernel's mark of a row without keys.
    return found[0], found[1].t().masked_fill(found[1].t() == torch.inf, -torch.inf)


def segment_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain twin, which defines it."""
    repeat = query.shape[1] // key.shape[1]
    output = query.new_zeros(*query.shape[:2], value.shape[-1])
    lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
    for rows, columns, seen in segments.visible():
        weights, lse[rows] = _weights(query[rows], key[columns], seen, scale)
        values = value[columns].repeat_interleave(repeat, 1)
        output[rows] = torch.einsum("hqk,khd->qhd", weights.to(value.dtype), values)
    return output, lse


def segment_attention_backward(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, lse: torch.Tensor, segments: Segments, scale: float
) -> Inputs:
    """Gradients of queries, keys and values.

    ``output`` and ``lse`` may be those of attention to more keys than these: then the gradients are the share of these.
    Shapes are those of `segment_attention`; ``grad`` is the output's gradient.
    """
    if not kernel_takes(inputs[0], inputs[2]):
        return segment_attention_backward_reference(grad, inputs, output, lse, segments, scale)
    # No dropout whose random state would be read.
    unread = torch.zeros(2, dtype=torch.uint64, device=grad.device), torch.empty(0, device=grad.device)
    return aten._flash_attention_backward(
        grad.contiguous(),
        *inputs,
        output.contiguous(),
        lse.t().contiguous(),
        *_of_kernel(segments),
        *unread,
        scale=scale,
        **_window(segments),
    )


def segment_attention_backward_reference(
    grad: torch.Tensor, inputs: Inputs, output: torch.Tensor, lse: torch.Tensor, segments: Segments, scale: float
) -> Inputs:
    """The plain twin."""
    query, key, value = inputs
    groups, repeat = key.shape[1], query.shape[1] // key.shape[1]
    delta = (grad.float() * output.float()).sum(-1)
    grads = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    for rows, columns, seen in segments.visible():
        keys, values = (x[columns].float().repeat_interleave(repeat, 1) for x in (key, value))
        weights, _ = _weights(query[rows], key[columns], seen, scale, lse[rows])
        of_weights = torch.einsum("qhd,khd->hqk", grad[rows].float(), values)
        of_logits = weights * (of_weights - delta[rows].t()[..., None]) * scale
        grads[0][rows] = torch.einsum("hqk,khd->qhd", of_logits, keys)
        of_keys = torch.einsum("hqk,qhd->khd", of_logits, query[rows].float())
        of_values = torch.einsum("hqk,qhd->khd", weights, grad[rows].float())
        for place, found in ((1, of_keys), (2, of_values)):
            grads[place][columns] = found.unflatten(1, (groups, repeat)).sum(2)
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def _weights(
    query: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, scale: float, lse: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax weights ``[heads, queries, keys]`` in fp32, by the sums given or by their own, and the sums."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = torch.einsum("qhd,khd->hqk", query, keys).float() * scale
    logits = logits.masked_fill(~seen, -torch.inf)
    sums = logits.logsumexp(-1) if lse is None else lse.t()
    # Over minus infinity alone the sum is minus infinity, and its difference to that not a number.
    return (logits - sums.clamp(min=torch.finfo(torch.float32).min)[..., None]).exp(), sums.t()


def _of_kernel(segments: Segments) -> tuple[Any, ...]:
    # With one query each the kernel would take another way, which no segment may leave out.
    longest = max(segments.longest, 2)
    return segments.queries, segments.keys, longest, longest, 0.0, segments.causal


def _window(segments: Segments) -> dict[str, int]:
    if segments.window is None:
        return {}
    return {"window_size_left": segments.window, "window_size_right": 0}
