"""Heads of query, key and value orthonormalized apart (``--muon-split-heads``)."""

from __future__ import annotations

import math

import pytest
import torch
from optim_cases import alone, meta, numbers

from megatron_mup.optim.blocks import MatrixSettings, logical_blocks
from megatron_mup.optim.muon import Muon, MuonSettings, NorMuon, NorMuonSettings
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.planner import newton_schulz_cost
from megatron_mup.optim.sphere import MuonSphere, SphereSettings
from megatron_mup.parametrization.meta import Block, Role

WIDTH = 4
# Two groups of two query heads, a key head and a value head each.
BLOCKS = (
    Block("query", 0, 2 * WIDTH, 16, heads=2),
    Block("key", 2 * WIDTH, WIDTH, 16),
    Block("value", 3 * WIDTH, WIDTH, 16),
)
QKV = meta("qkv", Role.QKV, (32, 10), blocks=BLOCKS)


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_heads_are_matrices():
    blocks = logical_blocks(QKV, MatrixSettings(split_heads=True))
    assert [(b.name, b.start, b.size, b.apart) for b in blocks] == [
        ("query.0", 0, WIDTH, True),
        ("query.1", WIDTH, WIDTH, True),
        ("key.0", 2 * WIDTH, WIDTH, True),
        ("value.0", 3 * WIDTH, WIDTH, True),
    ]
    assert newton_schulz_cost(QKV.shape, blocks) == 8 * (2 * WIDTH**2 * 10 + WIDTH**3)
    other = meta("fc1", Role.MLP_IN, (32, 10), blocks=BLOCKS)
    assert logical_blocks(other, MatrixSettings(split_heads=True)) == BLOCKS, "only attention has heads"


@pytest.mark.parametrize("mode", ["unit_rms_norm", "spectral"])
def test_each_head_has_its_own_update_and_its_own_scale(mode):
    grad = random(QKV.shape, 0)
    # A head that is far larger than the others would take all of the norm that they share.
    grad[WIDTH : 2 * WIDTH] *= 1000
    param = alone(QKV, torch.zeros(QKV.shape))
    param.grad = grad
    settings = MuonSettings(split_heads=True, scale_mode=mode)
    Muon([(param, numbers(lr=1.0, weight_decay=0.0))], settings, None).step(1.0)
    scale = math.sqrt(WIDTH / 10) if mode == "unit_rms_norm" else math.sqrt(10)
    for first in range(0, 32, WIDTH):
        head = slice(first, first + WIDTH)
        torch.testing.assert_close(param.value[head], -scale * orthonormalize(grad[head]), atol=1e-4, rtol=0)


def test_state_is_by_head():
    param = alone(QKV, random(QKV.shape, 0))
    sphere = MuonSphere([(param, numbers(lr=0.0))], SphereSettings(split_heads=True), None)
    param.grad = random(QKV.shape, 1)
    sphere.step(1.0)
    vectors = sphere.state_tensors()["right_vector/qkv"][1]
    assert vectors.shape == (8, 10)
    # The order is that of the blocks: all first query heads, all second ones, and so on.
    rows = [g * 16 + start for start in range(0, 16, WIDTH) for g in range(2)]
    for first, vector in zip(rows, vectors, strict=True):
        _, sigma, vh = torch.linalg.svd(param.value[first : first + WIDTH])
        assert sigma[0].item() == pytest.approx(math.sqrt(WIDTH / 10), rel=0.01)
        assert abs(vh[0] @ vector) > 0.99

    rows = alone(QKV, torch.zeros(QKV.shape))
    normuon = NorMuon([(rows, numbers(lr=1.0))], NorMuonSettings(split_heads=True), None)
    rows.grad = random(QKV.shape, 1)
    normuon.step(1.0)
    variance = normuon.state_tensors()["row_variance/qkv"][1]
    for first in range(0, 32, WIDTH):
        head = slice(first, first + WIDTH)
        want = 0.05 * orthonormalize(rows.grad[head]).square().mean(1, keepdim=True)
        torch.testing.assert_close(variance[head], want, rtol=1e-3, atol=1e-7)
