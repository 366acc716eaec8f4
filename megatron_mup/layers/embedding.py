"""The vocabulary-parallel embedding, the position table and the output layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.kernels.embedding import embedding_backward
from megatron_mup.kernels.late import HAS_KERNEL
from megatron_mup.layers.scale import scale
from megatron_mup.parallel.collectives import enter_tensor_parallel, leave_tensor_parallel
from megatron_mup.parallel.mesh import TensorAxis
from megatron_mup.parametrization.operations import PLAIN, Scales


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        (tokens,) = ctx.saved_tensors
        return None, embedding_backward(tokens, grad, ctx.rows)


def lookup(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows ``[..., channels]`` of a table by ids ``[...]``; on a GPU with a kernel of ours for the gradient.

    Not where there are fewer rows than tokens: many share one then, and PyTorch's takes parts of it side by side.
    """
    if HAS_KERNEL and weight.is_cuda and weight.shape[0] >= tokens.numel():
        return _Lookup.apply(tokens, weight)
    return F.embedding(tokens, weight)


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
        # The factor on the weight's gradient goes to that of the rows, which are fewer.
        return scale(self._rows(tokens), backward=self.scales.weight)

    def _rows(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.axis.group is None:
            return lookup(tokens, self.weight)
        local = tokens - self.first_row
        foreign = (local < 0) | (local >= self.weight.shape[0])
        rows = F.embedding(local.masked_fill(foreign, 0), self.weight).masked_fill(foreign[..., None], 0)
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
        logits, rows = F.linear(*self.operands(x, shared)), self.rows(shared)
        return logits if logits.shape[-1] == rows else logits[..., :rows]  # FSDP2, which hooks it, wants no view

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
