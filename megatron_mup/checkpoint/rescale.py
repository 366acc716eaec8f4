"""Weights taken over into another parametrization: stored in other units, so that the model computes the same.

A weight acts as ``multiplier x weight``. Where the new run's multiplier differs from the old one's, the weight is
divided by as much (the abc symmetry of Tensor Programs, arXiv 2011.14522). What it is then trained with is the new
parametrization's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from megatron_mup.checkpoint.state import MODEL, Piece
from megatron_mup.config import Config, ConfigError
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.schemes import Kind, Operations, kind_of
from megatron_mup.parametrization.table import ForwardMultipliers, forward_multipliers, scheme_of

if TYPE_CHECKING:
    from megatron_mup.optim.main_params import MainParam

_EMBEDDING, _HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def quotient(wanted: ForwardMultipliers, applied: ForwardMultipliers) -> ForwardMultipliers:
    """Factors that weights must take up where a model wants some multipliers and others are applied to it."""
    return ForwardMultipliers(**{name: value / getattr(applied, name) for name, value in vars(wanted).items()})


@dataclass(frozen=True)
class Rescaling:
    """Factors on the weights of a model.

    Attributes:
        factors: by the multiplier whose place they take; ``logits`` is on the output layer's weight.
        final_norm: on the gain behind the last layer; it stands for what a tied output layer can't take.
        qk_norm: whether queries are normed; the norm's gain then takes the attention's factor.
    """

    factors: ForwardMultipliers
    final_norm: float = 1.0
    qk_norm: bool = False

    def __str__(self) -> str:
        """What happens to the weights, in words."""
        told = {**vars(self.factors), "final norm": self.final_norm}
        changes = [f"{name.replace('_', ' ')} x {value:.6g}" for name, value in told.items() if value != 1.0]
        # A tied output layer isn't rescaled by itself.
        changes = [c for c in changes if self.final_norm == 1.0 or not c.startswith("logits")]
        return f"rescaled to keep their function: {', '.join(changes)}" if changes else "as they are"

    def factor(self, meta: ParamMeta, block: str | None = None) -> float:
        """Factor on a parameter, or on one logical matrix of it."""
        own = self.factors
        if meta.role in (Role.EMBEDDING, Role.POSITION_EMBEDDING):
            return own.embedding
        if meta.role is Role.READOUT:
            return own.logits
        if kind_of(meta) is Kind.FINAL_VECTOR:
            return self.final_norm
        # Which of two norms, or of several biases, a vector is, its name alone tells.
        if (block == "query" and not self.qk_norm) or ".q_layernorm." in meta.name:
            return own.attention_logits
        if meta.role is Role.ATTENTION_OUTPUT or meta.name.endswith(".linear_proj.bias"):
            return own.attention_branch
        if meta.role.is_output_projection or meta.name.endswith(".linear_fc2.bias"):
            return own.mlp_branch
        return 1.0


def rescaling(saved: Config, config: Config) -> Rescaling:
    """What makes the weights of one configuration compute the same under another.

    A matrix that is embedding and output layer at once has one factor for both, the embedding's; what the logits need
    beyond it goes into the gain of the final norm.

    Raises:
        ConfigError: one of the two has unit-scaled operations, and they aren't alike: no factors on weights make up
            for those. Or a factor has no place in the model's weights.
    """
    if Operations.PLAIN in (kinds := {scheme_of(c).operations for c in (saved, config)}) and len(kinds) == 1:
        factors = quotient(forward_multipliers(saved), forward_multipliers(config))
    elif saved.parametrization == config.parametrization:
        factors = ForwardMultipliers(1.0, 1.0, 1.0, 1.0, 1.0)
    else:
        raise ConfigError(
            f"--parametrization {config.parametrization.parametrization}",
            f"the weights are of a run with {saved.parametrization.parametrization}; where operations are unit-scaled, "
            "no factors on weights keep the function",
            "go on with the checkpoint's parametrization",
        )
    tied = not config.model.untie_embeddings_and_output_weights
    final_norm = factors.logits / factors.embedding if tied else 1.0
    change = Rescaling(factors, final_norm, config.model.qk_layernorm)
    if lost := _without_place(change, config):
        raise ConfigError(
            f"--parametrization {config.parametrization.parametrization}",
            f"the checkpoint's factors differ, and {lost}",
            "go on with the checkpoint's parametrization and base sizes",
        )
    return change


def _without_place(change: Rescaling, config: Config) -> str | None:
    """Why some factor can't be taken up by the weights; None if all can."""
    model, own = config.model, change.factors
    if model.norm_position != "pre" and (own.attention_branch, own.mlp_branch) != (1.0, 1.0):
        return "a norm behind each branch undoes what its weights would take up (--norm-position)"
    in_gains = [change.final_norm] + [own.attention_logits] * model.qk_layernorm
    if not model.norm_affine and any(factor != 1.0 for factor in in_gains):
        return "norms have no gains that could take them up (--no-norm-affine)"
    return None


@torch.no_grad()
def rescale(params: Iterable[MainParam], change: Rescaling) -> None:
    """Applies the factors to this rank's shards, in place."""
    params = list(params)
    blocks = {param.meta.name: param.meta.blocks for param in params}
    for param in params:
        meta, value = param.meta, param.value
        # A bias is cut as its weight.
        cut = blocks.get(f"{meta.name.rpartition('.')[0]}.weight", ())
        if not cut and (factor := change.factor(meta)) != 1.0:
            value.mul_(factor)
        rows = param.layout.rows(value.device)
        for block in cut:
            if (factor := change.factor(meta, block.name)) != 1.0:
                place = rows % block.period
                value[(place >= block.start) & (place < block.start + block.size)] *= factor


def untied(pieces: list[Piece], saved: Config, config: Config) -> list[Piece]:
    """The pieces to load where a tied model goes on untied: its output layer starts as the embedding."""
    was_tied = not saved.model.untie_embeddings_and_output_weights
    if not (was_tied and config.model.untie_embeddings_and_output_weights):
        return pieces
    keys = {f"{MODEL}/{_HEAD}": f"{MODEL}/{_EMBEDDING}"}
    return [replace(piece, key=keys.get(piece.key, piece.key)) for piece in pieces]
