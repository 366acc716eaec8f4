from __future__ import annotations

import pytest
import torch

from megatron_mup.optim.newton_schulz import gram_pays, orthonormalize, orthonormalize_plain

# Smallest and largest singular value that five (or eight) steps may leave, for inputs above 1e-2 of the norm.
RANGES = {
    "jordan": (0.66, 1.23),
    "quintic": (0.95, 1.17),
    "polar_express": (0.85, 1.15),
    "polar_express:1.05": (0.82, 1.15),
    "cans": (0.86, 1.15),
    "generated:0.01:1.0": (0.98, 1.02),
}


def with_spectrum(m: int, n: int, smallest: float, seed: int = 0) -> torch.Tensor:
    """[m, n] fp64 with singular values from 1 down to ``smallest``, log-uniform."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q
    return (u * torch.logspace(0, torch.log10(torch.tensor(smallest)).item(), k, dtype=torch.float64)) @ v.T


def polar(x: torch.Tensor) -> torch.Tensor:
    u, _, vt = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32), (1, 16), (16, 1)])
def test_near_the_polar_factor(name, shape):
    x = with_spectrum(*shape, smallest=0.1).float()
    low, high = RANGES[name]
    got = orthonormalize(x, 5, name).double()
    values = torch.linalg.svdvals(got)
    assert low <= values.min()
    assert values.max() <= high
    # Same singular vectors: the error is that of the singular values alone.
    error = torch.linalg.matrix_norm(got - polar(x), 2)
    assert error <= max(1 - low, high - 1) + 1e-4


def test_eight_steps_of_polar_express_converge():
    x = with_spectrum(24, 60, smallest=1e-2).float()
    torch.testing.assert_close(orthonormalize(x, 8, "polar_express").double(), polar(x), atol=2e-3, rtol=0)
    torch.testing.assert_close(orthonormalize(x, 12, "polar_express").double(), polar(x), atol=2e-5, rtol=0)


# cans and generated sets without safety have no room for what bf16 rounds above 1.
@pytest.mark.parametrize("name", ["jordan", "quintic", "polar_express", "polar_express:1.05"])
def test_bf16(name):
    low, high = RANGES[name]
    x = torch.randn(64, 224, generator=torch.Generator().manual_seed(1))
    got = orthonormalize(x, 5, name, torch.bfloat16)
    assert got.dtype is torch.bfloat16
    values = torch.linalg.svdvals(got.float())
    assert low - 0.05 <= values.min()
    assert values.max() <= high + 0.05
    # Aligned with the input: <O, X> against the nuclear norm, to which the polar factor comes.
    assert (got.float() * x).sum() >= 0.85 * (low + high) / 2 * torch.linalg.svdvals(x).sum()


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
def test_scale_of_the_input_does_not_matter(name, scale):
    x = torch.randn(16, 48, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthonormalize(x * scale, 5, name), orthonormalize(x, 5, name), atol=1e-3, rtol=0)


def test_zeros_and_low_rank():
    assert orthonormalize(torch.zeros(4, 9)).count_nonzero() == 0
    x = with_spectrum(2, 40, 0.5).float()
    padded = torch.cat([x, torch.zeros(6, 40)])
    got = orthonormalize(padded)
    assert got[2:].count_nonzero() == 0
    torch.testing.assert_close(got[:2], orthonormalize(x), atol=1e-5, rtol=0)


def test_transposition_and_batches():
    x = torch.randn(2, 3, 12, 30, generator=torch.Generator().manual_seed(3))
    got = orthonormalize(x)
    assert got.shape == x.shape
    torch.testing.assert_close(orthonormalize(x.mT), got.mT, atol=1e-5, rtol=0)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(orthonormalize(x[i, j]), got[i, j], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 5])
def test_never_touches_its_input(dtype, steps):
    x = torch.randn(8, 20).to(dtype)
    before = x.clone()
    got = orthonormalize(x, steps, dtype=dtype)
    got.zero_()
    assert torch.equal(x, before)


@pytest.mark.parametrize("setting", ["ieee", "tf32"])
def test_the_processs_precision_is_neither_used_nor_changed(setting):
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    want = orthonormalize(torch.eye(4, 6))
    try:
        matmul.fp32_precision = setting
        assert torch.equal(orthonormalize(torch.eye(4, 6)), want)
        assert matmul.fp32_precision == setting
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpus_run_the_plain_iteration(dtype):
    x = torch.randn(34, 512, 520, generator=torch.Generator().manual_seed(4))
    assert gram_pays(*x.shape)
    assert torch.equal(orthonormalize(x, 1, "jordan", dtype), orthonormalize_plain(x, 1, "jordan", dtype))


def test_where_gram_space_pays():
    assert gram_pays(1, 4096, 4096)
    assert gram_pays(1, 2048, 8192)
    assert gram_pays(1, 14336, 4096)
    assert gram_pays(4, 2048, 2048)
    assert gram_pays(1, 2048, 2048)
    assert not gram_pays(1, 1024, 1024)
    assert not gram_pays(1000, 256, 256)


@pytest.mark.parametrize("name", RANGES)
def test_direction(name):
    x = torch.randn(48, 160, generator=torch.Generator().manual_seed(5))
    share = 0.8 if name == "jordan" else 0.9  # jordan leaves values between 0.68 and 1.2
    assert (orthonormalize(x, 5, name) * x).sum() >= share * torch.linalg.svdvals(x).sum()
