from __future__ import annotations

import pytest
import torch

from megatron_mup.config import ModelConfig
from megatron_mup.training.flops import flops_per_token, peak_flops

LLAMA3_8B = ModelConfig(
    num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, swiglu=True
)
LLAMA3_70B = ModelConfig(
    num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64, num_query_groups=8, swiglu=True
)


@pytest.mark.parametrize(
    ("model", "causal", "gflop"),
    [
        (LLAMA3_8B, "full", 800e3 / 13812),  # 57.92
        (LLAMA3_8B, "half", 744e3 / 14451),  # 51.48
        (LLAMA3_70B, "full", 780e3 / 1621),
        (LLAMA3_70B, "half", 719e3 / 1602),
    ],
)
def test_published_ratios(model, causal, gflop):
    """TFLOP/s over tokens/s per device in Megatron's (full) and Bridge's (half) tables; both are rounded there."""
    assert flops_per_token(model, 8192, 128256, causal) / 1e9 == pytest.approx(gflop, rel=1e-3)


def test_narrow_heads_and_two_matrix_mlp():
    model = ModelConfig(num_layers=2, hidden_size=32, ffn_hidden_size=100, num_attention_heads=4, kv_channels=5)
    matrices = 2 * (3 * 20 * 32 + 20 * 32 + 2 * 32 * 100) + 32 * 77
    assert flops_per_token(model, 10, 77, "full") == 6 * matrices + 12 * 2 * 20 * 10
    assert flops_per_token(model, 10, 77, "half") == 6 * matrices + 6 * 2 * 20 * 10


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peaks(name, peak):
    assert peak_flops(name, torch.bfloat16) == peak


def test_peak_depends_on_dtype():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.float32) == 67e12
    assert peak_flops("NVIDIA B200", torch.float32) is None
