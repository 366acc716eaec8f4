"""Gradient of the cross entropy by the logits in one pass over memory: an operation that torch.compile leaves whole.

What the compiler makes of the formula looks up, for each logit, what belongs to its token.
"""

from __future__ import annotations

import torch

from megatron_mup.kernels.late import kernels_of


@torch.library.custom_op("megatron_mup::cross_entropy_backward", mutates_args=(), device_types="cuda")
def cross_entropy_backward(
    logits: torch.Tensor,
    normalizer: torch.Tensor,
    weight: torch.Tensor,
    label: torch.Tensor,
    pull: torch.Tensor,
    factor: float,
) -> torch.Tensor:
    """``weight exp(factor logits - normalizer)``, less ``pull`` at the label; computed in fp32.

    Args:
        logits: ``[..., vocabulary]``, contiguous.
        normalizer, weight, pull: fp32 numbers of each token, ``[...]``.
        label: place of a token's label in its logits, ``[...]`` int64.
        factor: on the logits.

    Returns:
        Like the logits.
    """
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    numbers = [each.contiguous() for each in (normalizer, weight, label, pull)]
    kernels_of("cross_entropy").launch(logits.contiguous(), *numbers, out, factor)
    return out


@cross_entropy_backward.register_fake
def _(logits: torch.Tensor, *_numbers: object) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def cross_entropy_backward_reference(
    logits: torch.Tensor,
    normalizer: torch.Tensor,
    weight: torch.Tensor,
    label: torch.Tensor,
    pull: torch.Tensor,
    factor: float,
) -> torch.Tensor:
    """The plain twin of :func:`cross_entropy_backward`, which defines it."""
    grad = (logits.float() * factor - normalizer[..., None]).exp_() * weight[..., None]
    return grad.scatter_add_(-1, label[..., None], -pull[..., None]).to(logits.dtype)
