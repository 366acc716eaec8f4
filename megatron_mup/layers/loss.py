"""Cross entropy over a vocabulary that is sharded over tensor ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megatron_mup.kernels.cross_entropy import cross_entropy_backward
from megatron_mup.kernels.late import HAS_KERNEL
from megatron_mup.parallel.collectives import all_reduce
from megatron_mup.parallel.mesh import TensorAxis

IGNORE = -100


class Softmax(NamedTuple):
    """What the loss of tokens needs of their logits, on a rank that holds part of the vocabulary.

    Attributes:
        loss: negative log-likelihood, fp32, 0 where ignored.
        normalizer: logarithm of the softmax denominator, fp32.
        label: place of the label among this rank's logits, 0 where it is elsewhere.
        here: whether it is here.
        valid: whether the token has a label.
    """

    loss: torch.Tensor
    normalizer: torch.Tensor
    label: torch.Tensor
    here: torch.Tensor
    valid: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, labels: torch.Tensor, first_row: int, axis: TensorAxis) -> Softmax:
        """From fp32 logits ``[..., part of the vocabulary]`` and labels ``[...]``."""
        peak = all_reduce(values.amax(-1), "max", axis)
        normalizer = all_reduce((values - peak[..., None]).exp_().sum(-1), "sum", axis).log() + peak
        valid = labels != IGNORE
        label = labels - first_row
        here = valid & (label >= 0) & (label < values.shape[-1])
        label = torch.where(here, label, 0)
        target = values.gather(-1, label[..., None]).squeeze(-1)
        target = all_reduce(torch.where(here, target, 0.0), "sum", axis)
        return cls(torch.where(valid, normalizer - target, 0.0), normalizer, label, here, valid)

    def weights(self, of_loss: torch.Tensor, of_normalizer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's factor on its softmax, and what is taken off at its label, in the gradient of its logits, given
        those of its loss and normalizer.
        """
        return torch.where(self.valid, of_loss + of_normalizer, 0.0), torch.where(self.here, of_loss, 0.0)

    def gradient(self, values: torch.Tensor, of_loss: torch.Tensor, of_normalizer: torch.Tensor) -> torch.Tensor:
        """Gradient of the logits ``values``, given those of each token's loss and normalizer."""
        weight, pull = self.weights(of_loss, of_normalizer)
        grad = (values - self.normalizer[..., None]).exp_() * weight[..., None]
        if torch.compiler.is_compiling():  # all in one pass; a scatter would hold the gradient in fp32 first
            here = torch.arange(values.shape[-1], device=values.device) == self.label[..., None]
            return grad - torch.where(here, pull[..., None], 0.0)
        return grad.scatter_add_(-1, self.label[..., None], -pull[..., None])


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits as they came and recomputes the softmax in backward: no fp32 copy outlives the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        first_row: int,
        axis: TensorAxis,
        factor: float,
        gradient: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found = Softmax.of(_scaled(logits, factor), labels, first_row, axis)
        ctx.save_for_backward(logits, *found)
        ctx.factor, ctx.gradient = factor, gradient
        return found.loss, torch.where(found.valid, found.normalizer, 0.0)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: torch.Tensor, grad_normalizer: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        logits, *numbers = ctx.saved_tensors
        found = Softmax(*numbers)
        if on_kernel(logits):
            weight, pull = (each * ctx.gradient for each in found.weights(grad_loss, grad_normalizer))
            grad = cross_entropy_backward(logits, found.normalizer, weight, found.label, pull, ctx.factor)
        else:
            grad = found.gradient(_scaled(logits, ctx.factor), grad_loss, grad_normalizer).to(logits.dtype)
            grad = grad if ctx.gradient == 1 else grad * ctx.gradient
        return grad, None, None, None, None, None


def on_kernel(logits: torch.Tensor) -> bool:
    """Whether their gradient is a kernel of ours: in compiled code, where else everything before it fuses with it."""
    return HAS_KERNEL and logits.is_cuda and logits.is_contiguous() and torch.compiler.is_compiling()


def _scaled(logits: torch.Tensor, factor: float) -> torch.Tensor:
    """In fp32, behind a product in their own precision."""
    return (logits if factor == 1 else logits * factor).float()


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    first_row: int,
    axis: TensorAxis,
    factor: float = 1.0,
    gradient: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each label, in fp32, without gathering the logits.

    Args:
        logits: ``[seq, batch, about vocab / tp]`` of this rank's part of the vocabulary.
        labels: ``[seq, batch]`` token ids; `IGNORE` gives 0.
        first_row: token id of the first logit here.
        axis: tensor-parallel axis.
        factor: on the logits.
        gradient: on the logits' gradient, in the place of ``factor``.

    Returns:
        The loss and the logarithm of the softmax denominator, each ``[seq, batch]`` fp32 (0 where ignored), in nats,
        the same on every tensor rank.
    """
    return _CrossEntropy.apply(logits, labels, first_row, axis, factor, gradient)
