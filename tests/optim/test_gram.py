"""Gram space on its CPU twin, against exact arithmetic on hard spectra."""

from __future__ import annotations

import pytest
import torch
from hard_spectra import SPECTRA, matrix

from megatron_mup.optim.coefficients import coefficient_schedule
from megatron_mup.optim.gram import BLOCKS, block_lengths, gram_newton_schulz
from megatron_mup.optim.newton_schulz import (
    gram_pays,
    orthonormalize,
    orthonormalize_plain,
)

# Largest singular value that five steps leave in exact arithmetic, and 2 % for bf16.
LARGEST = {"jordan": 1.205 * 1.02, "quintic": 1.15 * 1.02, "polar_express": 1.13 * 1.02}


def exact(x: torch.Tensor, name: str, steps: int) -> torch.Tensor:
    """The iteration in exact arithmetic: its polynomials on the singular values."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.norm()
    for a, b, c in coefficient_schedule(name, steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def gram(x: torch.Tensor, name: str, steps: int = 5) -> torch.Tensor:
    lengths = block_lengths(name, steps, x.shape[0] == x.shape[1])
    return gram_newton_schulz(x[None], coefficient_schedule(name, steps), lengths, 1e-7)[0]


def compare(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    """Relative error and largest singular value."""
    error = ((got.double() - want).norm() / want.norm()).item()
    return error, torch.linalg.matrix_norm(got.double(), 2).item()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 336), (96, 96), (336, 96)])
def test_hard_spectra(name, kind, shape):
    x = matrix(kind, *shape)
    want = exact(x, name, 5)
    error, largest = compare(gram(x, name), want)
    assert error <= 0.12
    assert largest <= LARGEST[name]
    plain = compare(orthonormalize_plain(x, 5, name, torch.bfloat16), want)[0]
    assert error <= max(plain, 0.03), "no worse than bf16 without Gram space"


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_any_number_of_steps(name, steps):
    x = matrix("log 1e-3", 48, 160)
    error, _ = compare(gram(x, name, steps), exact(x, name, steps))
    assert error <= 0.07


@pytest.mark.parametrize("name", BLOCKS)
def test_lengths_cover_the_steps(name):
    assert sum(BLOCKS[name]) == 5
    for steps in range(12):
        for square in (False, True):
            lengths = block_lengths(name, steps, square)
            assert sum(lengths) == steps
            assert all(1 <= length <= 4 for length in lengths)


@pytest.mark.parametrize("kind", SPECTRA)
def test_eight_steps_of_the_sphere(kind):
    """With the safety factor in the name, as the flags spell it; a long last block costs no accuracy."""
    name, x = "polar_express:1.01", matrix(kind, 96, 336)
    assert block_lengths(name, 8) == (2, 2, 4)
    want = exact(x, name, 8)
    error, largest = compare(gram(x, name, 8), want)
    assert error <= 0.12
    assert largest <= 1.03
    assert (
        error <= 0.005 + compare(gram_newton_schulz(x[None], coefficient_schedule(name, 8), (2,) * 4, 1e-7)[0], want)[0]
    )


@pytest.mark.parametrize("scale", [1e-8, 1e4])
def test_scale_of_the_input_does_not_matter(scale):
    x = matrix("gaussian", 48, 160)
    got = gram((x.double() * scale).to(torch.bfloat16), "quintic")
    torch.testing.assert_close(got, gram(x, "quintic"), atol=2e-2, rtol=0)


def test_zeros():
    x = torch.zeros(2, 16, 40, dtype=torch.bfloat16)
    x[1, :4] = matrix("gaussian", 4, 40)
    before = x.clone()
    got = gram_newton_schulz(x, coefficient_schedule("quintic", 5), (2, 3), 1e-7)
    assert torch.equal(x, before)
    assert got[0].count_nonzero() == 0
    assert got[1, 4:].count_nonzero() == 0
    assert torch.linalg.svdvals(got[1, :4].float()).min() > 0.9


@pytest.mark.parametrize("shape", [(48, 160), (64, 64)])
def test_transposition(shape):
    x = matrix("gaussian", *shape)
    got = gram(x, "quintic")
    torch.testing.assert_close(gram(x.mT.contiguous(), "quintic").mT, got, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", BLOCKS)
def test_direction(name):
    x = matrix("gaussian", 48, 160)
    values = torch.linalg.svdvals(x.float())
    assert (gram(x, name).float() * x.float()).sum() >= 0.9 * (0.9 if name == "jordan" else 1.0) * values.sum()


def test_matrices_of_a_batch_are_their_own():
    x = torch.stack([matrix(kind, 48, 160) for kind in SPECTRA])
    together = gram_newton_schulz(x, coefficient_schedule("quintic", 5), (2, 3), 1e-7)
    for got, one in zip(together, x, strict=True):
        torch.testing.assert_close(got, gram(one, "quintic"), atol=2e-2, rtol=0)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(512, 1800), (1024, 1024), (1800, 520)])
def test_hard_spectra_on_the_device(name, kind, shape):
    x = matrix(kind, *shape, "cuda")
    want = exact(x, name, 5)
    error, largest = compare(gram(x, name), want)
    assert error <= 0.12
    assert largest <= LARGEST[name]
    # Rounding of the plain form's size.
    assert error <= max(1.5 * compare(orthonormalize_plain(x, 5, name, torch.bfloat16), want)[0], 0.03)


@pytest.mark.gpu
@gpu
def test_waits_for_nothing_on_the_device():
    x = torch.randn(16, 512, 1024, device="cuda")
    assert gram_pays(*x.shape)
    want = orthonormalize(x, dtype=torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = orthonormalize(x, dtype=torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)
