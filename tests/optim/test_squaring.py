"""Steps of high degree, made of squarings: what the coefficients do, and what rounding does to them."""

from __future__ import annotations

import math

import pytest
import torch
from hard_spectra import SPECTRA, matrix

from megatron_mup.kernels.multiply import multiplied
from megatron_mup.optim.coefficients import coefficient_schedule, has_squarings, polynomial, squarings
from megatron_mup.optim.gram import block_lengths, gram_newton_schulz, gram_squarings
from megatron_mup.optim.newton_schulz import orthonormalize, orthonormalize_plain

STEPS = coefficient_schedule("squaring", 2)
LOWER = 0.0028


def values(x: torch.Tensor, schedule=STEPS) -> torch.Tensor:
    """What singular values become, in the precision of x."""
    for step in schedule:
        s = x * x
        for a, b, c in squarings(step):
            s = a + b * x * x + c * s * s
        x = s * x
    return x


def factors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the steps make of x in exact arithmetic, and its orthonormal factor."""
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    return (u * values(s / s.norm())) @ vt, u @ vt


def test_two_steps_bring_all_values_near_one():
    x = torch.logspace(math.log10(LOWER), math.log10(1.01), 200_001, dtype=torch.float64)
    y = values(x)
    assert y.min() >= 0.977
    assert y.max() <= 1.023
    # The first step alone leaves an interval whose ends differ by a factor of 7.8; the second takes a bit more.
    first = values(x, STEPS[:1])
    assert first.max() <= 1 / 1.0059
    assert first.max() / first.min() <= 7.75
    second = values(torch.linspace(first.min().item(), 1.0, 100_001).double(), STEPS[1:])
    assert second.min() >= 0.977
    assert second.max() <= 1.023


@pytest.mark.parametrize(("number", "low", "high"), [(0, LOWER, 1.01), (1, 0.12893, 1.0)])
def test_no_small_change_of_a_step_does_better(number, low, high):
    """Its error is largest at one point more than it has coefficients, the scales of S not counted, and what lowers it
    at some of them raises it at another: its slopes there add up to zero with weights above zero (Kuhn and Tucker)."""
    step = torch.tensor(STEPS[number], dtype=torch.float64)
    x = torch.logspace(math.log10(low), math.log10(high), 40_001, dtype=torch.float64)
    ends = values(x, [STEPS[number]])
    middle = (ends.min() + ends.max()) / 2
    error = (ends - middle).abs()
    peak = (error > 0.995 * error.max()) & (error == torch.nn.functional.max_pool1d(error[None], 3, 1, 1)[0])
    at, signs = x[peak], (ends - middle)[peak].sign()
    assert len(at) == 2 * len(squarings(STEPS[number])) + 2
    slopes = torch.autograd.functional.jacobian(
        lambda factors: signs * values(at, [tuple(step * factors)]), torch.ones_like(step)
    )
    weights = torch.linalg.svd(slopes).U[:, -1]
    assert (weights @ slopes).norm() < 1e-9 * slopes.norm()
    assert (weights * weights.sum().sign() > 0).all()


def test_degrees_and_the_steps_after():
    assert [len(squarings(step)) for step in STEPS] == [5, 4]
    assert coefficient_schedule("squaring", 1) == STEPS[:1]
    third = coefficient_schedule("squaring", 3)
    assert third[:2] == STEPS
    x = torch.logspace(-2.5, 0, 10_001).double()
    assert (values(x, third) - 1).abs().max() < 1e-4
    assert has_squarings(third)
    assert not has_squarings(coefficient_schedule("quintic", 5))
    assert block_lengths("squaring", 3) == (1, 1, 1)


@pytest.mark.parametrize("step", STEPS)
def test_nothing_on_the_way_leaves_the_range_of_fp16(step):
    r = torch.linspace(0, 1.02, 10_001).double()
    s, ends = r, []
    for a, b, c in squarings(step):
        s = a + b * r + c * s * s
        ends.append((s[0].item(), s.abs().max().item()))
    for at_zero, largest in ends[:-1]:
        assert at_zero == pytest.approx(1, abs=1e-8)
        assert largest <= 1 + 1e-6
    assert ends[-1][1] < 64


def test_polynomials_of_matrices():
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    r = torch.logspace(-4, 0, 12).double()
    for step in (*STEPS, (3.0, -2.0, 1.0)):
        apart, a = polynomial(((q * r) @ q.T)[None], step)
        want = values(r.sqrt(), [step]) / r.sqrt()
        torch.testing.assert_close((q.T @ apart[0] @ q).diagonal() + a, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(96, 240), (96, 96), (240, 96)])
def test_hard_spectra(kind, shape):
    x = matrix(kind, *shape)
    before = x.clone()
    want, factor = factors(x)
    got = gram_squarings(x[None], STEPS, 1e-7)[0].double()
    assert torch.equal(x, before)
    assert (got - want).norm() / want.norm() <= (0.12 if kind == "rank 2" else 0.04)
    assert torch.linalg.matrix_norm(got, 2) <= 1.03
    # As near to the orthonormal factor as the five steps of quintic, which are more work.
    quintic = orthonormalize_plain(x, 5, "quintic").double()
    if kind != "rank 2":  # of that both find two values, and noise
        assert (got - factor).norm() <= (quintic - factor).norm() * 1.01


def test_few_singular_values():
    """The first step's large Q cancels on their vectors, and leaves rounding there; no value grows by it."""
    generator = torch.Generator().manual_seed(5)
    schedule = coefficient_schedule("quintic", 5)
    for rank in (1, 2, 3, 4, 6, 8) * 2:
        spectrum = 10 ** (-2 * torch.rand(rank, generator=generator, dtype=torch.float64))
        u, v = (torch.linalg.qr(torch.randn(96, rank, generator=generator, dtype=torch.float64)).Q for _ in range(2))
        x = ((u * spectrum) @ v.T).to(torch.bfloat16)
        left, s, right = torch.linalg.svd(x.double())
        usual = gram_newton_schulz(x[None], schedule, block_lengths("quintic", 5, square=True), 1e-7)[0].double()
        for bound, got, steps in (
            (0.3, gram_squarings(x[None], STEPS, 1e-7)[0].double(), STEPS),
            (0.1, usual, schedule),
        ):
            want = (left * values(s / s.norm(), steps)) @ right
            assert (got - want).norm() / want.norm() <= bound
        assert torch.linalg.matrix_norm(gram_squarings(x[None], STEPS, 1e-7)[0].double(), 2) <= 1.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_products_in_full_precision(dtype):
    """Half precision would leave little of a degree of 65."""
    x = matrix("rank 2", 48, 64).to(dtype)
    got = orthonormalize(x, 2, "squaring", dtype)
    assert got.dtype is dtype
    rounding = 2e-3 if dtype is torch.bfloat16 else 1e-3
    torch.testing.assert_close(got.double(), factors(x)[0], atol=rounding, rtol=2**-7)


def test_zeros_scale_and_batches():
    x = torch.zeros(3, 16, 40, dtype=torch.bfloat16)
    x[1, :4] = matrix("gaussian", 4, 40)
    x[2] = 2.0**-40 * matrix("gaussian", 16, 40)
    got = gram_squarings(x, STEPS, 1e-12)
    assert got[0].count_nonzero() == 0
    assert got[1, 4:].count_nonzero() == 0
    torch.testing.assert_close(got[1, :4], gram_squarings(x[1:2, :4], STEPS, 1e-12)[0], atol=2e-2, rtol=0)
    torch.testing.assert_close(got[2], gram_squarings(2.0**40 * x[2:], STEPS, 1e-12)[0], atol=2e-2, rtol=0)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), dtype=torch.float32)
    assert torch.equal(gram_squarings(x, STEPS, 1e-12, norm), got)


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(512, 1800), (1024, 1024), (1800, 520), (64, 200)])
def test_hard_spectra_on_the_device(kind, shape):
    x = matrix(kind, *shape, "cuda")
    want, _ = factors(x)
    got = orthonormalize(x, 2, "squaring", torch.bfloat16).double()
    assert (got - want).norm() / want.norm() <= (0.12 if kind == "rank 2" else 0.04)
    assert torch.linalg.matrix_norm(got, 2) <= 1.03


@pytest.mark.gpu
@gpu
def test_waits_for_nothing_on_the_device():
    x = torch.randn(4, 512, 1024, device="cuda")
    want = orthonormalize(x, 2, "squaring", torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = orthonormalize(x, 2, "squaring", torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("source", "target"), [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)])
def test_factors_of_matrices_on_the_device(source, target):
    x = torch.randn(3, 70, 130, device="cuda").to(source)
    numbers = torch.tensor([64.0, 0.3, 0.0], device="cuda")
    want = (x.float() * numbers.view(-1, 1, 1)).to(target)
    torch.testing.assert_close(multiplied(x, numbers, target), want, rtol=0, atol=0)
