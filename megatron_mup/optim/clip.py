"""The global gradient norm, each logical parameter counted once, and the factor that clips by it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_mup.kernels.multiply import multiply_
from megatron_mup.optim.main_params import MainParam
from megatron_mup.parallel.mesh import Mesh


def gradients(params: list[MainParam]) -> list[torch.Tensor]:
    """Gradients of parameters, in order; an empty shard may come without.

    Raises:
        RuntimeError: a parameter that has no gradient.
    """
    grads = []
    for param in params:
        grad = param.grad
        if grad is None:
            if param.value.numel():
                raise RuntimeError(f"parameter {param.meta.name} has no gradient; did it take part in the loss?")
            grad = torch.empty_like(param.value)
        grads.append(grad)
    return grads


@torch.no_grad()
def global_grad_norm(params: list[MainParam], mesh: Mesh) -> torch.Tensor:
    """Euclidean norm of the gradient of all logical parameters, alike on every rank.

    Copies count once: those of tensor ranks by tensor rank 0, a tied parameter's other copy not at all, replicas
    because no sum runs over ``dp_replicate`` (``edp_replicate`` for experts). Norms of single tensors are taken in
    fp64 on a CPU (whose fp32 reduction loses digits on long tensors) and in fp32 elsewhere; their squares are
    summed in fp64. Squares that an optimizer has left in all parameters are taken as they are. One number is summed
    over each of the axes ``tp``, ``dp_shard`` and ``pp``, one of the experts over ``ep``, ``etp`` and
    ``edp_shard``: collective over all ranks. Of gradients that replicas keep apart (`MainParam.is_apart`) all
    replicas' parts count, side by side: the square is the sum of theirs, at least 1/replicas of what the norm of
    their sum would have.

    Returns:
        0-d fp32 tensor on the mesh's device, without waiting for it.

    Raises:
        RuntimeError: a parameter that has no gradient.
    """
    counted: list[MainParam] = []
    apart: list[MainParam] = []
    of_experts: list[MainParam] = []
    for param in params:
        meta = param.meta
        if meta.experts is not None:
            of_experts.append(param)
        elif meta.tied_to is None and (meta.tp_dim is not None or mesh.rank("tp") == 0):
            (apart if param.is_apart else counted).append(param)
    square = _square(counted, mesh.device)
    if any(param.is_apart for param in params):
        square += _sum_over(_square(apart, mesh.device), ("dp_replicate",), mesh)
    square = _sum_over(square, ("tp", "dp_shard"), mesh)
    if mesh.experts is not None:
        square += _sum_over(_square(of_experts, mesh.device), ("ep", "etp", "edp_shard"), mesh)
    return _sum_over(square, ("pp",), mesh).sqrt().float()


def _square(params: list[MainParam], device: torch.device) -> torch.Tensor:
    """Squared norm of gradients, 0-d fp64."""
    params = [param for param in params if param.value.numel()]
    if not params:
        return torch.zeros((), dtype=torch.float64, device=device)
    known = [param.square for param in params if param.square is not None]
    if len(known) == len(params):
        return torch.stack(known).double().sum()
    norms = torch._foreach_norm(gradients(params), 2, dtype=torch.float64 if device.type == "cpu" else torch.float32)
    return torch.stack(norms).double().square().sum()


def _sum_over(square: torch.Tensor, axes: tuple[str, ...], mesh: Mesh) -> torch.Tensor:
    for axis in axes:
        if mesh.size(axis) > 1:
            dist.all_reduce(square, group=mesh.group(axis))
    return square


def clip_factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor | None:
    """min(1, max_norm / (norm + 1e-6)), 0-d, without waiting for it; None where ``max_norm`` is 0: no clipping."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm > 0 else None


@torch.no_grad()
def scale_grads(params: list[MainParam], factor: torch.Tensor) -> None:
    """Multiplies gradients by a 0-d tensor, in place and in the precision of the parameters."""
    for param in params:
        param.widen_grad()
    multiply_([grad for grad in gradients(params) if grad.numel()], factor)
