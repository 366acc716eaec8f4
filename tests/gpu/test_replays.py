"""Optimizers that exchange shards between two GPUs: replayed bitwise as launched, and as on one GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_mup.config import Config
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.optim import planner
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from tests.gpu.gpu_runs import attempted, gpu_config, meshes_on

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "dp2": "",
    "fsdp2": "--data-parallel-sharding-strategy optim_grads_params",
}
OPTIMIZERS = ("muon", "normuon", "muonsphere", "spectral_sphere", "dion")
RUNS = {name: f"--optimizer {name} --muon-ns-dtype fp32" for name in OPTIMIZERS}
RUNS |= {f"{name}-bf16": f"--optimizer {name} --muon-ns-dtype bf16" for name in ("muon", "spectral_sphere")}
TRANSPORTS = {"near": "--optimizer-transport auto", "messages": "--optimizer-transport collective"}
FORMS = {"replayed": "", "launched": "--no-optimizer-cuda-graph"}
VOCABULARY = 256


def optimized(flags: str, mesh_of: Callable[[Config], Mesh]) -> dict[str, torch.Tensor]:
    """How far hidden matrices' shards move in a few steps on given gradients, in several chunks."""
    planner.CHUNK_ELEMENTS = 1 << 16
    config = gpu_config(flags)
    mesh, params = mesh_of(config), []
    for number, meta in enumerate(parameter_metas(config, VOCABULARY)):
        layout = Layout.of(meta, mesh)
        torch.manual_seed(number)
        params.append(MainParam(meta, layout, layout.shard(torch.randn(meta.shape)).to(mesh.device).contiguous()))
    initial = [param.value.clone() for param in params]
    optimizer, alive = Optimizer(params, config, mesh), []
    optimizer.start()
    for step in range(5):
        for number, param in enumerate(params):
            torch.manual_seed(1000 * step + number)
            alive.append(param.grad)
            param.grad = param.layout.shard(torch.randn(param.meta.shape)).to(mesh.device).contiguous()
        optimizer.step(1 / (step + 1))
    assert len(optimizer._matrix.plan.chunks) > 1 or dist.get_world_size() == 1
    pairs = [(param, start) for param, start in zip(params, initial, strict=True) if param.meta.role.is_hidden_matrix]
    found = {param.meta.name: (param.value - start).cpu() for param, start in pairs}
    if dist.get_world_size() == 1:
        return found
    near = config.optimizer.optimizer_transport == "auto" and torch.cuda.can_device_access_peer(0, 1)
    assert (optimizer.transport() != "collectives") is near
    assert bool(optimizer._matrix._replays._graphs) is config.optimizer.optimizer_cuda_graph
    return found


def every_case(transport: str) -> dict[tuple[str, ...], Any]:
    """By a transport, launched and replayed; an error's text where there was one."""
    found, mesh_of = {}, meshes_on(torch.device("cuda", dist.get_rank()))
    for case in product(RUNS, LAYOUTS, FORMS):
        run, layout, form = case
        flags = " ".join([RUNS[run], LAYOUTS[layout], FORMS[form], TRANSPORTS[transport]])
        found[case] = attempted((*case, transport), optimized, flags, mesh_of)
    return found


def every_case_alone() -> dict[str, Any]:
    """On one GPU."""
    mesh_of = meshes_on(torch.device("cuda"))
    return {run: attempted(run, optimized, flags, mesh_of) for run, flags in RUNS.items()}


@pytest.fixture(scope="module")
def ranks(gpus):
    """What two ranks have by a transport: all cases in one start of the processes, which takes longer than most."""

    def found(transport: str) -> list[dict[tuple[str, ...], Any]]:
        try:
            return gpus.run(2, every_case, transport, timeout=150)
        except RuntimeError as error:
            return [dict.fromkeys(product(RUNS, LAYOUTS, FORMS), str(error))]

    return functools.cache(found)


@pytest.fixture(scope="module")
def alone(gpus):
    return gpus.run(1, every_case_alone)[0]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("run", RUNS)
def test_two_gpus(ranks, alone, layout, run, transport):
    found = [{form: rank[run, layout, form] for form in FORMS} for rank in ranks(transport)]
    for seen in found:
        for weights in seen.values():
            assert isinstance(weights, dict), weights
        for key, value in seen["launched"].items():
            assert torch.equal(seen["replayed"][key], value), key
    assert isinstance(alone[run], dict), alone[run]
    for key, value in alone[run].items():
        parts = [seen["launched"][key] for seen in found]
        if parts[0].shape != value.shape:
            dim = 0 if parts[0].shape[0] != value.shape[0] else 1
            parts = [torch.cat(parts, dim)]
        assert ((parts[0] - value).norm() / value.norm()).item() < (2e-2 if "bf16" in run else 1e-4), key
