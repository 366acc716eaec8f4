"""Experts as the matrix optimizers see them: a rank's stack of them, cut into runs that have homes of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mup.optim.main_params import MainParam
from megatron_mup.parallel.chunks import chunk, splits_rows
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import Block, ParamMeta
from megatron_mup.parametrization.table import Scaling


class ExpertPart(MainParam):
    """A run of experts of one tensor, as a parameter of its own; value and gradient are views.

    Where expert tensor ranks share its rows it is one expert, whose rows stand in the order of the ranks: of each block
    the first rank's, then of each the second's. So a rank's part is one rectangle, and a block's rows keep their order.

    Attributes:
        whole: the tensor that it is a part of.
        start: its first row among those of the tensor here.
        first_expert, experts: the run, by its place among all experts.
        ranks: that share its rows.
    """

    def __init__(
        self, whole: MainParam, meta: ParamMeta, layout: Layout, start: int, first_expert: int, ranks: int = 1
    ) -> None:
        """``meta`` and ``layout`` are those of the part."""
        self.whole, self.start, self.first_expert, self.ranks = whole, start, first_expert, ranks
        self._rows = slice(start, start + layout.local_shape[0])
        super().__init__(meta, layout, whole.value[self._rows])

    @property
    def experts(self) -> int:
        """Number of experts in it."""
        assert self.meta.experts is not None
        return self.meta.experts

    @property
    def grad(self) -> torch.Tensor | None:
        """This part of the tensor's gradient."""
        return None if self.whole.grad is None else self.whole.grad[self._rows]

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise AttributeError("a part's gradient is its tensor's")

    def momentum(self, tensor: torch.Tensor) -> MainParam:
        """What lies as the value does, as its place in the whole tensor."""
        return MainParam(self.whole.meta, self.whole.layout.part(self.start, len(tensor)), tensor)

    def rows(self, tensor: torch.Tensor, length: int) -> MainParam:
        """A state of each row as its place in that of the whole tensor, of ``length`` rows."""
        first = self.first_expert * len(tensor) // self.experts
        saved = self.saved(tensor, first, length)
        if self.ranks > 1:
            blocks = self.whole.meta.blocks
            each = blocks[0].size // self.ranks
            places = [first + block.start + rank * each for rank in range(self.ranks) for block in blocks]
            saved.layout = replace(saved.layout, runs=tuple((place, each) for place in places))
        return saved

    def saved(self, tensor: torch.Tensor, first: int, length: int) -> MainParam:
        """A state as its place in that of the whole tensor: rows from ``first`` on, of ``length``."""
        shape, offsets = (length, *tensor.shape[1:]), (first, *[0] * (tensor.dim() - 1))
        layout = Layout(shape, offsets, tuple(tensor.shape), None, length, None, None)
        return MainParam(self.whole.meta, layout, tensor)


class ExpertRanks:
    """The ranks that hold the same experts, copies, parts or shards: the domain of their matrices.

    Args:
        mesh: the run's mesh, with experts.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.matrix_group: dist.ProcessGroup = mesh.expert_group
        self._places = mesh.expert_places()
        self._shards, self._ranks = mesh.size("edp_shard"), mesh.size("etp")
        self._parts: dict[str, tuple[int, int]] = {}

    def matrix_places(self) -> list[tuple[int, int, int]]:
        """Expert tensor, replica and shard coordinate of each rank."""
        return self._places

    def matrix_bounds(self, meta: ParamMeta, place: tuple[int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Offsets and shape of what a rank holds of a part; its shape may be empty."""
        (first, held), (rows, columns) = self._parts[meta.name], meta.shape
        above, left = 0, 0
        if splits_rows(meta, self._ranks):
            rows //= self._ranks
            above = place[0] * rows
        else:
            left, columns = chunk(columns, self._ranks, place[0])
        start, length = chunk(held, self._shards, place[2])
        low, high = max(start, first), min(start + length, first + rows)
        return (above + max(low - first, 0), left), (max(high - low, 0), columns)

    def homes(self, meta: ParamMeta) -> Sequence[int]:
        """The ranks that hold a part whole, where there are such, else all: what is whole need not travel."""
        whole = [rank for rank, place in enumerate(self._places) if self.matrix_bounds(meta, place)[1] == meta.shape]
        return whole or range(len(self._places))

    def parts(self, params: list[tuple[MainParam, Scaling]], mesh: Mesh) -> list[tuple[MainParam, Scaling]]:
        """Cuts tensors of stacked experts into runs, as many as divide both the experts and the ranks here.

        So where every rank holds whole experts, each has runs of its own, and where experts are cut over ranks, their
        homes are spread. Experts whose rows ranks share are taken one by one (`ExpertPart`).
        """
        found: list[tuple[MainParam, Scaling]] = []
        for param, scaling in params:
            meta = param.meta
            assert meta.experts is not None
            here, rows = meta.experts // mesh.size("ep"), meta.shape[0] // meta.experts
            ranks = self._ranks if splits_rows(meta, self._ranks) else 1
            run = here // math.gcd(here, len(self._places)) if ranks == 1 else 1
            held, blocks = rows // ranks, tuple(_in_order_of_ranks(block, ranks) for block in meta.blocks)
            mine = (mesh.rank("etp"), mesh.rank("edp_replicate"), mesh.rank("edp_shard"))
            begin = chunk(here * held, self._shards, mine[2])[0]
            for place in range(0, here, run):
                first = mesh.rank("ep") * here + place
                name = f"{meta.name}[{first}:{first + run}]"
                own = replace(meta, name=name, shape=(run * rows, meta.shape[1]), blocks=blocks, experts=run)
                self._parts[name] = (place * held, here * held)
                offsets, shape = self.matrix_bounds(own, mine)
                layout = Layout(own.shape, offsets, shape, None, own.shape[0], None, None)
                start = max(place * held - begin, 0)
                found.append((ExpertPart(param, own, layout, start, first, ranks), scaling))
        return found


def _in_order_of_ranks(block: Block, ranks: int) -> Block:
    """A block of an expert whose rows stand rank by rank, an equal share of each block."""
    if ranks == 1:
        return block
    start, size, period = (rows // ranks for rows in (block.start, block.size, block.period))
    return replace(block, start=start, size=size, period=period, apart=False)
