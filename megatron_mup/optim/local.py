"""Muon on tensor-parallel shards as if each were a matrix of its own (``--muon-distributed-mode local``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
import torch.distributed as dist

from megatron_mup.optim.exchange import Bounds, Place
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.muon import Muon, MuonSettings
from megatron_mup.parallel.chunks import chunk, shard_bounds
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import Scaling


class _TensorPart(MainParam):
    """A parameter whose tensor-parallel shard passes for the whole; value and gradient are the parameter's own."""

    def __init__(self, whole: MainParam, meta: ParamMeta, layout: Layout) -> None:
        self._whole = whole
        super().__init__(meta, layout, whole.value)

    @property
    def grad(self) -> torch.Tensor | None:
        """The parameter's gradient."""
        return self._whole.grad

    @grad.setter
    def grad(self, value: torch.Tensor | None) -> None:
        if value is not None:
            raise AttributeError("a part's gradient is its parameter's")


class _DataRanks:
    """The data-parallel ranks that share one tensor-parallel shard: the domain of its matrices."""

    def __init__(self, mesh: Mesh) -> None:
        self.matrix_group: dist.ProcessGroup = mesh.local_group
        self._mesh = mesh

    def matrix_places(self) -> list[Place]:
        """0, replica and shard coordinate of each rank."""
        mesh = self._mesh
        return [(0, r, s) for r in range(mesh.size("dp_replicate")) for s in range(mesh.size("dp_shard"))]

    def matrix_bounds(self, meta: ParamMeta, place: Place) -> Bounds:
        """Offsets and shape of a rank's part of the tensor-parallel shard."""
        return shard_bounds(meta, 1, 0, self._mesh.size("dp_shard"), place[2])

    def part(self, param: MainParam) -> MainParam:
        """The parameter with its tensor-parallel shard in the place of the whole."""
        mesh, meta = self._mesh, param.meta
        shape = list(meta.shape)
        if meta.tp_dim is not None:
            shape[meta.tp_dim] = chunk(shape[meta.tp_dim], mesh.size("tp"), mesh.rank("tp"))[1]
        own = replace(meta, shape=tuple(shape), tp_dim=None)
        offsets, local = self.matrix_bounds(own, (0, 0, mesh.rank("dp_shard")))
        return _TensorPart(param, own, Layout(own.shape, offsets, local, None, own.shape[0], None, None))


class LocalMuon(Muon[MuonSettings]):
    """`Muon` in which no tensor-parallel shard leaves its rank: each is orthonormalized by itself.

    Megatron-LM's ``blockwise``. It saves the exchange over tensor ranks and changes the step: another number of tensor
    ranks trains another model. Factors on the update still follow the shapes of whole matrices. What data-parallel
    ranks cut is put together as always.
    """

    mode: ClassVar[str] = "local"

    def __init__(self, params: list[tuple[MainParam, Scaling]], settings: MuonSettings, mesh: Mesh) -> None:
        ranks = _DataRanks(mesh)
        self._whole = {param.meta.name: param for param, _ in params}
        super().__init__([(ranks.part(param), scaling) for param, scaling in params], settings, ranks)

    def per_matrix(self, meta: ParamMeta, value: Callable[[int, int], float]) -> list[float]:
        """A function of ``[out, in]`` of the whole matrix, for each logical matrix."""
        return super().per_matrix(self._whole[meta.name].meta, value)

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """Momentum in storage layout: any layout loads it."""
        return {key: (self._whole[param.meta.name], value) for key, (param, value) in super().state_tensors().items()}
