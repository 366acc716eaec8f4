"""How hyperparameters follow the model's size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ParametrizationConfig:
    """Parametrization (muP, CompleteP, u-muP and their kin)."""

    parametrization: Literal[
        "standard", "mup", "depth-mup", "completep", "spectral", "everett", "umup", "munit", "custom"
    ] = "standard"
    """Rule table: standard; mup, spectral, everett (width); depth-mup, completep (width and depth); umup, munit
    (unit-scaled weights); custom (--custom-parametrization)."""
    custom_parametrization: str | None = None
    """module:function that returns the rule table of --parametrization custom."""
    mup_form: Literal["A", "B", "C"] = "B"
    """Which of muP's equivalent forms: A, no multiplier on the logits; B, multiplier 1 / width ratio; C, multipliers on
    embedding and logits that share it. The training is the same."""
    lr_alignment: Literal["full", "none"] = "full"
    """Alignment that everett assumes between weights and their inputs: learning rates of hidden matrices and output
    layer as 1 / width ratio (full) or its root (none)."""
    mup_router_rule: Literal["output", "hidden", "zero"] = "output"
    """How the router's initial values follow width. output: like an output layer's, as 1 / width ratio; hidden: as its
    root (Megatron); zero: all 0. Its learning rate goes as 1 / width ratio in each."""
    mup_base_hidden_size: int | None = None
    """Hidden size at which the hyperparameters were tuned. Default: this model's own (ratio 1)."""
    mup_base_ffn_hidden_size: int | None = None
    """MLP width of the base model. Default: in proportion to the hidden sizes."""
    mup_base_moe_ffn_hidden_size: int | None = None
    """Inner width of an expert of the base model. Default: in proportion to the hidden sizes."""
    mup_base_num_attention_heads: int | None = None
    """Query heads of the base model. Default: in proportion to the hidden sizes at the base head width."""
    mup_base_head_dim: int | None = None
    """Head width of the base model. Default: this model's own."""
    mup_base_q_lora_rank: int | None = None
    """Width of the base model's query latent. Default: in proportion to the hidden sizes."""
    mup_base_kv_lora_rank: int | None = None
    """Width of the base model's key/value latent. Default: in proportion to the hidden sizes."""
    base_num_layers: int | None = None
    """Layers of the base model (depth-mup, completep). Default: this model's own (ratio 1)."""
    depth_alpha: float = 1.0
    """Depth exponent of CompleteP, 0.5 or 1: branches are scaled by (layers / base layers)^-alpha."""
    mup_embedding_mult: float = 1.0
    """Factor on the embedding's output."""
    mup_output_mult: float = 1.0
    """Factor on the logits, beside the parametrization's own 1 / width ratio."""
    mup_attention_mult: float = 1.0
    """Factor on the attention logits, beside the parametrization's own."""
    mup_residual_mult: float = 1.0
    """Factor on every residual branch, beside the parametrization's own. umup: weight of all branches together
    against the embedding."""
    mup_residual_attention_ratio: float = 1.0
    """umup: weight of the attention branches over that of the MLP branches."""
    mup_ffn_act_mult: float = 1.0
    """umup: factor inside the MLP's activation."""
    residual_tau: float | None = None
    """munit: share tau of each branch in the residual stream, sqrt(1 - tau) x + sqrt(tau) branch(x)."""
    mup_attention_residual_scale: float | None = None
    """Factor on attention branches is this / sqrt(layers) (Xmodel-2.5); takes the place of --mup-residual-mult
    there."""
    mup_ffn_residual_scale: float | None = None
    """Factor on MLP branches is this / sqrt(layers) (Xmodel-2.5); takes the place of --mup-residual-mult there."""
    weight_decay_rule: Literal["independent", "coupled", "sqrt-width", "inverse-width", "lr-independent"] | None = None
    """How weight decay follows width. independent: learning rate x decay of each matrix stays the base model's;
    coupled: the coefficient stays; sqrt-width: coefficient x sqrt(width ratio); inverse-width: learning rate x decay
    falls as 1 / width ratio; lr-independent: the coefficient is the decay per step at peak, whatever the learning rate.
    Default: lr-independent for umup and munit, independent for the others."""
    batch_horizon_rule: Literal["none", "sde", "sqrt-batch", "power-law", "step-law"] = "none"
    """How learning rate, weight decay, epsilon and betas follow tokens per step and tokens in all."""
    base_batch_tokens: int | None = None
    """Tokens per step at which the hyperparameters were tuned. Default: this run's (ratio 1)."""
    base_train_tokens: int | None = None
    """Tokens of the whole run in which the hyperparameters were tuned. Default: this run's (ratio 1)."""
