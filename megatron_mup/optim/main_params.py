"""The tensors that optimizers update: this rank's shard of each parameter, in the optimizer's precision."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from megatron_mup.config import Config
from megatron_mup.parallel.data_parallel import is_left_apart, keeps_replicas_apart, main_dtype
from megatron_mup.parallel.layout import Layout
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.init import initial_values
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.table import scaling


@dataclass
class MainParam:
    """One parameter as its optimizer sees it.

    Attributes:
        meta: logical facts.
        layout: where ``value`` lies in the global tensor.
        value: this rank's shard, shape ``layout.local_shape``, plain tensor; updated in place.
        grad: gradient of the global loss by ``value``, same shape, summed over every axis, or None between steps. A
            factor that all gradients share may be missing: the optimizer is told (`Optimizer.step`). Of a single
            micro-batch it may have the module's precision instead of ``value``'s.
        copy: what the module computes with, where that is another tensor.
        square: sum of squares of ``grad``, 0-d fp32, where an optimizer found it on its way (`Optimizer.step`).
        published: whether ``copy`` already has the updated values; an optimizer that writes both at once says so.
        is_apart: whether ``grad`` is of this replica's tokens alone: the optimizer does without the sum over replicas.
    """

    meta: ParamMeta
    layout: Layout
    value: torch.Tensor
    grad: torch.Tensor | None = None
    copy: torch.Tensor | None = None
    square: torch.Tensor | None = None
    published: bool = False
    is_apart: bool = False

    def widen_grad(self) -> torch.Tensor | None:
        """The gradient, from now on in the precision of ``value``: before arithmetic on it."""
        if self.grad is not None and self.grad.dtype != self.value.dtype:
            self.grad = self.grad.to(self.value.dtype)
        return self.grad


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter or gradient, whether FSDP2 holds it or not."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def draw(params: Iterable[MainParam], config: Config) -> None:
    """Gives shards their initial values, each drawn from its counter-based generator."""
    for main in params:
        std = scaling(main.meta, config).init_std
        for offsets, part in main.layout.rectangles(main.value):
            part.copy_(
                initial_values(main.meta, std, config.training.seed, offsets, part.shape, part.device, torch.float32)
            )


class MainParams:
    """Links a model's parameters and gradients to the optimizer's tensors.

    Where the module already holds the optimizer's precision, ``value`` is its storage. Otherwise (bf16 without
    data-parallel peers) it is a copy, gradients of several micro-batches are summed in fp32, and `publish` writes the
    updated values back.

    Args:
        model: this rank's pipeline stages, sharded, with memory.
        metas: full parameter name to facts, for every parameter of ``model``.
        config: the run's configuration.
        mesh: the run's mesh.
    """

    def __init__(self, model: nn.Module, metas: dict[str, ParamMeta], config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.modules_params = dict(model.named_parameters())
        if set(self.modules_params) != set(metas):
            raise RuntimeError(f"parameters without facts: {sorted(set(self.modules_params) ^ set(metas))}")
        dtype = main_dtype(config)
        self.params: list[MainParam] = []
        self.copied: list[tuple[MainParam, nn.Parameter]] = []
        self._sums: dict[str, torch.Tensor] = {}
        self._sum_axes = {name: meta.grad_sum_axes for name, meta in metas.items()}
        apart = keeps_replicas_apart(config, mesh)
        for name, param in self.modules_params.items():
            local = local_part(param.detach())
            layout = Layout.of(metas[name], mesh)
            if local.shape != layout.local_shape:
                raise RuntimeError(f"{name}: this rank holds {tuple(local.shape)}, not {layout.local_shape}")
            value = local if local.dtype == dtype else torch.empty_like(local, dtype=dtype)
            self.params.append(MainParam(metas[name], layout, value))
            if apart and is_left_apart(param):
                self.params[-1].is_apart = scaling(metas[name], config).optimizer == "dion"
                if not self.params[-1].is_apart:
                    self._sum_axes[name] = (*self._sum_axes[name], "dp_replicate")
            if value is not local:
                self.params[-1].copy = local
                self.copied.append((self.params[-1], param))
                # The hook must not know the parameter: Python can't free such a ring.
                param.register_post_accumulate_grad_hook(partial(_accumulate, self._sums, name))

    def initialise(self) -> None:
        """Draws every value from its counter-based generator."""
        draw(self.params, self.config)
        self.publish()

    def publish(self) -> None:
        """Writes updated values to the parameters that the module computes with, where the optimizer hasn't."""
        stale = [main for main, _ in self.copied if not main.published]
        if stale:
            torch._foreach_copy_([main.copy for main in stale if main.copy is not None], [main.value for main in stale])
        for main, _ in self.copied:
            main.published = False

    def accumulate(self) -> None:
        """Adds gradients to the fp32 sums that were set on parameters without the notice of hooks."""
        for main, param in self.copied:
            if param.grad is not None:
                _accumulate(self._sums, main.meta.name, param)

    def collect_grads(self) -> None:
        """Gives every `MainParam` its final gradient, summed over the axes that its facts name, and over replicas where
        FSDP2 has left that and the optimizer wants it.
        """
        unsummed: dict[str, list[torch.Tensor]] = defaultdict(list)
        for main in self.params:
            grad = self._sums.pop(main.meta.name, None)
            if grad is None:
                module_grad = self.modules_params[main.meta.name].grad
                if module_grad is None:
                    raise RuntimeError(f"{main.meta.name} took no part in the loss: it has no gradient")
                grad = local_part(module_grad)
            main.grad = grad
            for axis in self._sum_axes[main.meta.name]:
                wide = main.widen_grad()
                assert wide is not None
                unsummed[axis].append(wide)
        for axis, grads in unsummed.items():
            if axis == "embedding" and len(grads) == 2:  # a rank that holds both the first and the last stage
                total = grads[0].float() + grads[1]
                torch._foreach_copy_(grads, [total, total])
                continue
            group = self.mesh.embedding_group if axis == "embedding" else self.mesh.group(axis)
            _all_reduce_together(grads, group)

    def zero_grad(self) -> None:
        """Drops all gradients."""
        self._sums.clear()
        for main in self.params:
            main.grad = main.square = None
        for param in self.modules_params.values():
            param.grad = None


def _accumulate(sums: dict[str, torch.Tensor], name: str, param: nn.Parameter) -> None:
    """Adds the gradient of one micro-batch to the sum, in fp32; the first stays as it is until another comes."""
    grad, param.grad = param.grad, None
    assert grad is not None
    first = sums.get(name)
    if first is None:
        sums[name] = grad
    elif first.dtype == torch.float32:
        first += grad
    else:
        sums[name] = first.float() + grad


def _all_reduce_together(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors over a group in place, in one fp32 collective."""
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    dist.all_reduce(flat, group=group)
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [f.view_as(t) for f, t in zip(parts, tensors, strict=True)])
