"""Routers and experts in configurations of Hugging Face's architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_mup.config import Config, ConfigError, MoEConfig

if TYPE_CHECKING:
    from megatron_mup.checkpoint.convert.architectures import Architecture


def from_fields(kind: Architecture, values: Any) -> MoEConfig:
    """Experts of a configuration of transformers."""
    if kind.experts is None:
        return MoEConfig()
    if not kind.dense_layers:
        return MoEConfig(
            num_experts=values.num_local_experts,
            moe_router_topk=values.num_experts_per_tok,
            moe_ffn_hidden_size=values.intermediate_size,
        )
    dense = set(values.mlp_only_layers or ())
    step, count = values.decoder_sparse_step, values.num_hidden_layers
    pattern = [int(layer not in dense and (layer + 1) % step == 0) for layer in range(count)]
    return MoEConfig(
        num_experts=values.num_local_experts,
        moe_router_topk=values.num_experts_per_tok,
        moe_ffn_hidden_size=values.moe_intermediate_size,
        moe_layer_freq="1" if all(pattern) else str(pattern),
        moe_router_pre_softmax=not values.norm_topk_prob,
    )


def to_fields(kind: Architecture, config: Config) -> dict[str, Any]:
    """The same the other way round, for a model that the architecture can hold."""
    moe = config.moe
    if kind.experts is None:
        return {}
    fields: dict[str, Any] = {"num_local_experts": moe.num_experts, "num_experts_per_tok": moe.moe_router_topk}
    if not kind.dense_layers:
        return {**fields, "intermediate_size": config.expert_ffn_size}
    layers = moe.layers(config.model.num_layers)
    return {
        **fields,
        "moe_intermediate_size": config.expert_ffn_size,
        "norm_topk_prob": not moe.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [number for number, has_experts in enumerate(layers) if not has_experts],
    }


def check_exportable(config: Config) -> None:
    """Refuses what none of the architectures has."""
    moe = config.moe
    if moe.num_experts is None:
        return
    for name, needed in (
        ("moe_shared_expert_intermediate_size", None),
        ("moe_router_score_function", "softmax"),
        ("moe_router_sqrt_gates", False),
        ("moe_router_num_groups", None),
    ):
        value = getattr(moe, name)
        if value != needed:
            flag = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            raise ConfigError(
                flag, "none of the architectures of Hugging Face that are written here has it", "export another model"
            )


def why_not(kind: Architecture, config: Config) -> str | None:
    """Why an architecture can't hold a model's experts, or their absence; None if it can."""
    moe = config.moe
    if (moe.num_experts is None) != (kind.experts is None):
        return "it has no experts" if kind.experts is None else "it is made of experts, and the model has none"
    if moe.num_experts is None or kind.dense_layers:
        return None
    if not all(moe.layers(config.model.num_layers)):
        return f"all of its layers have experts (--moe-layer-freq {moe.moe_layer_freq})"
    if moe.moe_router_pre_softmax:
        return "its softmax is over the chosen experts (--moe-router-pre-softmax)"
    return None
