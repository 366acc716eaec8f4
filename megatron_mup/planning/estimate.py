"""Everything that can be said about a configuration at a world size before it runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_mup.config import Config, ConfigError, validate
from megatron_mup.config.checkpoint import CheckpointConfig
from megatron_mup.config.fields import told
from megatron_mup.planning.cut import Cut
from megatron_mup.planning.hardware import Hardware
from megatron_mup.planning.inventory import Inventory
from megatron_mup.planning.memory import Memory, stage_memory
from megatron_mup.planning.speed import Speed, estimate_speed


@dataclass(frozen=True)
class Estimate:
    """Memory of each pipeline stage that was looked at, by its number, and speed, of one configuration."""

    config: Config
    cut: Cut
    memory: dict[int, Memory]
    speed: Speed
    hardware: Hardware

    @property
    def fullest(self) -> int:
        """Stage whose ranks need most memory."""
        return max(self.memory, key=lambda stage: self.memory[stage].peak)

    @property
    def reserved(self) -> float:
        """Bytes of a GPU that the fullest rank takes: tensors, fragmentation, CUDA, NCCL and libraries."""
        return self.memory[self.fullest].peak * (1 + self.hardware.slack) + self.hardware.reserved

    @property
    def fits(self) -> bool:
        """Whether that is less than a GPU has."""
        return self.reserved <= self.hardware.memory


def complete(config: Config) -> Config:
    """Fills in what a run needs and a plan doesn't, its length and its data, and drops its checkpoints.

    Raises:
        ConfigError: an engine that the planner can't count.
    """
    if config.parallel.distributed_engine != "native":
        raise ConfigError(
            told(config, "distributed_engine"),
            "the planner knows FSDP2's memory and messages, not DeepSpeed's",
            "plan with --distributed-engine native: optim_grads is near ZeRO-2, optim_grads_params near ZeRO-3",
        )
    training, data = config.training, config.data
    if training.train_iters is None and training.train_samples is None:
        training = replace(training, train_iters=10**6)
    if not (data.mock_data or data.data_path or data.train_data_path):
        data = replace(data, mock_data=True)
    return replace(config, training=training, data=data, checkpoint=CheckpointConfig())


def estimate(
    config: Config,
    inventory: Inventory,
    world_size: int,
    vocab_size: int,
    hardware: Hardware,
    stages: Literal["all", "some"] = "all",
) -> Estimate:
    """Memory and speed of a configuration.

    Args:
        config: complete (see :func:`complete`).
        inventory: of its model.
        world_size: ranks.
        vocab_size: number of token ids.
        hardware: what it runs on.
        stages: ``all`` looks at every stage, ``some`` at those among which the fullest is.

    Raises:
        ConfigError: a configuration that can't run on so many ranks.
    """
    validate(config, world_size)
    cut = Cut.of(config, world_size)
    counts = [cut.layers(rank) for rank in range(cut.pp)]
    # The front holds most micro-batches, the end the logits, and those in between have neighbours on both sides.
    some = {0, min(1, cut.pp - 1), counts.index(max(counts)), cut.pp - 1}
    chosen = range(cut.pp) if stages == "all" else sorted(some)
    memory = {stage: stage_memory(config, inventory, cut, stage, vocab_size) for stage in chosen}
    return Estimate(config, cut, memory, estimate_speed(config, inventory, cut, vocab_size, hardware), hardware)
