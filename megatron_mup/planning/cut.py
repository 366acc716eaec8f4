"""How ranks share a run, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mup.config import Config
from megatron_mup.config.pipeline import stage_layers
from megatron_mup.parallel.data_parallel import compute_dtype, main_dtype


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Sizes of the axes (`parallel.mesh`) and of what each rank computes with.

    Attributes:
        tp, pp, replicate, shard: ranks along the axes.
        sequence: ranks that share the positions of the residual stream.
        stages: layers ``[start, end)`` of each pipeline stage.
        micro_batches: of each rank in a step.
        tokens: of a micro-batch.
        compute, main: precision of matrix products, and in which the optimizer keeps weights.
        keeps_gathered: whether gathered parameters stay from forward to backward.
    """

    tp: int
    pp: int
    replicate: int
    shard: int
    sequence: int
    stages: tuple[tuple[int, int], ...]
    micro_batches: int
    tokens: int
    compute: torch.dtype
    main: torch.dtype
    keeps_gathered: bool

    @classmethod
    def of(cls, config: Config, world_size: int) -> Cut:
        """The cut of a configuration that is valid in a world of so many ranks."""
        parallel, training = config.parallel, config.training
        data, tp = config.data_parallel_size(world_size), parallel.tensor_model_parallel_size
        replicate = data if parallel.sharding == "no_shard" else parallel.num_distributed_optimizer_instances
        return cls(
            tp=tp,
            pp=parallel.pipeline_model_parallel_size,
            replicate=replicate,
            shard=data // replicate,
            sequence=tp if parallel.sequence_parallel else 1,
            stages=stage_layers(config),
            micro_batches=config.global_batch_size(world_size) // (data * training.micro_batch_size),
            tokens=training.micro_batch_size * training.seq_length,
            compute=compute_dtype(config),
            main=main_dtype(config),
            keeps_gathered=parallel.sharding != "optim_grads_params",
        )

    @property
    def dp(self) -> int:
        """Data-parallel ranks."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.dp

    def in_flight(self, stage: int) -> int:
        """Micro-batches whose activations a stage holds at once under 1F1B, counted from 0 at the front."""
        return min(self.pp - stage, self.micro_batches)
