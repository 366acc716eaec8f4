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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["muon", "muonsphere", "dion"])
def test_two_gpus(gpus, layout, name):
    flags = f"--optimizer {name} --muon-ns-dtype fp32 {LAYOUTS[layout]}"
    launched = gpus.run(2, optimized, f"{flags} --no-optimizer-cuda-graph")
    for got, want in zip(gpus.run(2, optimized, flags), launched, strict=True):
        for key, value in want.items():
            assert torch.equal(got[key], value), key
    whole = gpus.run(1, optimized, f"--optimizer {name} --muon-ns-dtype fp32")[0]
    for key, value in whole.items():
        parts = [rank[key] for rank in launched]
        if parts[0].shape != value.shape:
            dim = 0 if parts[0].shape[0] != value.shape[0] else 1
            parts = [torch.cat(parts, dim)]
        assert ((parts[0] - value).norm() / value.norm()).item() < 1e-4, key
