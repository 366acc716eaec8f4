from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_mup.kernels.rms_norm import rms_norm_backward_reference
from megatron_mup.layers import norm as norms
from megatron_mup.layers.norm import RMSNorm

EPS = 1e-3


def leaves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad, skip = (torch.randn(3, 2, 10, generator=generator) for _ in range(3))
    return x.requires_grad_(), torch.linspace(0.5, 2, 10, requires_grad=True), grad, skip


def test_the_twin_is_the_gradient_of_norm_and_stream():
    x, weight, grad, skip = leaves()
    torch.autograd.backward([F.rms_norm(x, (10,), weight, EPS), x.clone()], [grad, skip])
    found = rms_norm_backward_reference(x.detach(), weight.detach(), grad, skip, EPS)
    for got, want in zip(found, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_both_gradients_of_a_fork_go_through_one_function(monkeypatch, compiled):
    calls = []

    def counted(*args):
        calls.append(args)
        return rms_norm_backward_reference(*args)

    monkeypatch.setattr(norms, "rms_norm_backward", counted)
    x, weight, *_ = leaves()

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        stream, branch = norms._Fork.apply(x, weight, EPS)
        return stream.cos() + branch.sin()

    (torch.compile(layer, backend="aot_eager") if compiled else layer)(x, weight).sum().backward()
    assert len(calls) == 1
    got = x.grad, weight.grad
    x.grad = weight.grad = None
    (x.cos() + F.rms_norm(x, (10,), weight, EPS).sin()).sum().backward()
    for one, want in zip(got, (x.grad, weight.grad), strict=True):
        torch.testing.assert_close(one, want, rtol=1e-5, atol=1e-6)


def test_a_fork_on_a_cpu_is_stream_and_norm():
    x, weight, *_ = leaves()
    norm = RMSNorm(10, torch.nn.Parameter(weight.detach()), EPS)
    stream, branch = norm.fork(x)
    assert stream is x
    assert torch.equal(branch, norm(x))
