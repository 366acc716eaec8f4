"""Products of halves against fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.optim.thin import add_product_, halves, side_by_side, split_factors, split_gram, split_product


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_product(dtype):
    left, right = random(2, 30, 50).to(dtype), random(2, 50, 20)
    got = split_product(left, right)
    assert got.dtype is torch.float32
    assert error(got, left.double() @ right.double()) < 2**-16
    assert error(left.bfloat16() @ right.bfloat16(), left.double() @ right.double()) > 2**-11, "more than bf16 knows"


def test_split_gram():
    x = random(2, 70, 20)
    got = split_gram(x)
    assert error(got, x.mT.double() @ x.double()) < 2**-16
    torch.testing.assert_close(got, got.mT, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_side_by_side(dtype):
    x = 10 * random(2, 30, 3)
    joined = side_by_side(x, dtype)
    assert joined.shape == (2, 30, 8)
    assert torch.equal(joined[..., :6], torch.cat(halves(x, dtype), -1))
    assert not joined[..., 6:].any()


def test_factors_in_thirds():
    left, right = random(2, 30, 5), random(2, 5, 40)
    a, b = split_factors(left, right, torch.bfloat16, 64)
    assert a.shape[-1] == b.shape[-2] == 64
    assert error(a.double() @ b.double(), left.double() @ right.double()) < 2**-15


def test_sums_are_rounded_once():
    matrix, left, right = random(2, 30, 40).bfloat16(), random(2, 30, 3), random(2, 3, 40)
    got = add_product_(matrix, left, right)
    want = matrix.double() + left.double() @ right.double()
    assert (got == want.bfloat16()).float().mean() > 0.999
