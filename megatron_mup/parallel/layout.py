"""Where a rank's shard lies in the global tensor, and how to get from one to the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_mup.parallel.chunks import chunk, expert_runs, shard_bounds, splits_rows
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta


@dataclass(frozen=True)
class Split:
    """How expert tensor ranks share each expert's matrix.

    Attributes:
        dim: dimension that they cut.
        length: rows or columns that are cut together: those of a block, or all columns.
        group: the ranks.
    """

    dim: int
    length: int
    group: dist.ProcessGroup

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """Whole experts, one below the other, from this rank's part of them."""
        if self.dim == 1:
            return gather_chunks(local, 1, self.length, self.group)
        parts = self.group.size()
        by_rank = gather_chunks(local, 0, parts * len(local), self.group)
        runs = by_rank.view(parts, -1, self.length // parts, *local.shape[1:])
        return runs.transpose(0, 1).reshape(by_rank.shape)


@dataclass(frozen=True)
class Layout:
    """Place of this rank's shard of one parameter: cut by model-parallel rank, then by data shard along dimension 0.

    Model-parallel ranks are tensor ranks, or expert ranks for the experts of MoE layers, whose data shards lie on an
    axis of their own, and whose matrices expert tensor ranks may share besides.

    Attributes:
        shape: global shape.
        offsets: index of the shard's first element in the global tensor, per dimension.
        local_shape: shape of the shard; a dimension may be 0.
        cut_dim: dimension that model-parallel ranks cut, or None.
        cut_rows: rows of this rank's model-parallel shard, before data shards cut it.
        cut_group, shard_group: ranks along the two axes; None for a rank that is alone.
        runs: where the shard's rows don't follow one another in the global tensor, its runs of such that do: first
            global row and number of rows of each, in the shard's order.
        split: how expert tensor ranks share the parameter; None: they don't.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local_shape: tuple[int, ...]
    cut_dim: int | None
    cut_rows: int
    cut_group: dist.ProcessGroup | None
    shard_group: dist.ProcessGroup | None
    runs: tuple[tuple[int, int], ...] | None = None
    split: Split | None = None

    @classmethod
    def of(cls, meta: ParamMeta, mesh: Mesh) -> Layout:
        """Layout of a parameter on a mesh."""
        cut, shard = ("tp", "dp_shard") if meta.experts is None else ("ep", "edp_shard")
        cuts, cut_rank, shards, shard_rank = mesh.size(cut), mesh.rank(cut), mesh.size(shard), mesh.rank(shard)
        parts, part = (1, 0) if meta.experts is None else (mesh.size("etp"), mesh.rank("etp"))
        offsets, local = shard_bounds(meta, cuts, cut_rank, shards, shard_rank, parts, part)
        begin, cut_rows = chunk(meta.shape[0], cuts, cut_rank) if meta.cut_dim == 0 else (0, meta.shape[0])
        runs = split = None
        if splits_rows(meta, parts):
            cut_rows //= parts
            start, length = chunk(cut_rows, shards, shard_rank)
            runs = tuple((begin + row, count) for row, count in expert_runs(meta, start, length, parts, part))
            split = Split(0, meta.blocks[0].size, mesh.group("etp"))
        elif parts > 1:
            split = Split(1, meta.shape[1], mesh.group("etp"))
        groups = mesh.group(cut), mesh.group(shard)
        return cls(meta.shape, offsets, local, meta.cut_dim, cut_rows, *groups, runs, split)

    @classmethod
    def alone(cls, meta: ParamMeta) -> Layout:
        """Layout of a parameter that one rank holds whole."""
        return cls(meta.shape, (0,) * len(meta.shape), meta.shape, meta.cut_dim, meta.shape[0], None, None)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The whole tensor, on every rank. Collective over the ranks that hold one copy of it."""
        whole = gather_chunks(local, 0, self.cut_rows, self.shard_group)
        if self.split is not None:
            whole = self.split.gather(whole)
        if self.cut_dim is None:
            return whole
        return gather_chunks(whole, self.cut_dim, self.shape[self.cut_dim], self.cut_group)

    def shard(self, full: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor, as a view; a copy where it is several runs of rows."""
        if self.runs is not None:
            full = full[self.rows(full.device)]
        for dim, (offset, size) in enumerate(zip(self.offsets, self.local_shape, strict=True)):
            if size != full.shape[dim]:
                full = full.narrow(dim, offset, size)
        return full

    def rectangles(self, local: torch.Tensor) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """A shard as rectangles of the global tensor: offsets and view of each, at least one."""
        if not self.runs:
            yield self.offsets, local
            return
        for (row, _), part in zip(self.runs, local.split([count for _, count in self.runs]), strict=True):
            yield (row, *self.offsets[1:]), part

    def rows(self, device: torch.device) -> torch.Tensor:
        """Global number of each row of the shard."""
        runs = ((self.offsets[0], self.local_shape[0]),) if self.runs is None else self.runs
        return torch.cat([torch.arange(row, row + count, device=device) for row, count in (*runs, (0, 0))])

    def part(self, start: int, length: int) -> Layout:
        """Layout of some of the shard's rows, for what lies as they do in the global tensor."""
        shape = (length, *self.local_shape[1:])
        if self.runs is None:
            return replace(self, offsets=(self.offsets[0] + start, *self.offsets[1:]), local_shape=shape)
        runs, end = [], start + length
        for row, count in self.runs:
            low, high = max(start, 0), min(end, count)
            if low < high:
                runs.append((row + low, high - low))
            start, end = start - count, end - count
        first = runs[0][0] if runs else self.offsets[0]
        return replace(self, offsets=(first, *self.offsets[1:]), local_shape=shape, runs=tuple(runs))


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
