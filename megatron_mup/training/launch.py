"""From the environment that a launcher sets up to a process group and a device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_mup.config import Config, ConfigError


@dataclass(frozen=True)
class Launch:
    """This process among those of the run."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> Launch:
        """Reads torchrun's variables; without them the process is alone."""
        return cls(*(int(os.environ.get(name, alone)) for name, alone in _VARIABLES))


_VARIABLES = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))


def init_process_group(config: Config, launch: Launch) -> torch.device:
    """Starts communication and returns this process's device.

    Raises:
        ConfigError: a backend that this machine can't serve, or fewer GPUs than processes on it.
    """
    backend = config.parallel.distributed_backend
    has_gpu = torch.cuda.is_available()
    if backend == "nccl" and not has_gpu:
        raise ConfigError(
            "--distributed-backend nccl", "PyTorch sees no GPU here", "use gloo, or run where GPUs are visible"
        )
    use_gpu = has_gpu and backend != "gloo"
    if use_gpu and launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {launch.local_rank}",
            f"this machine has {torch.cuda.device_count()} GPUs, one per process is needed",
            "lower torchrun's --nproc-per-node",
        )
    device = torch.device("cuda", launch.local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        if launch.world_size == 1:
            os.environ.setdefault(name, value)
    dist.init_process_group(
        "nccl" if use_gpu else "gloo",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
        device_id=device if use_gpu else None,
    )
    return device
