"""The whole configuration of a run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_mup.config.checkpoint import CheckpointConfig
from megatron_mup.config.data import DataConfig
from megatron_mup.config.fp8 import Fp8Config
from megatron_mup.config.guard import GuardConfig
from megatron_mup.config.logging import LoggingConfig
from megatron_mup.config.model import ModelConfig
from megatron_mup.config.moe import MoEConfig
from megatron_mup.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_mup.config.parallel import ParallelConfig
from megatron_mup.config.parametrization import ParametrizationConfig
from megatron_mup.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Pretrain a GPT. Flags carry Megatron-LM's names; a YAML recipe (--config) has the same keys."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def at_iteration(self, iteration: int) -> Config:
        """What holds for the step that follows ``iteration`` ones: AdamW until ``--optimizer-switch-at``."""
        switch = self.optimizer.optimizer_switch_at
        if switch is None or iteration >= switch:
            return self
        return replace(self, optimizer=replace(self.optimizer, optimizer="adam", optimizer_switch_at=None))

    def phases(self) -> dict[int, Config]:
        """What holds from which iteration on; one phase without ``--optimizer-switch-at``."""
        switch = self.optimizer.optimizer_switch_at
        return {0: self} if switch is None else {0: self.at_iteration(0), switch: self}

    @property
    def expert_ffn_size(self) -> int:
        """Inner width of each expert, default resolved."""
        return self.moe.moe_ffn_hidden_size or self.model.ffn_size

    def data_parallel_size(self, world_size: int) -> int:
        """Data-parallel ranks in a world of ``world_size`` (validated elsewhere)."""
        return world_size // self.parallel.model_parallel_size

    def sharding_size(self, world_size: int) -> int:
        """Ranks over which parameters are sharded and gradients summed: data-parallel times context-parallel ones."""
        return self.data_parallel_size(world_size) * self.parallel.context_parallel_size

    def global_batch_size(self, world_size: int) -> int:
        """Sequences per step, default resolved."""
        if self.training.global_batch_size is not None:
            return self.training.global_batch_size
        return self.training.micro_batch_size * self.data_parallel_size(world_size)
