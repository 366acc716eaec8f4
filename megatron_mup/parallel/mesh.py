"""Who is where: the ranks of a run, laid out over the axes pipeline, tensor, replica and shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_mup.config import Config

AXES = ("pp", "tp", "dp_replicate", "dp_shard")


def rank_grid(pp: int, tp: int, replicate: int, shard: int) -> torch.Tensor:
    """Ranks as ``[pp, tp, dp_replicate, dp_shard]``.

    Tensor ranks are neighbours (fastest), pipeline stages farthest apart, as in Megatron's default order.
    """
    world = pp * tp * replicate * shard
    return torch.arange(world).view(pp, replicate, shard, tp).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Mesh:
    """The device mesh of a run and this rank's place in it."""

    world: DeviceMesh
    device: torch.device
    _joint: dict[str, dist.ProcessGroup]

    @classmethod
    def build(cls, config: Config, device: torch.device) -> Mesh:
        """Builds the mesh over the process group that exists; the configuration has been validated for its size."""
        parallel = config.parallel
        data = config.data_parallel_size(dist.get_world_size())
        if parallel.sharding == "no_shard":
            replicate, shard = data, 1
        else:
            replicate = parallel.num_distributed_optimizer_instances
            shard = data // replicate
        grid = rank_grid(parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size, replicate, shard)
        world = DeviceMesh(device.type, grid, mesh_dim_names=AXES)
        joint = {"loss": dist.new_subgroups_by_enumeration(_rows(grid, ("pp", "dp_replicate", "dp_shard")))[0]}
        joint["matrix"] = dist.new_subgroups_by_enumeration(_rows(grid, ("tp", "dp_replicate", "dp_shard")))[0]
        stages = grid.shape[0]
        if stages > 1:
            # Ranks in between get None: they hold no copy of a tied embedding.
            ends = _rows(grid[[0, stages - 1]], ("pp",))
            joint["embedding"] = dist.new_subgroups_by_enumeration(ends)[0]
        return cls(world, device, joint)

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        return self.world.size(AXES.index(axis))

    def rank(self, axis: str) -> int:
        """This rank's place along an axis."""
        return self.world.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Process group of this rank along an axis."""
        return self.world.get_group(axis)

    @property
    def loss_group(self) -> dist.ProcessGroup:
        """The ranks of every stage and data-parallel place with this tensor shard: a sum counts each token once."""
        return self._joint["loss"]

    @property
    def matrix_group(self) -> dist.ProcessGroup:
        """The ranks that share shards or copies of this stage's matrices: tensor and data axes."""
        return self._joint["matrix"]

    def matrix_places(self) -> list[tuple[int, int, int]]:
        """Tensor, replica and shard coordinate of each rank of `matrix_group`, in the group's order."""
        places = []
        for rank in dist.get_process_group_ranks(self.matrix_group):
            _, tp, replicate, shard = (self.world.mesh == rank).nonzero()[0].tolist()
            places.append((tp, replicate, shard))
        return places

    @property
    def embedding_group(self) -> dist.ProcessGroup:
        """The ranks of the first and the last stage that share a tied embedding."""
        return self._joint["embedding"]

    @property
    def tp(self) -> TensorAxis:
        """The tensor-parallel axis, as layers want it."""
        return TensorAxis(self.group("tp") if self.size("tp") > 1 else None, self.rank("tp"), self.size("tp"))

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_rank(self) -> int:
        """This rank's place among the data-parallel ranks."""
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.rank("pp") == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer and computes the loss."""
        return self.rank("pp") == self.size("pp") - 1


def _rows(grid: torch.Tensor, axes: tuple[str, ...]) -> list[list[int]]:
    """Ranks that differ along ``axes`` only, one row per group."""
    dims = [AXES.index(a) for a in axes]
    rest = [d for d in range(grid.dim()) if d not in dims]
    return grid.permute(*rest, *dims).reshape(-1, int(torch.tensor([grid.shape[d] for d in dims]).prod())).tolist()


@dataclass(frozen=True)
class TensorAxis:
    """Place of a rank on the tensor-parallel axis; ``group`` is None when it is alone."""

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def local(self, length: int) -> tuple[int, int]:
        """Offset and length of this rank's share of a dimension: ``ceil(length / size)``, the last ones less."""
        chunk = -(-length // self.size)
        start = min(self.rank * chunk, length)
        return start, min(chunk, length - start)


ALONE = TensorAxis(None, 0, 1)
