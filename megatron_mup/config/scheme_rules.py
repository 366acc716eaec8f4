"""What a parametrization cannot be combined with: choices for which no source has a rule, and flags that fight."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import settings, told, value_of

SPHERE = ("muonsphere", "spectral_sphere")
BASE_SIZES = (
    "mup_base_hidden_size",
    "mup_base_ffn_hidden_size",
    "mup_base_moe_ffn_hidden_size",
    "mup_base_num_attention_heads",
    "mup_base_head_dim",
    "mup_base_q_lora_rank",
    "mup_base_kv_lora_rank",
    "base_num_layers",
)
FORMED = ("mup", "depth-mup", "completep")
"""Parametrizations that have the three forms."""
FOLLOWS_DEPTH = ("depth-mup", "completep", "custom")
"""Parametrizations that read the base model's depth."""


def check_scheme(config: Config) -> None:
    """Architecture and multipliers that a parametrization has no rule for."""
    rules, model = config.parametrization, config.model
    name = rules.parametrization
    if (rules.custom_parametrization is not None) != (name == "custom"):
        raise ConfigError(
            told(config, "parametrization", "custom_parametrization"),
            "a custom parametrization is named by both flags",
            "give --parametrization custom --custom-parametrization module:function, or neither",
        )
    if rules.mup_form == "A" and name in FORMED and not model.untie_embeddings_and_output_weights:
        raise ConfigError(
            told(config, "mup_form"),
            "its output layer starts smaller than the embedding, so they can't be one matrix",
            "use --mup-form B or C, or --untie-embeddings-and-output-weights",
        )
    for scales in ("mup_attention_residual_scale", "mup_ffn_residual_scale"):
        if getattr(rules, scales) is not None and name in ("completep", "depth-mup", "umup", "munit"):
            raise ConfigError(
                told(config, scales, "parametrization"),
                f"its 1 / sqrt(layers) takes the place of {name}'s own rule for the branches",
                f"use --mup-residual-mult with {name}, or --parametrization mup"
                if name != "munit"
                else "use --residual-tau",
            )
    no_experts = "there is no published rule for experts", "drop it, or use --parametrization completep"
    if name in ("everett", "umup", "munit"):
        _refuse(config, [("num_experts", config.moe.num_experts is not None, *no_experts)])
    no_latents = "it has no rule for latents and the key that heads share", "use --parametrization completep"
    if name in ("everett", "umup", "munit"):
        _refuse(config, [("multi_latent_attention", model.multi_latent_attention, *no_latents)])
    if name in ("umup", "munit"):
        _refuse(config, _unit_scaled(config))
    if name == "umup":
        _refuse(config, _umup(config))
    if name == "munit":
        _refuse(config, _munit(config))


def check_rule_of_optimizer(config: Config) -> None:
    """Optimizers for which a parametrization has a rule."""
    flags, name = config.optimizer, config.parametrization.parametrization
    if flags.optimizer == "scion" and name != "standard":
        raise ConfigError(
            told(config, "optimizer", "parametrization"),
            "Scion's norms follow width by themselves; the scheme's factor on the logits would count it twice",
            "use --parametrization standard with scion; its learning rate carries over between widths as it is",
        )
    if name == "everett" and flags.optimizer != "adam":
        raise ConfigError(
            told(config, "optimizer", "parametrization"),
            "Everett et al. have exponents for Adam and its kin only",
            "use --optimizer adam, or --parametrization spectral or completep",
        )
    if name == "umup" and flags.optimizer in ("muon", "normuon", *SPHERE) and flags.muon_scale_mode != "unit_rms_norm":
        raise ConfigError(
            told(config, "parametrization", "muon_scale_mode"),
            "u-muP has no base model at which another scale could equal sqrt(out/in)",
            "use --muon-scale-mode unit_rms_norm",
        )


def check_horizon(config: Config) -> None:
    """Rules for batch and length of training: what they need, and the optimizers that they are known for."""
    rules, training, optimizer = config.parametrization, config.training, config.optimizer.optimizer
    rule = rules.batch_horizon_rule
    if rule == "none":
        return
    shown = told(config, "batch_horizon_rule")
    if training.global_batch_size is None:
        raise ConfigError(shown, "nothing says how many tokens a step has", "give --global-batch-size")
    if training.rampup_batch_size is not None:
        raise ConfigError(
            f"{shown}, {told(config, 'rampup_batch_size')}", "the rule knows one batch size only", "drop one of them"
        )
    if rules.base_batch_tokens is None and rules.base_train_tokens is None:
        raise ConfigError(
            shown, "nothing says what the base run was", "give --base-batch-tokens, --base-train-tokens, or both"
        )
    known = ("adam",) if rule in ("sde", "step-law") else ("adam", *SPHERE)
    if optimizer not in known:
        raise ConfigError(
            f"{shown}, {told(config, 'optimizer')}",
            f"the rule is known for --optimizer {' or '.join(known)} only",
            "use --batch-horizon-rule none and set the learning rate by hand",
        )
    if rule == "step-law" and rules.parametrization != "standard":
        raise ConfigError(
            told(config, "batch_horizon_rule", "parametrization"),
            "the step law was fitted to the standard parametrization",
            "use --parametrization standard, or --batch-horizon-rule power-law",
        )


Refusal = tuple[str, bool, str, str]
"""Setting, whether it is refused, why, and what to do."""


def _refuse(config: Config, refusals: Iterable[Refusal]) -> None:
    for setting, refused, why, fix in refusals:
        if refused:
            raise ConfigError(f"{told(config, 'parametrization')}, {told(config, setting)}", why, fix)


def _unit_scaled(config: Config) -> Iterable[Refusal]:
    """What neither paper of unit-scaled weights treats."""
    model, rules = config.model, config.parametrization
    rope = "use --position-embedding-type rope or none"
    learned = model.position_embedding_type == "learned_absolute"
    yield "position_embedding_type", learned, "a sum of two tables would not have unit scale", rope
    bias = "add --disable-bias-linear"
    yield "disable_bias_linear", model.linear_bias, "it has no rule for biases of linear layers", bias
    yield "add_qkv_bias", model.add_qkv_bias, "it has no rule for biases of linear layers", "drop it"
    plain = "drop it: weights of the embedding start at 1"
    yield "mup_embedding_mult", rules.mup_embedding_mult != 1, "its embedding has no multiplier", plain


def _umup(config: Config) -> Iterable[Refusal]:
    model = config.model
    untie = "add --untie-embeddings-and-output-weights"
    tied = not model.untie_embeddings_and_output_weights
    yield "untie_embeddings_and_output_weights", tied, "embedding and output layer have different rules", untie
    yield "squared_relu", model.squared_relu, "it has no scale for this activation", "use --swiglu, or GELU"
    scale = "use --mup-attention-mult; u-muP's own factor is 1/head width"
    yield "softmax_scale", model.softmax_scale is not None, "the scale of attention's output rests on it", scale
    window = model.window_size is not None
    yield "window_size", window, "the scale of attention's output is that of the whole sequence", "drop it"
    yield "norm_position", model.norm_position != "pre", "its residual rule is for norms in front", "drop it"
    for name in BASE_SIZES:
        yield name, value_of(config, name) is not None, "u-muP has no base model", "drop it"


def _munit(config: Config) -> Iterable[Refusal]:
    model, rules = config.model, config.parametrization
    norm = "add --norm-position post-branch"
    yield "norm_position", model.norm_position == "pre", "only a norm at the end of a branch keeps unit scale", norm
    hint = "give --residual-tau, about 0.4 for 4 layers and 0.1 for 100 (arXiv 2502.05967)"
    yield "residual_tau", rules.residual_tau is None, "it needs the branches' share", hint
    yield "mup_residual_mult", rules.mup_residual_mult != 1, "the branches' share is tau", "use --residual-tau"
    layers = rules.base_num_layers is not None
    yield "base_num_layers", layers, "no learning rate follows depth; tau does, by hand", "drop it; set --residual-tau"


def idle(config: Config) -> Iterable[tuple[list[str], bool, str]]:
    """Settings of parametrizations that are idle, and why: rows for `unused`."""
    rules = config.parametrization
    name = rules.parametrization
    base = [setting for setting in settings() if setting.startswith("mup_base_")]
    yield base, name == "standard", "--parametrization standard has no base model"
    yield ["base_num_layers"], name not in FOLLOWS_DEPTH, f"{name} doesn't look at depth (CompleteP does)"
    yield ["depth_alpha"], name not in ("completep", "custom"), "only CompleteP has the choice"
    yield ["mup_form"], name not in FORMED, f"{name} has one form"
    routers = "its own table has the router's row"
    yield ["mup_router_rule"], name == "custom", routers
    yield ["lr_alignment"], name != "everett", f"{name} assumes full alignment"
    only_umup = ["mup_residual_attention_ratio", "mup_ffn_act_mult"]
    yield only_umup, name != "umup", "only u-muP has it"
    yield ["residual_tau"], name != "munit", "only munit has it"
    own = ["init_method_std", "embedding_init_method_std", "output_layer_init_method_std"]
    yield own, name in ("umup", "munit"), f"{name}'s weights start at standard deviation 1"
    sizes = any(value_of(config, size) is not None for size in BASE_SIZES)
    reason = "without --mup-base-hidden-size (or another base size) the base is this model, all ratios are 1"
    relative = ("mup", "depth-mup", "completep", "spectral", "everett")
    yield ["parametrization"], name in relative and not sizes, reason
    scales = rules.mup_attention_residual_scale is not None and rules.mup_ffn_residual_scale is not None
    yield ["mup_residual_mult"], scales, "both residual scales are given and take its place"
    base_run = ["base_batch_tokens", "base_train_tokens"]
    yield base_run, rules.batch_horizon_rule == "none", "there is no --batch-horizon-rule"
    length_only = rules.batch_horizon_rule in ("sqrt-batch", "step-law")
    unread = "base_train_tokens" if rules.batch_horizon_rule == "sqrt-batch" else "base_batch_tokens"
    yield [unread], length_only, f"{rules.batch_horizon_rule} doesn't look at it"
