"""Matrices among ranks that read and write each other's memory: no messages, and nothing packed or unpacked for them.

The pass that advances momenta writes updates to where they belong in their home's batches, over NVLink where the home
is another GPU; the pass that changes weights reads results from there. Both have to go over these elements anyway. All
multiprocessors are left to the arithmetic, which a library's messages beside it would hold some of, and the whole step
is one CUDA graph. Ranks wait for each other on the device: when all updates of a chunk are at their homes, and when all
its results are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from megatron_mup.kernels.shards import Pieces, Shards
from megatron_mup.optim.batches import Batch
from megatron_mup.parallel.shared_memory import MakeBuffer

LINE = 128
"""Elements at whose multiples batches begin: 512 bytes at most, 256 at least."""


@dataclass(frozen=True)
class NearChunk:
    """The work on a chunk of the plan.

    Attributes:
        matrices: numbers of its logical matrices.
        batches: of those whose home is here.
        begins: where each batch begins in this rank's area.
        packing: by batch, where its rows are in whole tensors.
        outward: what this rank has to send, and where it is in the homes' areas.
        back: what it has of all matrices, likewise.
        longest: elements of the longest of all homes' areas.
    """

    matrices: slice
    batches: list[Batch]
    begins: list[int]
    packing: list[Pieces]
    outward: Pieces
    back: Pieces
    longest: int


def begins_of(batches: Sequence[Batch]) -> list[int]:
    """Where batches begin that lie one after another, and where the last one ends."""
    return list(accumulate((-(-batch.numel // LINE) * LINE for batch in batches), initial=0))


class HomeMemory:
    """Areas of each rank for the batches at home there, which results take the place of; and what is said of them.

    Chunks have two areas in turn, so that shards of one may arrive while results of the one before are read.

    Args:
        make: makes shared memory; collective over the ranks.
        rank, ranks: of the domain.
        elements: of an area.
        dtype: of updates and results.
        weights: of weights at home; None if the rule doesn't ask for them.
        numbers: fp32 ``[matrices, numbers]`` that homes say of their matrices, shape of it.
        chunks: how many there are.

    Attributes:
        weights: the homes' weights of the chunk that is worked on, each flat.
    """

    def __init__(
        self,
        make: MakeBuffer,
        rank: int,
        ranks: int,
        elements: int,
        dtype: torch.dtype,
        weights: torch.dtype | None,
        numbers: tuple[int, int],
        chunks: int,
    ) -> None:
        parts = [(elements, dtype)] * min(chunks, 2)
        parts += [(elements if weights else 0, weights or dtype), (numbers[0] * numbers[1], torch.float32)]
        starts = list(accumulate((-(-count * kind.itemsize // 256) * 256 for count, kind in parts), initial=0))
        self._buffer, self._rank = make(max(starts[-1], 256)), rank

        def shared(tensors: list[torch.Tensor]) -> Shards:
            shards = Shards(ranks, tensors[0].device)
            shards.set(tensors)
            return shards

        *areas, at_home, said = [
            [self._buffer.of(r, count, kind, start // kind.itemsize) if count else torch.empty(0) for r in range(ranks)]
            for (count, kind), start in zip(parts, starts[:-1], strict=True)
        ]
        self._areas, self.weights = [shared(area) for area in areas], shared(at_home)
        self._said = [one.view(numbers) if one.numel() else one for one in said]

    def areas(self, chunk: int) -> Shards:
        """The homes' updates of a chunk, each flat; later its results."""
        return self._areas[chunk % len(self._areas)]

    def barrier(self) -> None:
        """Lets this stream go on when all ranks have come here."""
        self._buffer.barrier()

    def say(self, numbers: torch.Tensor, matrices: slice) -> None:
        """Shows the other ranks what this one has to say of some matrices, zero where it isn't their home."""
        if numbers.shape[1]:
            self._said[self._rank][matrices].copy_(numbers[matrices])

    def hear(self, numbers: torch.Tensor, matrices: slice) -> None:
        """Takes what all ranks have said of them."""
        if numbers.shape[1]:
            numbers[matrices] = torch.stack([said[matrices] for said in self._said]).sum(0)
