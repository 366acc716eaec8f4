"""Casts to FP8 as matrix products want them: both operands of a product lie along the dimension that is summed over, so
the gradients' products take transposes, which FP8's one byte makes slow to write without a kernel.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
HAS_KERNEL = torch.version.hip is None and importlib.util.find_spec("triton") is not None
"""Whether there are kernels for tensors on a GPU."""


@functools.cache
def _kernels() -> ModuleType:
    """Imported late, so that machines without a GPU need no Triton."""
    return importlib.import_module("megatron_mup.kernels.fp8_casts_triton")


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
    _kernels().transpose(pair[0].contiguous(), pair[1])
    return out


@_transposed.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape[::-1], dtype=dtype)


def both_ways(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`saturated` ``[m, n]`` and its transpose, contiguous, in one pass."""
    if HAS_KERNEL and x.is_cuda:
        return _both_ways(x, dtype)
    rows = saturated(x, dtype)
    return rows, rows.t().contiguous()


@torch.library.custom_op("megatron_mup::fp8_both_ways", mutates_args=(), device_types="cuda")
def _both_ways(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = (torch.empty(shape, dtype=dtype, device=x.device) for shape in (x.shape, x.shape[::-1]))
    _kernels().transpose(x.contiguous(), columns, rows)
    return rows, columns


@_both_ways.register_fake
def _(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[::-1], dtype=dtype)
