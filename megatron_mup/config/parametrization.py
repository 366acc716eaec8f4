"""How hyperparameters follow the model's size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParametrizationConfig:
    """Parametrization (muP, CompleteP)."""

    parametrization: Literal["standard", "mup", "completep"] = "standard"
    """Rule table: standard; mup (width); completep (width and depth)."""
    mup_base_hidden_size: int | None = None
    """Hidden size at which the hyperparameters were tuned. Default: this model's own (ratio 1)."""
    mup_base_ffn_hidden_size: int | None = None
    """MLP width of the base model. Default: in proportion to the hidden sizes."""
    mup_base_num_attention_heads: int | None = None
    """Query heads of the base model. Default: in proportion to the hidden sizes at the base head width."""
    mup_base_head_dim: int | None = None
    """Head width of the base model. Default: this model's own."""
    base_num_layers: int | None = None
    """Layers of the base model (CompleteP). Default: this model's own (ratio 1)."""
    depth_alpha: float = 1.0
    """Depth exponent of CompleteP, 0.5 or 1: branches are scaled by (layers / base layers)^-alpha."""
    mup_embedding_mult: float = 1.0
    """Factor on the embedding's output."""
    mup_output_mult: float = 1.0
    """Factor on the logits, beside the parametrization's own 1 / width ratio."""
    mup_attention_mult: float = 1.0
    """Factor on the attention logits, beside the parametrization's own."""
    mup_residual_mult: float = 1.0
    """Factor on every residual branch, beside the parametrization's own."""
    mup_attention_residual_scale: float | None = None
    """Factor on attention branches is this / sqrt(layers) (Xmodel-2.5); takes the place of --mup-residual-mult
    there."""
    mup_ffn_residual_scale: float | None = None
    """Factor on MLP branches is this / sqrt(layers) (Xmodel-2.5); takes the place of --mup-residual-mult there."""
    weight_decay_rule: Literal["independent", "coupled", "sqrt-width", "lr-independent"] = "independent"
    """How weight decay follows width. independent: learning rate x decay of each matrix stays the base model's;
    coupled: the coefficient stays; sqrt-width: coefficient x sqrt(width ratio); lr-independent: the coefficient is the
    decay per step at peak, whatever the learning rate."""
