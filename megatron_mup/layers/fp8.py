"""Tensor-parallel linear layers of unit-scaled models in FP8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from megatron_mup.kernels.fp8 import E4M3, fp8_linear, fp8_swiglu_mlp
from megatron_mup.layers.linear import ColumnLinear, ParallelLinear, RowLinear
from megatron_mup.layers.mlp import GLU_INTERLEAVE, MLP
from megatron_mup.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from megatron_mup.parallel.mesh import TensorAxis
from megatron_mup.parametrization.operations import Scales

Watcher = Callable[[str, torch.Tensor, torch.dtype], None]
"""Called with ``input``, ``weight`` or ``gradient``, the values that are about to be cast, and the type."""


@dataclass(frozen=True)
class StaticFP8:
    """How a layer's gradient is cast.

    Attributes:
        gradient: FP8 type.
        gradient_scale: brings it near unit scale.
    """

    gradient: torch.dtype
    gradient_scale: float


class StaticLinear(ParallelLinear):
    """What both directions hold: a linear layer without bias, whose factors are those of its FP8 products.

    Args:
        weight, axis, sequence_parallel, scales: as for the layer in full precision.
        static: how its gradient is cast.

    Attributes:
        watcher: sees the operands, if there is one.
        keeps: whether it holds its weight in FP8 from forward to backward.
    """

    def __init__(
        self, weight: nn.Parameter, axis: TensorAxis, sequence_parallel: bool, scales: Scales, static: StaticFP8
    ) -> None:
        super().__init__(weight, None, axis, sequence_parallel, scales)
        self.static = static
        self.factors = (scales.forward, scales.weight, scales.backward)
        self.watcher: Watcher | None = None
        self.keeps = False

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]`` of this rank's part of the weight."""
        static = self.static
        y = fp8_linear(x, self.weight, self.factors, static.gradient, static.gradient_scale, self.keeps)
        if self.watcher is not None:
            self.watcher("input", x, E4M3)
            self.watcher("weight", self.weight, E4M3)
            if y.requires_grad:
                y.register_hook(partial(self._show_gradient, self.watcher))
        return y

    def _show_gradient(self, watcher: Watcher, grad: torch.Tensor) -> None:
        watcher("gradient", grad * self.static.gradient_scale, self.static.gradient)


class StaticColumnLinear(StaticLinear, ColumnLinear):
    """`ColumnLinear` in FP8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq (/ tp), batch, in]`` to ``[seq, batch, out / tp]``."""
        return self.product(enter_tensor_parallel(x, self.axis, self.sequence_parallel))


class StaticRowLinear(StaticLinear, RowLinear):
    """`RowLinear` in FP8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq, batch, in / tp]`` to ``[seq (/ tp), batch, out]``."""
        return leave_tensor_parallel(self.product(x), self.axis, self.sequence_parallel)


class StaticMLP(MLP):
    """`MLP` of two of these layers with SwiGLU between them, taken together unless somebody looks inside.

    Args:
        linear_fc1, linear_fc2, activation, activation_scale: as there.
        mult: the factor inside the activation.
    """

    linear_fc1: StaticColumnLinear
    linear_fc2: StaticRowLinear

    def __init__(
        self, linear_fc1: nn.Module, linear_fc2: nn.Module, activation: object, activation_scale: float, mult: float
    ) -> None:
        super().__init__(linear_fc1, linear_fc2, activation, activation_scale)
        self.mult = mult

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `MLP.forward`."""
        first, second = self.linear_fc1, self.linear_fc2
        if first.watcher is not None or first._forward_hooks or second._forward_hooks:
            return super().forward(x)
        x = enter_tensor_parallel(x, first.axis, first.sequence_parallel)
        y = fp8_swiglu_mlp(
            x,
            (first.weight, second.weight),
            (first.factors, second.factors),
            first.static.gradient,
            first.static.gradient_scale,
            GLU_INTERLEAVE,
            self.mult,
            self.activation_scale,
            first.keeps,
        )
        return leave_tensor_parallel(y, second.axis, second.sequence_parallel)
