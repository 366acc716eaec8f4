"""The sum of a few long rows, in one pass."""

from __future__ import annotations

import torch

from megatron_mup.kernels.late import HAS_KERNEL, kernels_of


def row_sum(first: torch.Tensor, others: torch.Tensor, out: torch.Tensor) -> None:
    """Writes ``first + others[0] + others[1] + ...``, summed in fp32 in this order and rounded once, to ``out``.

    Args:
        first: ``[count]``, contiguous.
        others: ``[rows, count]``, contiguous.
        out: ``[count]``, contiguous, any floating-point precision.
    """
    if HAS_KERNEL and out.is_cuda:
        if out.numel():
            kernels_of("row_sum").launch(first, others, out)
        return
    total = first.float()
    for row in others:
        total = total + row
    out.copy_(total)
