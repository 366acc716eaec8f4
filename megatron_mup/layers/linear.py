"""Tensor-parallel linear layers, native backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from megatron_mup.parallel.mesh import TensorAxis


class ColumnLinear(nn.Module):
    """Linear layer whose output features are sharded over tensor ranks.

    Args:
        weight: this rank's rows, ``[out / tp, in]``.
        bias: this rank's part, ``[out / tp]``, or None.
        axis: tensor-parallel axis.
        sequence_parallel: whether the input is a sequence shard.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, axis: TensorAxis, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.axis, self.sequence_parallel = axis, sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq (/ tp), batch, in]`` to ``[seq, batch, out / tp]``."""
        return F.linear(enter_tensor_parallel(x, self.axis, self.sequence_parallel), self.weight, self.bias)


class RowLinear(nn.Module):
    """Linear layer whose input features are sharded over tensor ranks.

    Args:
        weight: this rank's columns, ``[out, in / tp]``.
        bias: the whole bias, ``[out]``, added once, after the sum; or None.
        axis: tensor-parallel axis.
        sequence_parallel: whether the output is a sequence shard.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, axis: TensorAxis, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.axis, self.sequence_parallel = axis, sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[seq, batch, in / tp]`` to ``[seq (/ tp), batch, out]``."""
        if self.axis.group is None:
            return F.linear(x, self.weight, self.bias)
        y = leave_tensor_parallel(F.linear(x, self.weight), self.axis, self.sequence_parallel)
        return y if self.bias is None else y + self.bias
