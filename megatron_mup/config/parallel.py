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
    expert_model_parallel_size: int = 1
    """Ranks that share out the experts of a layer. They are the stage's tensor- and data-parallel ranks, laid out
    anew, so this size multiplies no number of ranks."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages."""
    decoder_first_pipeline_num_layers: int | None = None
    """Layers on the first stage. Default: an even share."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers on the last stage. Default: an even share."""
    account_for_embedding_in_pipeline_split: bool = False
    """Count the embedding as one layer when layers are shared out."""
    account_for_loss_in_pipeline_split: bool = False
    """Count the output layer and loss as one layer when layers are shared out."""
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
    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Communication library. auto: nccl with a GPU, gloo without."""
    distributed_timeout_minutes: float = 10.0
    """After so long a collective that did not finish ends the run."""

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
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size
