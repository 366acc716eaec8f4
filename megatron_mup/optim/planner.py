"""Where each matrix is orthonormalized: storage layout and compute layout are separate things.

The plan is a pure function of names, shapes, mesh sizes and costs. Costs are FLOPs, or times that one rank has measured
and told the others (`optim.costs`); so every rank makes the same plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mup.parametrization.meta import Block, ParamMeta

CHUNK_ELEMENTS = 1 << 27
"""Elements that one rank exchanges at once; the exchange of a chunk runs beside the arithmetic of another. Enough for a
GPU to be busy with (`batches.BATCH_BYTES`)."""

NEAR_CHUNKS = 2
"""How many times as large chunks are where nothing is exchanged beside the arithmetic (`optim.near`)."""


@dataclass(frozen=True)
class Assignment:
    """A matrix and the rank that orthonormalizes it.

    Attributes:
        meta: the matrix.
        home: rank in the domain.
        cost: of one optimizer step on it, in multiply-adds.
        mode: how it gets there. ``owner``: its shards travel; ``replica``: every rank has it, the home deals out the
            result; ``local``: shards of the tensor-parallel part travel; ``gram``: Gram matrices travel.
        time: of one optimizer step on it, in milliseconds, where that has been measured.
    """

    meta: ParamMeta
    home: int
    cost: float
    mode: str = "owner"
    time: float | None = None

    @property
    def weight(self) -> float:
        """What it is dealt out by."""
        return self.cost if self.time is None else self.time


@dataclass(frozen=True)
class Plan:
    """All matrices of a domain, in chunks that are exchanged and computed one after the other.

    Attributes:
        ranks: ranks of the domain: those that hold shards or copies of the same matrices.
        chunks: each matrix in one of them.
    """

    ranks: int
    chunks: tuple[tuple[Assignment, ...], ...]

    @property
    def assignments(self) -> list[Assignment]:
        """All of them, in order of work."""
        return [assignment for chunk in self.chunks for assignment in chunk]

    def loads(self) -> list[float]:
        """Cost by rank."""
        return self._by_rank([a.cost for a in self.assignments])

    def times(self) -> list[float] | None:
        """Milliseconds by rank; None if they haven't been measured for all matrices."""
        times = [a.time for a in self.assignments if a.time is not None]
        return self._by_rank(times) if times and len(times) == len(self.assignments) else None

    def _by_rank(self, values: Sequence[float]) -> list[float]:
        sums = [0.0] * self.ranks
        for assignment, value in zip(self.assignments, values, strict=True):
            sums[assignment.home] += value
        return sums

    def digest(self) -> int:
        """63 bits that differ between plans; ranks compare them at the start."""
        text = repr([(a.meta.name, a.meta.shape, a.home, a.mode) for a in self.assignments] + [self.ranks])
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def newton_schulz_cost(shape: tuple[int, ...], blocks: Sequence[Block]) -> float:
    """Multiply-adds of one step over a tensor's logical matrices: ``2 n^2 m + n^3`` each, n the short side."""
    rows, columns = shape
    cost = 0.0
    for block in blocks:
        count, height = block.matrices(rows)
        short, long = sorted((height, columns))
        cost += count * (2.0 * short**2 * long + short**3)
    return cost


def make_plan(
    metas: Sequence[ParamMeta],
    costs: Sequence[float],
    ranks: int,
    homes: Sequence[Sequence[int]] | None = None,
    mode: str = "owner",
    times: Sequence[float] | None = None,
    near: bool = False,
) -> Plan:
    """Deals matrices out over the ranks of a domain, longest processing time first, over all shapes together.

    Args:
        metas: the matrices, the same on every rank of the domain.
        costs: of each.
        ranks: size of the domain.
        homes: ranks that each may go to; None: any.
        mode: see `Assignment`.
        times: milliseconds of each, to be balanced in the place of costs, if they are known.
        near: whether the ranks reach each other's memory.
    """
    weights = costs if times is None else times
    order = sorted(range(len(metas)), key=lambda i: (-weights[i], metas[i].name))
    loads = [0.0] * ranks
    dealt: list[list[Assignment]] = [[] for _ in range(ranks)]
    for index in order:
        home = min(homes[index] if homes else range(ranks), key=lambda rank: (loads[rank], rank))
        loads[home] += weights[index]
        time = None if times is None else times[index]
        dealt[home].append(Assignment(metas[index], home, costs[index], mode, time))
    # A rank alone exchanges nothing and needs no chunks.
    size = CHUNK_ELEMENTS * (NEAR_CHUNKS if near else 1)
    number = 1 if ranks == 1 else max(1, round(sum(m.numel for m in metas) / ranks / size))
    chunks: list[list[Assignment]] = [[] for _ in range(number)]
    for mine in dealt:
        done, total = 0.0, sum(a.weight for a in mine)
        for assignment in mine:
            chunks[min(number - 1, int(number * done / total))].append(assignment)
            done += assignment.weight
    return Plan(ranks, tuple(tuple(chunk) for chunk in chunks if chunk))


def describe(plan: Plan, element_size: int) -> str:
    """The plan as a table for people: each matrix with its home, and what each rank has to do.

    Args:
        plan: of one pipeline stage.
        element_size: bytes per element of what travels.

    Returns:
        Lines. Bytes are those of the whole matrix, one way; FLOPs those of one step by dense products; milliseconds
        those that were measured, where they were.
    """
    if not plan.assignments:
        return "no hidden matrices to orthonormalize"
    width, times = max(len(a.meta.name) for a in plan.assignments), plan.times()
    head = f"{'matrix':{width}}  {'shape':>13}  {'mode':>7}  chunk  home  {'MB':>8}  {'GFLOP':>10}"
    lines = [head if times is None else f"{head}  {'ms':>8}"]
    for number, chunk in enumerate(plan.chunks):
        for a in chunk:
            shape = "x".join(map(str, a.meta.shape))
            moved, work = a.meta.numel * element_size / 1e6, 2e-9 * a.cost
            place = f"{a.mode:>7}  {number:>5}  {a.home:>4}"
            line = f"{a.meta.name:{width}}  {shape:>13}  {place}  {moved:>8.3g}  {work:>10.3g}"
            lines.append(line if times is None else f"{line}  {a.time:>8.3g}")
    loads, bytes_at = plan.loads(), [0] * plan.ranks
    for a in plan.assignments:
        bytes_at[a.home] += a.meta.numel * element_size
    for rank, (load, size) in enumerate(zip(loads, bytes_at, strict=True)):
        line = f"rank {rank}: {2e-9 * load:.3g} GFLOP, {size / 1e6:.3g} MB"
        lines.append(line if times is None else f"{line}, {times[rank]:.3g} ms")
    balance = f"the busiest rank has {_balance(loads)}"
    if times is not None:
        balance = f"{balance} by FLOPs, {_balance(times)} by measured time"
    lines.append(f"{len(plan.assignments)} matrices in {len(plan.chunks)} chunks; {balance}")
    return "\n".join(lines)


def _balance(loads: Sequence[float]) -> str:
    return f"{max(loads) * len(loads) / sum(loads):.3f} times the mean"
