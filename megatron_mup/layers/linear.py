"""Tensor-parallel linear layers, native backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.layers.scale import scale
from megatron_mup.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from megatron_mup.parallel.mesh import TensorAxis
from megatron_mup.parametrization.operations import PLAIN, Scales


class ParallelLinear(nn.Module):
    """What both directions hold."""

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        axis: TensorAxis,
        sequence_parallel: bool,
        scales: Scales = PLAIN,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.axis, self.sequence_parallel, self.scales = axis, sequence_parallel, scales

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``[..., in]`` to ``[..., out]`` of this rank's part of the weight."""
        return F.linear(x, self.weight, bias)


class ColumnLinear(ParallelLinear):
    """Linear layer whose output features are sharded over tensor ranks.

    Args:
        weight: this rank's rows, ``[out / tp, in]``.
        bias: this rank's part, ``[out / tp]``, or None.
        axis: tensor-parallel axis.
        sequence_parallel: whether the input is a sequence shard.
        scales: factors of unit-scaled models.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq (/ tp), batch, in]`` to ``[seq, batch, out / tp]``."""
        x = scale(x, backward=self.scales.backward / self.scales.weight)
        y = self.multiply(enter_tensor_parallel(x, self.axis, self.sequence_parallel), self.bias)
        return scale(y, self.scales.forward, self.scales.weight)


class RowLinear(ParallelLinear):
    """Linear layer whose input features are sharded over tensor ranks.

    Args:
        weight: this rank's columns, ``[out, in / tp]``.
        bias: the whole bias, ``[out]``, added once, after the sum; or None.
        axis: tensor-parallel axis.
        sequence_parallel: whether the output is a sequence shard.
        scales: factors of unit-scaled models.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq, batch, in / tp]`` to ``[seq (/ tp), batch, out]``."""
        x = scale(x, backward=self.scales.backward / self.scales.weight)
        if self.axis.group is None:
            y = self.multiply(x, self.bias)
        else:
            y = leave_tensor_parallel(self.multiply(x), self.axis, self.sequence_parallel)
            y = y if self.bias is None else y + self.bias
        return scale(y, self.scales.forward, self.scales.weight)
