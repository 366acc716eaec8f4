"""How the run is cut over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Parallelism."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each matrix."""
    sequence_parallel: bool = False
    """Shard norms, dropout and the residual stream over the tensor-parallel ranks along the sequence."""
    context_parallel_size: int = 1
    """Ranks that share the tokens of each sequence. They read the same samples, and count as data-parallel ranks where
    parameters are sharded and gradients summed."""
    cp_comm_type: Literal["p2p", "all_gather"] = "p2p"
    """How keys and values reach the context-parallel ranks that need them. p2p: around a ring, while attention to those
    at hand is computed; all_gather: all of them at once, by a layer."""
    expert_model_parallel_size: int = 1
    """Ranks that share out the experts of a layer. They are the stage's tensor-, context- and data-parallel ranks, laid
    out anew, so this size multiplies no number of ranks."""
    expert_tensor_parallel_size: int = 1
    """Ranks that share the matrices of each expert, whatever --tensor-model-parallel-size is. They are ranks of the
    stage too, laid out anew with those of --expert-model-parallel-size."""
    pipeline_model_parallel_size: int = 1
    """Ranks that share out the layers. Each holds one stage of the pipeline, or several."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first stage. Default: an even share."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last stage. Default: an even share."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer when layers are shared out."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and loss as one layer when layers are shared out."""
    pipeline_model_parallel_layout: str | None = None
    """What each stage holds, in order: E the embedding, t a layer, L output layer and loss, | between stages; *3
    repeats what stands before it, a letter or a group in parentheses. Stages are a multiple of the pipeline size."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Stages on each pipeline rank. Default: as many as the schedule takes, 1 or 2."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of each stage where a rank holds several: another way to say how many."""
    pipeline_schedule: (
        Literal["1F1B", "GPipe", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"] | None
    ) = None
    """In what order micro-batches pass the stages. Default: 1F1B, with several stages on a rank Interleaved1F1B."""
    data_parallel_sharding_strategy: Literal["no_shard", "optim_grads", "optim_grads_params"] = "no_shard"
    """What data-parallel ranks shard: nothing (replicas); optimizer state and gradients; parameters too (FSDP2)."""
    use_torch_fsdp2: bool = False
    """Same as --data-parallel-sharding-strategy optim_grads_params."""
    use_distributed_optimizer: bool = False
    """Same as --data-parallel-sharding-strategy optim_grads."""
    num_distributed_optimizer_instances: int = 1
    """Replicas of the sharded state (HSDP): each group of data-parallel size / this many ranks shards one copy."""
    grad_reduce_in_bf16: bool = False
    """Reduce gradients over data-parallel ranks in bf16 instead of fp32."""
    fsdp_transport: Literal["auto", "collective"] = "collective"
    """What moves sharded parameters and their gradients (FSDP2). auto: copy engines where the ranks that share them are
    GPUs of one machine that read each other's memory, else collective; collective: NCCL or gloo."""
    distributed_engine: Literal["native", "deepspeed"] = "native"
    """What shards parameters, gradients and optimizer state over data-parallel ranks: FSDP2 and this package's
    optimizers, or DeepSpeed's ZeRO with AdamW."""
    zero_stage: int = 1
    """What ZeRO shards (--distributed-engine deepspeed): optimizer state (1), gradients too (2), parameters too (3)."""
    optimizer_cpu_offload: bool = False
    """Keep DeepSpeed's fp32 weights and optimizer state in the host's memory, and take the step there."""
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library. auto: nccl with a GPU, gloo without."""
    distributed_timeout_minutes: float = 10.0
    """After so long a collective that did not finish ends the run."""
    distributed_timeout_seconds_after_init: int | None = None
    """The same from this process's first step on. Longer than any save or evaluation. Default: as before."""

    @property
    def sharding(self) -> Literal["no_shard", "optim_grads", "optim_grads_params"]:
        """The sharding strategy, aliases resolved."""
        if self.use_torch_fsdp2:
            return "optim_grads_params"
        if self.use_distributed_optimizer and self.data_parallel_sharding_strategy == "no_shard":
            return "optim_grads"
        return self.data_parallel_sharding_strategy

    @property
    def model_parallel_size(self) -> int:
        """Ranks that work on the same samples."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size
