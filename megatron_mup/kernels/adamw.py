"""AdamW's step of one tensor in one pass over memory, whatever the precisions of weight, gradient and state.

Its plain twin, and what runs elsewhere, is :class:`torch.optim.AdamW` in the precision of the weight.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from types import ModuleType

import torch


@functools.cache
def device_has_adamw(device: torch.device) -> bool:
    """Whether :func:`adamw_` runs there: an NVIDIA GPU, and Triton."""
    return device.type == "cuda" and torch.version.hip is None and importlib.util.find_spec("triton") is not None


@functools.cache
def _kernel() -> ModuleType:
    """Imported late, so that machines without a GPU need no Triton."""
    return importlib.import_module("megatron_mup.kernels.adamw_triton")


def adamw_(
    value: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    copy: torch.Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    scale: torch.Tensor | None = None,
) -> None:
    """One step of decoupled AdamW (Loshchilov and Hutter, arXiv 1711.05101), in place, computed in fp32.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``x <- (1 - lr wd) x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``.

    Args:
        value: the weight x, contiguous, with elements.
        grad: g, contiguous, of the same shape and any floating-point precision.
        exp_avg, exp_avg_sq: m and v, likewise.
        copy: takes the new weight in a precision of its own, likewise; or None.
        lr, betas, eps, weight_decay: AdamW's.
        step: t, 1 in the first step.
        scale: 0-d fp32 on the same device, a factor on g; None is 1.
    """
    _kernel().launch(
        value,
        grad,
        exp_avg,
        exp_avg_sq,
        copy,
        scale,
        decay=1 - lr * weight_decay,
        size=lr / (1 - betas[0] ** step),
        betas=betas,
        root=math.sqrt(1 - betas[1] ** step),
        eps=eps,
    )
