"""The optimizer room on a GPU: the CPU's numbers, and no waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from optim_cases import alone, meta, model_metas

from megatron_mup.config import Config, OptimizerConfig
from megatron_mup.optim.clip import clip_factor, global_grad_norm
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.newton_schulz import orthonormalize
from megatron_mup.optim.optimizer import Optimizer
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta, Role

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OPTIMIZERS = ("muon", "normuon", "muonsphere", "spectral_sphere", "scion", "dion")


@pytest.fixture(scope="module")
def meshes() -> Iterator[dict[str, Mesh]]:
    """Meshes of one rank on either device."""
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield {kind: Mesh.build(Config(), torch.device(kind)) for kind in ("cpu", "cuda")}
    dist.destroy_process_group()


def build(
    mesh: Mesh,
    name: str,
    dtype: torch.dtype = torch.float32,
    ns_dtype: str = "fp32",
    metas: list[ParamMeta] | None = None,
    **flags: object,
) -> tuple[list[MainParam], Optimizer]:
    torch.manual_seed(0)
    params = [alone(m, torch.randn(m.shape).to(mesh.device, dtype)) for m in metas or model_metas()]
    config = Config(optimizer=OptimizerConfig(optimizer=name, lr=1e-2, muon_ns_dtype=ns_dtype, **flags))
    return params, Optimizer(params, config, mesh)


def train(
    params: list[MainParam], optimizer: Optimizer, mesh: Mesh, steps: int = 3, first: int = 0, taken: str = "1" * 99
) -> torch.Tensor:
    """Steps at rates that change; one that isn't taken has its gradients all the same."""
    norm, alive = torch.zeros(()), []
    for step in range(first, first + steps):
        torch.manual_seed(100 + step)
        for param in params:
            alive.append(param.grad)  # so that gradients never lie where they lay before
            param.grad = torch.randn(param.value.shape).to(param.value)
        norm = global_grad_norm(params, mesh)
        if taken[step] == "1":
            optimizer.step(1.0 / (1 + step), clip_factor(norm, 1.0))
    return norm


def contents(params: list[MainParam], optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Values and state by name."""
    state = {key: value for key, (_, value) in optimizer.state_tensors().items()}
    return state | {param.meta.name: param.value for param in params}


def large_metas() -> list[ParamMeta]:
    """Matrices that take the symmetric kernels in bf16."""
    return [meta(f"large.{i}", Role.MLP_OUT, (1024, 2048)) for i in range(8)]


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
        optimizer.step(1.0, clip_factor(global_grad_norm(params, mesh), 1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("form", ["fp32", "bf16", "large"])
def test_replayed_steps_are_bitwise_launched_ones(meshes, name, form):
    """Over steps left out, other rates, gradients elsewhere, and after weights and state were loaded."""
    mesh, found = meshes["cuda"], []
    dtype, ns_dtype = (torch.float32, "fp32") if form == "fp32" else (torch.bfloat16, "bf16")
    metas = large_metas() if form == "large" else None
    for replayed in (False, True):
        params, optimizer = build(mesh, name, dtype, ns_dtype, metas, optimizer_cuda_graph=replayed)
        assert optimizer._matrix._replays.enabled is replayed
        train(params, optimizer, mesh, steps=5, taken="11011")
        assert bool(optimizer._matrix._replays._graphs) is replayed
        for key, value in contents(params, optimizer).items():
            if key.partition("/")[0] not in ("dion_basis", "right_vector"):
                value.mul_(0.5)
        train(params, optimizer, mesh, steps=2, first=5)
        found.append(contents(params, optimizer))
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_replays_begin_anew_when_optimizers_change(meshes):
    mesh, found = meshes["cuda"], []
    for replayed in (False, True):
        params, optimizer = build(mesh, "muon", optimizer_cuda_graph=replayed, optimizer_switch_at=3)
        train(params, optimizer, mesh)
        assert optimizer.advance(3)
        train(params, optimizer, mesh, steps=4, first=3)
        found.append(contents(params, optimizer))
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replaying_takes_little_of_the_host(meshes, name):
    mesh = meshes["cuda"]
    params, optimizer = build(mesh, name, torch.bfloat16, "bf16")
    train(params, optimizer, mesh)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer._matrix.step(1.0)
    launches = sum(event.count for event in profile.key_averages() if event.key.startswith("cudaLaunchKernel"))
    assert launches < 10


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
