"""Floating-point operations of a training step, by the two formulas in use, and what devices could do at best."""

from __future__ import annotations

import re
from typing import Literal

import torch

from megatron_mup.config import ModelConfig, MoEConfig

Causal = Literal["half", "full"]


def flops_per_token(
    model: ModelConfig, seq_length: int, vocab_size: int, causal: Causal, moe: MoEConfig | None = None
) -> float:
    """Operations of forward and backward for one token, counted as published tables count them.

    ``6 x matrix parameters + a x layers x heads x head width x seq_length``, the head width being the mean of that of
    queries and that of values. Matrix parameters are those of the
    layers and of the output layer (tied or not), of routed experts those that a token goes to; embeddings, norms,
    biases and the padding of the vocabulary count nothing, recomputed activations neither. Attention's two products
    over scores take ``12`` for every pair of positions (``a = 12``, ``full``: torchtitan, Megatron-LM's older tables);
    a causal mask needs half of the pairs (``a = 6``, ``half``: Megatron-LM today, Megatron-Bridge). Packed documents
    are counted as one sequence.

    Args:
        model: architecture.
        seq_length: tokens per sequence.
        vocab_size: token ids, unpadded.
        causal: how attention is counted.
        moe: which layers have experts, and how many of them a token goes to; None: all layers are dense.

    Returns:
        FLOP per token; a multiplication and an addition are two.
    """
    # Queries times keys, and weights times values.
    attention_width = model.num_attention_heads * (model.head_dim + model.value_dim)
    mlp_matrices = 3 if model.swiglu else 2
    dense = mlp_matrices * model.ffn_size
    # Rows and columns of hidden size, layer by layer: of the MLP, or of router and experts.
    widths = [
        active_width(model, moe) if has_experts else dense
        for has_experts in (moe or MoEConfig()).layers(model.num_layers)
    ]
    matrices = model.hidden_size * (sum(widths) + vocab_size) + model.num_layers * model.attention_weights
    per_pair = 3 if causal == "half" else 6
    return float(6 * matrices + per_pair * model.num_layers * attention_width * seq_length)


def active_width(model: ModelConfig, moe: MoEConfig | None) -> int:
    """Parameters over hidden size that a token passes in an MoE layer: router, chosen experts and shared ones."""
    assert moe is not None
    assert moe.num_experts is not None
    inner = moe.moe_router_topk * (moe.moe_ffn_hidden_size or model.ffn_size)
    inner += moe.moe_shared_expert_intermediate_size or 0
    return moe.num_experts + (3 if model.swiglu else 2) * inner


_PEAKS: tuple[tuple[str, dict[torch.dtype, float]], ...] = (
    (r"\bMIG\b", {}),
    (r"\bGB[23]00\b", {torch.bfloat16: 2500e12}),
    (r"\bB[23]00\b", {torch.bfloat16: 2250e12}),
    (r"\bGH200\b", {torch.bfloat16: 989e12, torch.float32: 67e12}),
    (r"\bH200 NVL\b", {torch.bfloat16: 835e12, torch.float32: 60e12}),
    (r"\bH[128]00 PCIe\b", {torch.bfloat16: 756e12, torch.float32: 51e12}),
    (r"\bH100 NVL\b", {torch.bfloat16: 835e12, torch.float32: 60e12}),
    (r"\bH(100|200|800)\b", {torch.bfloat16: 989e12, torch.float32: 67e12}),
    (r"\bA[18]00\b", {torch.bfloat16: 312e12, torch.float32: 19.5e12}),
    (r"\bL40S\b", {torch.bfloat16: 362e12, torch.float32: 91.6e12}),
    (r"\bMI300X\b", {torch.bfloat16: 1307e12, torch.float32: 163.4e12}),
)
"""Device name pattern, most special first, to peak FLOP/s by dtype of the matrix products, from the makers' data
sheets: dense, without sparsity; fp32 without TF32."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Peak FLOP/s of a device for dense matrix products in ``dtype``; None where unknown.

    Args:
        device_name: as ``torch.cuda.get_device_name`` tells it, e.g. ``NVIDIA H100 80GB HBM3``.
        dtype: bf16 or fp32 (without TF32).
    """
    for pattern, peaks in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peaks.get(dtype)
    return None
