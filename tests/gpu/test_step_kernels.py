"""One GPU: kernels of the step against their plain twins."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.kernels.adamw import Stepped, adamw_, device_has_adamw
from megatron_mup.kernels.late import HAS_KERNEL
from megatron_mup.kernels.multiply import multiply_
from megatron_mup.kernels.rms_norm import rms_norm_backward, rms_norm_backward_reference
from megatron_mup.kernels.swiglu import swiglu_backward, swiglu_backward_reference
from megatron_mup.layers.mlp import GLU_INTERLEAVE, swiglu
from megatron_mup.layers.norm import RMSNorm
from megatron_mup.training.signals import StopRequest
from tests.gpu.gpu_runs import UMUP, gpu_config, train

pytestmark = pytest.mark.gpu

NUMBERS = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
BETAS = (0.9, 0.95)


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
    theirs = torch.optim.AdamW([plain], fused=True, betas=BETAS, **NUMBERS)
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    copy = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    for step in range(1, 4):
        grad = torch.randn(shape, generator=generator, device="cuda").to(gradient)
        plain.grad = grad.to(weight)
        theirs.step()
        adamw_([Stepped(value, grad, mean, square, copy, **NUMBERS)], betas=BETAS, step=step)
    tight = {"rtol": 1e-5, "atol": 1e-6} if weight is torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    for got, want in (
        (value, plain),
        (mean, theirs.state[plain]["exp_avg"]),
        (square, theirs.state[plain]["exp_avg_sq"]),
    ):
        torch.testing.assert_close(got, want.detach(), **tight)
    assert torch.equal(copy, value.bfloat16())


@pytest.mark.parametrize("gradient", [torch.float32, torch.bfloat16])
def test_a_factor_on_the_gradient_is_adamw_s_own(gradient):
    """Both in fp32, but for the rounding of the product that the compiler leaves out."""
    if not device_has_adamw(torch.device("cuda")):
        pytest.skip("needs Triton")
    generator = torch.Generator("cuda").manual_seed(0)
    start = [torch.rand(3001, generator=generator, device="cuda") for _ in range(3)]
    grad, scale = torch.randn(3001, generator=generator, device="cuda").to(gradient), torch.tensor(0.37, device="cuda")
    folded, scaled = ([tensor.clone() for tensor in start] for _ in range(2))
    adamw_([Stepped(folded[0], grad, *folded[1:], None, **NUMBERS)], betas=BETAS, step=1, scale=scale)
    adamw_([Stepped(scaled[0], grad.float() * scale, *scaled[1:], None, **NUMBERS)], betas=BETAS, step=1)
    for one, other in zip(folded, scaled, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("scheme", "flags"), [("", ""), ("", "--main-params-dtype bf16"), (f"{UMUP} --no-norm-affine", "")]
)
@pytest.mark.parametrize("graph", ["none", "local"])
def test_the_norm_is_the_same_behind_the_update(meshes, scheme, flags, graph):
    """Without clipping AdamW's kernel finds it on its way; with a limit that is never reached it comes first."""
    seen = []
    for clip in ("0", "1e9"):
        # The formula of attention, whose gradients are the same each time.
        wanted = f"--bf16 --attention-backend unfused --clip-grad {clip} --cuda-graph-impl {graph}"
        seen.append(train(gpu_config(wanted, flags, scheme=scheme), meshes["cuda"], steps=6))
    torch.testing.assert_close(seen[0]["norms"][0], seen[1]["norms"][0], rtol=1e-6, atol=0)
    # The compiler may fuse sums and products otherwise where there is a factor, and so round weights in bf16 otherwise.
    rounding = {"rtol": 2**-6, "atol": 2**-9} if "bf16" in flags else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(seen[0]["norms"], seen[1]["norms"], rtol=1e-2 if "bf16" in flags else 1e-6, atol=0)
    for name, weights in seen[0]["weights"].items():
        torch.testing.assert_close(weights, seen[1]["weights"][name], **rounding, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 16), (7, 3, 300), (2000, 2048), (50, 2, 16384)])
def test_gradient_of_a_norm_on_the_stream_equals_its_twin(dtype, shape):
    generator = torch.Generator("cuda").manual_seed(0)
    x, grad, skip = (torch.randn(shape, generator=generator, device="cuda").to(dtype) for _ in range(3))
    weight = torch.randn(shape[-1], generator=generator, device="cuda").to(dtype)
    want, want_gain = rms_norm_backward_reference(x, weight, grad, skip, 1e-5)
    got, gain = rms_norm_backward(x, weight, grad, skip, 1e-5)
    rounding = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2**-7, "atol": 2**-7}
    torch.testing.assert_close(got, want, **rounding)
    torch.testing.assert_close(gain, want_gain, rtol=rounding["rtol"], atol=rounding["atol"] * 10)


def test_a_branch_through_the_norm_has_the_plain_gradients():
    generator = torch.Generator("cuda").manual_seed(0)
    x, pull = (torch.randn(64, 2, 512, generator=generator, device="cuda") for _ in range(2))
    found = []
    for forks in (True, False):
        norm = RMSNorm(512, torch.nn.Parameter(torch.linspace(0.5, 2, 512, device="cuda")), 1e-5)
        leaf = x.clone().requires_grad_()

        def layer(x: torch.Tensor, norm: RMSNorm = norm, forks: bool = forks) -> torch.Tensor:
            stream, branch = norm.fork(x) if forks else (x, norm(x))
            return stream + branch.sin()

        (torch.compile(layer) if forks else layer)(leaf).backward(pull)
        found.append((leaf.grad, norm.weight.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_wish_to_stop_is_known_a_step_later_and_waits_for_no_step_under_way():
    gpu = torch.device("cuda")
    with StopRequest(0.0, gpu) as stop:
        stop.submit(torch.tensor(stop.local(), device=gpu))
        torch.cuda._sleep(2_000_000_000)  # the next step; about a second
        assert stop.agreed() is None
        stop.submit(torch.zeros((), dtype=torch.int64, device=gpu))
        assert stop.agreed() == "--exit-duration-in-mins"
        assert not torch.cuda.current_stream().query(), "the second step should still run"


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
