"""The optimizer room on a GPU: the CPU's numbers, and no waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from optim_cases import alone, model_metas

from megatron_mup.config import Config, OptimizerConfig
from megatron_mup.optim.clip import clip_, global_grad_norm
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.mesh import Mesh

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OPTIMIZERS = ("muon", "normuon", "muonsphere", "spectral_sphere", "scion", "dion")


@pytest.fixture(scope="module")
def meshes() -> Iterator[dict[str, Mesh]]:
    """Meshes of one rank on either device."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield {kind: Mesh.build(Config(), torch.device(kind)) for kind in ("cpu", "cuda")}
    dist.destroy_process_group()


def build(
    mesh: Mesh, name: str, dtype: torch.dtype = torch.float32, ns_dtype: str = "fp32"
) -> tuple[list[MainParam], Optimizer]:
    torch.manual_seed(0)
    params = [alone(m, torch.randn(m.shape).to(mesh.device, dtype)) for m in model_metas()]
    config = Config(optimizer=OptimizerConfig(optimizer=name, lr=1e-2, muon_ns_dtype=ns_dtype))
    return params, Optimizer(params, config, mesh)


def train(params: list[MainParam], optimizer: Optimizer, mesh: Mesh, steps: int = 3) -> torch.Tensor:
    norm = torch.zeros(())
    for step in range(steps):
        torch.manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.value.shape).to(param.value)
        norm = global_grad_norm(params, mesh)
        clip_(params, norm, 1.0)
        optimizer.step(1.0)
    return norm


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_numbers_as_the_cpu(meshes, name):
    results = {}
    for kind, mesh in meshes.items():
        params, optimizer = build(mesh, name)
        results[kind] = (train(params, optimizer, mesh), [param.value for param in params])
    torch.testing.assert_close(results["cuda"][0].cpu(), results["cpu"][0], rtol=1e-6, atol=0)
    for got, want in zip(results["cuda"][1], results["cpu"][1], strict=True):
        assert ((got.cpu() - want).norm() / want.norm()).item() < 1e-5


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_wait_for_the_device(meshes, name, dtype):
    mesh = meshes["cuda"]
    params, optimizer = build(mesh, name, dtype, "fp32" if dtype is torch.float32 else "bf16")
    train(params, optimizer, mesh, steps=1)
    for param in params:
        param.grad = torch.ones_like(param.value)
    torch.cuda.set_sync_debug_mode("error")
    try:
        clip_(params, global_grad_norm(params, mesh), 1.0)
        optimizer.step(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("switch", ["legacy", "new"])
def test_tf32_does_not_change_the_result(switch):
    x = torch.randn(256, 896, device="cuda")
    want = orthonormalize(x)
    matmul, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    try:
        if switch == "legacy":
            torch.set_float32_matmul_precision("high")
        else:
            matmul.fp32_precision = "tf32"
        product = x @ x.T
        assert torch.equal(orthonormalize(x), want)
        assert torch.equal(x @ x.T, product), "the process's own setting is back"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(x @ x.T, product), "TF32 was on"


def test_bf16_is_batched_over_equal_shapes():
    x = torch.randn(4, 512, 1024, device="cuda")
    got = orthonormalize(x, dtype=torch.bfloat16)
    torch.testing.assert_close(got[2], orthonormalize(x[2], dtype=torch.bfloat16), atol=2e-2, rtol=0)
    values = torch.linalg.svdvals(got.float())
    assert values.min() > 0.9
    assert values.max() < 1.2
