"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split form as in Llama and Megatron."""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_mup.kernels.late import HAS_KERNEL
from megatron_mup.kernels.rotary import rotary_backward

# Llama 3.1's own numbers; Megatron-LM has them fixed too.
ORIGINAL_CONTEXT, LOW_FREQUENCY_FACTOR, HIGH_FREQUENCY_FACTOR = 8192, 1.0, 4.0


def rotary_angles(
    positions: torch.Tensor, width: int, base: float, stretch: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angles.

    Args:
        positions: ``[seq, batch or 1]`` integers.
        width: channels of a head that rotate.
        base: base of the frequencies ``base^(-2i / width)``.
        stretch: factor of `stretched`, or None.

    Returns:
        Two fp32 tensors ``[seq, batch or 1, width]``.
    """
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    frequencies = base**-exponent
    if stretch is not None:
        frequencies = stretched(frequencies, stretch)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def stretched(frequencies: torch.Tensor, factor: float) -> torch.Tensor:
    """Frequencies for contexts longer than those of training (Llama 3.1, arXiv 2407.21783, and its published code).

    A wave that turns at least `HIGH_FREQUENCY_FACTOR` times within the original context keeps its frequency, one that
    turns at most `LOW_FREQUENCY_FACTOR` times is slowed by ``factor``, and between the two the share is linear in the
    number of turns.
    """
    turns = ORIGINAL_CONTEXT * frequencies / (2 * math.pi)
    kept = (turns - LOW_FREQUENCY_FACTOR) / (HIGH_FREQUENCY_FACTOR - LOW_FREQUENCY_FACTOR)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first channels of each head; computed in fp32.

    Args:
        x: ``[seq, batch, ..., head_dim]``, any number of head dimensions.
        cos, sin: from `rotary_angles`.
    """
    width = cos.shape[-1]
    for _ in range(x.dim() - 3):
        cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned = x[..., :width].float()
    first, second = turned.chunk(2, -1)
    turned = (turned * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        query, key, value = parts(fused)
        return rotate(query, cos, sin), rotate(key, cos, sin), value

    @staticmethod
    def backward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        return rotary_backward(query, key, value, *ctx.saved_tensors), None, None


def parts(fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of ``[seq, batch, groups, heads per group + 2, head_dim]``, apart."""
    query, key, value = fused.split([fused.shape[3] - 2, 1, 1], 3)
    return query, key, value


def rotated_parts(
    fused: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`parts`, queries and keys rotated; compiled for a GPU in half precision their gradients meet in one kernel."""
    # In fp32 PyTorch 2.11 loses the gradients of what ends in a cast that changes nothing, as `rotate` does then.
    if HAS_KERNEL and fused.is_cuda and fused.dtype != torch.float32 and torch.compiler.is_compiling():
        return _Parts.apply(fused, cos, sin)
    query, key, value = parts(fused)
    return rotate(query, cos, sin), rotate(key, cos, sin), value
