from __future__ import annotations

import math

import pytest
import torch
from optim_cases import GATE_UP_BLOCKS, QKV_BLOCKS, alone, meta, numbers

from megatron_mup.optim import matrix
from megatron_mup.optim.blocks import logical_blocks
from megatron_mup.optim.muon import Muon, MuonSettings, update_scale
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.parametrization.meta import Block, Role

SHAPES = [(16, 48), (48, 16), (32, 32), (32, 32), (7, 20)]


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.1 for shape in SHAPES]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def ours(settings: MuonSettings, steps: int, lr: float, decay: float, factor: float = 1.0) -> list[torch.Tensor]:
    params = [alone(meta(f"w{i}", Role.MLP_OUT, tuple(w.shape)), w) for i, w in enumerate(weights())]
    optimizer = Muon([(param, numbers(lr=lr, weight_decay=decay)) for param in params], settings, None)
    for step in range(steps):
        for param, grad in zip(params, weights(100 + step), strict=True):
            param.grad = grad
        optimizer.step(factor)
    return [param.value for param in params]


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("mode", "adjust"), [("shape_scaling", "original"), ("match_rms_adamw", "match_rms_adamw")])
def test_equals_torch(monkeypatch, nesterov, mode, adjust):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    params = [torch.nn.Parameter(w) for w in weights()]
    theirs = torch.optim.Muon(params, lr=0.02, weight_decay=0.3, nesterov=nesterov, adjust_lr_fn=adjust)
    for step in range(5):
        for param, grad in zip(params, weights(100 + step), strict=True):
            param.grad = grad
        theirs.step()
    settings = MuonSettings(nesterov=nesterov, scale_mode=mode, coefficients="jordan")
    for got, want in zip(ours(settings, 5, 0.02, 0.3), params, strict=True):
        assert relative(got, want.detach()) < 1e-5


def test_factor_scales_the_peak_rate():
    settings = MuonSettings()
    for got, want in zip(ours(settings, 3, 0.04, 0.1, factor=0.5), ours(settings, 3, 0.02, 0.1), strict=True):
        assert torch.equal(got, want)


def test_batching_does_not_change_the_result(monkeypatch):
    together = ours(MuonSettings(), 2, 0.02, 0.1)
    monkeypatch.setattr(matrix, "matrices_at_once", lambda *_: 2)
    for got, want in zip(ours(MuonSettings(), 2, 0.02, 0.1), together, strict=True):
        assert relative(got, want) < 1e-6


@pytest.mark.parametrize(
    ("mode", "wide", "tall"),
    [
        ("unit_rms_norm", 0.5, 2.0),
        ("spectral", 4.0, 4.0),
        ("shape_scaling", 1.0, 2.0),
        ("match_rms_adamw", 0.8, 0.8),
    ],
)
def test_scale_modes(mode, wide, tall):
    assert update_scale(mode, 4, 16) == pytest.approx(wide)
    assert update_scale(mode, 16, 4) == pytest.approx(tall)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("role", "blocks", "period"), [(Role.QKV, QKV_BLOCKS, 8), (Role.MLP_IN, GATE_UP_BLOCKS, 2)])
def test_blocks_are_orthonormalized_apart(role, blocks, period, split):
    shape = (24, 10)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    param = alone(meta("fused", role, shape, blocks=blocks), torch.zeros(shape))
    param.grad = grad
    settings = MuonSettings(split_qkv=split, split_fc1=split, extra_scale_factor=0.5)
    Muon([(param, numbers(lr=1.0, weight_decay=0.0))], settings, None).step(1.0)
    row = torch.arange(24) % period
    masks = [(row >= b.start) & (row < b.start + b.size) for b in blocks] if split else [row >= 0]
    for mask in masks:
        part = grad[mask]
        want = -0.5 * math.sqrt(part.shape[0] / part.shape[1]) * orthonormalize(part)
        torch.testing.assert_close(param.value[mask], want, atol=1e-4, rtol=0)


def test_blocks_that_leave_rows_out():
    hole = meta("w", Role.QKV, (16, 4), blocks=(Block("q", 0, 2, 8), Block("k", 4, 4, 8)))
    with pytest.raises(ValueError, match="cover"):
        logical_blocks(hole, MuonSettings())
    with pytest.raises(ValueError, match="only matrices"):
        logical_blocks(meta("b", Role.BIAS, (4,)), MuonSettings())


@pytest.mark.parametrize("nesterov", [True, False])
def test_bf16_parameters_keep_bf16_momentum_and_round_once(nesterov):
    """`torch.optim.Muon` has overwritten a bf16 momentum by the update's first iterate, without Nesterov."""
    value = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    grad = torch.randn(8, 24, generator=torch.Generator().manual_seed(1)).bfloat16()
    param = alone(meta("w", Role.MLP_OUT, (8, 24)), value)
    param.grad = grad.clone()
    optimizer = Muon(
        [(param, numbers(lr=0.1, weight_decay=0.5))], MuonSettings(ns_dtype=torch.bfloat16, nesterov=nesterov), None
    )
    optimizer.step(1.0)
    (_, momentum), *_ = optimizer.state_tensors().values()
    assert momentum.dtype is param.value.dtype is torch.bfloat16
    assert torch.equal(param.grad, grad)
    torch.testing.assert_close(momentum, 0.05 * grad)
    used = momentum.lerp(grad, 0.05) if nesterov else momentum
    update = orthonormalize(used, dtype=torch.bfloat16).float() / math.sqrt(3)
    want = value.float() * (1 - 0.1 * 0.5) - 0.1 * update
    torch.testing.assert_close(param.value.float(), want, atol=1e-2, rtol=2**-8)


def test_missing_gradient_is_named():
    param = alone(meta("layers.0.fc2", Role.MLP_OUT, (4, 4)), torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match=r"layers\.0\.fc2"):
        Muon([(param, numbers())], MuonSettings(), None).step(1.0)
