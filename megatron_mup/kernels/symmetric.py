"""Batched matrix products whose result is known to be symmetric: half the work of a plain product.

``X X^T``, ``X^T X`` and products of symmetric matrices that commute. :func:`symmetric_product` runs a Triton kernel on
Hopper and later GPUs (Hopper has two of its own) and its plain twin, :func:`symmetric_product_reference`, elsewhere.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch

from megatron_mup.kernels.late import kernels_of

HALVES = (torch.float16, torch.bfloat16)

Form = Literal["rows", "columns", "symmetric"]
"""What is multiplied: ``A B^T``, ``A^T B``, or operands that are symmetric themselves and can be read either way."""


class Product(NamedTuple):
    """What a kernel is to compute: the arguments of :func:`symmetric_product`, checked and three-dimensional.

    Attributes:
        by_columns: whether operands are read by columns; symmetric ones are too, which is a fifth faster on an H100.
    """

    a: torch.Tensor
    b: torch.Tensor
    out: torch.Tensor
    d: torch.Tensor | None
    scale: torch.Tensor | None
    alpha: float
    beta: float
    diagonal: float
    by_columns: bool

    @property
    def depth(self) -> int:
        """Length of the sums."""
        return self.a.shape[1 if self.by_columns else 2]


def symmetric_product_reference(
    a: torch.Tensor,
    b: torch.Tensor,
    form: Form,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    d: torch.Tensor | None = None,
    diagonal: float = 0.0,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The specification of :func:`symmetric_product`: products and sums in fp32, one rounding, upper half mirrored."""
    left, right = a.float(), b.float()
    out = alpha * (left.mT @ right if form == "columns" else left @ right.mT)
    if d is not None:
        out += beta * d.float()
    out.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    if scale is not None:
        out *= scale.view(-1, 1, 1)
    return (out.triu() + out.triu(1).mT).to(dtype or a.dtype)


@functools.cache
def _device_has_kernel(device: torch.device) -> bool:
    """Hopper or later, and Triton is there."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and importlib.util.find_spec("triton") is not None
    )


_beside_messages = False


@contextmanager
def beside_messages(yes: bool) -> Iterator[None]:
    """Products inside, if ``yes``, run beside messages between GPUs, whose kernels hold some multiprocessors.

    Hopper's kernel has one program for each of them, and those that find no room would start when others have ended. It
    has one for each part of the work instead, which takes a little longer where there are no messages.
    """
    global _beside_messages
    before, _beside_messages = _beside_messages, yes
    try:
        yield
    finally:
        _beside_messages = before


@functools.cache
def _kernel_of(device: torch.device, matrices: int, n: int) -> str:
    """The module of the kernel for results ``[matrices, n, n]``: Hopper's, or else the one for any GPU.

    Hopper's multiplies cells of 128 x 128 in pairs. Where cells are just more than multiprocessors, as those of a lone
    matrix of 2048 x 2048, that leaves half of these without.
    """
    if torch.cuda.get_device_capability(device)[0] != 9:
        return "symmetric"
    programs = torch.cuda.get_device_properties(device).multi_processor_count
    return "symmetric_cells" if just_more_cells(matrices, n, programs) else "symmetric_hopper"


def just_more_cells(matrices: int, n: int, programs: int) -> bool:
    """Whether results ``[matrices, n, n]`` have more cells of 128 x 128 than there are programs, by no more than lie on
    their diagonals; mirror images count once."""
    side = -(-n // 128)
    return 0 < matrices * side * (side + 1) // 2 - programs <= matrices * side


def kernel_takes(*operands: torch.Tensor) -> bool:
    """Whether the Triton kernel can run on these: half precision, Hopper or later, rows at multiples of 16 bytes."""
    return _device_has_kernel(operands[0].device) and all(
        o.dtype in HALVES and o.shape[-1] % 8 == 0 and has_whole_rows(o) and o.data_ptr() % 16 == 0 for o in operands
    )


def has_whole_rows(x: torch.Tensor) -> bool:
    """Whether each row lies in one piece, and the next one a multiple of 8 elements further."""
    *others, last = x.stride()
    return last == 1 and all(stride > 0 and stride % 8 == 0 for stride in others)


def symmetric_product(
    a: torch.Tensor,
    b: torch.Tensor,
    form: Form,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    d: torch.Tensor | None = None,
    diagonal: float = 0.0,
    scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scale (alpha A B^T + beta D + diagonal I)`` for each matrix of a batch, where that is symmetric.

    Only cells on and above the diagonal are computed and each is stored twice, so the result is symmetric to the bit.

    Args:
        a: ``[batch, n, k]``; ``[batch, k, n]`` in the form ``columns``, which computes ``A^T B`` instead.
        b: like ``a``, and may be ``a`` itself.
        form: see :data:`Form`.
        alpha: factor of the product.
        beta: factor of ``d``.
        d: symmetric ``[batch, n, n]``.
        diagonal: factor of the identity.
        scale: fp32 ``[batch]``, a factor per matrix.
        dtype: of the result; that of ``out``, or else ``a``'s, by default.
        out: where the result goes, if not to new memory; it may be part of a larger one.

    Returns:
        ``[batch, n, n]``, rounded once from fp32.
    """
    dtype = (dtype or a.dtype) if out is None else out.dtype
    operands = [operand for operand in (a, b, d, out) if operand is not None]
    n = a.shape[-1 if form == "columns" else -2]
    if n % 8 or dtype not in HALVES or not kernel_takes(*operands):
        found = symmetric_product_reference(
            a, b, form, alpha=alpha, beta=beta, d=d, diagonal=diagonal, scale=scale, dtype=dtype
        )
        return found if out is None else out.copy_(found)
    if out is None:
        out = torch.empty(a.shape[0], n, n, dtype=dtype, device=a.device)
    product = Product(a, b, out, d, scale, float(alpha), float(beta), float(diagonal), form != "rows")
    kernel = _kernel_of(a.device, a.shape[0], n)
    options = {"one_each": True} if _beside_messages and kernel == "symmetric_hopper" else {}
    kernels_of(kernel).launch(product, **options)
    return out
