"""Logical matrices of one shape that go through a home's arithmetic together, and where their rows are in tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_mup.kernels.shards import Piece
from megatron_mup.optim.exchange import Parcel
from megatron_mup.parametrization.meta import Block

LANES = 2
"""Of a CUDA graph, for batches that go side by side (`graphs.Lanes`), where chunks are small: among several ranks."""

BATCH_BYTES = 1 << 29
"""Of equal-shape matrices that are orthonormalized at once, in Newton-Schulz's precision; a larger matrix goes alone.
Bounds the memory of a step to a small multiple of it, or of the largest matrix. A quarter of it in each of two lanes
keeps an H100 as busy, but costs optimizers with much to do once per batch."""


def lanes_of(ranks: int) -> int:
    """How many lanes the ranks that share matrices have each."""
    return 1 if ranks == 1 else LANES


def matrices_at_once(size: int, device: torch.device, lanes: int = 1, count: int = 1 << 62) -> int:
    """Of ``count`` matrices of ``size`` bytes, how many go through a home's arithmetic together: some for each lane.

    On a CPU one: results must not depend on which matrices share a home, and so on the layout, by as much as a bit.
    """
    if device.type == "cpu":
        return 1
    if lanes == 1:
        return max(1, BATCH_BYTES // size)
    few, many = (max(1, part // size) for part in (BATCH_BYTES // 16, BATCH_BYTES // 4))
    return min(many, max(few, math.ceil(count / lanes)))


@dataclass(frozen=True)
class Run:
    """Rows that lie one after another both in a tensor and in a batch.

    Attributes:
        batch: number of the batch.
        row: first row in the batch, its matrices one below the other.
        start: first row in the tensor.
        count: rows.
        matrix: number of the logical matrix that they belong to, among all of the optimizer's.
    """

    batch: int
    row: int
    start: int
    count: int
    matrix: int


@dataclass(frozen=True)
class Batch:
    """Logical matrices of one shape.

    Attributes:
        shape: ``[out, in]`` of each.
        places: blocks whose matrices these are, as tensor and number of the block in it.
        matrices: how many.
    """

    shape: tuple[int, int]
    places: tuple[tuple[str, int], ...]
    matrices: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.matrices * math.prod(self.shape)

    @property
    def cost(self) -> float:
        """What orthonormalizing them takes, in proportion."""
        return float(self.numel * min(self.shape))


def runs_of_block(block: Block, rows: int, matrices: range) -> list[Run]:
    """A block's rows in a tensor of ``rows`` rows, as if they were a batch.

    Args:
        block: the block.
        rows: of the tensor.
        matrices: numbers of its logical matrices.
    """
    if block.size == block.period and not block.apart:
        return [Run(0, 0, 0, rows, matrices.start)]
    periods = range(rows // block.period)
    return [
        Run(0, p * block.size, p * block.period + block.start, block.size, matrices.start + (p if block.apart else 0))
        for p in periods
    ]


def make_batches(
    shapes: Mapping[tuple[str, int], tuple[int, int]],
    counts: Mapping[tuple[str, int], int],
    limits: Mapping[tuple[int, int], int],
) -> list[Batch]:
    """Groups blocks by shape; those of one block always stay together.

    Args:
        shapes: ``[out, in]`` of the matrices of each block, by tensor and number of the block.
        counts: how many matrices each has.
        limits: by shape, how many matrices go together.
    """
    alike: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for place in sorted(shapes):
        alike.setdefault(shapes[place], []).append(place)
    return [
        Batch(shape, tuple(group), sum(counts[place] for place in group))
        for shape, places in alike.items()
        for group in _split(places, counts, limits[shape])
    ]


def _split(
    places: Sequence[tuple[str, int]], counts: Mapping[tuple[str, int], int], limit: int
) -> Iterator[list[tuple[str, int]]]:
    size, group = 0, list[tuple[str, int]]()
    for place in places:
        if group and size + counts[place] > limit:
            yield group
            size, group = 0, []
        size += counts[place]
        group.append(place)
    yield group


def pieces_of_runs(tensor: int, runs: Iterable[Run], columns: int) -> list[Piece]:
    """Runs of a whole tensor as pieces, with places in their batch."""
    return [Piece(tensor, r.start * columns, r.row * columns, r.count * columns, r.matrix) for r in runs]


def pieces_of_parcel(tensor: int, runs: Iterable[Run], parcel: Parcel) -> list[Piece]:
    """The pieces of a shard, which is a parcel in a flat buffer: its rows by logical matrix."""
    columns, pieces = parcel.shape[1], []
    for run in cut_runs(runs, parcel):
        start = (run.start - parcel.offsets[0]) * columns
        pieces.append(Piece(tensor, start, parcel.place + start, run.count * columns, run.matrix))
    return pieces


def cut_runs(runs: Iterable[Run], parcel: Parcel) -> Iterator[Run]:
    """The rows of runs that lie in a part of the tensor."""
    first, last = parcel.offsets[0], parcel.offsets[0] + parcel.shape[0]
    for r in runs:
        start, stop = max(r.start, first), min(r.start + r.count, last)
        if start < stop:
            yield replace(r, row=r.row + start - r.start, start=start, count=stop - start)


def arriving_pieces(
    number: int, columns: int, runs: Mapping[str, Sequence[Run]], parcels: Iterable[Parcel]
) -> list[Piece]:
    """The way from parcels in a flat buffer to a batch: rows, or where shards are cut by columns parts of rows.

    Args:
        number: of the batch.
        columns: of its matrices.
        runs: of each tensor, in any batch.
        parcels: parts of these tensors.
    """
    pieces = []
    for parcel in parcels:
        (first, left), width = parcel.offsets, parcel.shape[1]
        for r in cut_runs((run for run in runs[parcel.name] if run.batch == number), parcel):
            start, place = parcel.place + (r.start - first) * width, r.row * columns + left
            if width == columns:
                pieces.append(Piece(0, start, place, r.count * width, r.matrix))
            else:
                pieces += [Piece(0, start + i * width, place + i * columns, width, r.matrix) for i in range(r.count)]
    return pieces


def turned(pieces: Iterable[Piece]) -> list[Piece]:
    """The way back."""
    return [replace(piece, start=piece.place, place=piece.start) for piece in pieces]
