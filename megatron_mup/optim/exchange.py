"""Shards to the ranks that orthonormalize them, and results back: one all-to-all each way for a chunk of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from megatron_mup.optim.planner import Assignment, Plan
from megatron_mup.parametrization.meta import ParamMeta

Bounds = tuple[tuple[int, ...], tuple[int, ...]]
Place = tuple[int, int, int]
Shards = Mapping[str, torch.Tensor]


class MatrixRanks(Protocol):
    """The ranks that share matrices: shards or copies of the same ones. A `Mesh` is its stage's; see `ExpertRanks`."""

    @property
    def matrix_group(self) -> dist.ProcessGroup:
        """The ranks."""

    def matrix_places(self) -> list[Place]:
        """Model-parallel, replica and shard coordinate of each of them, in the group's order."""

    def matrix_bounds(self, meta: ParamMeta, place: Place) -> Bounds:
        """Offsets and shape of what the rank at a place holds of a matrix."""


class Exchange:
    """Moves matrices between storage and compute layout over the domain that shares them.

    A matrix's home lies in one replica and takes the shards of that replica alone; its result goes to all replicas.

    Args:
        mesh: the ranks that share the matrices; None for a rank alone.
        device: where the tensors are.
        dtype: precision of what travels.
    """

    def __init__(self, mesh: MatrixRanks | None, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype, self._mesh = device, dtype, mesh
        self.places = mesh.matrix_places() if mesh is not None else [(0, 0, 0)]
        self.ranks = len(self.places)
        self.group = mesh.matrix_group if mesh is not None else None
        self.rank = dist.get_rank(self.group) if self.ranks > 1 else 0
        self.is_cut = any(place[0] or place[2] for place in self.places)

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

    def to_homes(self, chunk: Sequence[Assignment], shards: Shards) -> Callable[[], dict[str, torch.Tensor]]:
        """Starts bringing shards home.

        Args:
            chunk: the matrices.
            shards: by name, this rank's shard of every matrix whose home is in its replica.

        Returns:
            A function that waits and gives the whole matrices that are at home here, by name.
        """
        at_home = [a for a in chunk if a.home == self.rank]
        if not self.is_cut:
            return lambda: {a.meta.name: shards[a.meta.name].to(self.dtype) for a in at_home}
        outgoing = [
            [shards[a.meta.name] for a in chunk if a.home == home and self.holds(home)] for home in range(self.ranks)
        ]
        incoming = [
            [self.bounds(a.meta, source) for a in at_home] if self.holds(source) else [] for source in range(self.ranks)
        ]
        wait = self._all_to_all(outgoing, incoming)

        def finish() -> dict[str, torch.Tensor]:
            whole = {a.meta.name: torch.empty(a.meta.shape, dtype=self.dtype, device=self.device) for a in at_home}
            for parts, bounds in zip(wait(), incoming, strict=True):
                for assignment, part, (offsets, shape) in zip(at_home, parts, bounds, strict=False):
                    _window(whole[assignment.meta.name], offsets, shape).copy_(part)
            return whole

        return finish

    def from_homes(self, chunk: Sequence[Assignment], whole: Shards) -> Callable[[], dict[str, torch.Tensor]]:
        """Starts sending results back.

        Args:
            chunk: the matrices.
            whole: by name, the results that were computed here.

        Returns:
            A function that waits and gives this rank's shard of every result, by name.
        """
        if self.ranks == 1:
            return lambda: {a.meta.name: whole[a.meta.name] for a in chunk}
        outgoing = [
            [_window(whole[a.meta.name], *self.bounds(a.meta, rank)) for a in chunk if a.home == self.rank]
            for rank in range(self.ranks)
        ]
        ordered = [[a for a in chunk if a.home == home] for home in range(self.ranks)]
        wait = self._all_to_all(outgoing, [[self.bounds(a.meta, self.rank) for a in group] for group in ordered])

        def finish() -> dict[str, torch.Tensor]:
            return {
                assignment.meta.name: part
                for group, parts in zip(ordered, wait(), strict=True)
                for assignment, part in zip(group, parts, strict=True)
            }

        return finish

    def tell(
        self, chunk: Sequence[Assignment], sizes: Mapping[str, int], values: Shards
    ) -> Callable[[], dict[str, torch.Tensor]]:
        """Starts telling all ranks a few fp32 numbers about each matrix.

        Args:
            chunk: the matrices.
            sizes: how many numbers, by name; nothing is exchanged where all are 0.
            values: by name, those of the matrices that are at home here.

        Returns:
            A function that waits and gives the numbers of every matrix, flat, by name.
        """
        names = [a.meta.name for a in chunk]
        counts = [sizes[name] for name in names]
        # All but the home add zeros, which changes no bit.
        flat = torch.cat(
            [values[n].reshape(-1) if n in values else torch.zeros(sizes[n], device=self.device) for n in names]
        )
        work = dist.all_reduce(flat, group=self.group, async_op=True) if self.ranks > 1 and len(flat) else None

        def finish() -> dict[str, torch.Tensor]:
            if work is not None:
                work.wait()
            return dict(zip(names, flat.split(counts), strict=True))

        return finish

    def _all_to_all(
        self, outgoing: list[list[torch.Tensor]], incoming: list[list[Bounds]]
    ) -> Callable[[], list[list[torch.Tensor]]]:
        """Starts one exchange; the function waits and gives the parts by source, each in its shape."""
        flat = [part.reshape(-1).to(self.dtype) for parts in outgoing for part in parts]
        send = torch.cat(flat) if flat else torch.empty(0, dtype=self.dtype, device=self.device)
        sizes = [[math.prod(shape) for _, shape in bounds] for bounds in incoming]
        received = torch.empty(sum(map(sum, sizes)), dtype=self.dtype, device=self.device)
        work = dist.all_to_all_single(
            received,
            send,
            [sum(s) for s in sizes],
            [sum(part.numel() for part in parts) for parts in outgoing],
            group=self.group,
            async_op=True,
        )

        def finish(_alive: torch.Tensor = send) -> list[list[torch.Tensor]]:
            work.wait()
            pieces = iter(received.split([n for s in sizes for n in s]))
            return [[next(pieces).view(shape) for _, shape in bounds] for bounds in incoming]

        return finish


def _window(whole: torch.Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    for dim, (offset, size) in enumerate(zip(offsets, shape, strict=True)):
        whole = whole.narrow(dim, offset, size)
    return whole
