"""Any layout computes the same update, norm and clipping as one rank: matrices bitwise, where no clip rounds.

What is updated element by element (AdamW and so on) may differ in the last bit: a CPU's vector loop and its remainder
round differently, and a shard ends elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from optim_cases import alone, model_metas, numbers, shard_of

from megatron_mup.config import Config, OptimizerConfig, ParallelConfig
from megatron_mup.optim import planner
from megatron_mup.optim.blocks import logical_blocks
from megatron_mup.optim.clip import clip_factor, global_grad_norm
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.muon import Muon, MuonSettings
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.optim.whole import Whole
from megatron_mup.parallel.mesh import AXES, Mesh
from megatron_mup.parametrization.meta import ParamMeta
from tests.shared_file import SharedFile, shared_through

# (pp, tp, dp_replicate, dp_shard) by world size. "short" has 2 rows: with 4 data shards two ranks hold none of it; one
# rank holds all of "column" and "row", the latter where nothing but data shards cut it. The 7 and 13 of "odd", the
# embedding's 22 and the norms' 12 don't divide evenly.
LAYOUTS = {
    2: [(1, 2, 1, 1), (1, 1, 1, 2), (2, 1, 1, 1)],
    4: [(1, 4, 1, 1), (1, 1, 1, 4), (1, 2, 1, 2), (1, 2, 2, 1), (1, 1, 2, 2), (2, 2, 1, 1), (2, 1, 1, 2)],
    8: [(1, 2, 1, 4), (1, 4, 1, 2), (1, 2, 2, 2), (2, 2, 1, 2)],
}
STEPS = 3
CONFIGS = {
    "muon-clip": OptimizerConfig(optimizer="muon", lr=1e-2, muon_ns_dtype="fp32", clip_grad=1.0),
    "adam": OptimizerConfig(lr=1e-2),
    "muon-no-split": OptimizerConfig(
        optimizer="muon", lr=1e-2, muon_ns_dtype="fp32", muon_split_qkv=False, muon_split_fc1=False, clip_grad=0.0
    ),
    **{
        name: OptimizerConfig(
            optimizer=name, scalar_optimizer=rest, lr=1e-2, muon_ns_dtype=dtype, clip_grad=0.0, ademamix_warmup_iters=2
        )
        for name, rest, dtype in (
            ("muon", "adam_atan2", "bf16"),
            ("normuon", "lion", "fp32"),
            ("muonsphere", "ademamix", "fp32"),
            ("spectral_sphere", "lion", "fp32"),
            ("scion", "adam", "fp32"),
            ("dion", "adam", "fp32"),
        )
    },
    "heads": OptimizerConfig(
        optimizer="normuon",
        lr=1e-2,
        muon_ns_dtype="fp32",
        muon_split_heads=True,
        muon_scale_mode="spectral",
        clip_grad=0.0,
    ),
    "heads-sphere": OptimizerConfig(
        optimizer="muonsphere", lr=1e-2, muon_ns_dtype="fp32", muon_split_heads=True, clip_grad=0.0
    ),
}


def value_of(meta: ParamMeta, tag: str) -> torch.Tensor:
    seed = sum(i * byte for i, byte in enumerate(f"{meta.name}/{tag}".encode(), 1))
    return torch.randn(meta.shape, generator=torch.Generator().manual_seed(seed))


def train(params: list[MainParam], config: Config, mesh: Mesh) -> tuple[list[float], Optimizer]:
    """Gradient norms of a few steps on fixed gradients."""
    optimizer = Optimizer(params, config, mesh)
    optimizer.start()
    norms = []
    for step in range(STEPS):
        for param in params:
            param.grad = param.layout.shard(value_of(param.meta, str(step))).clone()
        norm = global_grad_norm(params, mesh)
        optimizer.step(1 / (step + 1), clip_factor(norm, config.optimizer.clip_grad))
        norms.append(norm.item())
    return norms, optimizer


def mesh_of(grid: tuple[int, int, int, int]) -> Mesh:
    pp, tp, replicate, shard = grid
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp,
        tensor_model_parallel_size=tp,
        data_parallel_sharding_strategy="optim_grads_params" if shard > 1 else "no_shard",
        num_distributed_optimizer_instances=replicate if shard > 1 else 1,
    )
    mesh = Mesh.build(Config(parallel=parallel), torch.device("cpu"))
    assert tuple(mesh.size(axis) for axis in AXES) == grid
    return mesh


def held(metas: list[ParamMeta], mesh: Mesh) -> list[ParamMeta]:
    """What a rank's pipeline stage holds: all, or the layers of its number."""
    if mesh.size("pp") == 1:
        return metas
    return [m for m in metas if (m.layer or 0) == mesh.rank("pp")]


def compare(mesh: Mesh, config: Config, want: dict[str, torch.Tensor], norms: list[float]) -> str:
    """What differs from one rank on this rank; empty when nothing does."""
    params = [shard_of(m, value_of(m, "init"), mesh) for m in held(model_metas(), mesh)]
    got_norms, optimizer = train(params, config, mesh)
    for got, norm in zip(got_norms, norms, strict=True):
        if abs(got - norm) > 1e-6 * norm:
            return f"norm {got} is not {norm}"
    compared = {f"value/{param.meta.name}": (param, param.value) for param in params} | optimizer.state_tensors()
    for name, (param, tensor) in compared.items():
        if tensor.shape != param.layout.local_shape:
            return f"{name} has shape {tuple(tensor.shape)}, not the shard's {param.layout.local_shape}"
        whole = want[name]
        if torch.equal(tensor, param.layout.shard(whole)):
            continue
        error = (tensor - param.layout.shard(whole)).norm() / whole.norm()
        if param.meta.role.is_hidden_matrix and config.optimizer.clip_grad == 0:
            return f"{name} off by {error:.1e}, and should not be by a bit"
        if error > 1e-5:
            return f"{name} off by {error:.1e}"
    return ""


def problems(
    world: int, references: dict[str, tuple[list[float], dict[str, torch.Tensor]]], folder: Path | None
) -> list[str]:
    """What differs from one rank on this rank, over all layouts and settings; with memory shared through a folder."""
    found = []
    for grid in LAYOUTS[world]:
        mesh = mesh_of(grid)
        for label, (norms, tensors) in references.items():
            with shared_through(folder) if folder else pytest.MonkeyPatch.context() as patch:
                patch.setattr(planner, "CHUNK_ELEMENTS", 300 if label == "muonsphere" else planner.CHUNK_ELEMENTS)
                problem = compare(mesh, Config(optimizer=CONFIGS[label]), tensors, norms)
            if problem:
                found.append(f"{label} {grid}: {problem}")
    if folder and not SharedFile.made:
        found.append("nothing was shared")
    return found


class Counting(Muon[MuonSettings]):
    """Muon that counts the matrices which it orthonormalizes."""

    count = 0

    def compute(self, whole: Whole) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.count += len(whole.update)
        return super().compute(whole)


def orthonormalized_here(grid: tuple[int, int, int, int]) -> tuple[int, int]:
    """Matrices that this rank orthonormalizes in a step, and all that there are."""
    mesh = mesh_of(grid)
    params = [shard_of(m, value_of(m, "init"), mesh) for m in model_metas() if m.role.is_orthonormalized]
    optimizer = Counting([(param, numbers()) for param in params], MuonSettings(), mesh)
    for param in params:
        param.grad = param.layout.shard(value_of(param.meta, "0")).clone()
    optimizer.step(1.0)
    return optimizer.count, sum(len(logical_blocks(param.meta, optimizer.settings)) for param in params)


@pytest.mark.parametrize(
    ("world", "grid"), [(2, (1, 1, 2, 1)), (2, (1, 1, 1, 2)), pytest.param(4, (1, 1, 2, 2), marks=pytest.mark.long)]
)
def test_no_matrix_is_orthonormalized_twice(world, grid, pool):
    """Not by replicas either: ranks that hold copies share the work."""
    counts = pool.run(world, orthonormalized_here, grid)
    assert all(count > 0 for count, _ in counts)
    assert sum(count for count, _ in counts) == counts[0][1]


@pytest.mark.parametrize("world", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (4, 8))])
@pytest.mark.parametrize("near", [False, True], ids=["messages", "near"])
def test_any_layout_equals_one_rank(world, near, lone_mesh, pool, tmp_path):
    """By messages, and where ranks write to each other's memory."""
    references = {}
    for label, flags in CONFIGS.items():
        params = [alone(m, value_of(m, "init")) for m in model_metas()]
        norms, optimizer = train(params, Config(optimizer=flags), lone_mesh)
        tensors = {f"value/{param.meta.name}": param.value for param in params}
        references[label] = norms, tensors | {key: tensor for key, (_, tensor) in optimizer.state_tensors().items()}
    assert pool.run(world, problems, world, references, tmp_path if near else None) == [[]] * world
