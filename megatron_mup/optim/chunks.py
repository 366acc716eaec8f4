"""A chunk of an optimizer's plan: what there is to do for its matrices, and the buffers that it travels in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_mup.kernels.shards import Pieces
from megatron_mup.optim.batches import Batch
from megatron_mup.optim.exchange import Load


@dataclass(frozen=True)
class Chunk:
    """The work on a chunk of the plan.

    Attributes:
        matrices: numbers of its logical matrices.
        batches: of those whose home is here.
        packing: by batch, where its rows are in whole tensors.
        unpacking: by batch, where they are in what arrives.
        repacking: by batch, where they go in what is sent back.
        homeward, back: what is sent and received on either way.
        shards, results: pieces of shards where they are sent, and where what comes back is received.
    """

    matrices: slice
    batches: list[Batch]
    packing: list[Pieces]
    unpacking: list[Pieces]
    repacking: list[Pieces]
    homeward: tuple[Load, Load]
    back: tuple[Load, Load]
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
        up = [max(chunk.homeward[i].numel for chunk in chunks) for i in range(2)]
        back = [max(chunk.back[i].numel for chunk in chunks) for i in range(2)]
        self.updates, self.arrived = (torch.empty(n, dtype=dtype, device=device) for n in up)
        self.weights, self.arrived_weights = (
            torch.empty(n if weights else 0, dtype=weights, device=device) for n in up
        )
        self.results, self.returned = (torch.empty(n, dtype=dtype, device=device) for n in back)
