"""Output layer and cross entropy in one, over chunks of tokens: the logits of a micro-batch are never held together.

Forward computes the loss of a chunk and at once the gradients of its hidden states and of the weight, for a loss that
is summed: what the loss is later multiplied by multiplies them in backward. The three matrix products are those of a
plain output layer (the idea: Hsu et al., Liger Kernel, arXiv 2410.10989).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_mup.layers.loss import Softmax
from megatron_mup.parallel.mesh import TensorAxis


@dataclass(frozen=True)
class Head:
    """How hidden states become a loss.

    Attributes:
        axis: tensor-parallel axis.
        first_row: token id of this rank's first row of the weight.
        rows: rows of this rank; what the weight has beyond them is padding.
        multiplier: factor on the logits.
        gradient: factor on the gradient of the logits behind their own factor.
        z_loss: coefficient of the sum of the normalizers' squares.
        chunk: tokens at a time.
        compiled: whether a chunk runs under torch.compile.
    """

    axis: TensorAxis
    first_row: int
    rows: int
    multiplier: float
    gradient: float
    z_loss: float
    chunk: int
    compiled: bool


Chunk = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]


def _chunk(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head, backward: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss and normalizer of each token, and on request the gradient of the logits, padding included."""
    # The factor is cheaper on the hidden states than on the logits.
    hidden = x if head.multiplier == 1 else x * head.multiplier
    values = (hidden @ weight.t()).float()
    found = Softmax.of(values[:, : head.rows], labels, head.first_row, head.axis)
    normalizer = torch.where(found.valid, found.normalizer, 0.0)
    if not backward:
        return found.loss, normalizer, None
    grad = found.gradient(values[:, : head.rows], torch.ones_like(found.loss), 2 * head.z_loss * normalizer)
    grad = (grad if head.gradient == 1 else grad * head.gradient).to(x.dtype)
    padding = weight.shape[0] - head.rows
    return found.loss, normalizer, F.pad(grad, (0, padding)) if padding else grad


@functools.cache
def _compiled_chunk() -> Chunk:
    return torch.compile(_chunk)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head, backward: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        run = _compiled_chunk() if head.compiled else _chunk
        grad_x = torch.empty_like(x) if backward else None
        # Chunks add up in fp32, as the inner sum of one matrix product would.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if backward else None
        losses, normalizers = [], []
        for start in range(0, len(x), head.chunk):
            part = slice(start, start + head.chunk)
            loss, normalizer, grad = run(x[part], weight, labels[part], head, backward)
            losses.append(loss)
            normalizers.append(normalizer)
            if grad_x is not None and grad_weight is not None and grad is not None:
                grad_x[part] = grad @ weight
                grad_weight += grad.t() @ x[part]
        total = torch.cat(losses).sum()
        objective = total + head.z_loss * torch.cat(normalizers).square().sum() if head.z_loss else total.clone()
        ctx.dtype = weight.dtype
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(total)
        return objective, total

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, _total: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, (grad_weight * grad).to(ctx.dtype), None, None, None


def linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, head: Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """Objective and language-model loss, 0-d fp32, in nats and summed over tokens; the loss has no gradient.

    Args:
        x: ``[tokens, hidden]``, the same on every tensor rank; its gradient is this rank's share of the sum.
        weight: ``[rows and padding, hidden]`` of this rank's part of the vocabulary.
        labels: ``[tokens]`` ids; `loss.IGNORE` gives 0.
        head: factors and chunks.
    """
    return _LinearCrossEntropy.apply(x, weight, labels, head, torch.is_grad_enabled())
