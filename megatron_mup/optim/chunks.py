"""A chunk of an optimizer's plan: what there is to do for its matrices, and the buffers that it travels in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_mup.kernels.shards import Pieces
from megatron_mup.optim.batches import Batch
from megatron_mup.optim.exchange import Way


@dataclass(frozen=True)
class Chunk:
    """The work on a chunk of the plan.

    Attributes:
        matrices: numbers of its logical matrices.
        batches: of those whose home is here.
        packing: by batch, where its rows are in whole tensors.
        kept: by batch, what is on this rank of its rows, where it is in shards.
        unpacking: by batch, where the others are in what arrives.
        repacking: by batch, where these go in what is sent back.
        homeward, back: where all of it is on either way.
        shards, results: pieces of shards where they are sent, and where what comes back is received.
    """

    matrices: slice
    batches: list[Batch]
    packing: list[Pieces]
    kept: list[Pieces]
    unpacking: list[Pieces]
    repacking: list[Pieces]
    homeward: Way
    back: Way
    shards: Pieces
    results: Pieces


class Buffers:
    """What a chunk travels in, long enough for any; two sets take turns.

    Args:
        chunks: all chunks.
        dtype: of updates and results.
        weights: of weights; None if they don't travel.
        device: where they are.
    """

    def __init__(
        self, chunks: Sequence[Chunk], dtype: torch.dtype, weights: torch.dtype | None, device: torch.device
    ) -> None:
        up = max(chunk.homeward.numel for chunk in chunks)
        back = max(chunk.back.numel for chunk in chunks)
        self.updates = torch.empty(up, dtype=dtype, device=device)
        self.weights = torch.empty(up if weights else 0, dtype=weights, device=device)
        self.results = torch.empty(back, dtype=dtype, device=device)
