"""Linear layers in FP8 whose scales are constants: no maximum is looked for, so casts fuse with what is around them.

Forward multiplies E4M3 by E4M3; gradients are E5M2 or E4M3 (u-muP, arXiv 2407.17465; munit scaling, arXiv 2502.05967).
"""

from __future__ import annotations

from typing import Any

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def saturated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to FP8, to the nearest and then to even; what is out of range becomes its end. NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


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
    return torch._scaled_mm(a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast)


def fp8_product_reference(a: torch.Tensor, b: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
    """The plain twin, which defines it, for matrices of any sides."""
    return (a.float() @ b.float().t() * factor).to(dtype)


class _Linear(torch.autograd.Function):
    """Keeps the input in FP8, and the weight as it is: a cast is cheaper than a second copy of all parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        factors: tuple[float, float, float],
        gradient: torch.dtype,
        gradient_scale: float,
    ) -> torch.Tensor:
        rows = saturated(x.flatten(0, -2), E4M3)
        ctx.save_for_backward(rows, weight)
        ctx.factors, ctx.gradient, ctx.gradient_scale = factors, gradient, gradient_scale
        y = fp8_product(rows, saturated(weight, E4M3), factors[0], x.dtype, fast=True)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        rows, weight = ctx.saved_tensors
        _, of_weight, of_input = (factor / ctx.gradient_scale for factor in ctx.factors)
        flat = saturated(grad.flatten(0, -2) * ctx.gradient_scale, ctx.gradient)
        columns = saturated(weight, E4M3).t().contiguous()
        grad_x = fp8_product(flat, columns, of_input, grad.dtype, fast=False)
        grad_weight = fp8_product(flat.t().contiguous(), rows.t().contiguous(), of_weight, weight.dtype, fast=False)
        return grad_x.unflatten(0, grad.shape[:-1]), grad_weight, None, None, None


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0),
    gradient: torch.dtype = E5M2,
    gradient_scale: float = 1.0,
) -> torch.Tensor:
    """A linear layer without bias, its products in FP8.

    Args:
        x: ``[..., in]``, near unit scale.
        weight: ``[out, in]``, near unit scale.
        factors: on the output, the gradient of the weight and that of the input; the products apply them.
        gradient: FP8 type of the output's gradient.
        gradient_scale: brings that gradient near unit scale; its results are divided by it.

    Returns:
        ``[..., out]`` of x's type.
    """
    return _Linear.apply(x, weight, factors, gradient, gradient_scale)
