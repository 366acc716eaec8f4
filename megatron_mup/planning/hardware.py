"""What the planner takes GPUs and the links between them to be able to do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mup.training.flops import peak_flops

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster of equal nodes. Rates are per GPU and, for links, per direction.

    Data sheets give the first group; the second are assumptions, chosen so that the measurements in
    `benchmarks/results/train_step_h100.md` come out.

    Attributes:
        name: of the GPU, as `torch.cuda.get_device_name` has it.
        memory: bytes that PyTorch sees.
        memory_rate: of HBM, bytes/s.
        node_rate: between GPUs of a node, bytes/s.
        network_rate: of a GPU's share of its node's network, bytes/s.
        gpus_per_node: GPUs that the fast links join.
        matmul_share: share of peak FLOP/s that large matrix products reach.
        attention_share: the same for fused causal attention, over the pairs that count.
        memory_share: share of HBM's rate that elementwise kernels reach.
        link_share: share of a link's rate that large collectives reach.
        latency: of one collective, seconds.
        reserved: bytes of CUDA's context, NCCL's buffers and libraries' workspaces.
        slack: share of PyTorch's memory lost to fragmentation.
    """

    name: str
    memory: float
    memory_rate: float
    node_rate: float
    network_rate: float
    gpus_per_node: int = 8
    matmul_share: float = 0.68
    attention_share: float = 0.4
    memory_share: float = 0.7
    link_share: float = 0.75
    latency: float = 20e-6
    reserved: float = 2.5 * GIB
    slack: float = 0.05

    def peak(self, dtype: torch.dtype) -> float:
        """Peak FLOP/s of dense matrix products."""
        peak = peak_flops(self.name, dtype)
        assert peak is not None, f"no peak for {self.name} in {dtype}"
        return peak


HARDWARE = {
    "h100": Hardware(
        name="NVIDIA H100 80GB HBM3", memory=79.1 * GIB, memory_rate=3.35e12, node_rate=450e9, network_rate=50e9
    ),
    "h200": Hardware(name="NVIDIA H200", memory=139.8 * GIB, memory_rate=4.8e12, node_rate=450e9, network_rate=50e9),
    "a100": Hardware(
        name="NVIDIA A100-SXM4-80GB", memory=79.1 * GIB, memory_rate=2.04e12, node_rate=300e9, network_rate=25e9
    ),
}
"""SXM parts in eight-GPU nodes with one 400 Gb/s port for each GPU (H100, H200) or 200 Gb/s (A100)."""
