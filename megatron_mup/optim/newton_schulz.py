"""Newton-Schulz orthonormalization: in plain PyTorch, the specification, and where it pays in Gram space."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_mup.kernels.symmetric import kernel_takes
from megatron_mup.optim.gram import block_lengths, gram_newton_schulz

Coefficients = tuple[tuple[float, float, float], ...]

_POLAR_EXPRESS_RAW = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115952949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)

COEFFICIENTS: dict[str, Coefficients] = {
    "jordan": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": (
        *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR_EXPRESS_RAW),
        (1.875, -1.25, 0.375),
    ),
}
"""Per-step (a, b, c) of X <- a X + (b A + c A^2) X with A = X X^T. Names are Megatron-LM's, but for ``jordan``:

- ``jordan``: Keller Jordan's one tuple for all steps (Megatron's ``simple``); singular values end in [0.68, 1.21].
- ``quintic``: YouJiacheng's five tuples; the flattest in five steps, [0.97, 1.15] for values above 0.01 of the norm.
- ``polar_express``: arXiv 2505.16932 for values above 1e-3 of the norm, with its safety factor 1.01; five steps end in
  [0.86, 1.13], eight converge.
"""


def coefficient_schedule(name: str, steps: int) -> Coefficients:
    """The tuples of ``steps`` steps. Past its list, polar_express repeats its last tuple, the others start over."""
    table = COEFFICIENTS[name]
    if name == "polar_express":
        return table[:steps] + table[-1:] * (steps - len(table))
    return tuple(table[i % len(table)] for i in range(steps))


@contextmanager
def _full_fp32_products() -> Iterator[None]:
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
) -> torch.Tensor:
    """:func:`orthonormalize` in plain PyTorch: cast to ``dtype`` once normalized, all steps on the short side in it."""
    work = x.reshape(-1, *x.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        work = work.mT
    norm = torch.linalg.vector_norm(work, dim=(-2, -1), keepdim=True, dtype=torch.float32).clamp_(min=eps)
    work = torch.div(work, norm, out=torch.empty_like(work, dtype=dtype))  # computed in fp32
    with _full_fp32_products():
        for a, b, c in coefficient_schedule(coefficients, steps):
            gram = work @ work.mT
            poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            work = torch.baddbmm(work, poly, work, beta=a)
    if tall:
        work = work.mT
    return work.reshape(x.shape).contiguous()


def gram_pays(batch: int, rows: int, columns: int) -> bool:
    """Whether Gram space is the faster for bf16 matrices on a GPU.

    The symmetric kernel's unit of work is a tile of 128 x 256. It gains by having half as many, which shows once they
    fill the chip; long matrices gain earlier, from Gram space itself. Measured on an H100 (benchmarks/results).
    """
    short, long = sorted((rows, columns))
    tiles = batch * math.ceil(short / 256) ** 2
    return short >= 512 and tiles >= (64 if long >= 2 * short else 132)


@torch.no_grad()
def orthonormalize(
    x: torch.Tensor,
    steps: int = 5,
    coefficients: str = "quintic",
    dtype: torch.dtype = torch.float32,
    eps: float = 1e-7,
    fast: bool = False,
) -> torch.Tensor:
    """Approximates U V^T for each matrix U S V^T of a batch.

    Each matrix is divided by its Frobenius norm (taken in fp32, at least ``eps``). Zero matrices, rows and columns stay
    zero. With ``fast``, bf16 on a GPU that has the kernels runs in Gram space (gram.py), where that pays; everything
    else runs :func:`orthonormalize_plain`. No optimizer asks for ``fast`` yet: the kernels' present form has not passed
    its tests on a GPU.

    Args:
        x: ``[..., m, n]``; left as it is.
        steps: Newton-Schulz steps.
        coefficients: a name in :data:`COEFFICIENTS`.
        dtype: precision of the iteration; fp32 is full fp32, whatever the process allows elsewhere.
        eps: smallest norm to divide by.
        fast: allow the Gram-space path.

    Returns:
        ``[..., m, n]`` in ``dtype``, new memory.
    """
    work = x.reshape(-1, *x.shape[-2:])
    if fast and dtype is torch.bfloat16 and steps and x.is_cuda and x.shape[-2] % 8 == 0 and gram_pays(*work.shape):
        halves = work.to(dtype).contiguous()
        if kernel_takes(halves):
            schedule = coefficient_schedule(coefficients, steps)
            return gram_newton_schulz(halves, schedule, block_lengths(coefficients, steps), eps).view(x.shape)
    return orthonormalize_plain(x, steps, coefficients, dtype, eps)
