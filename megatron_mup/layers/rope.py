"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split form as in Llama and Megatron."""

from __future__ import annotations

import torch


def rotary_angles(
    positions: torch.Tensor, head_dim: int, percent: float, base: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of each position's angles.

    Args:
        positions: ``[seq, batch or 1]`` integers.
        head_dim: width of a head.
        percent: share of it that rotates.
        base: base of the frequencies ``base^(-2i / rotated width)``.

    Returns:
        Two fp32 tensors ``[seq, batch or 1, rotated width]``.
    """
    width = int(head_dim * percent)
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions[..., None].float() * base**-exponent
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


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
