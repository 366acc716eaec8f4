"""One transformer layer."""

from __future__ import annotations

import torch
from torch import nn

from megatron_mup.layers.dropout import hidden_dropout
from megatron_mup.layers.factory import LayerFactory
from megatron_mup.layers.info import TokenInfo


class TransformerLayer(nn.Module):
    """Pre-norm layer: ``x + m_a attention(norm(x))``, then ``x + m_f mlp(norm(x))``.

    Args:
        factory: makes the parts.
        number: place in the whole model, from 0.
    """

    def __init__(self, factory: LayerFactory, number: int) -> None:
        super().__init__()
        name = f"decoder.layers.{number}"
        self.input_layernorm = factory.norm(f"{name}.input_layernorm", number)
        self.self_attention = factory.attention(f"{name}.self_attention", number)
        self.pre_mlp_layernorm = factory.norm(f"{name}.pre_mlp_layernorm", number)
        self.mlp = factory.mlp(f"{name}.mlp", number)
        self.attention_branch = factory.multipliers.attention_branch
        self.mlp_branch = factory.multipliers.mlp_branch
        self.dropout = factory.config.model.hidden_dropout
        self.axis, self.sequence_parallel = factory.axis, factory.sequence_parallel

    def forward(self, x: torch.Tensor, info: TokenInfo, salts: torch.Tensor | None) -> torch.Tensor:
        """``[seq (/ tp), batch, hidden]`` to the same shape. ``salts``: ``[3]`` int64 that key dropout, or None."""
        attention_salt, branch_salt, mlp_salt = (None, None, None) if salts is None else salts.unbind()
        start = x.shape[0] * self.axis.rank if self.sequence_parallel else 0
        branch = self.self_attention(self.input_layernorm(x), info, attention_salt)
        branch = hidden_dropout(branch, self.dropout, branch_salt, info.sample_index, start)
        x = torch.add(x, branch, alpha=self.attention_branch)
        branch = self.mlp(self.pre_mlp_layernorm(x))
        branch = hidden_dropout(branch, self.dropout, mlp_salt, info.sample_index, start)
        return torch.add(x, branch, alpha=self.mlp_branch)
