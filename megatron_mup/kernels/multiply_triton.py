"""The Triton kernel behind :mod:`megatron_mup.kernels.multiply`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from megatron_mup.kernels.late import run

_BLOCK = 2048


@triton.jit
def _multiply(x, factors, out, numel, blocks, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    matrix = program // blocks
    at = (program % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    place = matrix.to(tl.int64) * numel + at
    product = tl.load(x + place, mask=inside).to(tl.float32) * tl.load(factors + matrix)
    tl.store(out + place, product.to(out.dtype.element_ty), mask=inside)


def launch(x: torch.Tensor, factors: torch.Tensor, out: torch.Tensor) -> None:
    """``out = factors x``, both contiguous with elements; ``out`` may be x.

    There are as many fp32 factors as matrices of equal size in x.
    """
    numel = x.numel() // factors.numel()
    blocks = triton.cdiv(numel, _BLOCK)
    run(_multiply, blocks * factors.numel(), x, factors, out, numel, blocks, BLOCK=_BLOCK)
