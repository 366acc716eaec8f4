"""Dion against its published formulas, and its QR decomposition against LAPACK's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from optim_cases import GATE_UP_BLOCKS, alone, meta, numbers

from megatron_mup.optim.blocks import take_block
from megatron_mup.optim.dion import (
    Dion,
    DionSettings,
    cholesky_step,
    inverse_cholesky,
    orthonormal_columns,
    rank_of,
)
from megatron_mup.optim.experts import ExpertPart
from megatron_mup.parallel.layout import Layout
from megatron_mup.parametrization.meta import Block, Role

SHAPES = [(16, 48), (48, 16), (32, 32), (7, 20), (200, 24), (24, 200)]


def random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def reference(
    weight: torch.Tensor, basis: torch.Tensor, grads: list[torch.Tensor], lr: float, decay: float, mu: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """microsoft/dion's reference on one device, in fp64 with Householder's QR; the long side gets orthonormal."""
    weight, basis, momentum = weight.double(), basis.double(), torch.zeros(weight.shape, dtype=torch.float64)
    rows, columns = weight.shape
    for grad in grads:
        momentum = momentum + grad.double()
        seen = momentum if rows >= columns else momentum.T
        left = torch.linalg.qr(seen @ basis)[0]
        right = seen.T @ left
        low_rank = left @ right.T
        basis = right / (right.norm(dim=0, keepdim=True) + 1e-8)
        update = left @ basis.T
        if rows < columns:
            low_rank, update = low_rank.T, update.T
        momentum = momentum - (1 - mu) * low_rank
        weight = (1 - lr * decay) * weight - lr * math.sqrt(rows / columns) * update
    return weight, momentum, basis


@pytest.mark.parametrize("fraction", [0.25, 0.6, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_microsofts(shape, fraction):
    start, grads = random(shape, 0), [random(shape, 10 + i) for i in range(5)]
    param = alone(meta("w", Role.MLP_OUT, shape), start)
    settings = DionSettings(rank_fraction=fraction, momentum=0.9)
    optimizer = Dion([(param, numbers(lr=0.1, weight_decay=0.3))], settings, None)
    state = {key: tensor for key, (_, tensor) in optimizer.state_tensors().items()}
    columns = math.ceil(fraction * min(shape))
    factor = state["dion_basis/w"].view(min(shape), columns)
    weight, momentum, basis = reference(start, factor.clone(), grads, 0.1, 0.3, 0.9)
    for grad in grads:
        param.grad = grad
        optimizer.step(1.0)
    assert relative(param.value.double(), weight) < 1e-5
    assert relative(state["dion_momentum/w"].double(), momentum) < 1e-5
    # Signs of the basis' columns are those of P's, which Householder's method does not fix.
    signs = (factor.double() * basis).sum(0).sign()
    assert relative(factor.double() * signs, basis) < 1e-4


def test_blocks_and_their_ranks():
    """Gate and up apart, each with the update it would have alone."""
    shape, start = (80, 10), torch.zeros(80, 10)
    fused = alone(meta("fc1", Role.MLP_IN, shape, blocks=GATE_UP_BLOCKS), start)
    fused.grad = random(shape, 1)
    settings = DionSettings(rank_fraction=0.3)
    optimizer = Dion([(fused, numbers(lr=1.0, weight_decay=0.0))], settings, None)
    bases = optimizer.state_tensors()["dion_basis/fc1"][1].clone().view(2, 10, 3)
    optimizer.step(1.0)
    for block, basis in zip(GATE_UP_BLOCKS, bases, strict=True):
        grad = take_block(fused.grad, block).reshape(40, 10)
        want, momentum, _ = reference(torch.zeros(40, 10), basis, [grad], 1.0, 0.0, 0.95)
        assert relative(take_block(fused.value, block).reshape(40, 10).double(), want) < 1e-5
        kept = take_block(optimizer.state_tensors()["dion_momentum/fc1"][1], block).reshape(40, 10)
        assert relative(kept.double(), momentum) < 1e-5


def trained_experts(cuts: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Weights and state of four experts after two steps, as one rank holds them in runs."""
    blocks = (Block("gate", 0, 4, 10, apart=True), Block("up", 4, 6, 10, apart=True))
    whole = alone(meta("fc1", Role.EXPERT_IN, (40, 5), experts=4, blocks=blocks), random((40, 5), 0))
    parts = []
    for first, end in cuts:
        own = replace(whole.meta, name=f"fc1[{first}:{end}]", shape=(10 * (end - first), 5), experts=end - first)
        layout = Layout(own.shape, (0, 0), own.shape, None, own.shape[0], None, None)
        parts.append((ExpertPart(whole, own, layout, 10 * first, first), numbers()))
    optimizer = Dion(parts, DionSettings(rank_fraction=0.5, seed=3), None)
    for step in range(2):
        whole.grad = random((40, 5), 1 + step)
        optimizer.step(1.0)
    found = {"value": whole.value}
    for key, (place, value) in optimizer.state_tensors().items():
        state = found.setdefault(key.partition("/")[0], torch.full(place.layout.shape, torch.nan))
        state[place.layout.offsets[0] : place.layout.offsets[0] + len(value)] = value
    return found


def test_experts_do_not_depend_on_how_they_are_dealt():
    want = trained_experts([(0, 4)])
    assert all(state.isfinite().all() for state in want.values())
    for cuts in ([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 3), (3, 4)]):
        got = trained_experts(cuts)
        assert got.keys() == want.keys() == {"value", "dion_momentum", "dion_basis"}
        for kind, state in want.items():
            torch.testing.assert_close(got[kind], state, rtol=1e-5, atol=1e-6)


def test_the_error_is_fed_back():
    """A constant gradient of full rank: what a step of rank 4 leaves out, later ones bring."""
    shape = (24, 16)
    grad = random(shape, 0)
    param = alone(meta("w", Role.MLP_OUT, shape), torch.zeros(shape))
    settings = DionSettings(rank_fraction=0.25, momentum=0.5)
    optimizer = Dion([(param, numbers(lr=1.0, weight_decay=0.0))], settings, None)
    for _ in range(40):
        param.grad = grad
        optimizer.step(1.0)
    directions = torch.linalg.svdvals(param.value)
    assert (directions > 0.05 * directions[0]).sum() >= 10


def test_nothing_moves_without_a_gradient():
    param = alone(meta("w", Role.MLP_OUT, (6, 9)), torch.ones(6, 9))
    optimizer = Dion([(param, numbers(weight_decay=0.0))], DionSettings(rank_fraction=0.5), None)
    before = optimizer.state_tensors()["dion_basis/w"][1].clone()
    param.grad = torch.zeros(6, 9)
    optimizer.step(1.0)
    assert torch.equal(param.value, torch.ones(6, 9))
    assert torch.equal(optimizer.state_tensors()["dion_basis/w"][1], before), "it starts where it would have started"


@pytest.mark.parametrize("rank", [1, 3])
def test_gradients_of_lower_rank_than_the_update(rank):
    """What they lack is made up of rounding errors, which get no larger than what is there."""
    grad = random((40, rank), 0) @ random((rank, 24), 1)
    param = alone(meta("w", Role.MLP_OUT, (40, 24)), torch.zeros(40, 24))
    optimizer = Dion([(param, numbers(lr=1.0, weight_decay=0.0))], DionSettings(rank_fraction=0.5), None)
    for _ in range(3):
        param.grad = grad
        before = param.value.clone()
        optimizer.step(1.0)
    update = (before - param.value) / math.sqrt(40 / 24)
    u, _, vh = torch.linalg.svd(grad)
    assert torch.linalg.svdvals(u[:, :rank].T @ update @ vh[:rank].T)[-1] > 0.3
    assert torch.linalg.matrix_norm(update, 2) < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (300, 60), (700, 300)])
def test_orthonormal_columns(rows, columns, dtype):
    x = random((rows, columns), 0)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    hard = {"gaussian": x, "1e-3": (u * torch.logspace(0, -3, columns)) @ vh, "1e-20": 1e-20 * x, "lengths": x.clone()}
    hard["lengths"] *= torch.logspace(-8, 8, columns)
    stack = torch.stack(list(hard.values())).to(dtype)
    for name, q, matrix in zip(hard, orthonormal_columns(stack), stack, strict=True):
        want, triangle = torch.linalg.qr(matrix.double())
        want *= triangle.diagonal().sign()
        assert relative(q.double(), want) < (1e-4 if dtype is torch.float32 else 1e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (300, 60), (700, 300)])
def test_orthonormal_columns_of_anything(rows, columns, dtype):
    u, _, vh = torch.linalg.svd(random((rows, columns), 0), full_matrices=False)
    hard = {f"1e-{c}": (u * torch.logspace(0, -c, columns)) @ vh for c in (5, 7, 12)}
    hard |= {f"rank {k}": random((rows, k), 1) @ random((k, columns), 2) for k in (1, 2, columns // 2, columns - 1)}
    hard["twins"] = random((rows, columns), 3)
    hard["twins"][:, 1] = hard["twins"][:, 0]
    hard["twins"][:, 2] = 0
    hard["zero"] = torch.zeros(rows, columns)
    for name, q in zip(hard, orthonormal_columns(torch.stack(list(hard.values())).to(dtype)), strict=True):
        assert q.isfinite().all(), name
        assert torch.linalg.matrix_norm(q, 2) < 1.2, name
    assert not q.any(), "zero stays zero"


def test_a_factorization_that_fails_does_no_harm():
    x = random((50, 2), 0) @ random((2, 12), 1)
    other = random((50, 12), 2)
    stack = torch.stack([x, other])
    lengths, step = cholesky_step(stack.mT @ stack, -1e4)
    torch.testing.assert_close(lengths, torch.diag(1 / x.norm(dim=0)))
    torch.testing.assert_close((other @ step).mT @ (other @ step), torch.eye(12), atol=0.1, rtol=0)


def test_inverse_cholesky():
    for size in (5, 128, 200, 400):
        x = random((2, size, 2 * size), size)
        gram = x @ x.mT / size
        want = torch.linalg.inv(torch.linalg.cholesky(gram.double()))
        assert relative(inverse_cholesky(gram).double(), want) < 1e-4, size


def test_ranks():
    assert rank_of(0.25, 2048, 5504) == rank_of(0.25, 5504, 2048) == 512
    assert rank_of(0.1, 30, 40) == 3
    assert rank_of(0.3, 7, 40) == 3
    assert rank_of(0.01, 7, 40) == 1
    assert rank_of(1.0, 7, 40) == 7


def test_bf16_products_are_near():
    shape = (96, 48)
    start, grads = torch.zeros(shape), [random(shape, i) for i in range(4)]
    values = {}
    for dtype in (torch.float32, torch.bfloat16):
        param = alone(meta("w", Role.MLP_OUT, shape), start)
        optimizer = Dion([(param, numbers(weight_decay=0.0))], DionSettings(rank_fraction=0.25, ns_dtype=dtype), None)
        for grad in grads:
            param.grad = grad
            optimizer.step(1.0)
        values[dtype] = param.value
    assert relative(values[torch.bfloat16], values[torch.float32]) < 0.05
