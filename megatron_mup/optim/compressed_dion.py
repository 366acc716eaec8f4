"""Dion whose replicas exchange low-rank factors in the place of gradients (``--dion-compressed-sync``)."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_mup.optim.dion import Dion, DionSettings
from megatron_mup.optim.exchange import Bounds, Exchange, Place
from megatron_mup.optim.main_params import MainParam
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import Scaling


class _ReplicaRanks:
    """The ranks that share one copy of the stage's matrices: a replica is a domain of its own."""

    def __init__(self, mesh: Mesh) -> None:
        self.matrix_group: dist.ProcessGroup = mesh.replica_group
        self._mesh = mesh

    def matrix_places(self) -> list[Place]:
        """Tensor, replica and shard coordinate of each rank."""
        return self._mesh.replica_places()

    def matrix_bounds(self, meta: ParamMeta, place: Place) -> Bounds:
        """Offsets and shape of a rank's shard."""
        return self._mesh.matrix_bounds(meta, place)


class CompressedDion(Dion):
    """`Dion` on gradients that replicas have not summed (arXiv 2504.05295, its compressed synchronization).

    Replica i adds its own gradient to a momentum M_i of its own, at a home of its own. With V the same everywhere::

        P <- columns of sum_i M_i V made orthonormal;  R_i <- M_i^T P;  R <- sum_i R_i
        M_i <- M_i - (1 - mu) P R_i^T

    and V and W change as in `Dion`, alike in all replicas. Given P and V this is linear in M_i, so sum_i M_i is the
    momentum, and the step the step, that `Dion` has of summed gradients, but for rounding. What replicas sum are two
    factors, in the precision of the products. (microsoft/dion takes the mean of all R_i from each momentum. Momenta sum
    up to the same, but what they differ by would never shrink.)

    `gather_state` gives the first replica the sum of the momenta and the others zeros, which is another way to cut the
    same momentum: it is saved as `Dion`'s, and any layout loads it.
    """

    def __init__(
        self, params: list[tuple[MainParam, Scaling]], settings: DionSettings, mesh: Mesh, gradient_size: int
    ) -> None:
        """``gradient_size`` is that of an element of the gradients, in bytes, where they are summed."""
        self._gradient_size = gradient_size
        self._replicas, self._replica = mesh.group("dp_replicate"), mesh.rank("dp_replicate")
        # Sums over replicas stand in the middle of the arithmetic at home: it can't be recorded, nor timed by one rank.
        super().__init__(params, replace(settings, cuda_graph=False, measured_costs=False), _ReplicaRanks(mesh))
        Exchange(mesh, mesh.device).check(self.plan)

    def over_replicas(self, factor: torch.Tensor) -> torch.Tensor:
        """Sum of a factor, in place."""
        dist.all_reduce(factor, group=self._replicas)
        return factor

    @torch.no_grad()
    def gather_state(self) -> None:
        """Sums momenta in the first replica. Collective over the replicas."""
        for kinds in self._kept.values():
            momentum = kinds[self.home_momentum]
            dist.reduce(momentum, group_dst=0, group=self._replicas)
            if self._replica > 0:
                momentum.zero_()

    def state_tensors(self) -> dict[str, tuple[MainParam, torch.Tensor]]:
        """As `Dion`'s after `gather_state`: the momentum in the first replica, zeros being nothing to save or load."""
        state = super().state_tensors()
        if self._replica > 0:
            state = {key: value for key, value in state.items() if not key.startswith(f"{self.home_momentum}/")}
        return state

    def factor_elements(self) -> int:
        """Elements of both factors of all logical matrices: what a replica adds to the sums in a step."""

        def both(rows: int, columns: int) -> float:
            return (rows + columns) * self.basis_shape(rows, columns)[1]

        return int(sum(sum(self.per_matrix(a.meta, both)) for a in self.plan.assignments))

    def describe_sync(self) -> str:
        """What replicas sum in a step, and what they would without compression, as a line for people."""
        factors = self.factor_elements() * self.settings.ns_dtype.itemsize / 1e6
        gradients = sum(a.meta.numel for a in self.plan.assignments) * self._gradient_size / 1e6
        return (
            f"{self._replicas.size()} replicas, each with these homes, sum {factors:.3g} MB of factors per step in the "
            f"place of {gradients:.3g} MB of gradients: {gradients / factors:.3g} times less"
        )
