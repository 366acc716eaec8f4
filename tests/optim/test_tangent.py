"""The tangent direction of the spectral sphere: feasible, optimal, and found on hard momenta; what it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_mup.optim import tangent
from megatron_mup.optim.coefficients import coefficient_schedule
from megatron_mup.optim.gram import block_lengths, gram_newton_schulz
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.sphere import top_singular
from megatron_mup.optim.tangent import tangent_direction

SHAPES = [(32, 96), (40, 40), (90, 30), (1, 12), (96, 160)]
PAPER = (8, "polar_express", 3)


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tilted(axis: torch.Tensor, seed: int) -> torch.Tensor:
    """A unit vector whose product with ``axis`` is 0.8, in more than one dimension."""
    other = random(tuple(axis.shape), seed)
    other = other - (other @ axis) * axis
    return torch.nn.functional.normalize(0.8 * axis + 0.6 * torch.nn.functional.normalize(other, dim=0), dim=0)


def with_spectrum(m: int, n: int, values: torch.Tensor) -> torch.Tensor:
    k = min(m, n)
    left, right = torch.linalg.qr(random((m, k), 6)).Q, torch.linalg.qr(random((n, k), 7)).Q
    return (left * values) @ right.T


def hard_momenta(m: int, n: int, u: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    noise, k = random((m, n), 5) / math.sqrt(m * n), min(m, n)
    theta = torch.outer(u, v)
    momenta = {
        "gaussian": noise,
        "anti-aligned": 0.01 * noise - theta,
        "rank 1": torch.outer(random((m,), 6), random((n,), 7)),
        "rank 2": random((m, 2), 6) @ random((2, n), 7),
        "low rank and a tail": random((m, 10), 6) @ random((10, n), 7) + 0.1 * noise,
        "low rank beside the top": theta - 0.3 * torch.outer(u, random((n,), 7)),
        # The root lies far from -t here, near the end of the bracket.
        "tilted": torch.outer(tilted(u, 8), tilted(v, 9)),
        "falling": with_spectrum(m, n, 1 / torch.arange(1, k + 1)),
        "log 1e-3": with_spectrum(m, n, torch.logspace(0, -3, k)),
        "log 1e-7": with_spectrum(m, n, torch.logspace(0, -7, k)),
    }
    momenta |= {f"minus {name}": -x for name, x in momenta.items()}
    return {name: x / x.norm() for name, x in momenta.items()}


def problem(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    m, n = shape
    _, u, v = (t[0] for t in top_singular(random(shape, 0)[None], torch.zeros(1, n)))
    return u, v, hard_momenta(m, n, u, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_feasible_and_optimal(shape, dtype):
    """Tangent, of norm 1, and as steep as the dual problem allows: min over lambda of the nuclear norm of M + l u v^T.

    What a direction that is tangent up to rounding gains by not being it is left out.
    Log-uniform spectra are the hardest: a few dozen rows don't hold all that a new lambda changes.
    """
    u, v, momenta = problem(shape)
    count = len(momenta)
    stack = torch.stack(list(momenta.values()))
    phi, at, rest = tangent_direction(stack, u.expand(count, -1), v.expand(count, -1), *PAPER, dtype)
    assert phi.shape == stack.shape
    assert phi.dtype is dtype
    phi = phi.float()
    rough = dtype is torch.bfloat16
    for name, p, a, r, x in zip(momenta, phi, at, rest, stack, strict=True):
        assert abs(u @ p @ v) < (1e-3 if rough else 5e-5), name
        assert abs(r) < 1e-3, name
        largest = torch.linalg.matrix_norm(p, 2)
        assert largest < (1.35 if "log" in name else 1.1 if rough else 1.06), (name, largest)
        steepest = torch.linalg.svdvals(x.double() + a * torch.outer(u, v).double()).sum()
        gap = 1 - ((p * x).sum() - (u @ p @ v) * (u @ x @ v)) / steepest
        assert abs(gap) < (6e-3 if rough else 2e-3), (name, gap)


@pytest.mark.parametrize("shape", [(40, 40), (90, 30), (96, 160)])
def test_tangent_in_gram_space(shape, monkeypatch):
    """On the twin of the kernels, in the blocks that a GPU works in."""

    def in_blocks(x, steps, coefficients, dtype, **others):
        schedule, lengths = coefficient_schedule(coefficients, steps), block_lengths(coefficients, steps)
        return gram_newton_schulz(x, schedule, lengths, 1e-7, **others)

    u, v, momenta = problem(shape)
    names = [name for name in momenta if "log" not in name]
    stack = torch.stack([momenta[name] for name in names]).bfloat16()
    axes = u.expand(len(names), -1), v.expand(len(names), -1)
    exact = tangent_direction(stack.float(), *axes, *PAPER)[0]
    monkeypatch.setattr(tangent, "orthonormalize", in_blocks)
    phi = tangent_direction(stack, *axes, *PAPER, torch.bfloat16)[0]
    for name, p, want, x in zip(names, phi.float(), exact, stack.float(), strict=True):
        assert abs(u @ p @ v) < 1e-3, name
        assert torch.linalg.matrix_norm(p, 2) < 1.25, name  # fewer iterates make fewer directions
        assert (p * x).sum() > 0.97 * (want * x).sum(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_lambda_is_the_root(shape):
    """h at this lambda, by Newton-Schulz on the whole matrix and nothing of the solver's."""
    u, v, momenta = problem(shape)
    for name, x in momenta.items():
        if "log" in name or "falling" in name:
            continue  # there the bound is the duality gap above
        phi, at, _ = tangent_direction(x[None], u[None], v[None], *PAPER)
        want = orthonormalize(x + at * torch.outer(u, v), 8, "polar_express")
        # Where h all but jumps, an fp32 lambda can't be between.
        tolerance = 2e-2 if "rank 1" in name or "rank 2" in name else 2e-3
        assert abs(u @ want @ v) < tolerance, name
        assert (phi[0] - want).norm() < 0.02 * max(1, want.norm()), name
        assert abs(at) <= 2 * torch.linalg.svdvals(x).sum() + 1e-6, name


def test_zero_momentum():
    u, v = torch.eye(4)[:1], torch.eye(9)[:1]
    phi, _, _ = tangent_direction(torch.zeros(1, 4, 9), u, v, *PAPER)
    assert phi.count_nonzero() == 0


def test_batch_and_transposition():
    u, v, momenta = problem((96, 160))
    names = ("gaussian", "rank 2", "falling")
    stack = torch.stack([momenta[name] for name in names])
    together = tangent_direction(stack, u.expand(3, -1), v.expand(3, -1), *PAPER)[0]
    for x, p in zip(stack, together, strict=True):
        alone = tangent_direction(x[None], u[None], v[None], *PAPER)[0][0]
        torch.testing.assert_close(p, alone, atol=5e-3, rtol=0)
        turned = tangent_direction(x.T[None], v[None], u[None], *PAPER)[0][0]
        torch.testing.assert_close(turned.T, alone, atol=2e-3, rtol=0)


def test_tf32_is_not_used_where_the_process_allows_it():
    u, v, momenta = problem((90, 30))
    x = momenta["falling"][None]
    matmul = torch.backends.mkldnn.matmul
    before, want = matmul.fp32_precision, tangent_direction(x, u[None], v[None], *PAPER)[0]
    weight = random((1, 40, 90), 3)
    sigma = top_singular(weight, torch.zeros(1, 90))[0]
    try:
        matmul.fp32_precision = "bf16"
        assert torch.equal(tangent_direction(x, u[None], v[None], *PAPER)[0], want)
        assert torch.equal(top_singular(weight, torch.zeros(1, 90))[0], sigma)
    finally:
        matmul.fp32_precision = before


MODELS = {
    # [out, in] and how many in a layer, query, key, value and gate, up apart.
    "dense-1b": [(2048, 2048, 2), (512, 2048, 2), (8192, 2048, 2), (2048, 8192, 1)],
    "Llama-3-8B": [(4096, 4096, 2), (1024, 4096, 2), (14336, 4096, 2), (4096, 14336, 1)],
}


@pytest.mark.parametrize("model", MODELS)
def test_cost_beside_muon(model):
    """Multiplications of SSO's arithmetic at home against Muon's, counted on the meta device.

    That it runs there at all says that nothing waits for the device: a meta tensor has no values to wait for.
    """
    totals = [0.0, 0.0]
    for m, n, count in MODELS[model]:
        weight, u, v = (torch.empty(1, *shape, device="meta") for shape in ((m, n), (m,), (n,)))
        with FlopCounterMode(display=False) as muon:
            orthonormalize(weight, 5, "quintic", torch.bfloat16)
        with FlopCounterMode(display=False) as sso:
            top_singular(weight, v, torch.bfloat16)
            tangent_direction(weight, u, v, *PAPER, torch.bfloat16)
        totals[0] += count * muon.get_total_flops()
        totals[1] += count * sso.get_total_flops()
    assert totals[1] < 2.1 * totals[0]
