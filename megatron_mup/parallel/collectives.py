"""Collectives of the tensor-, context- and expert-parallel axes, most of them as autograd functions.

Activations are ``[seq, batch, ...]``, so that a sequence shard is contiguous. PyTorch's functional collectives are a
private module; it is used here alone, because torch.compile traces through it.
"""

from __future__ import annotations

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


def all_to_all(x: torch.Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Rows to other ranks and theirs here, in the order of ranks.

    Args:
        x: rows, those for rank 0 first.
        receive, send: rows that come from and go to each rank; any may be 0.
        group: the ranks.
    """
    return _AllToAll.apply(x, receive, send, group)


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
