"""What cannot work with a pipeline schedule."""

from __future__ import annotations

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import told
from megatron_mup.config.schedules import schedule_name, schedule_of


def check_pipeline(config: Config, world_size: int) -> None:
    """Micro-batches, and what a backward pass in two halves excludes; the batch sizes have been checked.

    Raises:
        ConfigError: what the schedule can't run.
    """
    if config.parallel.pipeline_model_parallel_size == 1:
        return
    for batch, flag in _batches(config, world_size):
        step = config.training.micro_batch_size * config.data_parallel_size(world_size)
        _check_micro_batches(config, batch // step, step, flag)
    if schedule_of(config).splits_backward:
        _check_split_backward(config, world_size)


def _batches(config: Config, world_size: int) -> list[tuple[int, str]]:
    """All sizes of the global batch over the run, and the flag that asks for each."""
    full, ramp = config.global_batch_size(world_size), config.training.rampup_batch_size
    on_the_way = [] if ramp is None else [(size, "rampup_batch_size") for size in range(ramp[0], full, ramp[1])]
    return [*on_the_way, (full, "global_batch_size")]


def _check_micro_batches(config: Config, count: int, step: int, flag: str) -> None:
    ranks, name = config.parallel.pipeline_model_parallel_size, schedule_name(config)
    shown = f"--pipeline-schedule {name}, {told(config, flag, 'pipeline_model_parallel_size')}"
    has = f"a step has {count} micro-batches per rank"
    if name == "DualPipeV" and count < 2 * ranks:
        raise ConfigError(
            shown,
            f"{has}; each of its {2 * ranks} stages needs one at least",
            f"use batches of {2 * ranks * step} or more, or --pipeline-schedule ZBVZeroBubble",
        )
    rounds = max(1, count // ranks)
    if schedule_of(config).in_rounds and count % rounds:
        raise ConfigError(
            shown,
            f"{has}, which don't make {rounds} equal rounds",
            f"use batches that are multiples of {ranks * step}",
        )


def _check_split_backward(config: Config, world_size: int) -> None:
    """Gradients of weights come apart from those of inputs: what joins the two, or forgets between them, is refused."""
    training, name = config.training, f"--pipeline-schedule {schedule_name(config)}"
    if training.torch_compile:
        raise ConfigError(
            f"{name}, --torch-compile",
            "a compiled layer has one backward, which can't be taken in two halves",
            "drop --torch-compile, or use --pipeline-schedule Interleaved1F1B",
        )
    if training.recompute != "none":
        raise ConfigError(
            f"{name}, {told(config, 'recompute_granularity')}",
            "a layer would be recomputed for each of its weights again, because their gradients come one by one",
            "don't recompute, or use --pipeline-schedule Interleaved1F1B",
        )
    if config.parallel.sharding == "optim_grads_params" and config.sharding_size(world_size) > 1:
        raise ConfigError(
            f"{name}, --data-parallel-sharding-strategy optim_grads_params",
            "FSDP2 gives gathered weights back before their gradients are taken, and those would be lost",
            "use --data-parallel-sharding-strategy optim_grads, which keeps them, or another schedule",
        )
