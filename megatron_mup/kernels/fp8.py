"""Linear layers in FP8 whose scales are constants: no maximum is looked for, so casts fuse with what is around them.

Forward multiplies E4M3 by E4M3; gradients are E5M2 or E4M3 (u-muP, arXiv 2407.17465; munit scaling, arXiv 2502.05967).
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_mup.kernels.fp8_casts import E4M3, E5M2, both_ways, saturated, swiglu_backward_fp8, swiglu_fp8, transposed


@torch.compiler.assume_constant_result
def device_has_fp8(device: torch.device) -> bool:
    """Whether its matrix units take FP8: NVIDIA's from compute capability 8.9 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_product(a: torch.Tensor, b: torch.Tensor, factor: float, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """``factor * a b^T`` of FP8 matrices, summed in fp32; on hardware without FP8 by `fp8_product_reference`.

    Args:
        a, b: ``[m, k]`` and ``[n, k]``, contiguous, not both E5M2; n and k are multiples of 16.
        factor: applied before rounding.
        dtype: of the result ``[m, n]``.
        fast: whether the hardware may sum with fewer bits.
    """
    if not device_has_fp8(a.device):
        return fp8_product_reference(a, b, factor, dtype)
    scale_a, scale_b = (torch.full((), value, device=a.device) for value in (factor, 1.0))
    return scaled_product(a, b, scale_a, scale_b, dtype, fast)


def scaled_product(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype, fast: bool
) -> torch.Tensor:
    """``scale_a a (scale_b b)^T`` on hardware with FP8; scales have one element, in fp32. Else as `fp8_product`."""
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


def fp8_product_reference(a: torch.Tensor, b: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """The plain twin, which defines it, for matrices of any sides."""
    return (a.float() @ b.float().t() * factor).to(dtype)


def _cast_weight(weight: torch.Tensor, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight in FP8, and what backward is to have of it: itself, which it will cast, or the cast's transpose."""
    return both_ways(weight, E4M3) if keep else (saturated(weight, E4M3), weight)


def _columns(kept: torch.Tensor) -> torch.Tensor:
    return kept if kept.dtype == E4M3 else transposed(kept, E4M3)


class _Linear(torch.autograd.Function):
    """Keeps the input in FP8."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        factors: tuple[float, float, float],
        gradient: torch.dtype,
        gradient_scale: float,
        keep: bool,
    ) -> torch.Tensor:
        rows = saturated(x.flatten(0, -2), E4M3)
        cast, kept = _cast_weight(weight, keep)
        ctx.save_for_backward(rows, kept)
        ctx.factors, ctx.gradient, ctx.gradient_scale, ctx.dtype = factors, gradient, gradient_scale, weight.dtype
        y = fp8_product(rows, cast, factors[0], x.dtype, fast=True)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, kept = ctx.saved_tensors
        _, of_weight, of_input = (factor / ctx.gradient_scale for factor in ctx.factors)
        flat, columns = both_ways(grad.flatten(0, -2), ctx.gradient, ctx.gradient_scale)
        grad_x = fp8_product(flat, _columns(kept), of_input, grad.dtype, fast=False)
        grad_weight = fp8_product(columns, transposed(rows, E4M3), of_weight, ctx.dtype, fast=False)
        return grad_x.unflatten(0, grad.shape[:-1]), grad_weight, None, None, None, None


class _MLP(torch.autograd.Function):
    """Two of these layers with SwiGLU between them, which writes FP8 both ways."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        factors: tuple[tuple[float, float, float], tuple[float, float, float]],
        gradient: torch.dtype,
        gradient_scale: float,
        act: tuple[int, float, float],
        keep: bool,
    ) -> torch.Tensor:
        rows = saturated(x.flatten(0, -2), E4M3)
        cast, kept_first = _cast_weight(first, keep)
        inner = fp8_product(rows, cast, factors[0][0], x.dtype, fast=True)
        result, columns = swiglu_fp8(inner, *act, E4M3)
        cast, kept_second = _cast_weight(second, keep)
        ctx.save_for_backward(rows, kept_first, inner, columns, kept_second)
        ctx.factors, ctx.gradient, ctx.gradient_scale, ctx.act = factors, gradient, gradient_scale, act
        ctx.dtype = first.dtype
        y = fp8_product(result, cast, factors[1][0], x.dtype, fast=True)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, first, inner, columns, second = ctx.saved_tensors
        (_, of_first, of_x), (_, of_second, of_inner) = (
            tuple(factor / ctx.gradient_scale for factor in each) for each in ctx.factors
        )
        flat, turned = both_ways(grad.flatten(0, -2), ctx.gradient, ctx.gradient_scale)
        d = fp8_product(flat, _columns(second), of_inner, grad.dtype, fast=False)
        d_second = fp8_product(turned, columns, of_second, ctx.dtype, fast=False)
        run, mult, weight = ctx.act
        d_rows, d_columns = swiglu_backward_fp8(inner, d, run, mult, weight * ctx.gradient_scale, ctx.gradient)
        d_x = fp8_product(d_rows, _columns(first), of_x, grad.dtype, fast=False)
        d_first = fp8_product(d_columns, transposed(rows, E4M3), of_first, ctx.dtype, fast=False)
        return d_x.unflatten(0, grad.shape[:-1]), d_first, d_second, None, None, None, None, None


def fp8_swiglu_mlp(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    factors: tuple[tuple[float, float, float], tuple[float, float, float]],
    gradient: torch.dtype,
    gradient_scale: float,
    run: int,
    mult: float,
    weight: float,
    keep: bool = False,
) -> torch.Tensor:
    """`fp8_linear`, SwiGLU, `fp8_linear`, but that SwiGLU's result and the gradient of its input are not rounded before
    they are cast.

    Args:
        x: ``[..., in]``.
        weights: ``[2 ffn, in]`` and ``[out, ffn]``.
        factors, gradient, gradient_scale: of both layers, as there.
        run: gate and up alternate along the first weight's rows in runs of this many.
        mult: a factor inside the sigmoid.
        weight: a factor on SwiGLU's result.
        keep: as there.
    """
    return _MLP.apply(x, *weights, factors, gradient, gradient_scale, (run, mult, weight), keep)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0),
    gradient: torch.dtype = E5M2,
    gradient_scale: float = 1.0,
    keep: bool = False,
) -> torch.Tensor:
    """A linear layer without bias, its products in FP8.

    Args:
        x: ``[..., in]``, near unit scale.
        weight: ``[out, in]``, near unit scale.
        factors: on the output, the gradient of the weight and that of the input; the products apply them.
        gradient: FP8 type of the output's gradient.
        gradient_scale: brings that gradient near unit scale; its results are divided by it.
        keep: the weight's cast for backward, a byte for each element, instead of casting it again.

    Returns:
        ``[..., out]`` of x's type.
    """
    return _Linear.apply(x, weight, factors, gradient, gradient_scale, keep)
