"""What every transformer layer is told about the tokens it sees."""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_mup.layers.cache import KeyValueCache


class TokenInfo(NamedTuple):
    """Facts about a micro-batch, computed once per pipeline stage.

    Attributes:
        cos, sin: rotary angles ``[seq, batch or 1, rotated width]``, or None without RoPE.
        mask: ``[batch or 1, 1, seq, seq]`` bool, True where a query may attend to a key; None for plain causal
            attention.
        sample_index: ``[batch]`` running number of each sample in the run; the counter that dropout draws from. None
            without dropout.
        cache: what was read before, when generating.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sample_index: torch.Tensor | None = None
    cache: KeyValueCache | None = None


def window_mask(seq: int, window: int, device: torch.device) -> torch.Tensor:
    """Causal attention to the ``window`` tokens before each token and to itself: ``[1, 1, seq, seq]`` bool."""
    all_pairs = torch.ones(seq, seq, dtype=torch.bool, device=device)
    return all_pairs.tril().triu(-window)[None, None]


def document_mask(document_ids: torch.Tensor) -> torch.Tensor:
    """Causal attention inside each document.

    Args:
        document_ids: ``[batch, seq]``, equal for tokens of one document.

    Returns:
        ``[batch, 1, seq, seq]`` bool, rows are queries.
    """
    seq = document_ids.shape[1]
    causal = torch.ones(seq, seq, dtype=torch.bool, device=document_ids.device).tril()
    return ((document_ids[:, :, None] == document_ids[:, None, :]) & causal).unsqueeze(1)
