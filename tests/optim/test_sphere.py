"""The spectral sphere against its published formulas, with exact SVDs and a dense solve."""

from __future__ import annotations

import math

import pytest
import torch
from optim_cases import GATE_UP_BLOCKS, QKV_BLOCKS, alone, meta, numbers

from megatron_mup.config import Config, OptimizerConfig
from megatron_mup.optim.blocks import take_block
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.optim.sphere import MuonSphere, SpectralSphere, SphereSettings, top_singular
from megatron_mup.parametrization.meta import Role

SHAPES = [(16, 48), (48, 16), (32, 32), (7, 20)]
EXACT = {"num_ns_steps": 14, "coefficients": "polar_express", "momentum": 0.9}
PAPER = {"num_ns_steps": 8, "coefficients": "polar_express", "momentum": 0.9}


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def well_conditioned(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """Singular values from 0.3 to 1, so that Newton-Schulz and SVD agree to the last digits."""
    u, _, vh = torch.linalg.svd(random(shape, seed).double(), full_matrices=False)
    return ((u * torch.linspace(1, 0.3, u.shape[1])) @ vh).float()


def msign(x: torch.Tensor) -> torch.Tensor:
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    return u @ vh


def reference(w: torch.Tensor, grads: list[torch.Tensor], lr: float, wd: float, kind: str, dynamic: bool):
    """parametrization.md section 5.2 in fp64: exact SVDs, and bisection of h over the paper's bracket."""
    w, m = w.double(), torch.zeros_like(w, dtype=torch.float64)
    radius = 2.0 * math.sqrt(w.shape[0] / w.shape[1])
    for step, g in enumerate(grads):
        m = 0.9 * m + 0.1 * g.double()
        used = 0.1 * g.double() + 0.9 * m
        used = used / used.norm()
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        theta = torch.outer(u[:, 0], vh[0])
        hard = not dynamic or step == 0
        w = w * (radius / s[0] if hard else 1 + wd * lr * torch.sign(radius - s[0]))
        if kind == "spectral_sphere":
            bound = 2 * torch.linalg.svdvals(used).sum()
            low, high = -bound, bound
            for _ in range(100):
                middle = (low + high) / 2
                below = (theta * msign(used + middle * theta)).sum() < 0
                low, high = (middle, high) if below else (low, middle)
            used = used + low * theta
        w = w - lr * radius * msign(used)
    return w


@pytest.mark.parametrize("retraction", ["hard", "dynamic"])
@pytest.mark.parametrize("kind", ["muonsphere", "spectral_sphere"])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_published_algorithm(kind, retraction, shape):
    # A gap below the largest singular value: without one its vectors are nobody's.
    start = well_conditioned(shape, 1)
    u, s, vh = torch.linalg.svd(start, full_matrices=False)
    start = start + 0.5 * s[0] * torch.outer(u[:, 0], vh[0])
    grads = [well_conditioned(shape, 10) + 0.1 * well_conditioned(shape, 20 + i) for i in range(5)]
    param = alone(meta("w", Role.MLP_OUT, shape), start)
    settings = SphereSettings(radius=2.0, retraction=retraction, solver_steps=12, **EXACT)
    cls = SpectralSphere if kind == "spectral_sphere" else MuonSphere
    optimizer = cls([(param, numbers(lr=0.02, weight_decay=0.5))], settings, None)
    for grad in grads:
        param.grad = grad
        optimizer.step(1.0)
    want = reference(start, grads, 0.02, 0.5, kind, retraction == "dynamic")
    assert ((param.value - want).norm() / want.norm()).item() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", [MuonSphere, SpectralSphere])
def test_weights_stay_on_the_sphere(cls, dtype):
    """Right after retraction within a hundredth by exact SVD, after the step within that and the learning rate."""
    lr, shapes = 0.02, [(40, 96), (96, 40), (64, 64)]
    params = [alone(meta(f"w{i}", Role.MLP_OUT, s), 0.02 * random(s, i)) for i, s in enumerate(shapes)]
    fused = alone(meta("fc1", Role.MLP_IN, (80, 24), blocks=GATE_UP_BLOCKS), random((80, 24), 9))
    params.append(fused)
    scaled = [(param, numbers(lr=lr, weight_decay=0.0)) for param in params]
    optimizer = cls(scaled, SphereSettings(radius=0.7, ns_dtype=dtype, **PAPER), None)

    def worst() -> float:
        matrices = [param.value for param in params[:-1]]
        matrices += [take_block(fused.value, block).reshape(40, 24) for block in GATE_UP_BLOCKS]
        radii = [0.7 * math.sqrt(m.shape[0] / m.shape[1]) for m in matrices]
        return max(
            abs(torch.linalg.matrix_norm(m.double(), 2).item() / r - 1) for m, r in zip(matrices, radii, strict=True)
        )

    for step in range(12):
        for i, param in enumerate(params):
            # Steady enough to pull new directions to the top, past the old one.
            param.grad = random(param.meta.shape, 50 + i) + 0.3 * random(param.meta.shape, 100 * step + i)
        optimizer.step(1.0)
        assert worst() < 0.01 + lr
        # A step at rate 0 is retraction alone. Its momentum goes on, and would without it.
        optimizer.step(0.0)
        assert worst() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_singular_is_exact_for_hard_spectra(dtype):
    for m, n in ((64, 160), (160, 64), (48, 48), (1, 7), (7, 1)):
        left, right = torch.linalg.qr(random((m, m), 1))[0], torch.linalg.qr(random((n, n), 2))[0]
        rank = min(m, n)
        for values in (
            torch.linspace(1, 0.99, rank),
            torch.cat([torch.ones(rank // 2), torch.full((rank - rank // 2,), 1.01)]),
            torch.logspace(0, -6, rank),
            1e-8 * torch.linspace(1, 0.5, rank),
        ):
            weight = (left[:, :rank] * values) @ right[:, :rank].T
            # The start lies on the smallest value: the old top, overtaken.
            sigma, u, v = top_singular(weight[None], right[:, rank - 1][None], dtype)
            assert sigma.item() == pytest.approx(values.max().item(), rel=5e-3)
            assert (u[0] @ weight @ v[0]).item() == pytest.approx(sigma.item(), rel=1e-5)
            assert u.norm().item() == pytest.approx(1, rel=1e-5)
    zero = top_singular(torch.zeros(1, 3, 4), torch.zeros(1, 4))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in zero)


@pytest.mark.parametrize("optimizer", ["muonsphere", "spectral_sphere"])
def test_initial_weights_are_put_on_the_sphere(lone_mesh, optimizer):
    qkv = alone(meta("qkv", Role.QKV, (32, 12), blocks=QKV_BLOCKS), random((32, 12), 0))
    norm = alone(meta("norm", Role.NORM, (12,)), torch.ones(12))
    flags = OptimizerConfig(optimizer=optimizer, sphere_radius=2.0, sphere_retraction="dynamic", weight_decay=0.1)
    whole = Optimizer([qkv, norm], Config(optimizer=flags), lone_mesh)
    before = qkv.value.clone()
    whole.start()
    assert torch.equal(norm.value, torch.ones(12))
    for block in QKV_BLOCKS:
        placed, drawn = (take_block(value, block).reshape(-1, 12) for value in (qkv.value, before))
        radius = 2.0 * math.sqrt(len(placed) / 12)
        assert torch.linalg.matrix_norm(placed, 2).item() == pytest.approx(radius, rel=0.01)
        torch.testing.assert_close(placed / placed.norm(), drawn / drawn.norm())
    assert whole.state_tensors()["momentum/qkv"][1].count_nonzero() == 0
    assert qkv.grad is None
    placed = qkv.value.clone()
    whole.start()
    torch.testing.assert_close(qkv.value, placed, rtol=0.02, atol=0)


@pytest.mark.parametrize("optimizer", ["adam", "muon", "scion"])
def test_other_optimizers_leave_initial_weights(lone_mesh, optimizer):
    param = alone(meta("w", Role.MLP_OUT, (6, 12)), random((6, 12), 0))
    before = param.value.clone()
    Optimizer([param], Config(optimizer=OptimizerConfig(optimizer=optimizer)), lone_mesh).start()
    assert torch.equal(param.value, before)


def test_vectors_are_kept_between_steps():
    param = alone(meta("fc1", Role.MLP_IN, (8, 6), blocks=GATE_UP_BLOCKS), random((8, 6), 0))
    optimizer = MuonSphere([(param, numbers(lr=0.0))], SphereSettings(**PAPER), None)
    place, vectors = optimizer.state_tensors()["right_vector/fc1"]
    assert vectors.shape == place.layout.local_shape == (2, 6)
    param.grad = random((8, 6), 1)
    optimizer.step(1.0)
    for block, vector in zip(GATE_UP_BLOCKS, vectors, strict=True):
        _, _, vh = torch.linalg.svd(take_block(param.value, block).reshape(4, 6))
        assert abs(vh[0] @ vector) > 0.999
