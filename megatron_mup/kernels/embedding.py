"""Gradient of an embedding in one pass over memory and the same in every run.

PyTorch's fills the table with zeros, sums parts of rows that many tokens share, and adds the parts.
"""

from __future__ import annotations

import torch

from megatron_mup.kernels.late import kernels_of


def embedding_backward(tokens: torch.Tensor, grad: torch.Tensor, rows: int) -> torch.Tensor:
    """For each row of the table the sum of the gradients of its tokens, in fp32 and in their order, rounded once.

    Args:
        tokens: ids ``[...]``, from 0 to ``rows - 1``.
        grad: gradient of their embeddings, ``[..., channels]``.
        rows: of the table.

    Returns:
        ``[rows, channels]`` in the precision of ``grad``.
    """
    grad = grad.reshape(-1, grad.shape[-1]).contiguous()
    ids, order = tokens.reshape(-1).to(torch.int32).sort(stable=True)
    ends = torch.searchsorted(ids, torch.arange(rows, dtype=torch.int32, device=ids.device), right=True)
    out = grad.new_empty(rows, grad.shape[-1])
    kernels_of("embedding").launch(grad, order, ends, out)
    return out


def embedding_backward_reference(tokens: torch.Tensor, grad: torch.Tensor, rows: int) -> torch.Tensor:
    """The plain twin of :func:`embedding_backward`, which defines it."""
    flat = grad.reshape(-1, grad.shape[-1])
    total = torch.zeros(rows, flat.shape[-1], dtype=torch.float32, device=grad.device)
    return total.index_add_(0, tokens.reshape(-1), flat.float()).to(grad.dtype)
