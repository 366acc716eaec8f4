"""Newton-Schulz orthonormalization: in plain PyTorch, the specification, and where it pays in Gram space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_mup.kernels.symmetric import kernel_takes
from megatron_mup.optim.coefficients import coefficient_schedule, has_squarings, polynomial
from megatron_mup.optim.gram import Correction, Watch, block_lengths, gram_newton_schulz, gram_squarings
from megatron_mup.optim.thin import image


@contextmanager
def full_fp32_products() -> Iterator[None]:
    """Products of fp32 matrices in fp32, whatever TF32 or bf16 shortcuts the process allows elsewhere."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@torch.no_grad()
def orthonormalize_plain(
    x: torch.Tensor,
    steps: int = 5,
    coefficients: str = "quintic",
    dtype: torch.dtype = torch.float32,
    eps: float = 1e-7,
    watch: Watch | None = None,
    correction: Correction | None = None,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`orthonormalize` in plain PyTorch: cast to ``dtype`` once normalized, all steps on the short side in it.

    With a correction the second half of the steps is in fp32; of a set with squarings all are.
    """
    schedule = coefficient_schedule(coefficients, steps)
    work = x.reshape(-1, *x.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        work = work.mT
    if norm is None:
        norm = torch.linalg.vector_norm(work, dim=(-2, -1), dtype=torch.float32)
    norm = norm.clamp(min=eps).view(-1, 1, 1)
    # Half precision would leave little of squarings.
    precision = torch.float32 if has_squarings(schedule) else dtype
    work = torch.div(work, norm, out=torch.empty_like(work, dtype=precision))  # computed in fp32
    with full_fp32_products():
        for number, step in enumerate(schedule):
            if correction is not None and number == steps // 2:
                # What is all but done and has been rounded would round to the same again, whatever is added to it.
                work = work.float()
            gram = work @ work.mT
            if watch is not None:
                watch(work, gram)
            poly, a = polynomial(gram, step)
            work = torch.baddbmm(work, poly, work, beta=a)
        if correction is not None:
            work = torch.baddbmm(work, *correction(lambda x: image(poly, x) + a * x)).to(dtype)
    if tall:
        work = work.mT
    return work.reshape(x.shape).to(dtype).contiguous()


def gram_pays(batch: int, rows: int, columns: int) -> bool:
    """Whether Gram space is the faster for bf16 matrices on a GPU.

    The symmetric kernel's unit of work is a tile of 128 x 256. It gains by having half as many, which shows once they
    fill half the chip. Measured on an H100 (benchmarks/results).
    """
    short = min(rows, columns)
    return short >= 512 and batch * math.ceil(short / 256) ** 2 >= 64


@torch.no_grad()
def orthonormalize(
    x: torch.Tensor,
    steps: int = 5,
    coefficients: str = "quintic",
    dtype: torch.dtype = torch.float32,
    eps: float = 1e-7,
    watch: Watch | None = None,
    correction: Correction | None = None,
    norm: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Approximates U V^T for each matrix U S V^T of a batch.

    Each matrix is divided by its Frobenius norm (taken in fp32, at least ``eps``). Zero matrices, rows and columns stay
    zero. bf16 on a GPU that has the kernels runs in Gram space (gram.py), where that pays, and always where steps have
    squarings; everything else runs :func:`orthonormalize_plain`.

    Args:
        x: ``[..., m, n]``; left as it is.
        steps: Newton-Schulz steps.
        coefficients: a name that `coefficient_schedule` takes.
        dtype: precision of the iteration; fp32 is full fp32, whatever the process allows elsewhere.
        eps: smallest norm to divide by.
        watch: is shown the iterate before each step; where Gram space skips iterates, before each block of steps.
        correction: is added to the result before that is rounded.
        norm: fp32 ``[batch]``, Frobenius norms of x, if they are known.
        out: where the result may be formed, like x; it may be x itself, which isn't left as it is then.

    Returns:
        ``[..., m, n]`` in ``dtype``, new memory or ``out``.
    """
    work = x.reshape(-1, *x.shape[-2:])
    schedule = coefficient_schedule(coefficients, steps)
    squares = has_squarings(schedule) and watch is None and correction is None
    # With a correction or squarings always, for plain PyTorch then needs fp32.
    pays = correction is not None or squares or gram_pays(*work.shape)
    if dtype is torch.bfloat16 and steps and x.is_cuda and x.shape[-2] % 8 == 0 and pays:
        halves = work.to(dtype).contiguous()
        if kernel_takes(halves):
            if squares:
                return gram_squarings(halves, schedule, eps, norm, out).view(x.shape)
            square = x.shape[-2] == x.shape[-1] and watch is None
            lengths = block_lengths(coefficients, steps, square)
            return gram_newton_schulz(halves, schedule, lengths, eps, watch, correction, norm, out).view(x.shape)
    return orthonormalize_plain(x, steps, coefficients, dtype, eps, watch, correction, norm)
