"""Experts as the matrix optimizers see them: a rank's stack of them, cut into runs that have homes of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mup.optim.main_params import MainParam
from megatron_mup.parallel.chunks import chunk
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import Scaling


class ExpertPart(MainParam):
    """A run of experts of one tensor, as a parameter of its own; value and gradient are views.

    Attributes:
        whole: the tensor that it is a part of.
        start: its first row among those of the tensor here.
        first_expert, experts: the run, by its place among all experts.
    """

    def __init__(self, whole: MainParam, meta: ParamMeta, layout: Layout, start: int, first_expert: int) -> None:
        """``meta`` and ``layout`` are those of the part."""
        self.whole, self.start, self.first_expert = whole, start, first_expert
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

    def saved(self, tensor: torch.Tensor, first: int, length: int) -> MainParam:
        """A state as its place in that of the whole tensor: rows from ``first`` on, of ``length``."""
        shape, offsets = (length, *tensor.shape[1:]), (first, *[0] * (tensor.dim() - 1))
        layout = Layout(shape, offsets, tuple(tensor.shape), None, length, None, None)
        return MainParam(self.whole.meta, layout, tensor)


class ExpertRanks:
    """The ranks that hold the same experts, copies or shards: the domain of their matrices.

    Args:
        mesh: the run's mesh, with experts.
    """

    def __init__(self, mesh: Mesh) -> None:
        self.matrix_group: dist.ProcessGroup = mesh.expert_group
        self._places = [(0, replicate, shard) for replicate, shard in mesh.expert_places()]
        self._shards = mesh.size("edp_shard")
        self._parts: dict[str, tuple[int, int]] = {}

    def matrix_places(self) -> list[tuple[int, int, int]]:
        """0, replica and shard coordinate of each rank."""
        return self._places

    def matrix_bounds(self, meta: ParamMeta, place: tuple[int, int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Offsets and shape of what a rank holds of a part; its shape may be empty."""
        first, held = self._parts[meta.name]
        start, length = chunk(held, self._shards, place[2])
        low, high = max(start, first), min(start + length, first + meta.shape[0])
        return (max(low - first, 0), 0), (max(high - low, 0), meta.shape[1])

    def homes(self, meta: ParamMeta) -> Sequence[int]:
        """The ranks that hold a part whole, where there are such, else all: what is whole need not travel."""
        whole = [rank for rank, place in enumerate(self._places) if self.matrix_bounds(meta, place)[1] == meta.shape]
        return whole or range(len(self._places))

    def parts(self, params: list[tuple[MainParam, Scaling]], mesh: Mesh) -> list[tuple[MainParam, Scaling]]:
        """Cuts tensors of stacked experts into runs, as many as divide both the experts and the ranks here.

        So where every rank holds whole experts, each has runs of its own, and where experts are cut over ranks, their
        homes are spread.
        """
        found: list[tuple[MainParam, Scaling]] = []
        for param, scaling in params:
            meta = param.meta
            assert meta.experts is not None
            here, rows = meta.experts // mesh.size("ep"), meta.shape[0] // meta.experts
            run = here // math.gcd(here, len(self._places))
            mine = (0, mesh.rank("edp_replicate"), mesh.rank("edp_shard"))
            begin = chunk(here * rows, self._shards, mine[2])[0]
            for place in range(0, here, run):
                first = mesh.rank("ep") * here + place
                name = f"{meta.name}[{first}:{first + run}]"
                own = replace(meta, name=name, shape=(run * rows, meta.shape[1]), experts=run)
                self._parts[name] = (place * rows, here * rows)
                offsets, shape = self.matrix_bounds(own, mine)
                layout = Layout(own.shape, offsets, shape, None, own.shape[0], None, None)
                start = max(place * rows - begin, 0)
                found.append((ExpertPart(param, own, layout, start, first), scaling))
        return found
