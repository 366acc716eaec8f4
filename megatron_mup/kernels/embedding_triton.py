"""The Triton kernel behind :mod:`megatron_mup.kernels.embedding`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_CHANNELS, _TOKENS = 512, 16  # at a time


@triton.jit
def _backward(grad, order, ends, out, channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    begin, end = tl.load(ends + row - 1, mask=row > 0, other=0), tl.load(ends + row)
    total = tl.zeros([CHANNELS], tl.float32)
    for start in range(begin, end, TOKENS):
        place = start + tl.arange(0, TOKENS)
        token = tl.load(order + place, mask=place < end, other=0)
        here = (place < end)[:, None] & inside[None, :]
        values = tl.load(grad + token[:, None] * channels + channel[None, :], mask=here, other=0)
        total += tl.sum(values.to(tl.float32), 0)
    tl.store(out + row * channels + channel, total.to(out.dtype.element_ty), mask=inside)


def launch(grad: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, out: torch.Tensor) -> None:
    """See :func:`megatron_mup.kernels.embedding.embedding_backward`.

    Args:
        grad: ``[tokens, channels]``, contiguous.
        order: int64 places of the tokens, row by row.
        ends: int64, how many tokens there are up to each row.
        out: ``[rows, channels]``, contiguous.
    """
    rows, channels = out.shape
    block = min(_CHANNELS, triton.next_power_of_2(channels))
    _backward[(rows, triton.cdiv(channels, block))](grad, order, ends, out, channels, TOKENS=_TOKENS, CHANNELS=block)
