"""FSDP2's messages as copies between GPUs of one machine, which take no multiprocessor away from matrix products.

A library's collective is a kernel: while it runs, a matrix product beside it has fewer multiprocessors, and one whose
work is cut for all of them takes up to twice as long. A GPU's copy engines move the same bytes over NVLink beside it.
Shards are copied to where they belong in the whole parameters, which saves FSDP2's passes over memory before and after.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import DTensor

from megatron_mup.kernels.row_sum import row_sum
from megatron_mup.parallel.shared_memory import SharedBuffer

ALIGNMENT = 256
"""Elements at whose multiples parameters begin; compiled kernels want 16 bytes."""


class Shards:
    """Each rank's shards of a model's parameters, where the other ranks read them.

    Parameters in the precision that is computed in live here, so that nothing is copied and nobody waits before a
    message; shards of others are cast to it, once for each pass. Values change after a step's last reduction alone, by
    which all ranks have gathered for the last time.

    Args:
        parameters: of all units, their memory not filled yet.
        make: makes a shared buffer of so many bytes; collective.
        group: the ranks that share shards.
        dtype: of whole parameters.
    """

    def __init__(
        self,
        parameters: Sequence[DTensor],
        make: Callable[[int], SharedBuffer],
        group: dist.ProcessGroup,
        dtype: torch.dtype,
    ) -> None:
        self.rank, self.ranks, self.dtype = group.rank(), group.size(), dtype
        self._starts, end = {}, 0
        for parameter in parameters:
            self._starts[id(parameter)] = end
            end += -(-parameter._local_tensor.numel() // ALIGNMENT) * ALIGNMENT
        self._buffer = make(max(end, 1) * dtype.itemsize)
        self._pass = self._met = 0
        for parameter in parameters:
            shard = parameter._local_tensor
            if shard.dtype == dtype:
                with torch.no_grad():
                    shard.set_(self.of(self.rank, parameter).view(shard.shape))  # type: ignore[call-overload]

    def of(self, rank: int, parameter: DTensor) -> torch.Tensor:
        """A rank's shard of a parameter, flat, as others read it."""
        return self._buffer.of(rank, parameter._local_tensor.numel(), self.dtype, self._starts[id(parameter)])

    def begin(self) -> None:
        """A forward pass begins, perhaps with new values."""
        self._pass += 1

    def end(self) -> None:
        """A forward pass ends; where no gradients follow it, values may be changed when all have read them."""
        if not torch.is_grad_enabled():
            self._buffer.barrier()

    def show(self, last: int, shown: list[torch.Tensor], shards: list[torch.Tensor]) -> int:
        """Lets the current stream go on when it may read what the other ranks show in this pass.

        Args:
            last: the pass in which the caller was here before.
            shown: where the caller's shards that don't live here are shown.
            shards: those.

        Returns:
            This pass.
        """
        if last == self._pass:
            return last
        if shown:
            torch._foreach_copy_(shown, shards)
        if shown or self._met != self._pass:
            self._buffer.barrier()
            self._met = self._pass
        return self._pass


class Places:
    """Memory for whole parameters of units that are gathered in turn; each unit always has the same place.

    When a unit is about to be used, all that was used before is done with, for the stream is in order. So then every
    other place is free.

    Args:
        count: units that are whole at once: the one in use and the next.
        dtype: of whole parameters.
        device: where they are.
    """

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self._memory: list[dict[tuple[torch.Size, ...], list[torch.Tensor]]] = [{} for _ in range(count)]
        self._free: list[torch.cuda.Event | None] = [None] * count
        self._holders: list[CopyAllGather | None] = [None] * count
        self._dtype, self._device, self._given = dtype, device, 0

    def give(self, shapes: Sequence[torch.Size]) -> tuple[int, list[torch.Tensor]]:
        """The next place, and parameters of these shapes there, in memory that units of the same shapes share."""
        number = self._given % len(self._memory)
        self._given += 1
        made = self._memory[number]
        if (key := tuple(shapes)) not in made:
            made[key] = [torch.empty(shape, dtype=self._dtype, device=self._device) for shape in shapes]
        return number, made[key]

    def begin(self) -> None:
        """A forward pass begins, for which FSDP2 lets streams that gather wait until all before it is done."""
        self._free = [None] * len(self._free)

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

    def use(self, number: int) -> None:
        """The current stream is about to use the unit in a place."""
        if self._device.type == "cuda":
            event = torch.cuda.current_stream().record_event()
            self._free = [event if other != number else free for other, free in enumerate(self._free)]


class CopyAllGather(AllGather):
    """Gathers the parameters of one FSDP2 unit: each rank copies all shards to their places.

    FSDP2 lets a shard say what is gathered and what comes of it (``fsdp_pre_all_gather``, ``fsdp_post_all_gather``).
    Here it gathers one element of each, and finds the whole parameters filled.

    Args:
        unit: with memory, its parameters cut evenly.
        parameters: the unit's own, by name.
        shards: of these parameters and others.
        places: for whole parameters.
    """

    def __init__(self, unit: nn.Module, parameters: dict[str, DTensor], shards: Shards, places: Places) -> None:
        name = next(iter(parameters))
        self._owner, self._name = unit.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        self._shards, self._places, self._seen = shards, places, 0
        self._place, wholes = places.give([parameter.shape for parameter in parameters.values()])
        self._token = torch.empty(1, dtype=shards.dtype, device=wholes[0].device)
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._shown: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []
        for parameter, whole in zip(parameters.values(), wholes, strict=True):
            shard = parameter._local_tensor
            if shard.dtype != shards.dtype:
                self._shown.append(shards.of(shards.rank, parameter))
                self._hidden.append(shard.detach().view(-1))
            # Another tensor to autograd than the one that it keeps, of which it so sees no writes.
            parts = whole.data.view(shards.ranks, -1)
            for step in range(1, shards.ranks + 1):
                rank = (shards.rank + step) % shards.ranks
                self._copies.append((parts[rank], shards.of(rank, parameter)))
            shard.fsdp_pre_all_gather = self._before()  # type: ignore[attr-defined]
            shard.fsdp_post_all_gather = self._after(whole.data, whole is wholes[0])  # type: ignore[attr-defined]

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
                self._places.use(self._place)
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
        self._seen = self._shards.show(self._seen, self._shown, self._hidden)
        self._places.enter(self._place, self)
        for here, there in self._copies:
            here.copy_(there)


class CopyReduceScatter(ReduceScatter):
    """Each rank copies its part of the others' gradients and sums in fp32.

    Gradients lie in one of two buffers in turn. When all ranks have come to a message, all have read what the one
    before it left in the other buffer, which FSDP2 fills after that: so they wait for each other once a message.

    Args:
        make: makes a shared buffer of so many bytes; collective.
        count: elements of the largest unit's gradients, padded as FSDP2 does.
        group: the ranks that share shards.
        asked: precision that FSDP2 asks for.
        wire: precision of gradients on their way; None for the one that FSDP2 asks for. Gradients that autograd gave in
            this precision lose nothing: the sum is in fp32 all the same.
        result: precision of the sum; None for the one that FSDP2 asks for.
    """

    def __init__(
        self,
        make: Callable[[int], SharedBuffer],
        count: int,
        group: dist.ProcessGroup,
        asked: torch.dtype,
        wire: torch.dtype | None = None,
        result: torch.dtype | None = None,
    ) -> None:
        self._wire, self._result = wire or asked, result or asked
        self._buffers = [make(count * self._wire.itemsize) for _ in range(2)]
        self._rank, self._ranks = group.rank(), group.size()
        self._filled = False

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for whole gradients, which the caller fills, then, asked again, for this rank's sum."""
        if self._filled:
            return torch.empty(*size, dtype=self._result, device=device)
        self._filled = True
        return self._buffers[0].of(self._rank, prod(size), self._wire, 0)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Sums this rank's part of all ranks' ``input_tensor`` into ``output_tensor`` on the current stream."""
        buffer, count = self._buffers[0], output_tensor.numel()
        assert op == dist.ReduceOp.SUM
        self._filled = False
        self._buffers.reverse()
        others = input_tensor.new_empty(self._ranks - 1, count)
        buffer.barrier()
        for step in range(1, self._ranks):
            peer = (self._rank + step) % self._ranks
            others[step - 1].copy_(buffer.of(peer, count, input_tensor.dtype, self._rank * count))
        row_sum(input_tensor.view(self._ranks, count)[self._rank], others, output_tensor)


def own_parameters(unit: nn.Module) -> dict[str, DTensor]:
    """Sharded parameters of a unit by name, those of units inside it left out."""
    inner = [module for module in unit.modules() if isinstance(module, FSDPModule) and module is not unit]
    theirs = {id(parameter) for module in inner for parameter in module.parameters()}
    mine = {name: parameter for name, parameter in unit.named_parameters() if id(parameter) not in theirs}
    return {name: parameter for name, parameter in mine.items() if isinstance(parameter, DTensor)}


def gradient_count(parameters: dict[str, DTensor], ranks: int) -> int:
    """Elements of a unit's whole gradients, each padded to as many rows as ranks share evenly."""
    return sum(-(-p.shape[0] // ranks) * ranks * prod(p.shape[1:]) for p in parameters.values())
