"""Shards to the ranks that orthonormalize them, and results back: one all-to-all each way for a chunk of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_mup.optim.blocks import Reach
from megatron_mup.optim.planner import Assignment, Plan
from megatron_mup.parallel.shared_memory import MakeBuffer
from megatron_mup.parametrization.meta import ParamMeta

Bounds = tuple[tuple[int, ...], tuple[int, ...]]
Place = tuple[int, int, int]


class MatrixRanks(Protocol):
    """The ranks that share matrices: shards or copies of the same ones. A `Mesh` is its stage's; see `ExpertRanks`."""

    @property
    def matrix_group(self) -> dist.ProcessGroup:
        """The ranks."""

    def matrix_places(self) -> list[Place]:
        """Model-parallel, replica and shard coordinate of each of them, in the group's order."""

    def matrix_bounds(self, meta: ParamMeta, place: Place) -> Bounds:
        """Offsets and shape of what the rank at a place holds of a matrix."""


@dataclass(frozen=True)
class Parcel:
    """A part of a matrix on its way.

    Attributes:
        name: the matrix.
        offsets, shape: the part.
        place: its first element in the flat buffer.
    """

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    place: int

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """View of the part in a flat buffer, in its shape."""
        return buffer[self.place : self.place + self.numel].view(self.shape)


Parts = Sequence[tuple[str, Bounds]]
"""Parts of matrices, by name."""

_LINE = 64  # elements


@dataclass(frozen=True)
class Load:
    """What a rank sends to, or gets from, each rank of the domain, in a part of a flat buffer, rank after rank.

    Attributes:
        parcels: all of them.
        counts: elements by rank.
    """

    parcels: tuple[Parcel, ...]
    counts: tuple[int, ...]

    @staticmethod
    def of(by_rank: Iterable[Parts], start: int = 0) -> Load:
        """From names and bounds, rank by rank; the first one's place is ``start``."""
        parcels: list[Parcel] = []
        counts, end = [], start
        for parts in by_rank:
            begin = end
            for name, (offsets, shape) in parts:
                parcels.append(Parcel(name, offsets, shape, end))
                end += parcels[-1].numel
            counts.append(end - begin)
        return Load(tuple(parcels), tuple(counts))

    @property
    def numel(self) -> int:
        """Elements."""
        return sum(self.counts)


@dataclass(frozen=True)
class Way:
    """Both ends of an all-to-all in one flat buffer: what a rank sends to others, then what it gets from them.

    Attributes:
        sent, got: between this rank and others.
        kept: what a rank would send to itself. It stays where it is; places count from zero.
        begin: place of the first element that arrives.
    """

    sent: Load
    got: Load
    kept: Load
    begin: int

    @staticmethod
    def of(sent: Sequence[Parts], got: Sequence[Parts], rank: int) -> Way:
        """From what ``rank`` sends to each rank and gets from each; what it gets from itself is what it sends."""
        out = Load.of([] if r == rank else parts for r, parts in enumerate(sent))
        begin = math.ceil(out.numel / _LINE) * _LINE
        arriving = Load.of(([] if r == rank else parts for r, parts in enumerate(got)), begin)
        return Way(out, arriving, Load.of([sent[rank]]), begin)

    @property
    def numel(self) -> int:
        """Elements of the buffer."""
        return self.begin + self.got.numel


class Exchange:
    """Moves matrices between storage and compute layout over the domain that shares them.

    A matrix's home lies in one replica and takes the shards of that replica alone; its result goes to all replicas.

    Args:
        mesh: the ranks that share the matrices; None for a rank alone.
        device: where the tensors are.
    """

    def __init__(self, mesh: MatrixRanks | None, device: torch.device) -> None:
        self.device, self._mesh = device, mesh
        self.places = mesh.matrix_places() if mesh is not None else [(0, 0, 0)]
        self.ranks = len(self.places)
        self.group = mesh.matrix_group if mesh is not None and self.ranks > 1 else None
        self.rank = dist.get_rank(self.group) if self.ranks > 1 else 0
        self.is_cut = any(place[0] or place[2] for place in self.places)

    def shared_buffers(self, reach: Reach | None) -> MakeBuffer | None:
        """What makes memory that the ranks share, where all of them are within reach. Collective."""
        return None if reach is None or self.group is None else reach(self.group, self.device)

    def check(self, plan: Plan) -> None:
        """Compares plans over the domain. Collective.

        Raises:
            RuntimeError: ranks made different plans, so their matrices or settings differ.
        """
        if self.ranks == 1 or not plan.chunks:
            return
        digest = torch.tensor([plan.digest(), -plan.digest()], device=self.device)
        dist.all_reduce(digest, op=dist.ReduceOp.MAX, group=self.group)
        if digest.sum() != 0:
            raise RuntimeError("ranks disagree on the optimizer plan: their parameters or settings differ")

    def holds(self, home: int) -> bool:
        """Whether this rank's shard is the one that travels to a home: whether they are in the same replica."""
        return self.places[home][1] == self.places[self.rank][1]

    def bounds(self, meta: ParamMeta, rank: int) -> Bounds:
        """Offsets and shape of a rank's shard."""
        if self._mesh is None:
            return (0,) * len(meta.shape), meta.shape
        return self._mesh.matrix_bounds(meta, self.places[rank])

    def to_homes(self, chunk: Sequence[Assignment]) -> Way:
        """The way of a chunk's shards to the homes of their replica; of none where all matrices are whole."""
        ranks = range(self.ranks)
        if not self.is_cut:
            return Way.of([[] for _ in ranks], [[] for _ in ranks], self.rank)
        own = {a.meta.name: self.bounds(a.meta, self.rank) for a in chunk}
        sent = [[(a.meta.name, own[a.meta.name]) for a in chunk if a.home == r and self.holds(r)] for r in ranks]
        got = [
            [(a.meta.name, self.bounds(a.meta, r)) for a in chunk if a.home == self.rank and self.holds(r)]
            for r in ranks
        ]
        return Way.of(sent, got, self.rank)

    def from_homes(self, chunk: Sequence[Assignment]) -> Way:
        """The way back, on which every rank gets its shard of every result of a chunk."""
        ranks = range(self.ranks)
        sent = [[(a.meta.name, self.bounds(a.meta, r)) for a in chunk if a.home == self.rank] for r in ranks]
        got = [[(a.meta.name, self.bounds(a.meta, self.rank)) for a in chunk if a.home == r] for r in ranks]
        return Way.of(sent, got, self.rank)

    def start(self, way: Way, buffer: torch.Tensor) -> Callable[[], None]:
        """Starts an all-to-all in a flat buffer, which may be longer. The function waits for it."""
        work = dist.all_to_all_single(
            buffer[way.begin : way.begin + way.got.numel],
            buffer[: way.sent.numel],
            list(way.got.counts),
            list(way.sent.counts),
            group=self.group,
            async_op=True,
        )
        return lambda: work.wait() and None

    def start_sum(self, numbers: torch.Tensor) -> Callable[[], None]:
        """Starts summing numbers over the domain, in place. The function waits for it."""
        if not numbers.numel():
            return lambda: None
        work = dist.all_reduce(numbers, group=self.group, async_op=True)
        return lambda: work.wait() and None
