"""Dropout whose mask is a function of seed, place in the model and place in the data, so that no layout changes it."""

from __future__ import annotations

import torch

from megatron_mup.parametrization.counter import hash_u32, hash_u64


def drop(
    x: torch.Tensor, probability: float, key: torch.Tensor, sample: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Zeroes elements with the given probability and scales the rest by ``1 / (1 - probability)``.

    Args:
        x: any shape.
        probability: share of elements that are zeroed.
        key: 0-d int64, names the place in the model and the seed.
        sample: int64, broadcasts to ``x``: running number of the sample that each element belongs to.
        index: int64, broadcasts to ``x``: number of each element within its sample.
    """
    # Each sample counts on from a place of its own. Added to a loaded number, the index is data to torch.compile, which
    # otherwise works out the hash of a bare counter in unbounded integers and fails.
    keep = hash_u32(key, hash_u64(key, sample) + index) >= int(probability * 2**32)
    return torch.where(keep, x / (1 - probability), 0)


def hidden_dropout(
    x: torch.Tensor, probability: float, key: torch.Tensor | None, sample_index: torch.Tensor | None, seq_start: int
) -> torch.Tensor:
    """Dropout on the residual stream.

    Args:
        x: ``[seq (/ tp), batch, hidden]``; its first position is ``seq_start`` of the sequence.
        probability: share of elements that are zeroed; 0 returns ``x``.
        key: 0-d int64; None, as in evaluation, returns ``x``.
        sample_index: ``[batch]``.
        seq_start: position of ``x[0]`` in the sequence.
    """
    if probability == 0 or key is None:
        return x
    assert sample_index is not None
    seq, _, hidden = x.shape
    position = torch.arange(seq_start, seq_start + seq, device=x.device)[:, None, None]
    index = position * hidden + torch.arange(hidden, device=x.device)
    return drop(x, probability, key, sample_index[:, None], index)
