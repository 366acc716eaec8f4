"""The spectral sphere against its published formulas, with exact SVDs and a dense solve."""

from __future__ import annotations

import math

import pytest
import torch
from optim_cases import GATE_UP_BLOCKS, alone, meta, numbers

from megatron_mup.optim.matrix import take_block
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.sphere import MuonSphere, SpectralSphere, SphereSettings, tangent_direction, top_singular
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
    settings = SphereSettings(radius=2.0, retraction=retraction, solver_steps=30, **EXACT)
    cls = SpectralSphere if kind == "spectral_sphere" else MuonSphere
    optimizer = cls([(param, numbers(lr=0.02, weight_decay=0.5))], settings, None)
    for grad in grads:
        param.grad = grad
        optimizer.step(1.0)
    want = reference(start, grads, 0.02, 0.5, kind, retraction == "dynamic")
    assert ((param.value - want).norm() / want.norm()).item() < 1e-5


@pytest.mark.parametrize("cls", [MuonSphere, SpectralSphere])
def test_weights_stay_on_the_sphere(cls):
    """Right after retraction within a hundredth by exact SVD, after the step within that and the learning rate."""
    lr, shapes = 0.02, [(40, 96), (96, 40), (64, 64)]
    params = [alone(meta(f"w{i}", Role.MLP_OUT, s), 0.02 * random(s, i)) for i, s in enumerate(shapes)]
    fused = alone(meta("fc1", Role.MLP_IN, (80, 24), blocks=GATE_UP_BLOCKS), random((80, 24), 9))
    params.append(fused)
    scaled = [(param, numbers(lr=lr, weight_decay=0.0)) for param in params]
    optimizer = cls(scaled, SphereSettings(radius=0.7, **PAPER), None)

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


def test_top_singular_is_exact_for_hard_spectra():
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
            sigma, u, v = top_singular(weight[None], right[:, rank - 1][None])
            assert sigma.item() == pytest.approx(values.max().item(), rel=5e-3)
            assert (u[0] @ weight @ v[0]).item() == pytest.approx(sigma.item(), rel=1e-5)
            assert u.norm().item() == pytest.approx(1, rel=1e-5)
    zero = top_singular(torch.zeros(1, 3, 4), torch.zeros(1, 4))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in zero)


def tilted(axis: torch.Tensor, seed: int) -> torch.Tensor:
    """A unit vector whose product with ``axis`` is 0.8."""
    other = random(tuple(axis.shape), seed)
    other = other - (other @ axis) * axis
    return 0.8 * axis + 0.6 * other / other.norm()


def hard_momenta(m: int, n: int, u: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    noise = random((m, n), 5) / math.sqrt(m * n)
    theta = torch.outer(u, v)
    return {
        "gaussian": noise,
        "anti-aligned": 0.01 * noise - theta,
        "aligned": 0.01 * noise + theta,
        "rank 1": torch.outer(random((m,), 6), random((n,), 7)),
        "rank 2": random((m, 2), 6) @ random((2, n), 7),
        "low rank beside the top": theta - 0.3 * torch.outer(u, random((n,), 7)),
        "decaying": torch.linalg.qr(random((m, m), 6))[0] * torch.logspace(0, -5, m) @ random((m, n), 7),
        # The root lies far from -t here, near the end of the bracket.
        "tilted": torch.outer(tilted(u, 8), tilted(v, 9)),
        "zero": torch.zeros(m, n),
    }


@pytest.mark.parametrize("shape", [(32, 96), (40, 40), (90, 30)])
def test_the_tangent_direction_is_found(shape):
    m, n = shape
    _, u, v = (t[0] for t in top_singular(random(shape, 0)[None], torch.zeros(1, n)))
    momenta = hard_momenta(m, n, u, v)
    momenta |= {f"minus {name}": -x for name, x in momenta.items()}
    unit = torch.stack([x / x.norm().clamp(min=1e-30) for x in momenta.values()])
    count = len(momenta)

    def ns(x: torch.Tensor) -> torch.Tensor:
        return orthonormalize(x, 8, "polar_express")

    phi, at, rest = tangent_direction(unit, u.expand(count, -1), v.expand(count, -1), ns, 16)
    for name, p, a, r, x in zip(momenta, phi, at, rest, unit, strict=True):
        assert abs(r) < 1e-3, name
        torch.testing.assert_close(u @ p @ v, r, atol=1e-5, rtol=0)
        torch.testing.assert_close(p, ns(x + a * torch.outer(u, v)), atol=2e-3, rtol=0)
        assert abs(a) <= 2 * torch.linalg.svdvals(x).sum() + 1e-6, name
    for name in ("gaussian", "low rank beside the top"):
        few = tangent_direction(momenta[name][None] / momenta[name].norm(), u[None], v[None], ns, 6)[2]
        assert abs(few) < 1e-3, f"{name}: six evaluations do"


@pytest.mark.parametrize("shape", [(32, 96), (40, 40), (90, 30)])
@pytest.mark.parametrize("steps", [4, 8])
def test_what_the_solver_leaves_is_projected_out(shape, steps):
    m, n = shape
    weight = random(shape, 0)
    _, u, v = (t[0] for t in top_singular(weight[None], torch.zeros(1, n)))
    param = alone(meta("w", Role.MLP_OUT, shape), weight)
    settings = SphereSettings(solver_steps=steps, **PAPER)
    optimizer = SpectralSphere([(param, numbers())], settings, None)
    for name, momentum in hard_momenta(m, n, u, v).items():
        phi = optimizer.direction(momentum[None], u[None], v[None])[0]
        assert abs(u @ phi @ v) < 1e-3, name
        assert torch.linalg.matrix_norm(phi, 2) < 1.2, name
        assert (phi * momentum).sum() >= -1e-5, name


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


def test_bf16_newton_schulz_stays_on_the_sphere():
    param = alone(meta("w", Role.MLP_OUT, (48, 96)), random((48, 96), 0))
    settings = SphereSettings(ns_dtype=torch.bfloat16, **PAPER)
    optimizer = SpectralSphere([(param, numbers(lr=0.02))], settings, None)
    for step in range(4):
        param.grad = random((48, 96), step)
        optimizer.step(1.0)
    optimizer.step(0.0)
    assert torch.linalg.matrix_norm(param.value, 2).item() == pytest.approx(math.sqrt(0.5), rel=0.01)
