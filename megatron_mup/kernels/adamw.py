"""AdamW's step of many tensors in one pass over memory and one launch, whatever the precisions of weights, gradients
and state.

Its plain twin, and what runs elsewhere, is :class:`torch.optim.AdamW` in the precision of the weight.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from megatron_mup.kernels.late import kernels_of

VECTOR = 16
"""Bytes that a thread moves at once, where a tensor's address allows it."""


@functools.cache
def device_has_adamw(device: torch.device) -> bool:
    """Whether :func:`adamw_` runs there: an NVIDIA GPU, and Triton."""
    return device.type == "cuda" and torch.version.hip is None and importlib.util.find_spec("triton") is not None


class Stepped(NamedTuple):
    """A tensor to step, and what with; all contiguous, of one shape, with elements, and each of any floating-point
    precision.

    Attributes:
        value: the weight x.
        grad: its gradient g.
        exp_avg, exp_avg_sq: m and v.
        copy: takes the new weight too; or None.
        lr, weight_decay, eps: AdamW's.
    """

    value: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    copy: torch.Tensor | None
    lr: float
    weight_decay: float
    eps: float


def adamw_(
    tensors: Sequence[Stepped],
    *,
    betas: tuple[float, float],
    step: int,
    scale: torch.Tensor | None = None,
    squares: torch.Tensor | None = None,
) -> None:
    """One step of decoupled AdamW (Loshchilov and Hutter, arXiv 1711.05101), in place, computed in fp32.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``,
    ``x <- (1 - lr wd) x - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)``.

    Args:
        tensors: what to step, on one device.
        betas: decays of the moments.
        step: t, 1 in the first step.
        scale: 0-d fp32 on the same device, a factor on every g; None is 1.
        squares: takes the sum of squares of each g, without the factor: ``[tensors]`` fp32, the same in every run.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for place, each in enumerate(tensors):
        memory = [tensor for tensor in each[:5] if tensor is not None]
        aligned = all(tensor.data_ptr() % VECTOR == 0 for tensor in memory)
        alike.setdefault((*(tensor.dtype for tensor in memory), aligned), []).append(place)
    for (*_, aligned), places in alike.items():
        chosen = [tensors[place] for place in places]
        kernels_of("adamw").launch(
            [each[:5] for each in chosen],
            [(1 - each.lr * each.weight_decay, each.lr / (1 - betas[0] ** step), each.eps) for each in chosen],
            places,
            scale,
            squares,
            betas=betas,
            root=math.sqrt(1 - betas[1] ** step),
            vector=VECTOR if aligned else 1,
        )
