"""From the environment that a launcher sets up to a process group and a device."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mup.checkpoint.background import GROUP
from megatron_mup.config import Config, ConfigError
from megatron_mup.training.flight import FOLDER, record_collectives


@dataclass(frozen=True)
class Launch:
    """This process among those of the run.

    Attributes:
        rank, local_rank: its number, and its number among those of its machine.
        world_size: processes of the run.
        address: host and port at which rank 0 listens; None where torchrun's variables tell.
    """

    rank: int
    local_rank: int
    world_size: int
    address: tuple[str, int] | None = None

    @classmethod
    def from_environment(cls) -> Launch:
        """Reads torchrun's variables, else those that SLURM gives each task of ``srun``; alone without both.

        Raises:
            ConfigError: variables that contradict each other.
        """
        variables = os.environ
        if any(name in variables for name in _TORCHRUN):
            return cls(*_numbers(_TORCHRUN))
        # A batch script and a shell of `salloc` have some of SLURM's variables too, but are no tasks.
        if "SLURM_PROCID" not in variables or "SLURM_STEP_ID" not in variables:
            if "SLURM_PROCID" in variables and variables.get("SLURM_NTASKS", "1") != "1":
                raise ConfigError(
                    f"SLURM_NTASKS {variables['SLURM_NTASKS']}",
                    "the batch script itself runs this, as one process",
                    "start it with srun, or with torchrun on each node (examples/slurm)",
                )
            return cls(0, 0, 1)
        rank, local_rank, world_size = _numbers(_SLURM)
        return cls(rank, local_rank, world_size, None if world_size == 1 else _slurm_address())


_TORCHRUN = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
_SLURM = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 1}
"""Variables of rank, local rank and number of processes, and what they are for a process alone."""
_FIRST_PORT, _PORTS = 20000, 10000


def _numbers(variables: Mapping[str, int]) -> tuple[int, int, int]:
    """Rank, local rank and number of processes, checked against each other."""
    values = []
    for name, alone in variables.items():
        text = os.environ.get(name, str(alone))
        if not text.isdecimal():
            raise ConfigError(f"{name} {text!r}", "is no whole number", "leave it to torchrun or srun")
        values.append(int(text))
    rank, local_rank, world_size = values
    names = list(variables)
    if rank >= world_size or local_rank >= world_size:
        raise ConfigError(
            f"{names[0]} {rank}, {names[1]} {local_rank}, {names[2]} {world_size}",
            "ranks are below the number of processes",
            "leave all three to torchrun or srun; unset what an earlier launcher left behind",
        )
    return rank, local_rank, world_size


def _slurm_address() -> tuple[str, int]:
    """Where rank 0 listens: on the first host of the step, at a port that follows from the job's number."""
    variables = os.environ
    hosts = variables.get("SLURM_STEP_NODELIST") or variables.get("SLURM_JOB_NODELIST")
    if "MASTER_ADDR" not in variables and not hosts:
        raise ConfigError(
            "SLURM_JOB_NODELIST", "not set, so nothing says where rank 0 is", "start it with srun, or set MASTER_ADDR"
        )
    port = variables.get("MASTER_PORT") or str(_FIRST_PORT + int(variables.get("SLURM_JOB_ID", 0)) % _PORTS)
    if not port.isdecimal():
        raise ConfigError(f"MASTER_PORT {port!r}", "is no whole number", "set a free port, or unset it")
    return variables.get("MASTER_ADDR") or first_host(hosts or ""), int(port)


def first_host(nodelist: str) -> str:
    """First host of a list in SLURM's notation: ``node[07-09,12],login`` gives ``node07``."""
    first = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?([^,]*)", nodelist.strip())
    assert first is not None
    prefix, ranges, rest = first.groups()
    return prefix + re.split("[-,]", ranges)[0] + rest if ranges else prefix


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
    index = launch.local_rank
    if launch.address is not None and torch.cuda.device_count() == 1:
        index = 0  # SLURM may show each task its own GPU alone
    if use_gpu and index >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {launch.local_rank}",
            f"this machine has {torch.cuda.device_count()} GPUs, one per process is needed",
            "lower torchrun's --nproc-per-node, or srun's --ntasks-per-node",
        )
    device = torch.device("cuda", index) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    address = ("127.0.0.1", 0) if launch.world_size == 1 else launch.address
    if address is not None:
        os.environ.setdefault("MASTER_ADDR", address[0])
        os.environ.setdefault("MASTER_PORT", str(address[1]))
    record_collectives(config.checkpoint.save)
    if use_gpu and config.checkpoint.save is not None:
        Path(config.checkpoint.save, FOLDER).mkdir(parents=True, exist_ok=True)
    dist.init_process_group(
        "nccl" if use_gpu else "gloo",
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=timedelta(minutes=config.parallel.distributed_timeout_minutes),
        device_id=device if use_gpu else None,
    )
    return device


def shorten_timeouts(config: Config) -> None:
    """Gives ``--distributed-timeout-seconds-after-init`` to all groups but that of saves, which may wait for a disk.

    The first step waits for compilers, kernels and connections that later ones find ready.
    """
    seconds = config.parallel.distributed_timeout_seconds_after_init
    if seconds is None:
        return
    for group in dist.distributed_c10d._world.pg_map:
        if group.group_desc != GROUP:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
