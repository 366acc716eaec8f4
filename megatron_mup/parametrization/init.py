"""Initial values that depend on seed, name and global place, and on no layout.

Each normal number is a function of (seed, parameter name, global index): a rank computes its shard, any rectangle of
the parameter, and holds bitwise the slice of the whole. Logarithm and sine are spelled out in additions,
multiplications and divisions, which IEEE 754 rounds alike everywhere; library versions differ in the last bit between
a vector loop and its remainder, and between devices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_mup.parametrization.counter import derive_key, hash_u64
from megatron_mup.parametrization.meta import ParamMeta, Role

# Elements at once: temporaries that stay in a CPU's cache, or fill a GPU within 64 MB.
_CHUNK_CPU = 1 << 15
_CHUNK_GPU = 3 << 18

# 2 atanh(s) / s, powers of s^2, highest first; for |s| < 0.172 good to 1e-14.
_ATANH = [2.0 / (2 * n + 1) for n in range(7, -1, -1)]
# sin(pi/2 t) / t, powers of t^2, highest first; for |t| < 1 good to 1e-13.
_SINE = [(-1) ** n * (math.pi / 2) ** (2 * n + 1) / math.factorial(2 * n + 1) for n in range(8, -1, -1)]


def initial_values(
    meta: ParamMeta,
    std: float | None,
    seed: int,
    offsets: Sequence[int],
    local_shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Initial values of one rectangle of a parameter.

    Args:
        meta: of the whole parameter; a copy (``tied_to``) gets its original's values.
        std: ``Scaling.init_std``; None: ones for norm gains, zeros for biases.
        seed: of the run.
        offsets: place of the rectangle's first element in the global parameter, one number per dimension.
        local_shape: shape of the rectangle.
        device: on which the values are computed.
        dtype: of the result; narrower types round the fp32 values.
    """
    return fill_(torch.empty(tuple(local_shape), device=device, dtype=dtype), meta, std, seed, offsets)


@torch.no_grad()
def fill_(tensor: Tensor, meta: ParamMeta, std: float | None, seed: int, offsets: Sequence[int]) -> Tensor:
    """Writes initial values into the rectangle ``tensor``; arguments as for :func:`initial_values`."""
    shape, local = meta.shape, tuple(tensor.shape)
    if not len(shape) == len(local) == len(offsets) or any(
        o < 0 or o + n > s for o, n, s in zip(offsets, local, shape, strict=True)
    ):
        raise ValueError(f"{meta.name} {list(shape)} has no rectangle {list(local)} at {list(offsets)}")
    if std is None:
        return tensor.fill_(1.0 if meta.role in (Role.NORM, Role.QK_NORM) else 0.0)
    if std == 0.0:
        return tensor.zero_()
    if tensor.numel() == 0:
        return tensor
    if not tensor.is_contiguous():
        dense = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        return tensor.copy_(fill_(dense, meta, std, seed, offsets))

    key = derive_key(seed, "init", meta.tied_to or meta.name)
    starts, length = _runs(shape, local, offsets, tensor.device)
    rows = tensor.view(-1, length)
    chunk = _CHUNK_CPU if tensor.device.type == "cpu" else _CHUNK_GPU
    columns = min(length, chunk)
    for row in range(0, len(rows), chunk // columns):
        first = starts[row : row + chunk // columns, None]
        for column in range(0, length, columns):
            index = first + torch.arange(column, min(column + columns, length), device=tensor.device)
            values = normal(key, index).mul_(std).to(torch.float32)
            rows[row : row + chunk // columns, column : column + columns].copy_(values)
    return tensor


def normal(key: int, index: Tensor) -> Tensor:
    """Standard normal numbers (float64) for int64 indices, by Box and Muller's method.

    64 hashed bits make the radius (40 bits: up to 7.5 standard deviations) and the angle (24 bits).
    """
    bits = hash_u64(key, index)
    # Uniform in (-1, 1): sin(pi/2 t) has the law of the cosine of a uniform angle.
    t = (bits >> 40).to(torch.float64).add_(0.5).mul_(2.0**-23)
    # Uniform in (0, 1), cut into 2^exponent * mantissa, mantissa in [0.5, 1).
    u = (bits & ((1 << 40) - 1)).to(torch.float64).add_(0.5).mul_(2.0**-40).view(torch.int64)
    exponent = (u >> 52).sub_(1022).to(torch.float64)
    mantissa = (u & ((1 << 52) - 1)).bitwise_or_(1022 << 52).view(torch.float64)
    # ln u = exponent ln 2 + ln c + 2 atanh((mantissa - c) / (mantissa + c)) with c in the middle of the mantissas.
    c = math.sqrt(0.5)
    s = (mantissa - c).div_(mantissa.add_(c))
    log_u = _odd_polynomial(s, _ATANH).add_(exponent.mul_(math.log(2.0))).add_(math.log(c))
    return log_u.mul_(-2.0).sqrt_().mul_(_odd_polynomial(t, _SINE))


def _odd_polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    """``x`` times a polynomial in ``x^2``, coefficients from the highest power."""
    square = x * x
    value = square * coefficients[0]
    for coefficient in coefficients[1:-1]:
        value.add_(coefficient).mul_(square)
    return value.add_(coefficients[-1]).mul_(x)


def _runs(
    shape: tuple[int, ...], local: tuple[int, ...], offsets: Sequence[int], device: torch.device
) -> tuple[Tensor, int]:
    """The rectangle as runs of neighbouring elements: global index of each run's start, and the runs' length."""
    strides = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    split = len(shape)
    while split > 0 and (split == len(shape) or local[split] == shape[split]):
        split -= 1
    starts = torch.zeros((), dtype=torch.int64, device=device)
    for d in range(split):
        starts = starts[..., None] + torch.arange(offsets[d], offsets[d] + local[d], device=device) * strides[d]
    inner = sum(o * s for o, s in zip(offsets[split:], strides[split:], strict=True))
    return starts.reshape(-1) + inner, math.prod(local[split:])
