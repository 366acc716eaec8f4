"""Dion's compressed synchronization on two GPUs under NCCL: the steps of Dion whose gradients are summed."""

from __future__ import annotations

import pytest
import torch

from megatron_mup.config import Config
from megatron_mup.parallel.mesh import Mesh
from tests.gpu.gpu_runs import BF16, gpu_config, train

pytestmark = [pytest.mark.gpu, pytest.mark.multi_gpu]

PLAIN = "--optimizer dion --muon-lr 0.02 --clip-grad 0"
COMPRESSED = f"{PLAIN} --dion-compressed-sync"


def train_all(configs: dict[str, Config], device: str = "cuda") -> dict[str, dict[str, torch.Tensor]]:
    """Losses and weights of several runs of one layout."""
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    mesh = Mesh.build(configs["compressed"], place)
    found = {}
    for name, config in configs.items():
        torch._dynamo.reset()
        seen = train(config, mesh, steps=6)
        found[name] = {"losses": seen["losses"], **seen["weights"]}
    return found


def test_compressed_sync(gpus):
    configs = {
        "plain": gpu_config(PLAIN, "--muon-ns-dtype fp32"),
        "compressed": gpu_config(COMPRESSED, "--muon-ns-dtype fp32"),
        "plain-bf16": gpu_config(PLAIN, BF16),
        "compressed-bf16": gpu_config(COMPRESSED, BF16),
    }
    first, second = gpus.run(2, train_all, configs, timeout=240)
    for name in configs:
        for key, value in first[name].items():
            assert torch.equal(value, second[name][key]), f"{name}: {key} differs between replicas"
    differs = any(not torch.equal(value, first["plain"][key]) for key, value in first["compressed"].items())
    assert differs, "sums in another order, yet no rounding: the flag did nothing"
    torch.testing.assert_close(first["compressed"]["losses"], first["plain"]["losses"], rtol=1e-4, atol=0)
    torch.testing.assert_close(first["compressed-bf16"]["losses"], first["plain-bf16"]["losses"], rtol=2e-2, atol=0)
