"""What a matrix optimizer's arithmetic sees at a matrix's home: whole logical matrices, and the states kept there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

import torch


class Kept(Enum):
    """Shape of a state that stays at a matrix's home."""

    ROWS = auto()
    """One number per row of the matrix: ``[rows, 1]``."""
    INPUTS = auto()
    """One vector over the columns for each logical matrix: ``[matrices, columns]``."""
    MATRIX = auto()
    """As the matrix: ``[rows, columns]``."""
    BASIS = auto()
    """A factor for each logical matrix, `MatrixOptimizer.basis_shape`: flat, one after the other."""


Norms = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class Whole:
    """Logical matrices of one shape, whole, at their home.

    Attributes:
        update: ``[batch, out, in]``, what is to be made orthonormal.
        weight: ``[batch, out, in]`` in the optimizer's precision, if the rule asks for it.
        kept: states by kind, written in place: ``[batch, out, 1]`` (rows), ``[batch, in]`` (inputs) or
            ``[batch, *basis_shape]`` (basis).
        feed_back: adds a multiple of matrices like ``update`` to the momentum that is kept at home.
        norms: fp32 ``[batch]``, Frobenius norms of ``update`` and of ``weight``, where packing has told.
        room: like ``update``, and perhaps its memory: where the result belongs. To form it there saves a copy.
    """

    update: torch.Tensor
    weight: torch.Tensor | None
    kept: Mapping[str, torch.Tensor]
    feed_back: Callable[[torch.Tensor, float], None]
    norms: Norms = (None, None)
    room: torch.Tensor | None = None


def example(
    count: int,
    shape: tuple[int, int],
    update: torch.dtype,
    weight: torch.dtype | None,
    kept: Mapping[str, tuple[int, ...]],
    device: torch.device,
) -> Whole:
    """Random matrices with states, to try the arithmetic on; nothing is fed back.

    Args:
        count: how many.
        shape: ``[out, in]`` of each.
        update, weight: precisions; no weights if that is None.
        kept: shape of each state of a matrix, by kind.
        device: where.
    """
    generator = torch.Generator(device).manual_seed(0)

    def random(dtype: torch.dtype, size: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(count, *size, device=device, dtype=dtype, generator=generator)

    updates, weights = random(update, shape), None if weight is None else random(weight, shape)
    norms = (norm_of(updates), None if weights is None else norm_of(weights))
    # Sums of squares are states too, and not negative.
    states = {kind: random(torch.float32, size).abs() for kind, size in kept.items()}
    return Whole(updates, weights, states, lambda _change, _factor: None, norms)


def norm_of(matrices: torch.Tensor) -> torch.Tensor:
    """Frobenius norms, fp32 ``[batch]``."""
    return torch.linalg.vector_norm(matrices, dim=(-2, -1), dtype=torch.float32)
