"""How ranks share a run, as plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_mup.config import Config
from megatron_mup.config.pipeline import stage_layers
from megatron_mup.config.schedules import SCHEDULES, schedule_name, stages_of_rank
from megatron_mup.parallel.data_parallel import compute_dtype, main_dtype


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Sizes of the axes (`parallel.mesh`) and of what each rank computes with.

    Attributes:
        tp, pp, replicate, shard: ranks along the axes; context-parallel ranks are among the last two.
        context: ranks that share sequences.
        experts, expert_tensor, expert_replicate, expert_shard: the ranks of a stage laid out anew for experts.
        sequence: ranks that share the positions of the residual stream.
        schedule: of the pipeline.
        stages: layers ``[start, end)`` of each pipeline stage.
        held: numbers of the stages on each pipeline rank.
        micro_batches: of each rank in a step.
        tokens: of a micro-batch, on each of the ranks that share its sequences.
        compute, main: precision of matrix products, and in which the optimizer keeps weights.
        keeps_gathered: whether gathered parameters stay from forward to backward.
        homes: ranks of a stage over which matrices are dealt out to be orthonormalized: all, or those of a replica.
    """

    tp: int
    pp: int
    replicate: int
    shard: int
    context: int
    experts: int
    expert_tensor: int
    expert_replicate: int
    expert_shard: int
    sequence: int
    schedule: str
    stages: tuple[tuple[int, int], ...]
    held: tuple[tuple[int, ...], ...]
    micro_batches: int
    tokens: int
    compute: torch.dtype
    main: torch.dtype
    keeps_gathered: bool
    homes: int

    @classmethod
    def of(cls, config: Config, world_size: int) -> Cut:
        """The cut of a configuration that is valid in a world of so many ranks."""
        parallel, training = config.parallel, config.training
        data, tp = config.data_parallel_size(world_size), parallel.tensor_model_parallel_size
        context, experts = parallel.context_parallel_size, parallel.expert_model_parallel_size
        ranks = data * context
        replicate = ranks if parallel.sharding == "no_shard" else parallel.num_distributed_optimizer_instances
        # As `parallel.mesh` has it: nothing is sharded where nothing else is.
        expert_tensor = parallel.expert_tensor_parallel_size
        holders = ranks * tp // (experts * expert_tensor)
        copies = holders if ranks == replicate else replicate
        apart = config.optimizer.optimizer == "dion" and config.optimizer.dion_compressed_sync
        return cls(
            tp=tp,
            pp=parallel.pipeline_model_parallel_size,
            replicate=replicate,
            shard=ranks // replicate,
            context=context,
            experts=experts,
            expert_tensor=expert_tensor,
            expert_replicate=copies,
            expert_shard=holders // copies,
            sequence=tp if parallel.sequence_parallel else 1,
            schedule=schedule_name(config),
            stages=stage_layers(config),
            held=tuple(stages_of_rank(config, rank) for rank in range(parallel.pipeline_model_parallel_size)),
            micro_batches=config.global_batch_size(world_size) // (data * training.micro_batch_size),
            tokens=training.micro_batch_size * training.seq_length // context,
            compute=compute_dtype(config),
            main=main_dtype(config),
            keeps_gathered=parallel.sharding != "optim_grads_params",
            homes=tp * ranks // (replicate if apart else 1),
        )

    @property
    def dp(self) -> int:
        """Data-parallel ranks, context-parallel ones among them: those that share or copy parameters."""
        return self.replicate * self.shard

    @property
    def world(self) -> int:
        """All ranks."""
        return self.tp * self.pp * self.dp

    def parts(self, rank: int) -> list[tuple[int, int]]:
        """Ranges of layers on a pipeline rank, one for each of its stages."""
        return [self.stages[number] for number in self.held[rank]]

    def layers(self, rank: int) -> int:
        """Layers on a pipeline rank."""
        return sum(end - start for start, end in self.parts(rank))

    def has_first(self, rank: int) -> bool:
        """Whether a pipeline rank holds the first stage."""
        return 0 in self.held[rank]

    def has_last(self, rank: int) -> bool:
        """Whether a pipeline rank holds the last stage."""
        return len(self.stages) - 1 in self.held[rank]

    def in_flight(self, rank: int) -> float:
        """Micro-batches whose activations a pipeline rank, counted from 0 at the front, holds at once.

        Where it has several stages those of one stage count as a part. With backward in two halves they count until the
        gradients of weights are there.
        """
        stages = len(self.held[rank])
        if self.schedule == "GPipe":
            passes = self.micro_batches
        elif self.schedule == "DualPipeV":
            passes = 2 * self.pp + 1
        elif SCHEDULES[self.schedule].splits_backward:
            passes = stages * self.pp
        elif stages > 1:
            passes = (stages - 1) * self.pp + 2 * (self.pp - rank) - 1
        else:
            passes = self.pp - rank
        return min(passes / stages, self.micro_batches)

    @property
    def idle(self) -> float:
        """Time that a rank waits for others in a step, in micro-batches.

        Where backward is taken in two halves weights' gradients fill two thirds of it (Qi et al., arXiv 2401.10241), as
        long as forward and the two halves take equally long.
        """
        stages = len(self.held[0])
        return (self.pp - 1) / stages / (3 if SCHEDULES[self.schedule].splits_backward else 1)
