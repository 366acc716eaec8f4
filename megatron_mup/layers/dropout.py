"""Dropout and jitter, functions of seed, place in the model and place in the data, so that no layout changes them."""

from __future__ import annotations

from typing import NamedTuple

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
    return torch.where(_bits(key, sample, index) >= int(probability * 2**32), x / (1 - probability), 0)


def jitter(x: torch.Tensor, epsilon: float, noise: Noise) -> torch.Tensor:
    """Each element times a number from ``1 - epsilon`` to ``1 + epsilon`` (Switch Transformer, arXiv 2101.03961).

    Args:
        x: ``[seq here, batch, hidden]``.
        epsilon: largest relative change.
        noise: where these elements are.
    """
    index = _elements(x, noise.places)
    uniform = _bits(noise.key, noise.sample_index[:, None], index).to(x.dtype) / 2**31 - 1
    return x * (1 + epsilon * uniform)


class Noise(NamedTuple):
    """Where a tensor ``[seq here, batch, hidden]`` is, which names its random numbers.

    Attributes:
        key: 0-d int64, the place in the model and the seed.
        sample_index: ``[batch]`` running numbers of the samples.
        places: ``[seq here]``, where in the sequence its rows are.
    """

    key: torch.Tensor
    sample_index: torch.Tensor
    places: torch.Tensor


def _bits(key: torch.Tensor, sample: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """32 random bits for each element, as int64; arguments as in `drop`."""
    # Each sample counts on from a place of its own. Added to a loaded number, the index is data to torch.compile, which
    # otherwise works out the hash of a bare counter in unbounded integers and fails.
    return hash_u32(key, hash_u64(key, sample) + index)


def _elements(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Number of each element of ``[seq here, batch, hidden]`` within its sample, ``[seq here, 1, hidden]``."""
    hidden = x.shape[-1]
    return places[:, None, None] * hidden + torch.arange(hidden, device=x.device)


def hidden_dropout(
    x: torch.Tensor,
    probability: float,
    key: torch.Tensor | None,
    sample_index: torch.Tensor | None,
    places: torch.Tensor | None,
) -> torch.Tensor:
    """Dropout on the residual stream.

    Args:
        x: ``[seq (/ cp) (/ tp), batch, hidden]``.
        probability: share of elements that are zeroed; 0 returns ``x``.
        key: 0-d int64; None, as in evaluation, returns ``x``.
        sample_index: ``[batch]``.
        places: ``[seq (/ cp) (/ tp)]``, where in the sequence the rows of ``x`` are.
    """
    if probability == 0 or key is None:
        return x
    assert sample_index is not None
    assert places is not None
    return drop(x, probability, key, sample_index[:, None], _elements(x, places))
