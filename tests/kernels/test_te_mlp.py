"""The MLP whose SwiGLU writes FP8, with plain twins in the places of kernels: its products, transposes and scales."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels import te_mlp
from megatron_mup.kernels.fp8_casts import (
    E4M3,
    E5M2,
    Scale,
    cast_reference,
    swiglu_backward_cast_reference,
    swiglu_cast_reference,
)
from megatron_mup.kernels.swiglu import plain_swiglu
from megatron_mup.kernels.te import Product, Scales
from tests.runs import relative_error

RUN = 8


def scale(factor: float, dtype: torch.dtype = E4M3) -> Scale:
    return Scale(torch.tensor([factor]), torch.zeros(1), dtype)


class Fixed(Product):
    """Scales that nobody updates."""

    def __init__(self, *factors: float) -> None:
        super().__init__()
        self.held = Scales(scale(factors[0]), scale(factors[1]), scale(factors[2], E5M2))

    def scales(self, x: torch.Tensor, weight: torch.Tensor) -> Scales:
        return self.held


@pytest.fixture
def twins(monkeypatch):
    def cast_by(x, scale, columns):
        cast = cast_reference(x, scale)
        return cast if columns else cast._replace(columns=None)

    def product(a, b, scale_a, scale_b, dtype, fast):
        assert a.is_contiguous()
        assert b.is_contiguous()
        return (a.float() * scale_a @ (b.float() * scale_b).t()).to(dtype)

    for module, name, twin in (
        (te_mlp, "cast_by", cast_by),
        (te_mlp, "scaled_product", product),
        (te_mlp, "swiglu_cast", swiglu_cast_reference),
        (te_mlp, "swiglu_backward_cast", swiglu_backward_cast_reference),
    ):
        monkeypatch.setattr(module, name, twin)
    monkeypatch.setattr("megatron_mup.kernels.te.cast_by", cast_by)


@pytest.mark.parametrize("resharded", [False, True])
def test_it_is_the_mlp_but_for_rounding(twins, resharded):
    generator = torch.Generator().manual_seed(0)
    x, first, second, grad = (
        torch.randn(shape, generator=generator).mul(size).requires_grad_()
        for shape, size in (((4, 6, 32), 1.0), ((96, 32), 0.2), ((32, 48), 0.2), ((4, 6, 32), 0.01))
    )
    products = Fixed(64.0, 128.0, 2048.0), Fixed(32.0, 128.0, 8192.0)
    for product in products:
        product.resharded = resharded
    seen = te_mlp.swiglu_mlp(x, products, (first, second), RUN)
    want = plain_swiglu(x @ first.t(), RUN) @ second.t()
    assert relative_error(seen, want) < 0.1
    of_seen, of_want = (torch.autograd.grad(y, (x, first, second), grad, retain_graph=True) for y in (seen, want))
    for got, expected in zip(of_seen, of_want, strict=True):
        assert relative_error(got, expected) < 0.2
    act = plain_swiglu(x @ first.t(), RUN)
    for held, values in (
        (products[0].held.input, x),
        (products[1].held.input, act),
        (products[1].held.weight, second),
        (products[1].held.gradient, grad),
    ):
        torch.testing.assert_close(held.largest[0], values.abs().max().detach(), rtol=0.1, atol=0)
    assert products[0].held.gradient.largest > 0


def test_a_weight_is_cast_once_for_all_micro_batches(twins):
    weight, product = torch.randn(16, 32, requires_grad=True), Fixed(1.0, 1.0, 1.0)
    first = product.cast_weight(weight, product.held.weight)
    assert product.cast_weight(weight, product.held.weight) is not first
    product.first = True
    first, second = (product.cast_weight(weight, product.held.weight) for _ in range(2))
    assert second is first
    assert torch.equal(first.columns.float(), first.rows.float().t())
    with torch.no_grad():
        assert product.cast_weight(weight, product.held.weight).columns is None
