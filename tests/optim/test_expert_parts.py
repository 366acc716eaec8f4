"""Experts whose matrices ranks share: steps and states are those of one rank, and every state is kept once."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from optim_cases import meta, numbers, shard_of

from megatron_mup.config import Config, MoEConfig, OptimizerConfig, ParallelConfig
from megatron_mup.layers.moe import expert_blocks
from megatron_mup.optim.build import build_matrix
from megatron_mup.optim.experts import ExpertRanks
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta, Role

EXPERTS, FFN, HIDDEN, STEPS = 3, 6, 5, 3


def experts_of(name: str, role: Role, rows: int, columns: int, dim: int, *parts: str) -> ParamMeta:
    facts = {"experts": EXPERTS, "tp_dim": dim, "blocks": expert_blocks(rows, *parts)}
    return replace(meta(name, role, (EXPERTS * rows, columns), **facts), fan_out=rows)


METAS = (
    experts_of("gated", Role.EXPERT_IN, 2 * FFN, HIDDEN, 0, "gate", "up"),
    experts_of("plain", Role.EXPERT_IN, FFN, HIDDEN, 0, "matrix"),
    experts_of("out", Role.EXPERT_OUT, HIDDEN, FFN, 1, "matrix"),
)
FSDP = {"data_parallel_sharding_strategy": "optim_grads_params"}
GRIDS = {
    # Data shards end inside an expert, and inside a run of its rows.
    "etp2-fsdp2": (4, {**FSDP, "expert_tensor_parallel_size": 2}),
    "etp3": (3, {"expert_tensor_parallel_size": 3}),
    "etp2-dp2": (4, {"expert_tensor_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
}
# Nothing but momentum; a number for each row; a vector for each matrix; momentum at home and a basis for each matrix;
# experts' gates and ups as one matrix.
OPTIMIZERS = {
    "muon": {},
    "normuon": {},
    "spectral_sphere": {},
    "dion": {},
    "whole": {"optimizer": "normuon", "muon_split_fc1": False},
}
DAILY = {("normuon", "etp2-fsdp2"), ("whole", "etp2-fsdp2")}

Places = list[tuple[str, tuple[slice, ...], torch.Tensor]]


def value_of(name: str, tag: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 * len(name) + tag))


def trained(name: str, parallel: dict[str, object]) -> tuple[Places, Places]:
    """Weights and states after some steps, each with its place in the global tensor."""
    flags = OptimizerConfig(**{"optimizer": name, "muon_ns_dtype": "fp32", **OPTIMIZERS[name]})
    config = Config(parallel=ParallelConfig(**parallel), moe=MoEConfig(num_experts=EXPERTS), optimizer=flags)
    mesh = Mesh.build(config, torch.device("cpu"))
    params = [shard_of(m, value_of(m.name, 0, m.shape), mesh) for m in METAS]
    ranks = ExpertRanks(mesh)
    numbered = ranks.parts([(param, numbers()) for param in params], mesh)
    optimizer = build_matrix(flags.optimizer, numbered, config, ranks, mesh.device)
    for step in range(1, STEPS + 1):
        for param in params:
            param.grad = param.layout.shard(value_of(param.meta.name, step, param.meta.shape)).clone()
        optimizer.step(1.0)
    states = [(kind.partition("/")[0], *held) for kind, held in optimizer.state_tensors().items()]
    return (
        [place for param in params for place in places("value", param, param.value)],
        [place for kind, param, tensor in states for place in places(kind, param, tensor)],
    )


def carried(parallel: dict[str, object]) -> int:
    """Experts' rows whose momentum is not AdamW's first moment as Muon takes over with state."""
    flags = OptimizerConfig(optimizer="muon", optimizer_switch_at=1, optimizer_switch_carry_state=True)
    config = Config(parallel=ParallelConfig(**parallel), moe=MoEConfig(num_experts=EXPERTS), optimizer=flags)
    mesh = Mesh.build(config, torch.device("cpu"))
    params = [shard_of(m, value_of(m.name, 0, m.shape), mesh) for m in METAS]
    optimizer = Optimizer(params, config, mesh)
    for param in params:
        param.grad = param.layout.shard(value_of(param.meta.name, 1, param.meta.shape)).clone()
    optimizer.step(1.0)
    assert optimizer.advance(1)
    wrong, rows = 0, 0
    for param, momentum in optimizer.state_tensors().values():
        want = 0.1 * param.layout.shard(value_of(param.meta.name, 1, param.meta.shape))
        wrong += int((momentum - want).abs().gt(1e-6).any(1).sum())
        rows += len(momentum)
    assert rows == sum(len(param.value) for param in params)
    return wrong


@pytest.mark.parametrize("grid", ["etp2-fsdp2", pytest.param("etp3", marks=pytest.mark.long)])
def test_state_is_carried_over(pool, grid):
    world, parallel = GRIDS[grid]
    assert pool.run(world, carried, parallel) == [0] * world


def places(kind: str, param: MainParam, tensor: torch.Tensor) -> Places:
    assert tensor.shape == param.layout.local_shape
    return [
        (f"{kind}/{param.meta.name}", tuple(slice(o, o + n) for o, n in zip(offsets, part.shape, strict=True)), part)
        for offsets, part in param.layout.rectangles(tensor)
    ]


@pytest.fixture(scope="module")
def whole(pool):
    """By optimizer what one rank has, as whole tensors."""

    @functools.cache
    def run(name: str) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        values, states = pool.run(1, trained, name, {})[0]
        for key in {key for key, _, _ in values + states}:
            mine = [(place, part) for k, place, part in values + states if k == key]
            shape = [max(place[dim].stop for place, _ in mine) for dim in range(mine[0][1].dim())]
            found[key] = torch.full(shape, float("nan"))
            for place, part in mine:
                found[key][place] = part
        return found

    return run


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        pytest.param(name, grid, marks=() if (name, grid) in DAILY else pytest.mark.long)
        for name in OPTIMIZERS
        for grid in GRIDS
    ],
)
def test_steps_and_states_are_those_of_one_rank(pool, whole, name, grid):
    world, parallel = GRIDS[grid]
    wanted = whole(name)
    kept: Counter[str] = Counter()
    for rank, (values, states) in enumerate(pool.run(world, trained, name, parallel)):
        for key, place, part in values + states:
            torch.testing.assert_close(
                part, wanted[key][place], rtol=1e-4, atol=1e-5, msg=lambda m, k=key, r=rank: f"{k}, {r}: {m}"
            )
        kept.update({key: 0 for key, _, _ in states})
        for key, _, part in states:
            kept[key] += part.numel()
    assert kept == {key: value.numel() for key, value in wanted.items() if not key.startswith("value/")}
