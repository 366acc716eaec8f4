"""What to change where memory doesn't suffice."""

from __future__ import annotations

import torch

from megatron_mup.config import Config, ConfigError


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that no memory is left: a GPU's or the host's."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def out_of_memory(error: BaseException, config: Config, device: torch.device, world_size: int) -> ConfigError:
    """The error as the user's: which settings of this run would need less."""
    return ConfigError(
        f"memory of {device}",
        f"the run doesn't fit: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
        f"{', or '.join(savings(config, world_size))}; tools/plan.py shows what takes how much, and layouts that fit",
    )


def savings(config: Config, world_size: int) -> list[str]:
    """Settings that would save memory and aren't used yet, the cheapest first."""
    training, parallel = config.training, config.parallel
    said = []
    if training.micro_batch_size > 1:
        said.append(f"--micro-batch-size {training.micro_batch_size // 2}, at the same --global-batch-size")
    if training.recompute == "none":
        said.append("--recompute-granularity selective")
    if training.recompute != "full":
        said.append("--recompute-granularity full --recompute-method uniform --recompute-num-layers 1")
    if parallel.sharding != "optim_grads_params" and config.sharding_size(world_size) > 1:
        said.append("--data-parallel-sharding-strategy optim_grads_params")
    if not training.bf16:
        said.append("--bf16")
    said.append("more GPUs, or a larger --tensor-model-parallel-size with --sequence-parallel")
    return said
