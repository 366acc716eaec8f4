"""One transformer layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from megatron_mup.layers.dropout import Noise, hidden_dropout
from megatron_mup.layers.factory import LayerFactory
from megatron_mup.layers.info import TokenInfo
from megatron_mup.layers.moe import MoE
from megatron_mup.layers.norm import RMSNorm
from megatron_mup.layers.scale import backward_by, forward_by, scale
from megatron_mup.models.recompute import keeping_products
from megatron_mup.parametrization.operations import Residual, dropout_scale, residual


class TransformerLayer(nn.Module):
    """Two branches on the residual stream: ``x <- s x + m branch(norm(x))``, or ``s x + m norm(branch(x))`` with
    ``--norm-position post-branch``. s is 1 except in unit-scaled models.

    Args:
        factory: makes the parts.
        number: place in the whole model, from 0.

    Attributes:
        keeps_products: whether the layer itself sees to selective recomputation; `models.build` says so of what it
            compiles as a whole.
    """

    keeps_products = False

    def __init__(self, factory: LayerFactory, number: int) -> None:
        super().__init__()
        name = f"decoder.layers.{number}"
        pre = factory.config.model.norm_position == "pre"
        self.input_layernorm = factory.norm(f"{name}.input_layernorm", number) if pre else None
        self.self_attention = factory.attention(f"{name}.self_attention", number)
        self.post_self_attn_layernorm = None if pre else factory.norm(f"{name}.post_self_attn_layernorm", number)
        self.pre_mlp_layernorm = factory.norm(f"{name}.pre_mlp_layernorm", number) if pre else None
        has_experts = factory.config.moe.layers(factory.config.model.num_layers)[number]
        self.mlp = (factory.moe if has_experts else factory.mlp)(f"{name}.mlp", number)
        self.post_mlp_layernorm = None if pre else factory.norm(f"{name}.post_mlp_layernorm", number)
        self.attention_residual = residual(factory.config, number, "attention")
        self.mlp_residual = residual(factory.config, number, "mlp")
        self.dropout, self.dropout_scale = factory.config.model.hidden_dropout, dropout_scale(factory.config)

    def forward(
        self, x: torch.Tensor, info: TokenInfo, salts: torch.Tensor | None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs the layer.

        Args:
            x: ``[seq (/ tp), batch, hidden]``; the result has the same shape.
            info: facts about the tokens.
            salts: ``[4]`` int64 that key dropout and jitter, or None.
            weights: ``[2, 2]``, weights of stream and branch for both branches where they differ between layers: as
                data, they let all layers share one compiled graph. None: as numbers.
        """
        if self.keeps_products and torch.is_grad_enabled():
            return keeping_products(self._run, x, info, salts, weights)
        return self._run(x, info, salts, weights)

    def _run(
        self, x: torch.Tensor, info: TokenInfo, salts: torch.Tensor | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        attention, mlp = self.attention_residual, self.mlp_residual
        if weights is not None:
            attention, mlp = (replace(mlp, skip=pair[0], branch=pair[1]) for pair in weights)
        attention_salt, branch_salt, mlp_salt, router_salt = (
            (None, None, None, None) if salts is None else salts.unbind()
        )
        x, branch = _enter(self.input_layernorm, x, attention)
        branch = _apply(self.post_self_attn_layernorm, self.self_attention(branch, info, attention_salt))
        branch = hidden_dropout(branch, self.dropout, branch_salt, info.sample_index, info.places)
        x = self._join(x, branch, attention)
        x, branch = _enter(self.pre_mlp_layernorm, x, mlp)
        branch = _apply(self.post_mlp_layernorm, self._mlp(branch, info, router_salt))
        branch = hidden_dropout(branch, self.dropout, mlp_salt, info.sample_index, info.places)
        return self._join(x, branch, mlp)

    def _mlp(self, x: torch.Tensor, info: TokenInfo, salt: torch.Tensor | None) -> torch.Tensor:
        if not isinstance(self.mlp, MoE) or salt is None:
            return self.mlp(x)
        assert info.sample_index is not None
        assert info.places is not None
        return self.mlp(x, Noise(salt, info.sample_index, info.places))

    def _join(self, x: torch.Tensor, branch: torch.Tensor, weights: Residual) -> torch.Tensor:
        branch = scale(branch, self.dropout_scale, self.dropout_scale)
        if weights.delayed:
            return forward_by(branch, weights.branch) + x * weights.skip
        return torch.add(x if weights.skip == 1 else x * weights.skip, branch, alpha=weights.branch)


def _enter(norm: nn.Module | None, x: torch.Tensor, weights: Residual) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream, to go on with, and what a branch reads of it."""
    if weights.delayed:
        return x, _apply(norm, backward_by(x, weights.branch))
    return norm.fork(x) if isinstance(norm, RMSNorm) else (x, _apply(norm, x))


def _apply(norm: nn.Module | None, x: torch.Tensor) -> torch.Tensor:
    return x if norm is None else norm(x)
