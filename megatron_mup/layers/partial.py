"""Attention to a part of the keys, by which the whole is put together (FlashAttention-2, arXiv 2307.08691).

Softmax over all keys is a mean of softmaxes over parts of them, weighted by their sums of exponentials, so the
logarithm of that sum is all that has to be known of a part. Its share of the gradients follows from the whole's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_mup.kernels.segments import Segments, kernel_takes, segment_attention, segment_attention_backward

TILE = 1024
"""Queries whose logits the plain formula holds at once."""

aten = torch.ops.aten


class Thinning(Protocol):
    """Dropout of attention weights."""

    def __call__(self, weights: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Of weights ``[batch, heads, queries, keys]`` between places in the sequence."""


@dataclass(frozen=True)
class Partial:
    """How queries attend to a part of the keys.

    Attributes:
        scale: factor on the logits.
        mask: from places of queries and keys to what `attention_mask` gives; None where attention is causal, no more.
        thin: dropout of attention weights; None without.
        plain: whether the formula is computed as it stands. Otherwise FlashAttention's kernel is taken where it fits;
            it knows neither masks, but for segments, nor this dropout.
        segments: where documents lie among queries and keys of a number of samples, at places in the sequence, causal
            or not, if they are all that the mask is made of.
    """

    scale: float
    mask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    thin: Thinning | None
    plain: bool
    segments: Callable[[int, torch.Tensor, torch.Tensor, bool], Segments] | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: tuple[torch.Tensor, torch.Tensor],
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention to these keys alone.

        Args:
            query: ``[batch, heads, queries, width]``.
            key, value: ``[batch, groups, keys, width]``.
            places: of queries and of keys in the sequence.
            causal: whether some keys come after some queries; then the places are the same.

        Returns:
            Output like ``query``, zero for a query that may attend to none of the keys, and the logarithm of the sum of
            exponentials ``[batch, heads, queries]`` fp32, there minus infinity.
        """
        if (segments := self._segments(query, value, places, causal)) is not None:
            return _over_segments(query, key, value, segments, self.scale)
        key, value = _repeated(key, query), _repeated(value, query)
        if self._by_kernel(query, value):
            return _flash(query, key, value, causal, self.scale)
        outputs, sums = [], []
        for rows in _tiles(query.shape[2]):
            logits = self._logits(query[:, :, rows], key, (places[0][rows], places[1]), causal)
            lse = logits.logsumexp(-1)
            # Over minus infinity alone the sum is minus infinity, and its difference to that not a number.
            weights = (logits - lse.clamp(min=torch.finfo(lse.dtype).min)[..., None]).exp()
            if self.thin is not None:
                weights = self.thin(weights, places[0][rows], places[1])
            outputs.append(weights.to(value.dtype) @ value)
            sums.append(lse)
        return torch.cat(outputs, 2), torch.cat(sums, 2)

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        places: tuple[torch.Tensor, torch.Tensor],
        causal: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """This part's share of the gradients of queries, and the gradients of these keys and values.

        Args:
            grad: gradient of ``output``.
            output, lse: of attention to all keys.
            query, key, value, places, causal: as in `forward`.
        """
        if (segments := self._segments(query, value, places, causal)) is not None:
            return _over_segments_backward((grad, query, key, value, output), lse, segments, self.scale)
        groups = key.shape[1]
        key, value = _repeated(key, query), _repeated(value, query)
        if self._by_kernel(query, value):
            grads = _flash_backward((grad, output, lse), (query, key, value), causal, self.scale)
            return grads[0], _summed(grads[1], groups), _summed(grads[2], groups)
        delta = (grad.float() * output.float()).sum(-1)
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for rows in _tiles(query.shape[2]):
            logits = self._logits(query[:, :, rows], key, (places[0][rows], places[1]), causal)
            weights = kept = (logits - lse[:, :, rows, None]).exp()
            grad_weights = (grad[:, :, rows] @ value.mT).float()
            if self.thin is not None:
                kept, grad_weights = (self.thin(x, places[0][rows], places[1]) for x in (weights, grad_weights))
            grad_value += kept.to(grad.dtype).mT @ grad[:, :, rows]
            grad_logits = (weights * (grad_weights - delta[:, :, rows, None]) * self.scale).to(query.dtype)
            grad_query[:, :, rows] = grad_logits @ key
            grad_key += grad_logits.mT @ query[:, :, rows]
        return grad_query, _summed(grad_key, groups), _summed(grad_value, groups)

    def _logits(
        self, query: torch.Tensor, key: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], causal: bool
    ) -> torch.Tensor:
        logits = (query @ key.mT).float() * self.scale
        if self.mask is not None:
            return logits.masked_fill(~self.mask(*places), -torch.inf)
        return logits.masked_fill(places[0][:, None] < places[1], -torch.inf) if causal else logits

    def _segments(
        self, query: torch.Tensor, value: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor], causal: bool
    ) -> Segments | None:
        """The segments, where attention inside them is all there is to compute and can be."""
        if self.plain or self.thin is not None or self.segments is None:
            return None
        if query.is_cuda and not kernel_takes(query, value):
            return None
        return self.segments(len(query), *places, causal)

    def _by_kernel(self, query: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the kernel takes such heads."""
        if self.plain or self.mask is not None or self.thin is not None or query.shape[-1] != value.shape[-1]:
            return False
        # What FlashAttention-2 asks for.
        fits = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
        return fits or not query.is_cuda


def merge_(output: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Adds a part to what is known, in place: ``output`` fp32 and ``lse``, at first zero and minus infinity.

    The first part must hold a key for every query.
    """
    both = torch.logaddexp(lse, part_lse)
    output.mul_((lse - both).exp()[..., None]).add_(part.float() * (part_lse - both).exp()[..., None])
    lse.copy_(both)


def packed(x: torch.Tensor) -> torch.Tensor:
    """``[batch, heads, seq, ...]`` as rows ``[batch * seq, heads, ...]``, sample after sample."""
    return x.transpose(1, 2).flatten(0, 1)


def unpacked(x: torch.Tensor, batch: int) -> torch.Tensor:
    """The opposite of `packed`."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def _over_segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = segment_attention(packed(query), packed(key), packed(value), segments, scale)
    return unpacked(output, len(query)), unpacked(lse, len(query))


def _over_segments_backward(
    tensors: tuple[torch.Tensor, ...], lse: torch.Tensor, segments: Segments, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``tensors``: the output's gradient, query, key, value and output."""
    grad, query, key, value, output = map(packed, tensors)
    grads = segment_attention_backward(grad, (query, key, value), output, packed(lse), segments, scale)
    query, key, value = (unpacked(grad, len(lse)) for grad in grads)
    return query, key, value


def _tiles(length: int) -> list[slice]:
    return [slice(start, start + TILE) for start in range(0, length, TILE)]


def _repeated(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A head of keys or values for every query head."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], 1)


def _summed(grad: torch.Tensor, groups: int) -> torch.Tensor:
    """The opposite of `_repeated` for gradients; fp32."""
    return grad.float().unflatten(1, (groups, -1)).sum(2)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if query.is_cuda:
        output, lse = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[:2]
    else:
        output, lse = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)
    return output, lse


def _flash_backward(
    of_output: tuple[torch.Tensor, ...], inputs: tuple[torch.Tensor, ...], causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, from the output's gradient, the output and the logarithms of its sums."""
    (grad, output, lse), (query, key, _) = (x.contiguous() for x in of_output), inputs
    tensors = (grad, *inputs, output, lse)
    if not query.is_cuda:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(*tensors, 0.0, causal, scale=scale)
    # Sequences of equal length, and no dropout whose random state would be read.
    unread = torch.empty(0, dtype=torch.long, device=query.device)
    lengths = (None, None, query.shape[2], key.shape[2])
    backward = aten._scaled_dot_product_flash_attention_backward
    return backward(*tensors, *lengths, 0.0, causal, unread, unread, scale=scale)
