"""Configuration: one dataclass per concern; flags, YAML, help and checkpoint metadata come from it."""

from megatron_mup.config.checkpoint import CheckpointConfig
from megatron_mup.config.cli import ParsedConfig, parse_config
from megatron_mup.config.config import Config
from megatron_mup.config.data import DataConfig
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fp8 import Fp8Config
from megatron_mup.config.guard import GuardConfig
from megatron_mup.config.logging import LoggingConfig
from megatron_mup.config.model import ModelConfig
from megatron_mup.config.moe import MoEConfig
from megatron_mup.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron_mup.config.parallel import ParallelConfig
from megatron_mup.config.parametrization import ParametrizationConfig
from megatron_mup.config.paths import check_paths
from megatron_mup.config.pipeline import stage_layers
from megatron_mup.config.rules import check_vocab_size
from megatron_mup.config.serialize import changed, from_dict, resolved, to_dict, to_yaml
from megatron_mup.config.training import TrainingConfig
from megatron_mup.config.validate import validate

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Fp8Config",
    "GuardConfig",
    "LoggingConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ParametrizationConfig",
    "ParsedConfig",
    "ScheduleConfig",
    "TrainingConfig",
    "changed",
    "check_paths",
    "check_vocab_size",
    "from_dict",
    "parse_config",
    "resolved",
    "stage_layers",
    "to_dict",
    "to_yaml",
    "validate",
]
