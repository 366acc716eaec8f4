"""Products in half precision that are all but as accurate as in fp32: numbers are split into two halves."""

from __future__ import annotations

import torch

_TINY = 1e-30


def halves(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Two numbers of half precision whose sum is all but x."""
    high = x.to(dtype)
    return high, (x - high.to(x.dtype)).to(dtype)


def side_by_side(x: torch.Tensor, dtype: torch.dtype, multiple: int = 8) -> torch.Tensor:
    """Both :func:`halves` of columns ``[batch, n, k]``, and zeros up to a multiple, with few operations."""
    k = x.shape[-1]
    joined = x.new_zeros(*x.shape[:-1], 2 * k + -2 * k % multiple, dtype=dtype)
    high, low = joined[..., :k], joined[..., k : 2 * k]
    torch.sub(x, high.copy_(x), out=low)
    return joined


def padded(parts: list[torch.Tensor], dim: int, multiple: int = 8) -> torch.Tensor:
    """Joined, and filled with zeros up to a multiple, as fast products of half precision want it."""
    missing = -sum(part.shape[dim] for part in parts) % multiple
    if not missing:
        return torch.cat(parts, dim)
    shape = list(parts[0].shape)
    shape[dim] = missing
    return torch.cat([*parts, parts[0].new_zeros(shape)], dim)


def thin_product(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A matrix of any precision times a few fp32 columns, as if in fp32, in one pass over the matrix.

    Args:
        matrix: ``[batch, m, n]``.
        columns: fp32 ``[batch, n, k]``.

    Returns:
        fp32 ``[batch, m, k]``.
    """
    if not matrix.is_cuda:
        # One by one: a batch of one is multiplied another way, and no bit may hang on which matrices share a home.
        return torch.stack([own.float() @ few for own, few in zip(matrix, columns, strict=True)])
    if matrix.dtype is torch.float32:
        return matrix @ columns
    k = columns.shape[-1]
    found = torch.bmm(matrix, side_by_side(columns, matrix.dtype), out_dtype=torch.float32)
    return found[..., :k] + found[..., k : 2 * k]


def image(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """:func:`thin_product` with one vector: ``[batch, m, n]`` times ``[batch, n]``."""
    return thin_product(matrix, vector[..., None])[..., 0]


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors ``[..., n]`` divided by their norms; zeros stay."""
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=_TINY)


def split_factors(
    left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, multiple: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors in half precision, three times as many, with all but the same product.

    Args:
        left: fp32 ``[batch, m, k]``.
        right: fp32 ``[batch, k, n]``.
        dtype: of half precision.
        multiple: what their number is filled up to.
    """
    (a, b), (c, d) = halves(left, dtype), halves(right, dtype)
    return padded([a, a, b], -1, multiple), padded([c, d, c], -2, multiple)


def add_product_(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """A matrix plus a product of low rank, summed in fp32 and rounded once; on a GPU, if in half precision, in place.

    Args:
        matrix: ``[batch, m, n]``.
        left: fp32 ``[batch, m, k]``.
        right: fp32 ``[batch, k, n]``.

    Returns:
        ``[batch, m, n]`` in the matrix's precision.
    """
    if matrix.dtype is torch.float32:
        return torch.baddbmm(matrix, left, right)
    if not matrix.is_cuda:
        return torch.baddbmm(matrix.float(), left, right).to(matrix.dtype)
    return matrix.baddbmm_(*split_factors(left, right, matrix.dtype))


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """fp32 result of operands in half precision."""
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def split_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` by products of bf16 halves, to 2^-17 of their entries: on a GPU several times as fast as fp32.

    Args:
        left: ``[batch, m, k]`` fp32, or bf16, which needs no splitting.
        right: fp32 ``[batch, k, n]``.

    Returns:
        fp32 ``[batch, m, n]``.
    """
    if left.dtype is torch.bfloat16:
        return _product(torch.cat([left, left], -1), torch.cat(halves(right, left.dtype), -2))
    return _product(*split_factors(left, right, torch.bfloat16))


def split_gram(x: torch.Tensor) -> torch.Tensor:
    """``x^T x`` in the same way; fp32 ``[batch, m, n]`` to ``[batch, n, n]``, symmetric."""
    high, low = halves(x, torch.bfloat16)
    own, mixed = _product(high.mT, torch.cat([high, low], -1)).chunk(2, -1)
    return own + mixed + mixed.mT
