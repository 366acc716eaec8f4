"""An MLP with SwiGLU under Transformer Engine's recipe ``delayed``: its scales and casts, and between the two products
our kernels, which write what the next product takes at once in FP8. The library's layers would write it in bf16 first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from megatron_mup.kernels.fp8 import scaled_product
from megatron_mup.kernels.fp8_casts import Cast, swiglu_backward_cast, swiglu_cast
from megatron_mup.kernels.late import HAS_KERNEL
from megatron_mup.kernels.te import Product, Scales, cast_by, in_fp8


def takes(x: torch.Tensor) -> bool:
    """Whether `swiglu_mlp` can be called now."""
    return HAS_KERNEL and x.is_cuda and in_fp8()


def swiglu_mlp(
    x: torch.Tensor, products: tuple[Product, Product], weights: tuple[torch.Tensor, torch.Tensor], run: int
) -> torch.Tensor:
    """``swiglu(x W1^T) W2^T``, its products in FP8, inside `te.one_step` with recipe ``delayed``.

    Args:
        x: ``[..., in]``.
        products: of both weights; they hold the scales.
        weights: ``[2 ffn, in]`` and ``[out, ffn]``.
        run: gate and up alternate along the first weight's rows in runs of this many.

    Returns:
        ``[..., out]``.
    """
    scales = tuple(product.scales(x, weight) for product, weight in zip(products, weights, strict=True))
    casts = tuple(
        product.cast_weight(weight, scale.weight)
        for product, weight, scale in zip(products, weights, scales, strict=True)
    )
    return _MLP.apply(x.flatten(0, -2), *weights, _How(scales, casts, run)).unflatten(0, x.shape[:-1])


class _How(NamedTuple):
    scales: tuple[Scales, ...]
    casts: tuple[Cast, ...]
    run: int


class _MLP(torch.autograd.Function):
    """Keeps inputs as transposes in FP8, and what SwiGLU read in bf16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, first: torch.Tensor, second: torch.Tensor, how: _How) -> torch.Tensor:
        scales, casts, run = how
        rows = cast_by(x.contiguous(), scales[0].input, True)
        inner = _product(rows.rows, rows.inverse, casts[0].rows, casts[0].inverse, x.dtype, fast=True)
        act = swiglu_cast(inner, run, scales[1].input)
        ctx.save_for_backward(
            *(rows.columns, rows.inverse, inner, act.columns, act.inverse, first, second),
            *(part for cast in casts for part in (cast.columns, cast.inverse)),
        )
        ctx.scales, ctx.run = scales, run
        return _product(act.rows, act.inverse, casts[1].rows, casts[1].inverse, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, x_inverse, inner, act, act_inverse, first, second, *casts = ctx.saved_tensors
        (of_first, of_second), dtype = ctx.scales, grad.dtype
        w, w_inverse = _columns(second, of_second, *casts[2:])
        flat = cast_by(grad.contiguous(), of_second.gradient, True)
        d_act = _product(flat.rows, flat.inverse, w, w_inverse, dtype)
        d_second = _product(flat.columns, flat.inverse, act, act_inverse, second.dtype)
        d = swiglu_backward_cast(inner, d_act, ctx.run, of_first.gradient)
        w, w_inverse = _columns(first, of_first, *casts[:2])
        d_x = _product(d.rows, d.inverse, w, w_inverse, dtype)
        d_first = _product(d.columns, d.inverse, x, x_inverse, first.dtype)
        return d_x, d_first, d_second, None


def _columns(
    weight: torch.Tensor, scales: Scales, columns: torch.Tensor | None, inverse: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The transpose of a weight, cast again if it was not kept."""
    if columns is not None:
        return columns, inverse
    cast = cast_by(weight.detach(), scales.weight, True)
    return cast.columns, cast.inverse


def _product(
    a: torch.Tensor | None,
    a_inverse: torch.Tensor,
    b: torch.Tensor | None,
    b_inverse: torch.Tensor,
    dtype: torch.dtype,
    fast: bool = False,
) -> torch.Tensor:
    """``a b^T``; forward sums with fewer bits than backward, as the library does."""
    assert a is not None
    assert b is not None
    return scaled_product(a, b, a_inverse, b_inverse, dtype, fast)
