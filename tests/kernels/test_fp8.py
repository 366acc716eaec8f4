"""FP8 casts, products and the linear layer, against FP8's definition and against fp32."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels.fp8 import E4M3, E5M2, fp8_linear, fp8_product, fp8_swiglu_mlp, saturated
from megatron_mup.kernels.swiglu import plain_swiglu

TYPES = {"e4m3": (E4M3, 448.0, 3), "e5m2": (E5M2, 57344.0, 2)}


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a type, ascending, in fp64; the even ones (last bit of the code 0) are exact neighbours."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).double()
    return values[values.isfinite()].sort().values


def nearest(x: torch.Tensor, dtype: torch.dtype, mantissa: int) -> torch.Tensor:
    """Rounding by the definition: the nearest value; between two, the one whose last bit is 0."""
    grid = numbers(dtype).unique()
    distance = (x.double()[:, None] - grid).abs()
    best = distance.min(1, keepdim=True).values
    ties = distance == best
    exponent = grid.abs().clamp(min=2.0 ** (1 - {3: 7, 2: 15}[mantissa])).log2().floor()
    odd = (grid.abs() / 2.0 ** (exponent - mantissa)) % 2
    return grid[torch.where(ties, odd, 9.0).argmin(1)]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_cast_is_to_the_nearest_and_saturates(name, source):
    dtype, limit, mantissa = TYPES[name]
    grid = numbers(dtype)
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(500, generator=generator) * 2.0 ** torch.randint(-18, 9, (500,), generator=generator)
    x = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, small]).to(source)
    x = x[x.abs() <= limit]
    assert torch.equal(saturated(x, dtype).double(), nearest(x, dtype, mantissa))
    beyond = torch.tensor([limit * 1.01, limit * 1.2, 1e30, float("inf")]).to(source)
    for sign in (1, -1):
        assert (saturated(sign * beyond, dtype).float() == sign * limit).all()
    assert saturated(torch.tensor([float("nan")]), dtype).float().isnan().all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_product_equals_torch(dtype):
    """PyTorch has the operation for CPUs too, at shapes that GPUs take."""
    generator = torch.Generator().manual_seed(1)
    a = saturated(torch.randn(24, 48, generator=generator), dtype)
    b = saturated(torch.randn(32, 48, generator=generator), E4M3)
    scale, one = torch.tensor(0.25), torch.tensor(1.0)
    want = torch._scaled_mm(a, b.t(), scale_a=scale, scale_b=one, out_dtype=torch.float32)
    torch.testing.assert_close(fp8_product(a, b, 0.25, torch.float32, fast=False), want, rtol=1e-6, atol=1e-6)


def by_formula(x, weight, grad, factors, gradient, gradient_scale):
    """Output and gradients, from casts and products in fp64."""
    cast = [saturated(t, d).double() for t, d in ((x, E4M3), (weight, E4M3), (grad * gradient_scale, gradient))]
    x, weight, grad = cast
    of_output, of_weight, of_input = factors
    grad_x, grad_weight = grad @ weight / gradient_scale, grad.t() @ x / gradient_scale
    return x @ weight.t() * of_output, grad_x * of_input, grad_weight * of_weight


@pytest.mark.parametrize("gradient", [E4M3, E5M2])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
def test_linear_is_its_formula(gradient, compiled):
    generator = torch.Generator().manual_seed(2)
    x, weight, grad = (
        torch.randn(*shape, generator=generator) * size
        for shape, size in (((6, 4, 16), 1.0), ((32, 16), 300.0), ((6, 4, 32), 1e-6))
    )
    x.requires_grad_()
    weight.requires_grad_()
    factors, scale = (0.5, 3.0, 0.125), 2.0**20
    layer = torch.compile(fp8_linear, backend="aot_eager", fullgraph=True) if compiled else fp8_linear
    y = layer(x, weight, factors, gradient, scale)
    y.backward(grad)
    want = by_formula(x.detach().flatten(0, 1), weight.detach(), grad.flatten(0, 1), factors, gradient, scale)
    for seen, expected in zip((y.flatten(0, 1), x.grad.flatten(0, 1), weight.grad), want, strict=True):
        torch.testing.assert_close(seen.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    # Without its scale the gradient would have vanished.
    assert x.grad.abs().max() > 0
    assert by_formula(x.detach()[0], weight.detach(), grad[0], factors, E4M3, 1.0)[1].abs().max() == 0


def test_backward_keeps_the_input_in_one_byte():
    kept = []
    x, weight = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fp8_linear(x, weight)
    assert sorted((tuple(t.shape), t.element_size()) for t in kept) == [((16, 32), 4), ((64, 32), 1)]
    assert any(t is weight or t.data_ptr() == weight.data_ptr() for t in kept), "no copy of the weight"


def test_a_kept_cast_changes_nothing():
    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (
        torch.randn(s, generator=generator).requires_grad_() for s in ((3, 16, 32), (64, 32), (3, 16, 64))
    )
    seen, want = (fp8_linear(x, weight, (0.2, 1.0, 0.15), E5M2, 4.0, keep) for keep in (True, False))
    assert torch.equal(seen, want)
    for got, expected in zip(*(torch.autograd.grad(y, (x, weight), grad) for y in (seen, want)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize(("gradient", "keep"), [(E4M3, False), (E5M2, True)])
def test_an_mlp_taken_together_is_its_layers(gradient, keep, compiled):
    """In fp32, where nothing is rounded between them, to the bit."""
    generator = torch.Generator().manual_seed(3)
    shapes = (3, 16, 32), (64, 32), (32, 32), (3, 16, 32)
    x, first, second, grad = (torch.randn(shape, generator=generator).requires_grad_() for shape in shapes)
    one, other = (0.2, 1.0, 0.15), (0.17, 0.9, 0.3)
    mlp = torch.compile(fp8_swiglu_mlp) if compiled else fp8_swiglu_mlp
    seen = mlp(x, (first, second), (one, other), gradient, 4.0, 8, 1.3, 1.7, keep)
    inner = plain_swiglu(fp8_linear(x, first, one, gradient, 4.0), 8, 1.3) * 1.7
    want = fp8_linear(inner, second, other, gradient, 4.0)
    assert torch.equal(seen, want)
    of_seen, of_want = (torch.autograd.grad(y, (x, first, second), grad) for y in (seen, want))
    for got, expected in zip(of_seen, of_want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
