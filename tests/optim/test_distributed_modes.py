"""``--muon-distributed-mode``: Gram matrices that travel in the place of shards, and shards on their own."""

from __future__ import annotations

import math

import pytest
import torch
from optim_cases import GATE_UP_BLOCKS, QKV_BLOCKS, alone, meta, model_metas, numbers, shard_of
from test_sharded_optimizer import value_of

from megatron_mup.config import Config, OptimizerConfig, ParallelConfig
from megatron_mup.optim import planner
from megatron_mup.optim.build import build_matrix
from megatron_mup.optim.coefficients import coefficient_schedule, polynomial
from megatron_mup.optim.gram_muon import GramMuon
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.muon import Muon, MuonSettings
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.chunks import chunk
from megatron_mup.parallel.mesh import AXES, Mesh
from megatron_mup.parametrization.meta import Block, Role

Grid = tuple[int, int, int, int]


def moded(grid: Grid, mode: str) -> tuple[Mesh, Config]:
    pp, tp, replicate, shard = grid
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp,
        tensor_model_parallel_size=tp,
        data_parallel_sharding_strategy="optim_grads_params" if shard > 1 else "no_shard",
        num_distributed_optimizer_instances=replicate if shard > 1 else 1,
    )
    flags = OptimizerConfig(optimizer="muon", lr=1e-2, muon_ns_dtype="fp32", muon_distributed_mode=mode, clip_grad=0.0)
    config = Config(parallel=parallel, optimizer=flags)
    mesh = Mesh.build(config, torch.device("cpu"))
    assert tuple(mesh.size(axis) for axis in AXES) == grid
    return mesh, config


def hard_spectra(m: int, n: int) -> dict[str, torch.Tensor]:
    """Section 5.6 of what others measured: Gaussian, decaying to 1e-3, 1e-5 and 1e-7, low rank with a tail, rank 2."""
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(m, n, generator=generator, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(gaussian, full_matrices=False)
    rank = min(m, n)
    spectra = {f"1e-{c}": torch.logspace(0, -c, rank, dtype=torch.float64) for c in (3, 5, 7)}
    spectra["low rank and a tail"] = torch.cat([torch.ones(rank // 6), torch.full((rank - rank // 6,), 1e-4)]).double()
    spectra["rank 2"] = torch.cat([torch.ones(2), torch.zeros(rank - 2)]).double()
    return {"gaussian": gaussian} | {name: (u * s) @ vh for name, s in spectra.items()}


def exact(x: torch.Tensor, coefficients: str, steps: int) -> torch.Tensor:
    """Newton-Schulz in fp64."""
    x = x.double()
    x = x / x.norm().clamp(min=1e-7)
    for step in coefficient_schedule(coefficients, steps):
        apart, a = polynomial((x @ x.mT)[None], step)
        x = a * x + apart[0] @ x
    return x


def gram_on_spectra(grid: Grid, dim: int, length: int, short: int) -> list[str]:
    """What is wrong with Gram-space steps on matrices whose dimension ``dim``, of ``length``, is cut."""
    mesh, _ = moded(grid, "gram")
    shape = (length, short) if dim == 0 else (short, length)
    problems = []
    sets = (("quintic", 5), ("polar_express", 5), ("polar_express", 8), ("jordan", 5), ("squaring", 2))
    for coefficients, steps in sets:
        params, wholes = [], {}
        for i, (name, x) in enumerate(hard_spectra(*shape).items()):
            facts = meta(f"w{i}", Role.MLP_OUT, shape, tp_dim=dim)
            params.append(shard_of(facts, torch.zeros(shape), mesh))
            params[-1].grad = params[-1].layout.shard(x.float()).clone()
            wholes[name] = x
        settings = MuonSettings(coefficients=coefficients, num_ns_steps=steps, scale_mode="spectral")
        scaled = [(param, numbers(lr=1.0, weight_decay=0.0)) for param in params]
        optimizer = GramMuon(scaled, settings, mesh)
        if {a.mode for a in optimizer.plan.assignments} != {"gram"}:
            problems.append("another mode")
        optimizer.step(1.0)
        for (name, x), param in zip(wholes.items(), params, strict=True):
            got = -param.layout.gather(param.value).double() / max(shape) ** 0.5
            want = exact(x, coefficients, steps)
            error = ((got - want).norm() / want.norm()).item()
            largest = torch.linalg.matrix_norm(got, 2).item()
            if not error < 0.02 or not largest < 1.22 or (largest > 1.2 and coefficients != "jordan"):
                problems.append(f"{coefficients} {steps} {name}: off by {error:.1e}, largest {largest:.3f}")
    return problems


# By data shards or tensor ranks along dimension 0, by tensor ranks along dimension 1; even, uneven, the last one empty.
CUTS = [
    (2, (1, 1, 1, 2), 0, 96, 64),
    (2, (1, 2, 1, 1), 0, 97, 64),
    (2, (1, 2, 1, 1), 1, 96, 64),
    (2, (1, 2, 1, 1), 1, 97, 64),
    (4, (1, 1, 1, 4), 0, 96, 64),
    pytest.param(4, (1, 4, 1, 1), 0, 98, 64, marks=pytest.mark.long),
    (4, (1, 2, 1, 2), 0, 99, 64),
    (4, (1, 4, 1, 1), 1, 97, 64),
    (4, (1, 1, 2, 2), 0, 97, 64),
    (4, (1, 1, 1, 4), 0, 9, 6),
    (4, (1, 4, 1, 1), 1, 9, 6),
]


@pytest.mark.parametrize(("ranks", "grid", "dim", "length", "short"), CUTS)
def test_gram_matrices_of_hard_spectra(pool, ranks, grid, dim, length, short):
    assert pool.run(ranks, gram_on_spectra, grid, dim, length, short) == [[]] * ranks


def train(params: list[MainParam], optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        for param in params:
            param.grad = param.layout.shard(value_of(param.meta, str(step))).clone()
        optimizer.step(1.0)


def gram_trains(grid: Grid, want: dict[str, torch.Tensor], chunk_elements: int) -> tuple[list[str], set[str]]:
    """What differs from one rank after three steps, and which modes the plan has."""
    planner.CHUNK_ELEMENTS = chunk_elements
    mesh, config = moded(grid, "gram")
    params = [shard_of(m, value_of(m, "init"), mesh) for m in model_metas()]
    optimizer = Optimizer(params, config, mesh)
    train(params, optimizer, range(3))
    compared = {f"value/{p.meta.name}": (p, p.value) for p in params} | optimizer.state_tensors()
    problems = []
    for name, (param, tensor) in compared.items():
        error = ((tensor - param.layout.shard(want[name])).norm() / want[name].norm()).item()
        if error > 1e-5:
            problems.append(f"{name} off by {error:.1e}")
    return problems, {a.mode for a in optimizer.matrix_plan.assignments}


@pytest.mark.parametrize(
    ("ranks", "grid", "modes"),
    [
        (2, (1, 2, 1, 1), {"owner", "gram"}),
        (2, (1, 1, 1, 2), {"owner", "gram"}),
        (2, (1, 1, 2, 1), {"replica"}),
        (4, (1, 2, 1, 2), {"owner", "gram"}),
        (4, (1, 2, 2, 1), {"owner", "gram"}),
        (4, (1, 1, 2, 2), {"owner", "gram"}),
    ],
)
def test_gram_mode_trains_as_one_rank(pool, lone_mesh, ranks, grid, modes):
    flags = OptimizerConfig(optimizer="muon", lr=1e-2, muon_ns_dtype="fp32")
    params = [alone(m, value_of(m, "init")) for m in model_metas()]
    optimizer = Optimizer(params, Config(optimizer=flags), lone_mesh)
    train(params, optimizer, range(3))
    want = {f"value/{p.meta.name}": p.value for p in params}
    want |= {key: tensor for key, (_, tensor) in optimizer.state_tensors().items()}
    for chunk_elements in (planner.CHUNK_ELEMENTS, 300):
        assert pool.run(ranks, gram_trains, grid, want, chunk_elements) == [([], modes)] * ranks


LOCAL = [
    meta("fc2", Role.MLP_OUT, (12, 20), tp_dim=1),
    meta("fc1", Role.MLP_IN, (40, 12), tp_dim=0, blocks=GATE_UP_BLOCKS),
    meta("qkv", Role.QKV, (32, 12), tp_dim=0, blocks=QKV_BLOCKS),
    meta("both", Role.MLP_OUT, (5, 12)),
]


def local_step(grid: Grid) -> list[str]:
    """What is wrong with a step on tensor-parallel shards that are matrices of their own."""
    mesh, config = moded(grid, "local")
    params = [shard_of(m, torch.zeros(m.shape), mesh) for m in LOCAL]
    scaled = [(param, numbers(lr=1.0, weight_decay=0.0)) for param in params]
    optimizer = build_matrix("muon", scaled, config, mesh, mesh.device)
    for param in params:
        param.grad = param.layout.shard(value_of(param.meta, "0")).clone()
    optimizer.step(1.0)
    problems = []
    tp, rank = mesh.size("tp"), mesh.rank("tp")
    for param in params:
        want = torch.zeros(param.meta.shape)
        facts = param.meta
        offset, length = (0, facts.shape[0]) if facts.tp_dim is None else chunk(facts.shape[facts.tp_dim], tp, rank)
        part = value_of(facts, "0").narrow(facts.tp_dim or 0, offset, length)
        place = torch.arange(len(part)) % facts.blocks[0].period if facts.blocks else torch.zeros(len(part))
        for block in facts.blocks or (Block("whole", 0, 1, 1),):
            rows = (place >= block.start) & (place < block.start + block.size)
            height = facts.shape[0] * block.size / block.period
            # The factor is that of the whole matrix.
            step = -math.sqrt(height / facts.shape[1]) * orthonormalize(0.05 * (1 + 0.95) * part[rows])
            want.narrow(facts.tp_dim or 0, offset, length)[rows] = step
        error = (param.value - param.layout.shard(want)).abs().max() if param.value.numel() else 0.0
        if error > 1e-4:
            problems.append(f"{facts.name} off by {error:.1e}")
        if (state := optimizer.state_tensors().get(f"momentum/{facts.name}")) is None:
            assert mesh.size("dp_replicate") > 1
            continue
        place_of, momentum = state
        if place_of.meta is not facts or momentum.shape != param.layout.local_shape:
            problems.append(f"{facts.name}: its momentum is not in storage layout")
    if {a.mode for a in optimizer.plan.assignments} != {"local" if mesh.size("dp_shard") > 1 else "replica"}:
        problems.append("another mode")
    return problems


@pytest.mark.parametrize(("ranks", "grid"), [(4, (1, 2, 1, 2)), (4, (1, 2, 2, 1))])
def test_local_mode_takes_tensor_shards_for_matrices(pool, ranks, grid):
    assert pool.run(ranks, local_step, grid) == [[]] * ranks


def test_local_mode_depends_on_the_layout(pool, lone_mesh):
    """The reason why it is not the default."""
    param = alone(LOCAL[0], torch.zeros(12, 20))
    param.grad = value_of(LOCAL[0], "0")
    Muon([(param, numbers(lr=1.0, weight_decay=0.0))], MuonSettings(), None).step(1.0)
    (shard, *_) = pool.run(2, local_shard)
    assert (shard - param.value[:, :10]).norm() > 0.1 * shard.norm()


def local_shard() -> torch.Tensor:
    """A shard after a step under two tensor ranks."""
    mesh, config = moded((1, 2, 1, 1), "local")
    param = shard_of(LOCAL[0], torch.zeros(12, 20), mesh)
    param.grad = param.layout.shard(value_of(LOCAL[0], "0")).clone()
    build_matrix("muon", [(param, numbers(lr=1.0, weight_decay=0.0))], config, mesh, mesh.device).step(1.0)
    return param.value
