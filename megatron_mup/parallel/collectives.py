"""Collectives of the tensor-, context- and expert-parallel axes, most of them as autograd functions.

Activations are ``[seq, batch, ...]``, so that a sequence shard is contiguous. PyTorch's functional collectives are a
private module; it is used here alone, because torch.compile traces through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from megatron_mup.parallel.mesh import ContextAxis, TensorAxis


def _all_reduce(x: torch.Tensor, op: str, group: dist.ProcessGroup) -> torch.Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x, op, group))


def _all_gather(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return funcol.wait_tensor(funcol.all_gather_tensor(x.contiguous(), 0, group))


def _reduce_scatter(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return funcol.wait_tensor(funcol.reduce_scatter_tensor(x.contiguous(), "sum", 0, group))


def _all_to_all(x: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(x.contiguous(), receive, send, group))


class _Copy(torch.autograd.Function):
    """Identity forward, sum of the gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_reduce(grad, "sum", ctx.group), None


class _Reduce(torch.autograd.Function):
    """Sum forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _all_reduce(x, "sum", group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    """Concatenation along dimension 0 forward, reduce-scatter of the gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _ReduceScatter(torch.autograd.Function):
    """Reduce-scatter along dimension 0 forward, concatenation of the gradients backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_gather(grad, ctx.group), None


class _AllToAll(torch.autograd.Function):
    """Exchange of rows forward, their gradients' way back backward."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.receive, ctx.send, ctx.group = receive, send, group
        return _all_to_all(x, receive, send, group)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grad, ctx.send, ctx.receive, ctx.group), None, None, None


@dataclass
class _Exchange:
    """Two halves of an exchange of rows, and of their gradients' way back.

    Attributes:
        receive, send, group: see `all_to_all`.
        back: gradients under way.
    """

    receive: list[int]
    send: list[int]
    group: dist.ProcessGroup
    back: torch.Tensor | None = None


class _StartAllToAll(torch.autograd.Function):
    """The first half; backward is the second half of the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: _Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return _started(x, exchange.receive, exchange.send, exchange.group)

    @staticmethod
    def backward(ctx: Any, _grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        back, ctx.exchange.back = ctx.exchange.back, None
        return _waited(back), None


class _FinishAllToAll(torch.autograd.Function):
    """The second half; backward is the first half of the way back. Gradients travel beside autograd, which knows one
    shape for both ends."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, exchange: _Exchange) -> torch.Tensor:
        ctx.exchange = exchange
        return _waited(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        way = ctx.exchange
        way.back = _started(grad, way.send, way.receive, way.group)
        return grad, None


def _started(x: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Rows under way: a plain tensor, to be read once it was waited for."""
    return torch.ops._c10d_functional.all_to_all_single(x.contiguous(), receive, send, group.group_name)


def _waited(x: torch.Tensor) -> torch.Tensor:
    return funcol.wait_tensor(x)


def all_to_all_around(
    meanwhile: Callable[[], None], x: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    """`all_to_all` with work done while rows are under way, and that work's backward while their gradients are.

    For backward it's the order of forward that counts: autograd takes the latest of the nodes that are ready.
    """
    exchange = _Exchange(receive, send, group)
    rows = _StartAllToAll.apply(x, exchange)
    meanwhile()
    return _FinishAllToAll.apply(rows, exchange)


def all_to_all(x: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Rows to other ranks and theirs here, in the order of ranks.

    Args:
        x: rows, those for rank 0 first.
        receive, send: rows that come from and go to each rank; any may be 0.
        group: the ranks.
    """
    return _AllToAll.apply(x, receive, send, group)


def gather_rows(x: torch.Tensor, sizes: list[int], axis: TensorAxis) -> torch.Tensor:
    """Rows of all ranks, one after the other, which may have unequally many; gradients come back summed.

    Args:
        x: this rank's rows.
        sizes: number of rows of each rank; any may be 0.
        axis: the ranks.
    """
    if axis.group is None:
        return x
    return all_to_all(x.repeat(axis.size, *[1] * (x.dim() - 1)), sizes, [len(x)] * axis.size, axis.group)


def sum_rows(x: torch.Tensor, sizes: list[int], axis: TensorAxis) -> torch.Tensor:
    """Partial sums of all ranks' rows to the sums of this rank's own: the way back of `gather_rows`."""
    if axis.group is None:
        return x
    own = sizes[axis.rank]
    # The sum is rounded once, whatever the number of ranks.
    return all_to_all(x, [own] * axis.size, sizes, axis.group).view(axis.size, own, *x.shape[1:]).sum(0)


def enter_tensor_parallel(x: torch.Tensor, axis: TensorAxis, sequence_parallel: bool) -> torch.Tensor:
    """Input of a column-parallel layer: the whole sequence on every rank, gradients summed over ranks.

    Args:
        x: ``[seq, batch, hidden]``, or ``[seq / tp, batch, hidden]`` under sequence parallelism.
        axis: tensor-parallel axis.
        sequence_parallel: whether ``x`` is a sequence shard.
    """
    if axis.group is None:
        return x
    return _Gather.apply(x, axis.group) if sequence_parallel else _Copy.apply(x, axis.group)


def leave_tensor_parallel(x: torch.Tensor, axis: TensorAxis, sequence_parallel: bool) -> torch.Tensor:
    """Output of a row-parallel layer: partial sums ``[seq, batch, hidden]`` summed, and cut along the sequence under
    sequence parallelism.
    """
    if axis.group is None:
        return x
    return _ReduceScatter.apply(x, axis.group) if sequence_parallel else _Reduce.apply(x, axis.group)


def all_reduce(x: torch.Tensor, op: str, axis: TensorAxis | ContextAxis) -> torch.Tensor:
    """Sum or maximum over ranks; knows no gradient, for use inside an autograd function."""
    return x if axis.group is None else _all_reduce(x, op, axis.group)


def gather_context(x: torch.Tensor, axis: ContextAxis) -> torch.Tensor:
    """Parts of a sequence ``[seq / cp, ...]`` of all context ranks, one after the other; gradients come back summed."""
    assert axis.group is not None
    return _Gather.apply(x, axis.group)


def start_shift(x: torch.Tensor, axis: ContextAxis) -> torch.Tensor:
    """Sends a tensor to the next context rank, the last one's to the first; `finish` gives the one that comes here.

    Knows no gradient.
    """
    assert axis.group is not None
    send, receive = [0] * axis.size, [0] * axis.size
    send[(axis.rank + 1) % axis.size] = receive[(axis.rank - 1) % axis.size] = 1
    return funcol.all_to_all_single(x.contiguous()[None], receive, send, axis.group)


def finish(shifted: torch.Tensor) -> torch.Tensor:
    """What `start_shift` brings, once it is here."""
    return funcol.wait_tensor(shifted)[0]
