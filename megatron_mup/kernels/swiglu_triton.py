"""The Triton kernel behind :mod:`megatron_mup.kernels.swiglu`; imported only where there is a CUDA device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_RUNS = 128  # of gate and up at a time


@triton.jit
def _backward(x, grad, out, runs, RUN: tl.constexpr, BLOCK: tl.constexpr):
    run = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    inside = run < runs
    within = tl.arange(0, RUN)[None, :]
    at = run * (2 * RUN) + within
    gate = tl.load(x + at, mask=inside).to(tl.float32)
    up = tl.load(x + at + RUN, mask=inside).to(tl.float32)
    d = tl.load(grad + run * RUN + within, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    d_gate = d * up * (share + silu * (1 - share))
    tl.store(out + at, d_gate.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + RUN, (d * silu).to(out.dtype.element_ty), mask=inside)


def launch(x: torch.Tensor, grad: torch.Tensor, out: torch.Tensor, run: int) -> None:
    """See :func:`megatron_mup.kernels.swiglu.swiglu_backward`; all contiguous, ``run`` a power of two."""
    runs = grad.numel() // run
    _backward[(triton.cdiv(runs, _RUNS),)](x, grad, out, runs, RUN=run, BLOCK=_RUNS)
