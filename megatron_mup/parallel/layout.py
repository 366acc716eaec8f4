"""Where a rank's shard lies in the global tensor, and how to get from one to the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mup.parallel.chunks import chunk, shard_bounds
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta


@dataclass(frozen=True)
class Layout:
    """Place of this rank's shard of one parameter: cut by model-parallel rank, then by data shard along dimension 0.

    Model-parallel ranks are tensor ranks, or expert ranks for the experts of MoE layers, whose data shards lie on an
    axis of their own.

    Attributes:
        shape: global shape.
        offsets: index of the shard's first element in the global tensor, per dimension.
        local_shape: shape of the shard; a dimension may be 0.
        cut_dim: dimension that model-parallel ranks cut, or None.
        cut_rows: rows of this rank's model-parallel shard, before data shards cut it.
        cut_group, shard_group: ranks along the two axes; None for a rank that is alone.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local_shape: tuple[int, ...]
    cut_dim: int | None
    cut_rows: int
    cut_group: dist.ProcessGroup | None
    shard_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, meta: ParamMeta, mesh: Mesh) -> Layout:
        """Layout of a parameter on a mesh."""
        cut, shard = ("tp", "dp_shard") if meta.experts is None else ("ep", "edp_shard")
        cuts, cut_rank = mesh.size(cut), mesh.rank(cut)
        offsets, local = shard_bounds(meta, cuts, cut_rank, mesh.size(shard), mesh.rank(shard))
        cut_rows = chunk(meta.shape[0], cuts, cut_rank)[1] if meta.cut_dim == 0 else meta.shape[0]
        return cls(meta.shape, offsets, local, meta.cut_dim, cut_rows, mesh.group(cut), mesh.group(shard))

    @classmethod
    def alone(cls, meta: ParamMeta) -> Layout:
        """Layout of a parameter that one rank holds whole."""
        return cls(meta.shape, (0,) * len(meta.shape), meta.shape, meta.cut_dim, meta.shape[0], None, None)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor, on every rank. Collective over the ranks that hold one copy of it."""
        whole = gather_chunks(local, 0, self.cut_rows, self.shard_group)
        if self.cut_dim is None:
            return whole
        return gather_chunks(whole, self.cut_dim, self.shape[self.cut_dim], self.cut_group)

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, as a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.local_shape, strict=True)):
            if size != full.shape[dim]:
                full = full.narrow(dim, offset, size)
        return full


def gather_chunks(local: torch.Tensor, dim: int, length: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Concatenates chunks along a dimension to ``length``; short and empty ones travel padded."""
    ranks = 1 if group is None else group.size()
    if ranks == 1:
        return local
    size = -(-length // ranks)
    local = local.movedim(dim, 0)
    padded = local.new_zeros(size, *local.shape[1:])
    padded[: local.shape[0]] = local
    whole = padded.new_empty(size * ranks, *local.shape[1:])
    dist.all_gather_into_tensor(whole, padded, group=group)
    return whole[:length].movedim(0, dim).contiguous()
