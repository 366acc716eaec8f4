"""The Triton kernel behind :mod:`megatron_mup.kernels.adamw`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _adamw(
    value,
    grad,
    exp_avg,
    exp_avg_sq,
    copy,
    scale,
    numel,
    decay,
    size,
    beta1,
    beta2,
    root,
    eps,
    HAS_COPY: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    g = tl.load(grad + at, mask=inside).to(tl.float32)
    if HAS_SCALE:
        g *= tl.load(scale)
    mean = tl.load(exp_avg + at, mask=inside).to(tl.float32)
    square = tl.load(exp_avg_sq + at, mask=inside).to(tl.float32)
    x = tl.load(value + at, mask=inside).to(tl.float32)
    mean += (1 - beta1) * (g - mean)
    square = beta2 * square + (1 - beta2) * g * g
    x = x * decay - size * mean / (tl.sqrt(square) / root + eps)
    tl.store(exp_avg + at, mean.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, square.to(exp_avg_sq.dtype.element_ty), mask=inside)
    tl.store(value + at, x.to(value.dtype.element_ty), mask=inside)
    if HAS_COPY:
        tl.store(copy + at, x.to(copy.dtype.element_ty), mask=inside)


def launch(
    value: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    copy: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    decay: float,
    size: float,
    betas: tuple[float, float],
    root: float,
    eps: float,
) -> None:
    """See :func:`megatron_mup.kernels.adamw.adamw_`."""
    count = value.numel()
    _adamw[(triton.cdiv(count, _BLOCK),)](
        value,
        grad,
        exp_avg,
        exp_avg_sq,
        value if copy is None else copy,
        value if scale is None else scale,
        count,
        decay,
        size,
        *betas,
        root,
        eps,
        HAS_COPY=copy is not None,
        HAS_SCALE=scale is not None,
        BLOCK=_BLOCK,
    )
