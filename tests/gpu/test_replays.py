"""Optimizers that exchange shards between two GPUs: replayed bitwise as launched, and as on one GPU."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_mup.models.gpt import parameter_metas
from megatron_mup.optim import planner
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from tests.gpu.gpu_runs import gpu_config

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "dp2": "",
    "fsdp2": "--data-parallel-sharding-strategy optim_grads_params",
}
NAMES = ("muon", "muonsphere", "dion")
VOCABULARY = 256


def optimized(flags: str) -> dict[str, torch.Tensor]:
    """Hidden matrices' shards after a few steps on given gradients, in several chunks."""
    planner.CHUNK_ELEMENTS = 1 << 16
    config = gpu_config(flags)
    mesh = Mesh.build(config, torch.device("cuda", dist.get_rank()))
    params = []
    for number, meta in enumerate(parameter_metas(config, VOCABULARY)):
        layout = Layout.of(meta, mesh)
        torch.manual_seed(number)
        params.append(MainParam(meta, layout, layout.shard(torch.randn(meta.shape)).to(mesh.device)))
    optimizer, alive = Optimizer(params, config, mesh), []
    optimizer.start()
    for step in range(5):
        for number, param in enumerate(params):
            torch.manual_seed(1000 * step + number)
            alive.append(param.grad)
            param.grad = param.layout.shard(torch.randn(param.meta.shape)).to(mesh.device)
        optimizer.step(1 / (step + 1))
    assert len(optimizer._matrix._chunks) > 1 or dist.get_world_size() == 1
    found = {param.meta.name: param.value.cpu() for param in params if param.meta.role.is_hidden_matrix}
    if dist.get_world_size() == 1:
        return found
    replays = optimizer._matrix._replays
    assert bool(replays._graphs) is config.optimizer.optimizer_cuda_graph
    return found


def flags_of(name: str, layout: str) -> str:
    return f"--optimizer {name} --muon-ns-dtype fp32 {LAYOUTS[layout]}"


def every_case() -> dict[tuple[str, ...], dict[str, torch.Tensor]]:
    """Of all optimizers and layouts, launched and replayed: processes of two GPUs start too slowly for one each."""
    found = {}
    for name in NAMES:
        for layout in LAYOUTS if dist.get_world_size() > 1 else ("dp2",):
            flags = flags_of(name, layout)
            found[name, layout, "replayed"] = optimized(flags)
            found[name, layout, "launched"] = optimized(flags + " --no-optimizer-cuda-graph")
    return found


@pytest.fixture(scope="module")
def results(gpus):
    return gpus.run(2, every_case), gpus.run(1, every_case)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_two_gpus(results, layout, name):
    ranks, alone = results
    for rank in ranks:
        for key, value in rank[name, layout, "launched"].items():
            assert torch.equal(rank[name, layout, "replayed"][key], value), key
    for key, value in alone[name, "dp2", "launched"].items():
        parts = [rank[name, layout, "launched"][key] for rank in ranks]
        if parts[0].shape != value.shape:
            dim = 0 if parts[0].shape[0] != value.shape[0] else 1
            parts = [torch.cat(parts, dim)]
        assert ((parts[0] - value).norm() / value.norm()).item() < 1e-4, key
