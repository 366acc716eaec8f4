from __future__ import annotations

import math

import pytest
import torch
from optim_cases import GATE_UP_BLOCKS, alone, meta, numbers

from megatron_mup.optim.coefficients import coefficient_schedule
from megatron_mup.optim.muon import Muon, MuonSettings, NorMuon, NorMuonSettings
from megatron_mup.parametrization.meta import Role

SHAPES = [(16, 48), (48, 16), (32, 32), (7, 20)]


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def newton_schulz(x: torch.Tensor, name: str) -> torch.Tensor:
    x = x / x.norm()
    for i in range(5):
        a, b, c = coefficient_schedule(name, i + 1)[i]
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x


def normuon(w: torch.Tensor, grads: list[torch.Tensor], lr: float, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """microsoft/dion's NorMuon without shards, in fp64: heavy-ball momentum, row variances, the norm kept."""
    w, m, v = w.double(), 0.0, torch.zeros(w.shape[0], 1, dtype=torch.float64)
    for g in grads:
        m = 0.95 * m + g.double()
        o = newton_schulz(m, "quintic")
        v = 0.8 * v + 0.2 * (o * o).mean(1, keepdim=True)
        even = o / (v.sqrt() + 1e-8)
        even = even * o.norm() / even.norm()
        w = (1 - lr * decay) * w - lr * math.sqrt(w.shape[0] / w.shape[1]) * even
    return w, v


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_dions(shape):
    grads = [random(shape, 10 + i) for i in range(5)]
    param = alone(meta("w", Role.MLP_OUT, shape), random(shape, 0))
    settings = NorMuonSettings(momentum_style="sum", nesterov=False, beta2=0.8)
    optimizer = NorMuon([(param, numbers(lr=0.02, weight_decay=0.3))], settings, None)
    for grad in grads:
        param.grad = grad
        optimizer.step(1.0)
    want, want_variance = normuon(random(shape, 0), grads, 0.02, 0.3)
    assert ((param.value - want).norm() / want.norm()).item() < 1e-5
    place, variance = optimizer.state_tensors()["row_variance/w"]
    assert variance.shape == place.layout.local_shape == (shape[0], 1)
    torch.testing.assert_close(variance.double(), want_variance, rtol=1e-4, atol=0)


def test_blocks_have_their_own_rows_and_norms():
    shape = (24, 10)
    grad, start = random(shape, 1), torch.zeros(shape)
    fused = alone(meta("fc1", Role.MLP_IN, shape, blocks=GATE_UP_BLOCKS), start)
    fused.grad = grad.clone()
    fused.grad[1::2] *= 100
    optimizer = NorMuon([(fused, numbers(lr=1.0, weight_decay=0.0))], NorMuonSettings(), None)
    optimizer.step(1.0)
    for start_row in (0, 1):
        part = alone(meta("w", Role.MLP_OUT, (12, 10)), torch.zeros(12, 10))
        part.grad = grad[start_row::2]
        NorMuon([(part, numbers(lr=1.0, weight_decay=0.0))], NorMuonSettings(), None).step(1.0)
        torch.testing.assert_close(fused.value[start_row::2], part.value, atol=1e-4, rtol=0)
    _, variance = optimizer.state_tensors()["row_variance/fc1"]
    assert (variance > 0).all()


def test_a_row_without_gradient_stays():
    param = alone(meta("w", Role.MLP_OUT, (6, 9)), torch.ones(6, 9))
    param.grad = random((6, 9), 0)
    param.grad[2] = 0
    optimizer = NorMuon([(param, numbers(weight_decay=0.0))], NorMuonSettings(), None)
    optimizer.step(1.0)
    assert torch.equal(param.value[2], torch.ones(9))
    param.grad.zero_()
    NorMuon([(param, numbers(weight_decay=0.0))], NorMuonSettings(), None).step(1.0)
    assert param.value.isfinite().all()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_styles_of_momentum_take_the_same_steps(shape, nesterov):
    values, momenta = [], []
    for style in ("sum", "ema"):
        param = alone(meta("w", Role.MLP_OUT, shape), random(shape, 0))
        optimizer = Muon([(param, numbers())], MuonSettings(momentum_style=style, nesterov=nesterov), None)
        for step in range(5):
            param.grad = random(shape, 10 + step)
            optimizer.step(1.0)
        values.append(param.value)
        momenta.append(optimizer.state_tensors()["momentum/w"][1])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(0.05 * momenta[0], momenta[1])
