"""One linear layer per group of rows: the product of an MoE layer's experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def grouped_linear(rows: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Applies each group's own matrix to its rows.

    On a GPU in bf16 it is one grouped product, and the host doesn't wait for the counts; everything else takes the
    loop of `grouped_linear_reference`.

    Args:
        rows: ``[n, in]``, group after group.
        weights: ``[groups, out, in]``.
        counts: ``[groups]`` int64, rows of each group, on the rows' device; their sum is ``n``.

    Returns:
        ``[n, out]``.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        # Widths are multiples of 8 (config.moe_rules), as 16-byte loads want them.
        ends = counts.cumsum(0).to(torch.int32)
        return torch._grouped_mm(rows, weights.transpose(-2, -1), offs=ends)
    return grouped_linear_reference(rows, weights, counts)


def grouped_linear_reference(rows: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The plain twin, which defines it; waits for the counts. Arguments as for `grouped_linear`."""
    groups = zip(rows.split(counts.tolist()), weights.unbind(), strict=True)
    return torch.cat([F.linear(part, weight) for part, weight in groups])
