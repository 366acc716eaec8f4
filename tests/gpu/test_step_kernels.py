"""One GPU: kernels of the step against their plain twins."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels.adamw import adamw_, device_has_adamw
from megatron_mup.kernels.multiply import multiply_
from megatron_mup.kernels.swiglu import HAS_KERNEL, swiglu_backward, swiglu_backward_reference
from megatron_mup.layers.mlp import GLU_INTERLEAVE, swiglu

pytestmark = pytest.mark.gpu

NUMBERS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("weight", "gradient"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("shape", [(1,), (300, 41), (64, 2048)])
def test_adamw_in_one_pass_is_adamw(weight, gradient, shape):
    if not device_has_adamw(torch.device("cuda")):
        pytest.skip("needs Triton")
    generator = torch.Generator("cuda").manual_seed(0)
    value = torch.randn(shape, generator=generator, device="cuda").to(weight)
    plain = torch.nn.Parameter(value.clone())
    theirs = torch.optim.AdamW([plain], fused=True, **NUMBERS)
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    copy = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    for step in range(1, 4):
        grad = torch.randn(shape, generator=generator, device="cuda").to(gradient)
        plain.grad = grad.to(weight)
        theirs.step()
        adamw_(value, grad, mean, square, copy, step=step, **NUMBERS)
    tight = {"rtol": 1e-5, "atol": 1e-6} if weight is torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    for got, want in (
        (value, plain),
        (mean, theirs.state[plain]["exp_avg"]),
        (square, theirs.state[plain]["exp_avg_sq"]),
    ):
        torch.testing.assert_close(got, want.detach(), **tight)
    assert torch.equal(copy, value.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (7, 3, 48), (5, 2, 4096)])
def test_gradient_of_swiglu_equals_its_twin(dtype, shape):
    if not HAS_KERNEL:
        pytest.skip("needs Triton")
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_()
    grad = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator, device="cuda").to(dtype)
    want = swiglu_backward_reference(x.detach(), grad, GLU_INTERLEAVE)
    rounding = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    torch.testing.assert_close(swiglu_backward(x.detach(), grad, GLU_INTERLEAVE), want, **rounding)
    swiglu(x).backward(grad)
    torch.testing.assert_close(x.grad, want, **rounding)


def test_factors_on_gradients_of_mixed_precision():
    """Inf and nan go through, and each product is that of fp32, rounded."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = [
        torch.randn(1000 + n, generator=generator, device="cuda").to(dtype)
        for n in range(4)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    tensors[0][0], tensors[1][0], tensors[1][1] = torch.nan, torch.nan, torch.inf
    factor = torch.tensor(0.3, device="cuda")
    want = [(tensor.float() * factor).to(tensor.dtype) for tensor in tensors]
    multiply_(tensors, factor)
    for got, expected in zip(tensors, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
