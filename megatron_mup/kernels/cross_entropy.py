"""Gradient of the cross entropy by the logits in one pass over memory: an operation that torch.compile leaves whole.

What the compiler makes of the formula looks up, for each logit, what belongs to its token.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

HAS_KERNEL = torch.version.hip is None and importlib.util.find_spec("triton") is not None
"""Whether there is a kernel for tensors on a GPU."""


@functools.cache
def _kernel() -> ModuleType:
    """Imported late, so that machines without a GPU need no Triton."""
    return importlib.import_module("megatron_mup.kernels.cross_entropy_triton")


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
    _kernel().launch(logits.contiguous(), *numbers, out, factor)
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
