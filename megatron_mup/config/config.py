"""The whole configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_mup.config.checkpoint import CheckpointConfig
from megatron_mup.config.data import DataConfig
from megatron_mup.config.logging import LoggingConfig
from megatron_mup.config.model import ModelConfig
from megatron_mup.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_mup.config.parallel import ParallelConfig
from megatron_mup.config.parametrization import ParametrizationConfig
from megatron_mup.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a GPT. Flags carry Megatron-LM's names; a YAML recipe (--config) has the same keys."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks in a world of ``world_size`` (validated elsewhere)."""
        return world_size // self.parallel.model_parallel_size

    def global_batch_size(self, world_size: int) -> int:
        """Sequences per step, default resolved."""
        if self.training.global_batch_size is not None:
            return self.training.global_batch_size
        return self.training.micro_batch_size * self.data_parallel_size(world_size)
