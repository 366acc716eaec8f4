"""FlashAttention-4, which ``--attention-backend auto`` takes on Hopper GPUs: each layout of two GPUs gives the loss and
the gradients of one, parameter by parameter, and one gives those of cuDNN's kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_mup.config import Config
from megatron_mup.kernels.libraries import obstacle
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.precision import settle_attention
from tests.gpu import test_two_gpus
from tests.gpu.gpu_runs import attempted, first_step, gpu_config, meshes_on, train
from tests.pool import Pool
from tests.runs import relative_error

pytestmark = pytest.mark.gpu

LAYOUTS = {**test_two_gpus.LAYOUTS, "cp2": "--context-parallel-size 2"}
COMPILED, GRAPHED = ("tp2-sp", "fsdp2", "pp2"), ("dp2", "fsdp2", "tp2")


def losses(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Of seven steps."""
    return {"losses": train(config, mesh, 7)["losses"]}


def on_rank(
    configs: dict[str, Config], function: Callable[[Config, Mesh], dict[str, Any]]
) -> dict[str, dict[str, Any] | str] | str:
    """What this rank sees of each configuration, or an error's text; why FlashAttention-4 can't be tried here."""
    if (why := obstacle("flash4")) is not None:
        return why
    if torch.cuda.get_device_capability() != (9, 0):
        return "--attention-backend auto takes FlashAttention-4 on Hopper GPUs only"
    mesh_of = meshes_on(torch.device("cuda", torch.cuda.current_device()))

    def seen(config: Config) -> dict[str, Any]:
        settled = settle_attention(config)
        return {"backend": settled.training.attention_backend, **function(settled, mesh_of(settled))}

    return {name: attempted(name, seen, config) for name, config in configs.items()}


def seen_on(gpus: Pool, ranks: int, runs: dict[str, str], function: Callable[..., Any]) -> list[dict[str, Any]]:
    """The same of all ranks; skips the test where the package can't be used."""
    configs = {name: gpu_config(flags) for name, flags in runs.items()}
    found = gpus.run(ranks, on_rank, configs, function, timeout=200)
    if isinstance(found[0], str):
        pytest.skip(found[0])
    return found


@pytest.fixture(scope="module")
def one(gpus):
    """One GPU with FlashAttention-4, with cuDNN's kernel, and in fp32."""
    runs = {"flash4": "--bf16", "cudnn": "--bf16 --attention-backend fused", "exact": "--attention-backend unfused"}
    return seen_on(gpus, 1, runs, first_step)[0]


@pytest.fixture(scope="module")
def two(gpus):
    """Each layout with FlashAttention-4."""
    return seen_on(gpus, 2, {name: f"--bf16 {flags}" for name, flags in LAYOUTS.items()}, first_step)


@pytest.fixture(scope="module")
def runs_of_two(gpus):
    """Seven steps plainly, compiled, and replayed from a CUDA graph after three eager ones."""
    runs = {"plain": "--bf16"}
    runs |= {f"graph {name}": f"--bf16 --cuda-graph-impl local {LAYOUTS[name]}" for name in GRAPHED}
    runs |= {f"compiled {name}": f"--bf16 --torch-compile {LAYOUTS[name]}" for name in COMPILED}
    return seen_on(gpus, 2, runs, losses)


def directions(seen: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Gradients, all divided by the norm of all of them."""
    norm = torch.stack([grad.norm() for grad in seen["grads"].values()]).norm()
    return {name: grad / norm for name, grad in seen["grads"].items()}


def errors(seen: dict[str, Any], want: dict[str, Any]) -> dict[str, float]:
    """Relative ones of every parameter's gradient; those of loss and norm are looked at here."""
    assert isinstance(seen, dict), seen
    torch.testing.assert_close(seen["loss"], want["loss"], rtol=2e-3, atol=0)
    torch.testing.assert_close(seen["norm"], want["norm"], rtol=1e-2, atol=0)
    got, wanted = directions(seen), directions(want)
    assert got.keys() == wanted.keys()
    return {name: relative_error(got[name], grad) for name, grad in wanted.items()}


def test_one_gpu_is_as_exact_as_with_cudnn(one):
    assert one["flash4"]["backend"] == "flash4"
    assert one["cudnn"]["backend"] == "fused"
    seen, cudnn = errors(one["flash4"], one["exact"]), errors(one["cudnn"], one["exact"])
    assert all(error < 1.5 * cudnn[name] + 1e-3 for name, error in seen.items()), (seen, cudnn)
    assert max(errors(one["flash4"], one["cudnn"]).values()) < 3e-2


@pytest.mark.multi_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_have_the_gradients_of_one(one, two, layout):
    """Context parallel ranks exchange parts of sequences, which this kernel doesn't know: ``auto`` leaves it there."""
    whole = {"loss": two[0][layout]["loss"], "norm": two[0][layout]["norm"], "grads": {}}
    for rank in two:
        seen = rank[layout]
        assert isinstance(seen, dict), seen
        assert seen["backend"] == ("auto" if layout == "cp2" else "flash4")
        torch.testing.assert_close(seen["norm"], whole["norm"], rtol=1e-5, atol=0)
        whole["grads"] |= seen["grads"]
    cudnn = errors(one["cudnn"], one["exact"])
    for name, error in errors(whole, one["exact"]).items():
        assert error < 1.5 * cudnn[name] + 1e-3, name
    assert max(errors(whole, one["flash4"]).values()) < 3e-2


@pytest.mark.multi_gpu
@pytest.mark.parametrize("run", [f"compiled {name}" for name in COMPILED] + [f"graph {name}" for name in GRAPHED])
def test_compiled_and_replayed_on_two_gpus(runs_of_two, run):
    for rank in runs_of_two:
        assert isinstance(rank[run], dict), rank[run]
        assert rank[run]["backend"] == "flash4"
        torch.testing.assert_close(rank[run]["losses"], rank["plain"]["losses"], rtol=2e-2, atol=0)
