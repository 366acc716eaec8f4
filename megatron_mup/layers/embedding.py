"""The vocabulary-parallel embedding, the position table and the output layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.layers.scale import scale
from megatron_mup.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from megatron_mup.parallel.mesh import TensorAxis
from megatron_mup.parametrization.operations import PLAIN, Scales


class VocabParallelEmbedding(nn.Module):
    """Embedding whose rows are sharded over tensor ranks.

    Args:
        weight: this rank's rows, ``[about vocab / tp, hidden]``.
        first_row: token id of the first of them.
        axis: tensor-parallel axis.
        sequence_parallel: whether the output is a sequence shard.
        scales: factors of unit-scaled models.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        first_row: int,
        axis: TensorAxis,
        sequence_parallel: bool,
        scales: Scales = PLAIN,
    ) -> None:
        super().__init__()
        self.weight, self.first_row, self.scales = weight, first_row, scales
        self.axis, self.sequence_parallel = axis, sequence_parallel

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids ``[seq, batch]`` to ``[seq (/ tp), batch, hidden]``."""
        weight = scale(self.weight, backward=self.scales.weight)
        if self.axis.group is None:
            return F.embedding(tokens, weight)
        local = tokens - self.first_row
        foreign = (local < 0) | (local >= weight.shape[0])
        rows = F.embedding(local.masked_fill(foreign, 0), weight).masked_fill(foreign[..., None], 0)
        return leave_tensor_parallel(rows, self.axis, self.sequence_parallel)


class PositionEmbedding(nn.Module):
    """Learned table of positions, one copy per tensor rank.

    Args:
        weight: ``[positions, hidden]``.
        axis: tensor-parallel axis.
        sequence_parallel: whether the output is a sequence shard.
    """

    def __init__(self, weight: nn.Parameter, axis: TensorAxis, sequence_parallel: bool) -> None:
        super().__init__()
        self.weight, self.axis, self.sequence_parallel = weight, axis, sequence_parallel

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Positions ``[seq, batch or 1]`` to ``[seq (/ tp), batch or 1, hidden]``."""
        if self.sequence_parallel:
            start, size = self.axis.local(positions.shape[0])
            positions = positions[start : start + size]
        return F.embedding(positions, self.weight)


class OutputLayer(nn.Module):
    """Projection to the vocabulary, whose rows are sharded over tensor ranks.

    Args:
        weight: this rank's rows, or None when the embedding's are passed to forward.
        axis: tensor-parallel axis.
        sequence_parallel: whether the input is a sequence shard.
        multiple: the GEMM runs on rows padded to a multiple of this; an odd row count would take a slow kernel.
        scales: factors of unit-scaled models; those forward are left to the factor on the logits.
    """

    def __init__(
        self,
        weight: nn.Parameter | None,
        axis: TensorAxis,
        sequence_parallel: bool,
        multiple: int,
        scales: Scales = PLAIN,
    ) -> None:
        super().__init__()
        self.weight, self.scales = weight, scales
        self.axis, self.sequence_parallel, self.multiple = axis, sequence_parallel, multiple

    def forward(self, x: torch.Tensor, shared: torch.Tensor | None = None) -> torch.Tensor:
        """``[seq (/ tp), batch, hidden]`` to logits ``[seq, batch, about vocab / tp]`` of this rank's rows.

        Args:
            x: normed hidden states.
            shared: weight of a tied embedding on this stage.
        """
        return F.linear(*self.operands(x, shared))[..., : self.rows(shared)]

    def rows(self, shared: torch.Tensor | None) -> int:
        """Rows of the vocabulary on this rank."""
        weight = self.weight if shared is None else shared
        assert weight is not None
        return weight.shape[0]

    def operands(self, x: torch.Tensor, shared: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the GEMM multiplies: ``[seq, batch, hidden]`` and the weight, padded to its `multiple`."""
        weight = self.weight if shared is None else shared
        assert weight is not None
        padding = -weight.shape[0] % self.multiple
        if padding:
            weight = F.pad(weight, (0, 0, 0, padding))
        x = scale(x, backward=self.scales.backward)
        return enter_tensor_parallel(x, self.axis, self.sequence_parallel), weight
