"""Shards cover each tensor once, whatever its sizes; ranks stand where Megatron puts them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config, MoEConfig, ParallelConfig
from megatron_mup.layers.moe import expert_blocks
from megatron_mup.parallel.layout import Layout, chunk
from megatron_mup.parallel.mesh import AXES, Mesh, TensorAxis, rank_grid
from megatron_mup.parametrization.meta import ParamMeta, Role


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_chunks_cover_a_length_once(parts):
    for length in range(20):
        chunks = [chunk(length, parts, index) for index in range(parts)]
        covered = [i for start, size in chunks for i in range(start, start + size)]
        assert covered == list(range(length))
        # As torch.chunk and FSDP2 cut: equal sizes, the last ones short or empty.
        sizes = [len(t) for t in torch.empty(length).chunk(parts)] if length else []
        assert [size for _, size in chunks if size] == [size for size in sizes if size]
        assert chunks == [TensorAxis(None, index, parts).local(length) for index in range(parts)]


SHAPES = [(16, 8), (7, 6), (3, 4), (1, 2), (5,), (2,), (6, 9), (2, 3, 4)]
GRIDS = {
    "tp2-fsdp2": {"tensor_model_parallel_size": 2, "data_parallel_sharding_strategy": "optim_grads_params"},
    "fsdp4": {"data_parallel_sharding_strategy": "optim_grads_params"},
    "tp4": {"tensor_model_parallel_size": 4},
    "hsdp2x2": {
        "data_parallel_sharding_strategy": "optim_grads_params",
        "num_distributed_optimizer_instances": 2,
    },
    "dp4": {},
}


def meta_of(shape: tuple[int, ...], tp_dim: int | None) -> ParamMeta:
    facts = {"fan_in": 1, "fan_out": 1, "base_fan_in": 1, "base_fan_out": 1}
    return ParamMeta(name="w", role=Role.BIAS, shape=shape, tp_dim=tp_dim, **facts)


def shards(grid: str):
    """Per tensor: this rank's elements, and whether gathering gives all of them back."""
    mesh = Mesh.build(Config(parallel=ParallelConfig(**GRIDS[grid])), torch.device("cpu"))
    seen = []
    for shape, tp_dim in cases():
        layout = Layout.of(meta_of(shape, tp_dim), mesh)
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        part = layout.shard(whole)
        assert part.shape == layout.local_shape
        assert part.numel() == 0 or part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        for dim, (offset, size) in enumerate(zip(layout.offsets, layout.local_shape, strict=True)):
            assert 0 <= offset <= offset + size <= shape[dim]
        seen.append((part.flatten().tolist(), torch.equal(layout.gather(part.clone()), whole)))
    return mesh.rank("dp_replicate"), mesh.rank("tp"), seen


def cases():
    return [(shape, dim) for shape in SHAPES for dim in (None, *range(len(shape)))]


@pytest.mark.parametrize("grid", GRIDS)
def test_shards_cover_a_tensor_once_and_gather(pool, grid):
    ranks = pool.run(4, shards, grid)
    replicas = {replica for replica, _, _ in ranks}
    for number, (shape, tp_dim) in enumerate(cases()):
        assert all(seen[number][1] for _, _, seen in ranks), (shape, tp_dim)
        for replica in replicas:
            # Without a dimension to cut, every tensor rank holds a copy.
            mine = [s for r, tp, s in ranks if r == replica and (tp_dim is not None or tp == 0)]
            elements = sorted(itertools.chain(*(seen[number][0] for seen in mine)))
            assert elements == list(range(torch.Size(shape).numel())), (shape, tp_dim)


EXPERT_GRIDS = {
    "etp2-fsdp2": {"expert_tensor_parallel_size": 2, "data_parallel_sharding_strategy": "optim_grads_params"},
    "etp2-ep2": {"expert_tensor_parallel_size": 2, "expert_model_parallel_size": 2},
    "etp4": {"expert_tensor_parallel_size": 4},
    "etp2-dp2": {"expert_tensor_parallel_size": 2, "tensor_model_parallel_size": 2},
}
EXPERT_KINDS = {
    "gated": ((4 * 24, 3), 0, expert_blocks(24, "gate", "up")),
    # Two data shards of 14 rows: the first ends inside a run.
    "odd": ((2 * 28, 2), 0, expert_blocks(28, "matrix")),
    "out": ((4 * 3, 12), 1, expert_blocks(3, "matrix")),
}


def expert_shards(grid: str):
    """Per tensor: this rank's elements, and whether gathering, rectangles and parts say the same of them."""
    parallel = ParallelConfig(**EXPERT_GRIDS[grid], sequence_parallel=True)
    mesh = Mesh.build(Config(parallel=parallel, moe=MoEConfig(num_experts=4)), torch.device("cpu"))
    seen = []
    for shape, dim, blocks in EXPERT_KINDS.values():
        experts = shape[0] // blocks[0].period
        meta = replace(meta_of(shape, dim), role=Role.EXPERT_IN, experts=experts, blocks=blocks)
        layout = Layout.of(meta, mesh)
        whole = torch.arange(torch.Size(shape).numel()).view(shape)
        local = layout.shard(whole)
        assert local.shape == layout.local_shape
        again = torch.full_like(local, -1)
        for (offsets, view), (_, own) in zip(layout.rectangles(again), layout.rectangles(local), strict=True):
            view.copy_(whole[tuple(slice(o, o + n) for o, n in zip(offsets, view.shape, strict=True))])
            assert torch.equal(view, own)
        assert torch.equal(again, local)
        for start in range(len(local) + 1):
            part = layout.part(start, len(local) - start)
            assert torch.equal(part.shard(whole), local[start:])
        seen.append((local.flatten().tolist(), torch.equal(layout.gather(local), whole)))
    return mesh.rank("edp_replicate"), seen


@pytest.mark.parametrize("grid", EXPERT_GRIDS)
def test_parts_of_experts_cover_them_once_and_gather(pool, grid):
    ranks = pool.run(4, expert_shards, grid)
    for number, (kind, (shape, _, _)) in enumerate(EXPERT_KINDS.items()):
        assert all(seen[number][1] for _, seen in ranks), kind
        for replica in {replica for replica, _ in ranks}:
            elements = sorted(itertools.chain(*(seen[number][0] for r, seen in ranks if r == replica)))
            assert elements == list(range(torch.Size(shape).numel())), kind


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 2, 2), (2, 2, 2, 2), (3, 2, 1, 4)])
def test_rank_grid(sizes):
    grid = rank_grid(*sizes)
    assert tuple(grid.shape) == sizes
    assert sorted(grid.flatten().tolist()) == list(range(grid.numel()))
    _, tp, replicate, shard = sizes
    for p, t, r, s in itertools.product(*map(range, sizes)):
        # Tensor ranks are neighbours, then data ranks (shards inside replicas), stages farthest apart.
        assert grid[p, t, r, s] == t + tp * (s + shard * (r + replicate * p))


def places(parallel: ParallelConfig):
    """What the mesh says of this rank, checked by sums over its groups."""
    mesh = Mesh.build(Config(parallel=parallel), torch.device("cpu"))

    def members(group):
        ranks = torch.zeros(dist.get_world_size(), dtype=torch.long)
        ranks[dist.get_rank()] = 1
        dist.all_reduce(ranks, group=group)
        return ranks.nonzero().flatten().tolist()

    groups = {axis: members(mesh.group(axis)) for axis in AXES}
    groups["loss"] = members(mesh.loss_group)
    if mesh.size("pp") > 1:
        groups["embedding"] = members(mesh.embedding_group)
    return groups, {axis: mesh.rank(axis) for axis in AXES}, mesh.dp_rank, mesh.dp_size


def test_groups_of_a_mesh(pool):
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    groups, place, dp_rank, dp_size = pool.run(4, places, parallel)[3]
    assert groups == {
        "pp": [1, 3],
        "tp": [2, 3],
        "dp_replicate": [3],
        "dp_shard": [3],
        "loss": [1, 3],
        "embedding": [1, 3],
    }
    assert place == {"pp": 1, "tp": 1, "dp_replicate": 0, "dp_shard": 0}
    assert (dp_rank, dp_size) == (0, 1)


def shared_samples(parallel: ParallelConfig):
    mesh = Mesh.build(Config(parallel=parallel), torch.device("cpu"))
    together = torch.zeros(dist.get_world_size(), dtype=torch.long)
    together[dist.get_rank()] = 1
    dist.all_reduce(together, group=mesh.cp.group)
    return together.nonzero().flatten().tolist(), mesh.cp.rank, mesh.dp_rank, mesh.dp_size, mesh.sharding_size


@pytest.mark.parametrize("instances", [1, 2])
def test_context_ranks_read_the_same_samples(pool, instances):
    """They are neighbours behind tensor ranks, and lie on the data axes, however these are cut into replicas."""
    parallel = ParallelConfig(
        context_parallel_size=2,
        data_parallel_sharding_strategy="optim_grads",
        num_distributed_optimizer_instances=instances,
    )
    assert pool.run(4, shared_samples, parallel) == [
        ([0, 1], 0, 0, 2, 4),
        ([0, 1], 1, 0, 2, 4),
        ([2, 3], 0, 1, 2, 4),
        ([2, 3], 1, 1, 2, 4),
    ]


def test_groups_of_a_sharded_mesh(pool):
    parallel = ParallelConfig(data_parallel_sharding_strategy="optim_grads", num_distributed_optimizer_instances=2)
    ranks = pool.run(4, places, parallel)
    assert [r[2] for r in ranks] == [0, 1, 2, 3]
    assert ranks[2][0] == {
        "pp": [2],
        "tp": [2],
        "dp_replicate": [0, 2],
        "dp_shard": [2, 3],
        "loss": [0, 1, 2, 3],
    }
