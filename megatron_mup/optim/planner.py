"""Where each matrix is orthonormalized: storage layout and compute layout are separate things.

The plan is a pure function of names, shapes and mesh sizes, so every rank makes the same one without a word.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mup.parametrization.meta import Block, ParamMeta

CHUNK_ELEMENTS = 1 << 27
"""Elements that one rank exchanges at once; the exchange of a chunk runs beside the arithmetic of another. Enough for a
GPU to be busy with (`matrix.BATCH_BYTES`)."""


@dataclass(frozen=True)
class Assignment:
    """A matrix and the rank that orthonormalizes it.

    Attributes:
        meta: the matrix.
        home: rank in the domain.
        cost: of one optimizer step on it, in multiply-adds.
        mode: how it gets there. ``owner``: its shards travel; ``replica``: every rank has it, the home deals out the
            result; ``local``: shards of the tensor-parallel part travel; ``gram``: Gram matrices travel.
    """

    meta: ParamMeta
    home: int
    cost: float
    mode: str = "owner"


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
        loads = [0.0] * self.ranks
        for assignment in self.assignments:
            loads[assignment.home] += assignment.cost
        return loads

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
) -> Plan:
    """Deals matrices out over the ranks of a domain, longest processing time first, over all shapes together.

    Args:
        metas: the matrices, the same on every rank of the domain.
        costs: of each.
        ranks: size of the domain.
        homes: ranks that each may go to; None: any.
        mode: see `Assignment`.
    """
    order = sorted(range(len(metas)), key=lambda i: (-costs[i], metas[i].name))
    loads = [0.0] * ranks
    dealt: list[list[Assignment]] = [[] for _ in range(ranks)]
    for index in order:
        home = min(homes[index] if homes else range(ranks), key=lambda rank: (loads[rank], rank))
        loads[home] += costs[index]
        dealt[home].append(Assignment(metas[index], home, costs[index], mode))
    # A rank alone exchanges nothing and needs no chunks.
    number = 1 if ranks == 1 else max(1, round(sum(m.numel for m in metas) / ranks / CHUNK_ELEMENTS))
    chunks: list[list[Assignment]] = [[] for _ in range(number)]
    for mine in dealt:
        done, total = 0.0, sum(a.cost for a in mine)
        for assignment in mine:
            chunks[min(number - 1, int(number * done / total))].append(assignment)
            done += assignment.cost
    return Plan(ranks, tuple(tuple(chunk) for chunk in chunks if chunk))


def describe(plan: Plan, element_size: int) -> str:
    """The plan as a table for people: each matrix with its home, and what each rank has to do.

    Args:
        plan: of one pipeline stage.
        element_size: bytes per element of what travels.

    Returns:
        Lines. Bytes are those of the whole matrix, one way; FLOPs those of one step by dense products.
    """
    width = max((len(a.meta.name) for a in plan.assignments), default=6)
    lines = [f"{'matrix':{width}}  {'shape':>13}  {'mode':>7}  chunk  home  {'MB':>8}  {'GFLOP':>10}"]
    for number, chunk in enumerate(plan.chunks):
        for a in chunk:
            shape = "x".join(map(str, a.meta.shape))
            moved, work = a.meta.numel * element_size / 1e6, 2e-9 * a.cost
            place = f"{a.mode:>7}  {number:>5}  {a.home:>4}"
            lines.append(f"{a.meta.name:{width}}  {shape:>13}  {place}  {moved:>8.3g}  {work:>10.3g}")
    loads, bytes_at = plan.loads(), [0] * plan.ranks
    for a in plan.assignments:
        bytes_at[a.home] += a.meta.numel * element_size
    for rank, (load, size) in enumerate(zip(loads, bytes_at, strict=True)):
        lines.append(f"rank {rank}: {2e-9 * load:.3g} GFLOP, {size / 1e6:.3g} MB")
    mean = sum(loads) / plan.ranks
    balance = f"{max(loads) / mean:.3f} times the mean" if mean else "idle"
    lines.append(f"{len(plan.assignments)} matrices in {len(plan.chunks)} chunks; the busiest rank has {balance}")
    return "\n".join(lines)
