"""Newton-Schulz's polynomial for small Gram matrices that a change of rank one is tried on, many of them at once.

By PyTorch's operations an evaluation is some forty kernels on a GPU, and their number is what it costs. A Triton kernel
does it in one, a program for each change.
"""

from __future__ import annotations

import functools

import torch

from megatron_mup.kernels.late import HAS_KERNEL, kernels_of

Schedule = tuple[tuple[float, ...], ...]
"""(a, b, c) of each step ``X <- (a I + b R + c R^2) X``, ``R = X X^T``."""

LARGEST = 32
"""Side of the largest Gram matrix that the kernel takes."""


@functools.cache
def _on_device(schedule: Schedule, device: torch.device) -> torch.Tensor:
    return torch.tensor(schedule, dtype=torch.float64, device=device)


def _outer(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left[..., :, None] * right[..., None, :]


def shifted_polynomial_reference(
    *operands: torch.Tensor, schedule: Schedule, smallest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of :func:`shifted_polynomial`."""
    gram, image, axis, unseen, shift = operands
    axes = axis[:, None]
    half = _outer(image[:, None] + 0.5 * shift[..., None] * axes, axes) * shift[..., None, None]
    changed = gram[:, None] + half + half.mT
    square = changed.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=0) + unseen[:, None]
    scale = square.sqrt().clamp(min=smallest).reciprocal()[..., None, None]
    r = (changed * scale.square()).flatten(0, 1)
    q: torch.Tensor | None = None
    for number, (a, b, c) in enumerate(schedule):
        p = torch.baddbmm(r, r, r, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        q = p if q is None else p @ q
        if number + 1 < len(schedule):
            r = p @ r @ p
    assert q is not None
    q = q.view(changed.shape) * scale
    images = image[:, None] + shift[..., None] * axes
    return q, ((q @ images[..., None])[..., 0] * axes).sum(-1)


def shifted_polynomial(
    gram: torch.Tensor,
    image: torch.Tensor,
    axis: torch.Tensor,
    unseen: torch.Tensor,
    shift: torch.Tensor,
    schedule: Schedule,
    smallest: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q with ``msign(Z + d u v^T) = Q (Z + d u v^T)`` by Newton-Schulz, and ``h = u^T msign(...) v``; all in fp64.

    Args:
        gram: ``[batch, s, s]``, Z Z^T.
        image: ``[batch, s]``, Z v of a unit v.
        axis: ``[batch, s]``, u.
        unseen: ``[batch]``, added to the squared Frobenius norm that Z is divided by.
        shift: d, ``[batch, count]``.
        schedule: Newton-Schulz's steps.
        smallest: norm to divide by.

    Returns:
        ``[batch, count, s, s]`` and ``[batch, count]``.
    """
    if not (HAS_KERNEL and gram.is_cuda and gram.shape[-1] <= LARGEST):
        return shifted_polynomial_reference(gram, image, axis, unseen, shift, schedule=schedule, smallest=smallest)
    h = torch.empty_like(shift, memory_format=torch.contiguous_format)
    q = h.new_empty(*h.shape, *gram.shape[1:])
    operands = [x.contiguous() for x in (gram, image, axis, unseen, shift)]
    kernels_of("rank_one").launch([*operands, _on_device(schedule, gram.device)], q, h, smallest)
    return q, h
