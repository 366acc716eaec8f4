"""Configurations of Hugging Face's architectures to ours and back: which of them can hold which model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_mup.checkpoint.convert import routing
from megatron_mup.checkpoint.convert.names import ExpertNames
from megatron_mup.checkpoint.rescale import Rescaling, quotient
from megatron_mup.config import Config, ConfigError, ModelConfig, ParametrizationConfig, TrainingConfig
from megatron_mup.parametrization.schemes import Operations
from megatron_mup.parametrization.table import ForwardMultipliers, forward_multipliers, scheme_of

Multipliers = Literal["fold", "granite"]
Biases = Literal["none", "qkv", "all"]

# Llama 3.1's numbers beside the factor; `layers.rope` has them fixed, as Megatron-LM has.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """What an architecture of Hugging Face's transformers can hold.

    Attributes:
        model_type: its name in ``config.json``.
        model_class: class of the model.
        biases: which of its linear layers may have biases.
        qk_norm: whether queries and keys are normed; it always or never does.
        window: whether it takes a sliding window.
        multipliers: whether it has fields for multipliers.
        experts: names of router and experts in its files; None: it has none.
        dense_layers: whether some of its layers may be without experts, and softmax may come before the choice.
    """

    model_type: str
    model_class: str
    biases: tuple[Biases, ...]
    qk_norm: bool = False
    window: bool = False
    multipliers: bool = False
    experts: ExpertNames | None = None
    dense_layers: bool = False


_MIXTRAL = ExpertNames(
    "block_sparse_moe.gate",
    ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
    "block_sparse_moe.experts.{}.w2",
)
_QWEN = ExpertNames("mlp.gate", ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"), "mlp.experts.{}.down_proj")
_GRANITE = ExpertNames(
    "block_sparse_moe.router.layer", ("block_sparse_moe.input_linear",), "block_sparse_moe.output_linear"
)

ARCHITECTURES = {
    a.model_type: a
    for a in (
        Architecture("llama", "LlamaForCausalLM", ("none", "all")),
        Architecture("qwen2", "Qwen2ForCausalLM", ("qkv",)),
        Architecture("qwen3", "Qwen3ForCausalLM", ("none",), qk_norm=True),
        Architecture("mistral", "MistralForCausalLM", ("none",), window=True),
        Architecture("granite", "GraniteForCausalLM", ("none", "all"), multipliers=True),
        Architecture("mixtral", "MixtralForCausalLM", ("none",), window=True, experts=_MIXTRAL),
        Architecture("qwen3_moe", "Qwen3MoeForCausalLM", ("none",), qk_norm=True, experts=_QWEN, dense_layers=True),
        Architecture("granitemoe", "GraniteMoeForCausalLM", ("none",), multipliers=True, experts=_GRANITE),
    )
}


def biases_of(model: ModelConfig) -> Biases:
    """Which linear layers have biases."""
    return "all" if model.linear_bias else "qkv" if model.qkv_bias else "none"


def from_hf_config(values: Any, source: str) -> Config:
    """The configuration of a model of Hugging Face's.

    Args:
        values: a ``PreTrainedConfig`` of transformers.
        source: where it is from, for errors.

    Raises:
        ConfigError: the architecture is unknown here, or uses something that is missing here; it is named.
    """

    def refuse(what: str, value: object) -> ConfigError:
        return ConfigError(source, f"{what} = {value!r} has no counterpart here", "convert another model")

    kind = ARCHITECTURES.get(values.model_type)
    if kind is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(source, f"its model_type is {values.model_type!r}", f"convert one of {known}")
    if values.hidden_act != "silu":
        raise refuse("hidden_act", values.hidden_act)
    if getattr(values, "quantization_config", None) is not None:
        raise refuse("quantization_config", "…")
    layer_types = set(getattr(values, "layer_types", None) or ()) - {"full_attention"}
    if layer_types:
        raise refuse("layer_types", sorted(layer_types)[0])
    if kind.dense_layers and values.sliding_window is not None:
        raise refuse("sliding_window", values.sliding_window)
    heads = values.num_attention_heads
    window = values.sliding_window if kind.window else None
    model = ModelConfig(
        num_layers=values.num_hidden_layers,
        hidden_size=values.hidden_size,
        ffn_hidden_size=values.intermediate_size if kind.experts is None or kind.dense_layers else None,
        num_attention_heads=heads,
        num_query_groups=values.num_key_value_heads,
        kv_channels=getattr(values, "head_dim", None) or values.hidden_size // heads,
        max_position_embeddings=values.max_position_embeddings,
        norm_epsilon=values.rms_norm_eps,
        swiglu=True,
        qk_layernorm=kind.qk_norm,
        untie_embeddings_and_output_weights=not values.tie_word_embeddings,
        vocab_size=values.vocab_size,
        init_method_std=values.initializer_range,
        window_size=None if window is None else window - 1,
        softmax_scale=values.attention_multiplier if kind.multipliers else None,
        **_biases(kind, values, refuse),
        **_rope(values.rope_parameters, refuse),
    )
    rules = ParametrizationConfig()
    if kind.multipliers:
        rules = ParametrizationConfig(
            mup_embedding_mult=values.embedding_multiplier,
            mup_residual_mult=values.residual_multiplier,
            mup_output_mult=1.0 / values.logits_scaling,
        )
    training = TrainingConfig(seq_length=values.max_position_embeddings)
    moe = routing.from_fields(kind, values)
    return Config(model=model, moe=moe, parametrization=rules, training=training)


def _biases(kind: Architecture, values: Any, refuse: Any) -> dict[str, Any]:
    if kind.biases == ("qkv",):
        return {"disable_bias_linear": True, "add_qkv_bias": True}
    attention, mlp = values.__dict__.get("attention_bias", False), values.__dict__.get("mlp_bias", False)
    if attention != mlp:
        # Here the output projections of both branches have a bias, or neither.
        raise refuse(f"attention_bias = {attention!r} with mlp_bias", mlp)
    return {"disable_bias_linear": not attention}


def _rope(parameters: dict[str, Any], refuse: Any) -> dict[str, Any]:
    kind, rest = parameters.get("rope_type", "default"), dict.fromkeys(("partial_rotary_factor",), 1.0) | parameters
    if rest["partial_rotary_factor"] not in (None, 1.0):
        raise refuse("partial_rotary_factor", rest["partial_rotary_factor"])
    if kind == "default":
        return {"rotary_base": float(parameters["rope_theta"])}
    if kind != "llama3":
        raise refuse("rope_type", kind)
    for name, value in _LLAMA3.items():
        if parameters[name] != value:
            raise refuse(f"rope_parameters.{name}", parameters[name])
    factor = float(parameters["factor"])
    return {"rotary_base": float(parameters["rope_theta"]), "use_rope_scaling": True, "rope_scaling_factor": factor}


@dataclass(frozen=True)
class Target:
    """How a model is exported.

    Attributes:
        architecture: what it becomes.
        fields: of its ``config.json``.
        fold: factors that the weights must take up, because the architecture doesn't apply them itself.
        unties: whether embedding and output layer, which were one matrix, become two.
        gates: factor on the gates of the experts, which their output weights must take up.
    """

    architecture: Architecture
    fields: dict[str, Any]
    fold: Rescaling
    unties: bool
    gates: float = 1.0


def to_hf_config(config: Config, name: str | None = None, multipliers: Multipliers | None = None) -> Target:
    """What a model becomes.

    Args:
        config: of the model, its vocabulary size known.
        name: ``model_type`` of the architecture; default: the plainest that can hold it, Granite where multipliers are
            to be mapped.
        multipliers: fold them into the weights, or map them to Granite's fields; default: map for Granite, else fold.

    Raises:
        ConfigError: no architecture, or not the one asked for, can hold the model.
    """
    model = config.model
    _check_exportable(config)
    if name is None:
        name = _plainest(config, multipliers)
    kind = ARCHITECTURES[name]
    if multipliers is None:
        multipliers = "granite" if kind.multipliers else "fold"
    _check_holds(kind, config, multipliers)
    wanted = forward_multipliers(config)
    applied = plain_multipliers(config)
    if multipliers == "granite":
        # One factor serves both branches: what the MLP's has beyond it goes into its weights.
        applied = replace(wanted, mlp_branch=wanted.attention_branch)
    fold = quotient(wanted, applied)
    was_tied = not model.untie_embeddings_and_output_weights
    tied = was_tied and fold.embedding == fold.logits
    fields = _fields(config, kind, tied)
    if kind.multipliers:
        fields |= {
            "embedding_multiplier": applied.embedding,
            "attention_multiplier": applied.attention_logits,
            "residual_multiplier": applied.attention_branch,
            "logits_scaling": 1.0 / applied.logits,
        }
    gates = config.moe.moe_router_topk_scaling_factor or 1.0
    return Target(kind, fields, Rescaling(fold, qk_norm=kind.qk_norm), unties=was_tied and not tied, gates=gates)


def plain_multipliers(config: Config) -> ForwardMultipliers:
    """What a standard model applies.

    Raises:
        ConfigError: the configuration's operations are unit-scaled, so that no factors on weights make it one.
    """
    if scheme_of(config).operations is not Operations.PLAIN:
        raise ConfigError(
            f"--parametrization {config.parametrization.parametrization}",
            "its unit-scaled operations are no factors that weights could take up",
            "export models of the other parametrizations",
        )
    return ForwardMultipliers(1.0, 1.0 / math.sqrt(config.model.head_dim), 1.0, 1.0, 1.0)


def _plainest(config: Config, multipliers: Multipliers | None) -> str:
    model, has_experts = config.model, config.moe.num_experts is not None
    if multipliers == "granite":
        return "granitemoe" if has_experts else "granite"
    if has_experts:
        return "qwen3_moe" if model.qk_layernorm else "mixtral"
    if model.qk_layernorm:
        return "qwen3"
    if biases_of(model) == "qkv":
        return "qwen2"
    return "llama" if model.window_size is None else "mistral"


def _check_exportable(config: Config) -> None:
    """Refuses what none of the architectures has."""
    model = config.model
    for name, needed in (
        ("normalization", "RMSNorm"),
        ("swiglu", True),
        ("position_embedding_type", "rope"),
        ("rotary_percent", 1.0),
        ("norm_position", "pre"),
        ("norm_affine", True),
        ("multi_latent_attention", False),
    ):
        value = getattr(model, name)
        if value != needed:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {value}",
                f"the architectures of Hugging Face that are written here need {needed}",
                "export another model",
            )
    routing.check_exportable(config)


def _check_holds(kind: Architecture, config: Config, multipliers: Multipliers) -> None:
    why = routing.why_not(kind, config) or _why_not(kind, config.model, multipliers)
    if why:
        raise ConfigError(f"--architecture {kind.model_type}", why, "choose another one, or leave the flag out")


def _why_not(kind: Architecture, model: ModelConfig, multipliers: Multipliers) -> str | None:
    """Why an architecture can't hold the rest of a model; None if it can."""
    biases = biases_of(model)
    if biases not in kind.biases:
        return f"it has biases on {' or '.join(kind.biases)} of its linear layers, the model on {biases}"
    if model.qk_layernorm != kind.qk_norm:
        return f"it {'needs' if kind.qk_norm else 'has no'} norms on queries and keys (--qk-layernorm)"
    if model.window_size is not None and not kind.window:
        return f"it has no sliding window (--window-size {model.window_size})"
    if multipliers == "granite" and not kind.multipliers:
        return "it has no fields for multipliers"
    if kind.model_type == "llama" and model.hidden_size % model.num_attention_heads:
        return f"it wants --hidden-size {model.hidden_size} to divide by {model.num_attention_heads} heads"
    return None


def _fields(config: Config, kind: Architecture, tied: bool) -> dict[str, Any]:
    model = config.model
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if model.use_rope_scaling:
        rope |= {"rope_type": "llama3", "factor": model.rope_scaling_factor, **_LLAMA3}
    fields: dict[str, Any] = {
        "architectures": [kind.model_class],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings or config.training.seq_length,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": tied,
        "rope_parameters": rope,
    }
    if "all" in kind.biases:
        fields |= {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias}
    if kind.window:
        fields["sliding_window"] = None if model.window_size is None else model.window_size + 1
    return fields | routing.to_fields(kind, config)
