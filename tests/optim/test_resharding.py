"""Optimizer state saved in one layout goes on in another as if nothing had happened."""

from __future__ import annotations

import pytest
import torch
from optim_cases import model_metas, shard_of
from test_sharded_optimizer import mesh_of, value_of

from megatron_mup import checkpoint
from megatron_mup.checkpoint import Manifest
from megatron_mup.config import Config, OptimizerConfig
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import Optimizer

Grid = tuple[int, int, int, int]

CONFIGS = {
    name: Config(optimizer=OptimizerConfig(optimizer=name, scalar_optimizer=rest, lr=1e-2, muon_ns_dtype="fp32"))
    for name, rest in (
        ("muon", "adam_atan2"),
        ("normuon", "ademamix"),
        ("muonsphere", "adam"),
        ("spectral_sphere", "lion"),
        ("scion", "adam"),
        ("dion", "adam"),
    )
}


def steps(params: list[MainParam], optimizer: Optimizer, numbers: range) -> None:
    for number in numbers:
        for param in params:
            param.grad = param.layout.shard(value_of(param.meta, str(number))).clone()
        optimizer.step(1.0)


def pieces_of(params: list[MainParam], optimizer: Optimizer):
    return checkpoint.checkpoint_pieces(params, optimizer.state_tensors())


def train_and_save(grid: Grid, folder: str) -> None:
    for name, config in CONFIGS.items():
        mesh = mesh_of(grid)
        params = [shard_of(m, value_of(m, "init"), mesh) for m in model_metas()]
        optimizer = Optimizer(params, config, mesh)
        steps(params, optimizer, range(2))
        manifest = Manifest(
            iteration=2,
            consumed_samples=0,
            config={},
            parametrization=[],
            layout=checkpoint.layout_sizes(mesh),
            optimizer=optimizer.state_scalars(),
        )
        checkpoint.save(f"{folder}/{name}", pieces_of(params, optimizer), manifest)


def load_and_go_on(grid: Grid, folder: str) -> list[str]:
    """What differs from a run of one rank that was never saved."""
    problems = []
    for name, config in CONFIGS.items():
        mesh = mesh_of(grid)
        params = [shard_of(m, torch.zeros(m.shape), mesh) for m in model_metas()]
        optimizer = Optimizer(params, config, mesh)
        pieces = pieces_of(params, optimizer)
        manifest = checkpoint.load(checkpoint.find(f"{folder}/{name}"), pieces)
        optimizer.load_state_scalars(manifest.optimizer)
        steps(params, optimizer, range(2, 4))
        want = torch.load(f"{folder}/{name}.pt")
        for piece in pieces:
            part = want[piece.key]
            for dim, (offset, size) in enumerate(zip(piece.offsets, piece.tensor.shape, strict=True)):
                part = part.narrow(dim, min(offset, part.shape[dim] - size), size)
            if not torch.allclose(piece.tensor, part, rtol=1e-5, atol=1e-7):
                problems.append(f"{name}: {piece.key}")
            matrix = "layers" in piece.key and ".norm" not in piece.key and "bias" not in piece.key
            if matrix and not torch.equal(piece.tensor, part):
                problems.append(f"{name}: {piece.key} by a bit")
    return problems


@pytest.mark.parametrize(
    ("ranks", "grid", "others", "other_grid"),
    [
        (4, (1, 2, 1, 2), 2, (1, 1, 1, 2)),
        pytest.param(1, (1, 1, 1, 1), 4, (1, 2, 2, 1), marks=pytest.mark.long),
        pytest.param(4, (1, 1, 1, 4), 1, (1, 1, 1, 1), marks=pytest.mark.long),
    ],
)
def test_state_moves_between_layouts(pool, lone_mesh, tmp_path, ranks, grid, others, other_grid):
    for name, config in CONFIGS.items():
        params = [shard_of(m, value_of(m, "init"), lone_mesh) for m in model_metas()]
        optimizer = Optimizer(params, config, lone_mesh)
        steps(params, optimizer, range(4))
        torch.save({piece.key: piece.tensor for piece in pieces_of(params, optimizer)}, tmp_path / f"{name}.pt")
    pool.run(ranks, train_and_save, grid, str(tmp_path))
    assert pool.run(others, load_and_go_on, other_grid, str(tmp_path)) == [[]] * others
