"""Casts to FP8 as matrix products want them: both operands of a product lie along the dimension that is summed over, so
the gradients' products take transposes, which FP8's one byte makes slow to write without a kernel.

SwiGLU's result and the gradient of its input are written in FP8 both ways: neither exists in bf16.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_mup.kernels.late import HAS_KERNEL, kernels_of
from megatron_mup.kernels.swiglu import plain_swiglu, swiglu_backward_reference

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Cast(NamedTuple):
    """A matrix in FP8.

    Attributes:
        rows: ``[m, n]``.
        columns: its transpose ``[n, m]``, or None.
        inverse: what brings its values back, fp32 with one element.
    """

    rows: torch.Tensor
    columns: torch.Tensor | None
    inverse: torch.Tensor


class Scale(NamedTuple):
    """How a matrix is cast, on the device.

    Attributes:
        factor: on its values, fp32 with one element.
        largest: is raised to the largest absolute value that was seen.
        dtype: of the result.
    """

    factor: torch.Tensor
    largest: torch.Tensor
    dtype: torch.dtype


def saturated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded to FP8, to the nearest and then to even; what is out of range becomes its end. NaN stays NaN."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def transposed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[m, n]`` to `saturated` ``[n, m]``, contiguous. ``x`` may be of that type already."""
    if HAS_KERNEL and x.is_cuda:
        return _transposed(x, dtype)
    return (x if x.dtype == dtype else saturated(x, dtype)).t().contiguous()


@torch.library.custom_op("megatron_mup::fp8_transposed", mutates_args=(), device_types="cuda")
def _transposed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape[::-1], dtype=dtype, device=x.device)
    # Bytes are moved alike, so one kernel does for both types.
    pair = (x.view(E4M3), out.view(E4M3)) if x.dtype == dtype else (x, out)
    kernels_of("fp8_casts").transpose(pair[0].contiguous(), pair[1])
    return out


@_transposed.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape[::-1], dtype=dtype)


def both_ways(x: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """``factor`` times ``[m, n]``, `saturated`, and its transpose, contiguous, in one pass."""
    if HAS_KERNEL and x.is_cuda:
        return _both_ways(x, dtype, factor)
    rows = saturated(x if factor == 1 else x * factor, dtype)
    return rows, rows.t().contiguous()


@torch.library.custom_op("megatron_mup::fp8_both_ways", mutates_args=(), device_types="cuda")
def _both_ways(x: torch.Tensor, dtype: torch.dtype, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = _empty(x.shape, x, dtype)
    kernels_of("fp8_casts").transpose(x.contiguous(), columns, rows, factor)
    return rows, columns


@_both_ways.register_fake
def _(x: torch.Tensor, dtype: torch.dtype, _factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(x.shape, x, dtype)


def swiglu_cast(x: torch.Tensor, run: int, scale: Scale) -> Cast:
    """SwiGLU of a matrix on a GPU, computed in fp32 and cast.

    Args:
        x: ``[m, 2 ffn]``, contiguous, runs of gate and up in turn.
        run: features in a run, a power of two.
        scale: of the result ``[m, ffn]``.
    """
    rows, columns = _empty((x.shape[0], x.shape[1] // 2), x, scale.dtype)
    inverse = x.new_empty(1, dtype=torch.float32)
    kernels_of("fp8_casts").swiglu(x, None, run, rows, columns, scaling=(scale.factor, scale.largest, inverse))
    return Cast(rows, columns, inverse)


def swiglu_backward_cast(x: torch.Tensor, grad: torch.Tensor, run: int, scale: Scale) -> Cast:
    """The gradient of SwiGLU's input ``[m, 2 ffn]``, cast; ``grad`` is that of its result, contiguous."""
    rows, columns = _empty(x.shape, x, scale.dtype)
    inverse = x.new_empty(1, dtype=torch.float32)
    kernels_of("fp8_casts").swiglu(x, grad, run, rows, columns, scaling=(scale.factor, scale.largest, inverse))
    return Cast(rows, columns, inverse)


def swiglu_fp8(
    x: torch.Tensor, run: int, mult: float, weight: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` times SwiGLU, computed in fp32 and `saturated`, ``[m, ffn]``, and its transpose.

    Args:
        x: ``[m, 2 ffn]``, runs of gate and up in turn.
        run: features in a run, a power of two.
        mult: factor inside the sigmoid.
        weight: factor on the result.
        dtype: of the result.
    """
    if HAS_KERNEL and x.is_cuda:
        return _swiglu_fp8(x, run, mult, weight, dtype)
    rows = saturated(plain_swiglu(x.float(), run, mult) * weight, dtype)
    return rows, rows.t().contiguous()


def swiglu_backward_fp8(
    x: torch.Tensor, grad: torch.Tensor, run: int, mult: float, weight: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` times the gradient of SwiGLU's input ``[m, 2 ffn]``, and its transpose; ``grad`` is its result's."""
    if HAS_KERNEL and x.is_cuda:
        return _swiglu_backward_fp8(x, grad, run, mult, weight, dtype)
    rows = saturated(swiglu_backward_reference(x.float(), grad.float() * weight, run, mult), dtype)
    return rows, rows.t().contiguous()


@torch.library.custom_op("megatron_mup::swiglu_fp8", mutates_args=(), device_types="cuda")
def _swiglu_fp8(
    x: torch.Tensor, run: int, mult: float, weight: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = _empty((x.shape[0], x.shape[1] // 2), x, dtype)
    kernels_of("fp8_casts").swiglu(x.contiguous(), None, run, rows, columns, mult, weight)
    return rows, columns


@_swiglu_fp8.register_fake
def _(x: torch.Tensor, run: int, mult: float, weight: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty((x.shape[0], x.shape[1] // 2), x, dtype)


@torch.library.custom_op("megatron_mup::swiglu_backward_fp8", mutates_args=(), device_types="cuda")
def _swiglu_backward_fp8(
    x: torch.Tensor, grad: torch.Tensor, run: int, mult: float, weight: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = _empty(x.shape, x, dtype)
    kernels_of("fp8_casts").swiglu(x.contiguous(), grad.contiguous(), run, rows, columns, mult, weight)
    return rows, columns


@_swiglu_backward_fp8.register_fake
def _(
    x: torch.Tensor, grad: torch.Tensor, run: int, mult: float, weight: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty(x.shape, x, dtype)


def cast_reference(x: torch.Tensor, scale: Scale) -> Cast:
    """The plain twin of casts with a scale."""
    scale.largest.copy_(torch.maximum(scale.largest, x.float().abs().max()))
    rows = saturated(x.float() * scale.factor, scale.dtype)
    return Cast(rows, rows.t().contiguous(), 1 / scale.factor)


def swiglu_cast_reference(x: torch.Tensor, run: int, scale: Scale) -> Cast:
    """The plain twin of `swiglu_cast`, which defines it."""
    return cast_reference(plain_swiglu(x.float(), run), scale)


def swiglu_backward_cast_reference(x: torch.Tensor, grad: torch.Tensor, run: int, scale: Scale) -> Cast:
    """The plain twin of `swiglu_backward_cast`, which defines it."""
    return cast_reference(swiglu_backward_reference(x.float(), grad.float(), run), scale)


def _empty(shape: tuple[int, ...], x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix and its transpose, beside ``x``."""
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape[::-1], dtype=dtype)
