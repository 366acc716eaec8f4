"""Who is where: the ranks of a run, laid out over the axes pipeline, tensor, replica and shard; and, for the experts of
MoE layers, the ranks of each stage laid out anew over expert replica, expert shard, expert rank and expert tensor rank.

Context-parallel ranks, which share sequences, are neighbours among the replicas and shards: these two axes are the
ranks that see different tokens, of other samples or of the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from megatron_mup.config import Config
from megatron_mup.parallel.chunks import shard_bounds
from megatron_mup.parametrization.meta import ParamMeta

AXES = ("pp", "tp", "dp_replicate", "dp_shard")
EXPERT_AXES = ("edp_replicate", "edp_shard", "ep", "etp")


def rank_grid(pp: int, tp: int, replicate: int, shard: int) -> torch.Tensor:
    """Ranks as ``[pp, tp, dp_replicate, dp_shard]``.

    Tensor ranks are neighbours (fastest), pipeline stages farthest apart, as in Megatron's default order.
    """
    world = pp * tp * replicate * shard
    return torch.arange(world).view(pp, replicate, shard, tp).permute(0, 3, 1, 2).contiguous()


def expert_grid(pp: int, replicate: int, shard: int, ep: int, etp: int) -> torch.Tensor:
    """Ranks as ``[pp, edp_replicate, edp_shard, ep, etp]``.

    Ranks that share an expert's matrices are neighbours, then expert ranks, whatever their tensor and data places.
    Replicas are farthest apart, as they are in `rank_grid`, so that a replica of the experts and one of everything else
    are the same ranks.
    """
    return torch.arange(pp * replicate * shard * ep * etp).view(pp, replicate, shard, ep, etp)


@dataclass(frozen=True)
class Mesh:
    """The device mesh of a run and this rank's place in it.

    ``experts`` is the mesh of MoE layers' experts, over the same ranks; None in a run without experts.
    """

    world: DeviceMesh
    device: torch.device
    _joint: dict[str, dist.ProcessGroup]
    experts: DeviceMesh | None = None
    _context_size: int = 1

    @classmethod
    def build(cls, config: Config, device: torch.device) -> Mesh:
        """Builds the mesh over the process group that exists; the configuration has been validated for its size."""
        parallel = config.parallel
        data = config.sharding_size(dist.get_world_size())
        if parallel.sharding == "no_shard":
            replicate, shard = data, 1
        else:
            replicate = parallel.num_distributed_optimizer_instances
            shard = data // replicate
        grid = rank_grid(parallel.pipeline_model_parallel_size, parallel.tensor_model_parallel_size, replicate, shard)
        world = DeviceMesh(device.type, grid, mesh_dim_names=AXES)
        joint = {"loss": dist.new_subgroups_by_enumeration(_rows(grid, ("pp", "dp_replicate", "dp_shard")))[0]}
        joint["matrix"] = dist.new_subgroups_by_enumeration(_rows(grid, ("tp", "dp_replicate", "dp_shard")))[0]
        flags = config.optimizer
        if flags.muon_distributed_mode == "local":
            joint["local"] = dist.new_subgroups_by_enumeration(_rows(grid, ("dp_replicate", "dp_shard")))[0]
        if flags.muon_distributed_mode == "gram" or flags.dion_compressed_sync:
            joint["replica"] = dist.new_subgroups_by_enumeration(_rows(grid, ("tp", "dp_shard")))[0]
        context = parallel.context_parallel_size
        if context > 1:
            sharing = torch.tensor(_rows(grid, ("dp_replicate", "dp_shard"))).view(-1, context)
            joint["context"] = dist.new_subgroups_by_enumeration(sharing.tolist())[0]
        stages = grid.shape[0]
        if stages > 1:
            # Ranks in between get None: they hold no copy of a tied embedding.
            ends = _rows(grid[[0, stages - 1]], ("pp",))
            joint["embedding"] = dist.new_subgroups_by_enumeration(ends)[0]
        experts = None
        if config.moe.num_experts is not None:
            ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size
            holders = data * parallel.tensor_model_parallel_size // (ep * etp)
            # Without data-parallel peers, or with replicas only, nothing is sharded.
            copies = holders if data == 1 or shard == 1 else replicate
            experts_grid = expert_grid(parallel.pipeline_model_parallel_size, copies, holders // copies, ep, etp)
            experts = DeviceMesh(device.type, experts_grid, mesh_dim_names=("pp", *EXPERT_AXES))
            columns = experts_grid.flatten(1, 2).transpose(1, 2).reshape(-1, holders * etp)
            joint["experts"] = dist.new_subgroups_by_enumeration(columns.tolist())[0]
        return cls(world, device, joint, experts, context)

    def _mesh_of(self, axis: str) -> DeviceMesh:
        if axis not in EXPERT_AXES:
            return self.world
        assert self.experts is not None, "a run without experts"
        return self.experts

    def size(self, axis: str) -> int:
        """Ranks along an axis."""
        mesh = self._mesh_of(axis)
        assert mesh.mesh_dim_names is not None
        return mesh.size(mesh.mesh_dim_names.index(axis))

    def rank(self, axis: str) -> int:
        """This rank's place along an axis."""
        return self._mesh_of(axis).get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup:
        """Process group of this rank along an axis."""
        return self._mesh_of(axis).get_group(axis)

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
        return self._places(self.matrix_group)

    def replica_places(self) -> list[tuple[int, int, int]]:
        """The same of `replica_group`."""
        return self._places(self.replica_group)

    def _places(self, group: dist.ProcessGroup) -> list[tuple[int, int, int]]:
        places = []
        for rank in dist.get_process_group_ranks(group):
            _, tp, replicate, shard = (self.world.mesh == rank).nonzero()[0].tolist()
            places.append((tp, replicate, shard))
        return places

    def matrix_bounds(self, meta: ParamMeta, place: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offsets and shape of the shard of a matrix at one of `matrix_places`."""
        tp_rank, _, shard_rank = place
        return shard_bounds(meta, self.size("tp"), tp_rank, self.size("dp_shard"), shard_rank)

    @property
    def local_group(self) -> dist.ProcessGroup:
        """The data-parallel ranks of this stage and tensor shard; there under ``--muon-distributed-mode local``."""
        return self._joint["local"]

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The ranks that share one copy of this stage's matrices; there under ``--muon-distributed-mode gram`` and
        ``--dion-compressed-sync``."""
        return self._joint["replica"]

    @property
    def expert_group(self) -> dist.ProcessGroup:
        """The ranks that share shards or copies of the same experts."""
        return self._joint["experts"]

    def expert_places(self) -> list[tuple[int, int, int]]:
        """Expert tensor, replica and shard coordinate of each rank of `expert_group`, in the group's order."""
        replicas, shards, parts = (range(self.size(axis)) for axis in ("edp_replicate", "edp_shard", "etp"))
        return [(part, replica, shard) for replica in replicas for shard in shards for part in parts]

    @property
    def embedding_group(self) -> dist.ProcessGroup:
        """The ranks at both ends of the pipeline, which share a tied embedding unless one holds both stages."""
        return self._joint["embedding"]

    @property
    def tp(self) -> TensorAxis:
        """The tensor-parallel axis, as layers want it."""
        return TensorAxis(self.group("tp") if self.size("tp") > 1 else None, self.rank("tp"), self.size("tp"))

    @property
    def cp(self) -> ContextAxis:
        """The context-parallel axis, as layers want it."""
        return ContextAxis(self._joint.get("context"), self._data_place % self._context_size, self._context_size)

    @property
    def ep(self) -> ExpertAxis:
        """The expert-parallel axis, as layers want it."""
        if self.experts is None:
            return ONE_EXPERT_RANK
        size = self.size("ep")
        return ExpertAxis(
            self.group("ep") if size > 1 else None,
            self.rank("ep"),
            size,
            sum_copies=self.sharding_size == 1 and self.size("edp_replicate") > 1,
            tensor=TensorAxis(self.group("etp") if self.size("etp") > 1 else None, self.rank("etp"), self.size("etp")),
        )

    @property
    def sharding_size(self) -> int:
        """Ranks over which parameters are sharded or copied, and gradients summed: data- and context-parallel ones."""
        return self.size("dp_replicate") * self.size("dp_shard")

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: those that read different samples."""
        return self.sharding_size // self._context_size

    @property
    def dp_rank(self) -> int:
        """This rank's place among the data-parallel ranks."""
        return self._data_place // self._context_size

    @property
    def _data_place(self) -> int:
        return self.rank("dp_replicate") * self.size("dp_shard") + self.rank("dp_shard")

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank is the first of the pipeline."""
        return self.rank("pp") == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is the last of the pipeline. With one stage on each it computes the loss."""
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


@dataclass(frozen=True)
class ContextAxis:
    """Place of a rank on the context-parallel axis; ``group`` is None when it is alone.

    A sequence is cut into twice as many chunks as there are ranks. Rank i takes chunk i and, from the end, chunk i
    again: late tokens attend to more than early ones, so that pairs of them are even work.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int

    def places(self, seq: int, device: torch.device) -> torch.Tensor:
        """Places ``[ranks, seq / ranks]`` in the whole sequence of the tokens of each rank, rising."""
        chunks = torch.arange(seq, device=device).view(2 * self.size, -1)
        return torch.cat([chunks[: self.size], chunks[self.size :].flip(0)], 1)


@dataclass(frozen=True)
class ExpertAxis:
    """Place of a rank on the expert-parallel axis; ``group`` is None when it is alone.

    ``sum_copies``: gradients of other ranks' copies of the same experts still have to be summed, because no data
    parallelism does it. ``tensor``: the ranks that share the matrices of each of this rank's experts.
    """

    group: dist.ProcessGroup | None
    rank: int
    size: int
    sum_copies: bool = False
    tensor: TensorAxis = ALONE


ONE_CONTEXT_RANK = ContextAxis(None, 0, 1)
ONE_EXPERT_RANK = ExpertAxis(None, 0, 1)
