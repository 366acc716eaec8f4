"""Memory of each GPU that the other GPUs of a machine read and write."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

MakeBuffer = Callable[[int], "SharedBuffer"]
"""Makes a buffer of so many bytes on each rank of a group. Collective over it."""


class SharedBuffer(Protocol):
    """Bytes that each rank of a group has, and that the others can read and write."""

    def of(self, rank: int, count: int, dtype: torch.dtype, start: int) -> torch.Tensor:
        """``count`` elements of a rank's bytes as ``dtype``, from element ``start`` on: a storage of its own."""

    def barrier(self) -> None:
        """Lets this stream go on when all ranks have come here."""


class SymmetricBuffer:
    """PyTorch's symmetric memory. Collective over the group.

    Args:
        nbytes: size on each rank.
        group: ranks of one machine.
        device: this rank's GPU.
        timeout: seconds after which a barrier that not all ranks reach ends the process.
    """

    def __init__(self, nbytes: int, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self._memory = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
        self._handle = symmetric.rendezvous(self._memory, group)
        self._timeout = int(timeout * 1e3)

    def of(self, rank: int, count: int, dtype: torch.dtype, start: int) -> torch.Tensor:
        """See `SharedBuffer.of`."""
        return self._handle.get_buffer(rank, (count,), dtype, start)

    def barrier(self) -> None:
        """See `SharedBuffer.barrier`."""
        self._handle.barrier(timeout_ms=self._timeout)


def within_reach(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether the ranks of a group are GPUs of one machine that read each other's memory. Collective."""
    if device.type != "cuda" or group.size() == 1:
        return False
    boot = Path("/proc/sys/kernel/random/boot_id")
    here = (platform.node(), boot.read_text() if boot.exists() else "")
    hosts: list[Any] = [None] * group.size()
    dist.all_gather_object(hosts, here, group=group)
    if any(host != here for host in hosts):
        return False
    works = torch.ones(1, device=device)
    try:
        SymmetricBuffer(1024, group, device, 60.0)
    except RuntimeError:  # no peer access, or the system doesn't let processes share memory
        works.zero_()
    dist.all_reduce(works, dist.ReduceOp.MIN, group=group)
    return bool(works)


def shared_buffers(group: dist.ProcessGroup, device: torch.device, timeout: float) -> MakeBuffer | None:
    """What makes buffers that the ranks of a group share; None where they aren't within reach. Collective.

    Args:
        group: the ranks.
        device: this rank's.
        timeout: seconds after which a barrier that not all ranks reach ends the process.
    """
    if not within_reach(group, device):
        return None
    return lambda nbytes: SymmetricBuffer(nbytes, group, device, timeout)
