"""Where a rank's shard lies in the global tensor, and how to get from one to the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """Offset and length of one of ``parts`` chunks of ``ceil(length / parts)``; the last ones may be short or empty."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)


def shard_bounds(
    meta: ParamMeta, tp: int, tp_rank: int, shards: int, shard_rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and shape of one rank's shard of a parameter.

    Args:
        meta: the parameter.
        tp, tp_rank: tensor-parallel ranks, and the one in question.
        shards, shard_rank: data shards, and the one in question.
    """
    offsets, local = [0] * len(meta.shape), list(meta.shape)
    if meta.tp_dim is not None:
        offsets[meta.tp_dim], local[meta.tp_dim] = chunk(local[meta.tp_dim], tp, tp_rank)
    start, local[0] = chunk(local[0], shards, shard_rank)
    offsets[0] += start
    return tuple(offsets), tuple(local)


@dataclass(frozen=True)
class Layout:
    """Place of this rank's shard of one parameter: cut by tensor rank along ``tp_dim``, then by data shard along dim 0.

    Attributes:
        shape: global shape.
        offsets: index of the shard's first element in the global tensor, per dimension.
        local_shape: shape of the shard; a dimension may be 0.
        tp_dim: dimension that tensor ranks cut, or None.
        tp_rows: rows of this rank's tensor-parallel shard, before data shards cut it.
        tp_group, shard_group: ranks along the two axes; None for a rank that is alone.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local_shape: tuple[int, ...]
    tp_dim: int | None
    tp_rows: int
    tp_group: dist.ProcessGroup | None
    shard_group: dist.ProcessGroup | None

    @classmethod
    def of(cls, meta: ParamMeta, mesh: Mesh) -> Layout:
        """Layout of a parameter on a mesh."""
        tp, tp_rank = mesh.size("tp"), mesh.rank("tp")
        offsets, local = shard_bounds(meta, tp, tp_rank, mesh.size("dp_shard"), mesh.rank("dp_shard"))
        tp_rows = chunk(meta.shape[0], tp, tp_rank)[1] if meta.tp_dim == 0 else meta.shape[0]
        return cls(meta.shape, offsets, local, meta.tp_dim, tp_rows, mesh.group("tp"), mesh.group("dp_shard"))

    @classmethod
    def alone(cls, meta: ParamMeta) -> Layout:
        """Layout of a parameter that one rank holds whole."""
        return cls(meta.shape, (0,) * len(meta.shape), meta.shape, meta.tp_dim, meta.shape[0], None, None)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor, on every rank. Collective over the ranks that hold one copy of it."""
        whole = _gather(local, 0, self.tp_rows, self.shard_group)
        return whole if self.tp_dim is None else _gather(whole, self.tp_dim, self.shape[self.tp_dim], self.tp_group)

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, as a view."""
        for dim, (offset, size) in enumerate(zip(self.offsets, self.local_shape, strict=True)):
            if size != full.shape[dim]:
                full = full.narrow(dim, offset, size)
        return full


def _gather(local: torch.Tensor, dim: int, length: int, group: dist.ProcessGroup | None) -> torch.Tensor:
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
