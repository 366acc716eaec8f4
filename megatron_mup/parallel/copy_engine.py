"""FSDP2's messages as copies between GPUs of one machine, which take no multiprocessor away from matrix products.

A library's collective is a kernel: while it runs, a matrix product beside it has fewer multiprocessors, and one whose
work is cut for all of them takes up to twice as long. A GPU's copy engines move the same bytes over NVLink beside it.
Shards are copied to where they belong in the whole parameters, which saves FSDP2's passes over memory before and after.
"""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor

from megatron_mup.kernels.row_sum import row_sum

ALIGNMENT = 256
"""Elements at whose multiples parameters begin; compiled kernels want 16 bytes."""


class SharedBuffer(Protocol):
    """Bytes that each rank of a group has, and that the others can read."""

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


class Buffers:
    """Shared buffers, one for messages of each size.

    Args:
        make: makes one of so many bytes; collective, so ranks have to ask for the same in the same order.
    """

    def __init__(self, make: Callable[[int], SharedBuffer]) -> None:
        self._make = make
        self._made: dict[int, SharedBuffer] = {}

    def take(self, nbytes: int) -> SharedBuffer:
        """The buffer of this size."""
        if nbytes not in self._made:
            self._made[nbytes] = self._make(nbytes)
        return self._made[nbytes]


class Places:
    """Memory for whole parameters of units that are gathered in turn; each unit always has the same place.

    When a unit is about to be used, all that was used before is done with, for the stream is in order. So then every
    other place is free.

    Args:
        make: makes a shared buffer of so many bytes; collective.
        count: units that are whole at once: the one in use and the next.
    """

    def __init__(self, make: Callable[[int], SharedBuffer], count: int) -> None:
        self._memory = [Buffers(make) for _ in range(count)]
        self._free: list[torch.cuda.Event | None] = [None] * count
        self._holders: list[CopyAllGather | None] = [None] * count
        self._given = 0

    def give(self, nbytes: int) -> tuple[int, SharedBuffer]:
        """The next place, and so much memory there, which units of the same size share."""
        number = self._given % len(self._memory)
        self._given += 1
        return number, self._memory[number].take(nbytes)

    def enter(self, number: int, unit: CopyAllGather) -> None:
        """The current stream is about to fill a place.

        Raises:
            RuntimeError: another unit there is still whole, so its values are wanted.
        """
        holder = self._holders[number]
        if holder is not None and holder is not unit and holder.is_whole:
            raise RuntimeError(f"{len(self._memory)} places for whole units, but more of them are in use at once")
        self._holders[number] = unit
        if (free := self._free[number]) is not None:
            torch.cuda.current_stream().wait_event(free)

    def use(self, number: int, device: torch.device) -> None:
        """The current stream is about to use the unit in a place."""
        if device.type == "cuda":
            event = torch.cuda.current_stream().record_event()
            self._free = [event if other != number else free for other, free in enumerate(self._free)]


class CopyAllGather(AllGather):
    """Gathers the parameters of one FSDP2 unit: each rank copies the others' shards to their places.

    FSDP2 lets a shard say what is gathered and what comes of it (``fsdp_pre_all_gather``, ``fsdp_post_all_gather``).
    Here it gathers one element of each, and finds the whole parameters filled.

    Args:
        unit: with memory, its parameters cut evenly.
        parameters: the unit's own, by name.
        places: for whole parameters.
        group: the ranks that share shards.
        dtype: of whole parameters.
    """

    def __init__(
        self,
        unit: nn.Module,
        parameters: dict[str, DTensor],
        places: Places,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        name = next(iter(parameters))
        self._owner, self._name = unit.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        shards = [parameter._local_tensor for parameter in parameters.values()]
        rank, ranks, self._device = group.rank(), group.size(), shards[0].device
        starts = [0]
        for shard in shards:
            starts.append(starts[-1] + -(-shard.numel() * ranks // ALIGNMENT) * ALIGNMENT)
        self._places = places
        self._place, self._buffer = places.give(starts[-1] * dtype.itemsize)
        self._shards = [shard.detach().view(-1) for shard in shards]
        # Each tensor that `of` gives is another to autograd, which so sees no writes to the ones that it keeps.
        self._mine: list[torch.Tensor] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._token = torch.empty(1, dtype=dtype, device=self._device)
        for index, (parameter, shard, start) in enumerate(zip(parameters.values(), shards, starts, strict=False)):
            count = shard.numel()
            self._mine.append(self._buffer.of(rank, count, dtype, start + rank * count))
            for step in range(1, ranks):
                peer = (rank + step) % ranks
                part = start + peer * count
                here, there = (self._buffer.of(holder, count, dtype, part) for holder in (rank, peer))
                self._copies.append((here, there))
            whole = self._buffer.of(rank, count * ranks, dtype, start).view(parameter.shape)
            shard.fsdp_pre_all_gather = self._before()  # type: ignore[attr-defined]
            shard.fsdp_post_all_gather = self._after(whole, index == 0)  # type: ignore[attr-defined]

    @property
    def is_whole(self) -> bool:
        """Whether the module has its whole parameters now."""
        return not isinstance(getattr(self._owner, self._name), DTensor)

    def _before(self) -> Callable[..., Any]:
        def before(mesh: Any) -> tuple[tuple[torch.Tensor], None]:
            return (self._token,), None

        # FSDP2 asks for it in each gather of each parameter, and to find it out takes as long as the rest.
        before.__signature__ = inspect.signature(before)  # type: ignore[attr-defined]
        return before

    def _after(self, whole: torch.Tensor, first: bool) -> Callable[..., Any]:
        def after(_outputs: Any, _metadata: Any, _dtype: Any, *, out: torch.Tensor | None = None) -> Any:
            if first:
                self._places.use(self._place, self._device)
            return (whole, ()) if out is None else None

        return after

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for what FSDP2 gathers itself: next to nothing."""
        return torch.empty(*size, dtype=dtype, device=device)

    @torch.no_grad()
    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Fills the whole parameters on the current stream; the arguments are not looked at."""
        self._places.enter(self._place, self)
        torch._foreach_copy_(self._mine, self._shards)
        self._buffer.barrier()
        for here, there in self._copies:
            here.copy_(there)
        self._buffer.barrier()  # nobody reads this rank's shards any more


class CopyReduceScatter(ReduceScatter):
    """Each rank copies its part of the others' gradients and sums in fp32.

    Args:
        buffers: for whole gradients. FSDP2 reduces one unit at a time.
        group: the ranks that share shards.
        wire: precision of gradients on their way; None for the one that FSDP2 asks for. Gradients that autograd gave in
            this precision lose nothing: the sum is in fp32 all the same.
        result: precision of the sum; None for the one that FSDP2 asks for.
    """

    def __init__(
        self,
        buffers: Buffers,
        group: dist.ProcessGroup,
        wire: torch.dtype | None = None,
        result: torch.dtype | None = None,
    ) -> None:
        self._buffers, self._wire, self._result = buffers, wire, result
        self._rank, self._ranks = group.rank(), group.size()
        self._buffer: SharedBuffer | None = None

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for whole gradients, which the caller fills, then, asked again, for this rank's sum."""
        if self._buffer is not None:
            return torch.empty(*size, dtype=self._result or dtype, device=device)
        dtype, count = self._wire or dtype, prod(size)
        self._buffer = self._buffers.take(count * dtype.itemsize)
        return self._buffer.of(self._rank, count, dtype, 0)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Sums this rank's part of all ranks' ``input_tensor`` into ``output_tensor`` on the current stream."""
        buffer, count = self._buffer, output_tensor.numel()
        assert buffer is not None
        assert op == dist.ReduceOp.SUM
        self._buffer = None
        others = input_tensor.new_empty(self._ranks - 1, count)
        buffer.barrier()
        for step in range(1, self._ranks):
            peer = (self._rank + step) % self._ranks
            others[step - 1].copy_(buffer.of(peer, count, input_tensor.dtype, self._rank * count))
        buffer.barrier()  # nobody reads this rank's gradients any more
        row_sum(input_tensor.view(self._ranks, count)[self._rank], others, output_tensor)


def own_parameters(unit: nn.Module) -> dict[str, DTensor]:
    """Sharded parameters of a unit by name, those of units inside it left out."""
    inner = [module for module in unit.modules() if isinstance(module, FSDPModule) and module is not unit]
    theirs = {id(parameter) for module in inner for parameter in module.parameters()}
    mine = {name: parameter for name, parameter in unit.named_parameters() if id(parameter) not in theirs}
    return {name: parameter for name, parameter in mine.items() if isinstance(parameter, DTensor)}
