"""Cross entropy over a vocabulary that is sharded over tensor ranks."""

from __future__ import annotations

from typing import Any

import torch

from megatron_mup.parallel.collectives import all_reduce
from megatron_mup.parallel.mesh import TensorAxis

IGNORE = -100


class _CrossEntropy(torch.autograd.Function):
    """Saves the logits as they came and recomputes the softmax in backward: no fp32 copy outlives the forward."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, first_row: int, axis: TensorAxis
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = logits.float()
        peak = all_reduce(values.amax(-1), "max", axis)
        normalizer = all_reduce((values - peak[..., None]).exp_().sum(-1), "sum", axis).log() + peak
        valid = labels != IGNORE
        local = labels - first_row
        here = valid & (local >= 0) & (local < logits.shape[-1])
        local = torch.where(here, local, 0)
        target = values.gather(-1, local[..., None]).squeeze(-1)
        target = all_reduce(torch.where(here, target, 0.0), "sum", axis)
        ctx.save_for_backward(logits, normalizer, local, here, valid)
        return torch.where(valid, normalizer - target, 0.0), torch.where(valid, normalizer, 0.0)

    @staticmethod
    def backward(
        ctx: Any, grad_loss: torch.Tensor, grad_normalizer: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        logits, normalizer, local, here, valid = ctx.saved_tensors
        weight = torch.where(valid, grad_loss + grad_normalizer, 0.0)
        grad = (logits.float() - normalizer[..., None]).exp_() * weight[..., None]
        grad.scatter_add_(-1, local[..., None], torch.where(here, -grad_loss, 0.0)[..., None])
        return grad.to(logits.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, first_row: int, axis: TensorAxis
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-likelihood of each label, in fp32, without gathering the logits.

    Args:
        logits: ``[seq, batch, about vocab / tp]`` of this rank's part of the vocabulary.
        labels: ``[seq, batch]`` token ids; `IGNORE` gives 0.
        first_row: token id of the first logit here.
        axis: tensor-parallel axis.

    Returns:
        The loss and the logarithm of the softmax denominator, each ``[seq, batch]`` fp32 (0 where ignored), in nats,
        the same on every tensor rank.
    """
    return _CrossEntropy.apply(logits, labels, first_row, axis)
