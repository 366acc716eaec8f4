"""From and to Megatron-LM's checkpoints."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_mup.checkpoint.convert import logits
from megatron_mup.checkpoint.convert.architectures import plain_multipliers
from megatron_mup.checkpoint.convert.megatron_files import LEGACY_FILE, MegatronWeights, is_gated, open_megatron
from megatron_mup.checkpoint.convert.names import fuse, split
from megatron_mup.checkpoint.convert.output import ConversionError, save_pieces, staged
from megatron_mup.checkpoint.files import POINTER, folder_name
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.rescale import Rescaling, quotient
from megatron_mup.checkpoint.state import MODEL, LazyPiece
from megatron_mup.checkpoint.whole import SavedModel, open_model
from megatron_mup.config import Config, ConfigError, DataConfig, ModelConfig, MoEConfig, TrainingConfig, to_dict
from megatron_mup.config.bounds import check_bounds
from megatron_mup.config.fields import settings
from megatron_mup.config.moe_rules import check_moe
from megatron_mup.config.rules import check_layout, check_model
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parallel.mesh import AXES
from megatron_mup.parametrization.meta import Block, ParamMeta, Role
from megatron_mup.parametrization.report import table_rows
from megatron_mup.parametrization.table import forward_multipliers

_SAME = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "normalization"),
    *("swiglu", "squared_relu", "add_qkv_bias", "qk_layernorm", "untie_embeddings_and_output_weights"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "max_position_embeddings", "init_method_std"),
    *("make_vocab_size_divisible_by", "use_rope_scaling", "rope_scaling_factor", "softmax_scale"),
)
"""Settings with Megatron's own name and meaning."""

_REFUSED = {
    "moe_shared_expert_gate": False,
    "moe_latent_size": None,
    "multi_latent_attention": False,
    "rotary_interleaved": False,
    "apply_layernorm_1p": False,
    "mtp_num_layers": None,
    "window_size": None,
    "is_hybrid_model": False,
}
"""Settings that must have this value (or be absent)."""


_SAME_OF_EXPERTS = (
    *("num_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
    *("moe_router_score_function", "moe_router_pre_softmax", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_router_enable_expert_bias"),
    *("moe_router_bias_update_rate", "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff"),
)
"""The same of experts and routers."""


def experts_of_arguments(values: Any) -> MoEConfig:
    """Experts of a run of Megatron-LM.

    Raises:
        ConfigError: it chooses experts in a way that is missing here.
    """
    if not getattr(values, "num_experts", None):
        return MoEConfig()
    # There may be several balancing losses there; they don't belong to the model.
    given = {
        name: value
        for name in _SAME_OF_EXPERTS
        if (value := getattr(values, name, None)) is not None and not isinstance(value, list)
    }
    for name, value in given.items():
        if (setting := settings()[name]).choices and value not in setting.choices:
            raise ConfigError(f"--load: {setting.flag} {value}", "has no counterpart here", "convert a run without it")
    if isinstance(frequency := getattr(values, "moe_layer_freq", 1), list | int):
        frequency = str(frequency)
    return MoEConfig(**given, moe_layer_freq=frequency)


def config_of_arguments(values: Any, vocab_size: int | None = None) -> Config:
    """The configuration of a run of Megatron-LM.

    Args:
        values: its arguments.
        vocab_size: true number of token ids; None takes the padded one.

    Raises:
        ConfigError: something of it is missing here; it is named.
    """
    if not isinstance(values, Namespace):
        raise ConfigError("--load", "the checkpoint holds no arguments of Megatron-LM", "convert another one")
    for name, needed in _REFUSED.items():
        if (value := getattr(values, name, needed)) not in (needed, None, 0):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"--load: {flag} {value}", "has no counterpart here", "convert a run without it")
    given = {name: getattr(values, name) for name in _SAME if getattr(values, name, None) is not None}
    if getattr(values, "group_query_attention", False):
        given["num_query_groups"] = values.num_query_groups
    given["rotary_base"] = float(given.get("rotary_base", 10000.0))
    epsilon = getattr(values, "norm_epsilon", getattr(values, "layernorm_epsilon", 1e-5))
    model = ModelConfig(
        **given,
        norm_epsilon=float(epsilon),
        disable_bias_linear=not getattr(values, "add_bias_linear", True),
        vocab_size=vocab_size or values.padded_vocab_size,
    )
    kind = getattr(values, "tokenizer_type", None)
    data = DataConfig()
    if kind in ("SentencePieceTokenizer", "HuggingFaceTokenizer") and getattr(values, "tokenizer_model", None):
        data = DataConfig(tokenizer_type=kind, tokenizer_model=str(values.tokenizer_model))
    training = TrainingConfig(seq_length=values.seq_length)
    return Config(model=model, moe=experts_of_arguments(values), data=data, training=training)


def from_megatron(
    folder: str | Path, target: str | Path, *, vocab_size: int | None = None, say: Callable[[str], None] = print
) -> None:
    """Writes the model of a Megatron-LM checkpoint as one of ours, weights only, at its own iteration.

    Raises:
        ConfigError: something in the model is missing here, or a folder can't be read or written.
    """
    weights = open_megatron(Path(folder))
    config = config_of_arguments(weights.arguments, vocab_size)
    check_bounds(config)
    check_model(config)
    check_layout(config, 1)
    check_moe(config, 1)
    assert config.model.vocab_size is not None
    metas = {meta.name: meta for meta in parameter_metas(config, config.model.vocab_size)}
    dtype = weights.tensor(metas["decoder.final_layernorm.weight"]).dtype
    pieces = [_piece(meta, metas, weights, dtype) for meta in metas.values()]
    if config.moe.moe_router_enable_expert_bias:
        pieces += [_expert_bias(meta, weights) for meta in metas.values() if meta.role is Role.ROUTER]
    manifest = Manifest(
        iteration=weights.iteration,
        consumed_samples=0,
        config=to_dict(config),
        parametrization=table_rows(list(metas.values()), config),
        layout=dict.fromkeys(AXES, 1),
        extra={"megatron": {"iteration": weights.iteration}},
    )
    with staged(target) as temporary:
        save_pieces(temporary, pieces, manifest)
    say(f"wrote {target}: iteration {weights.iteration}, {config.model.vocab_size} token ids")


def _piece(meta: ParamMeta, metas: dict[str, ParamMeta], weights: MegatronWeights, dtype: torch.dtype) -> LazyPiece:
    return LazyPiece(
        key=f"{MODEL}/{meta.name}",
        tensor=torch.empty(meta.shape, dtype=dtype, device="meta"),
        shape=meta.shape,
        offsets=(0,) * len(meta.shape),
        make=partial(_ours, meta, metas, weights, dtype),
    )


def expert_bias_of(router: ParamMeta) -> str:
    """Name of the bias beside a router's weight."""
    return f"{router.name.removesuffix('weight')}expert_bias"


def _expert_bias(router: ParamMeta, weights: MegatronWeights) -> LazyPiece:
    """The bias beside a router's weight that counts in its choice."""
    name = expert_bias_of(router)
    assert router.layer is not None
    shape = (router.shape[0],)
    return LazyPiece(
        key=f"{MODEL}/{name}",
        tensor=torch.empty(shape, device="meta"),
        shape=shape,
        offsets=(0,),
        make=partial(_in_fp32, weights, name, router.layer),
    )


def _in_fp32(weights: MegatronWeights, name: str, layer: int) -> torch.Tensor:
    return weights.buffer(name, layer).float()


def blocks_of(meta: ParamMeta, metas: dict[str, ParamMeta]) -> tuple[Block, ...]:
    """How gate and up lie in a weight, or in the bias of one; empty elsewhere: the rest lies as Megatron's."""
    weight = metas.get(f"{meta.name.rpartition('.')[0]}.weight", meta)
    return weight.blocks if is_gated(weight) and meta.experts is None else ()


def _ours(meta: ParamMeta, metas: dict[str, ParamMeta], weights: MegatronWeights, dtype: torch.dtype) -> torch.Tensor:
    blocks = blocks_of(meta, metas)
    # A bias is gathered as its weight.
    tensor = weights.tensor(replace(meta, blocks=blocks) if blocks else meta).to(dtype)
    if meta.role in (Role.EMBEDDING, Role.READOUT):
        # Padding of the vocabulary.
        tensor = tensor[: meta.shape[0]]
    if blocks:
        tensor = fuse(tensor.chunk(2), blocks)
    if tuple(tensor.shape) != meta.shape:
        raise ConfigError(
            meta.name, f"is {list(tensor.shape)} there and {list(meta.shape)} here", "restore the checkpoint"
        )
    return tensor.contiguous()


def to_megatron(
    folder: str | Path, target: str | Path, *, step: int | None = None, say: Callable[[str], None] = print
) -> logits.Comparison:
    """Writes the model of a checkpoint in Megatron-LM's legacy format ``torch``, for one rank.

    Multipliers are folded into the weights; a tied model whose ends differ is untied. The whole model is in memory. The
    result is read back and its logits are compared.

    Raises:
        ConfigError: Megatron-LM can't hold the model, or a folder can't be read or written.
        ConversionError: the result computes something else.
    """
    saved = open_model(folder, step)
    config, fold = _plain(saved)
    state = dict(_theirs(saved, config, fold))
    padded = state["embedding.word_embeddings.weight"].shape[0]
    iteration = saved.manifest.iteration
    content = {
        "args": _arguments(config, padded),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "model": state,
    }
    with staged(target) as temporary:
        name = folder_name(iteration)
        rank = temporary / name / "mp_rank_00"
        rank.mkdir(parents=True)
        torch.save(content, rank / LEGACY_FILE)
        (temporary / POINTER).write_text(f"{iteration}\n", encoding="utf-8")
        back = temporary / ".back"
        from_megatron(temporary, back, vocab_size=saved.vocab_size, say=lambda _: None)
        tokens = logits.random_tokens(saved.vocab_size)
        tolerance = logits.TOLERANCE.get(next(iter(state.values())).dtype, 1e-5)
        before, after = (logits.our_logits(one, tokens) for one in (saved, open_model(back)))
        comparison = logits.compare(after, before, tolerance)
        shutil.rmtree(back)
        if not comparison.holds:
            raise ConversionError(comparison)
    say(f"{comparison}\nwrote {target}")
    return comparison


def _plain(saved: SavedModel) -> tuple[Config, Rescaling]:
    """The configuration without multipliers, and what the weights must take up."""
    config = saved.config
    if config.moe.moe_router_sqrt_gates:
        raise ConfigError("--moe-router-sqrt-gates", "Megatron-LM doesn't have it", "convert a model without it")
    for name, needed in (
        ("window_size", None),
        ("norm_position", "pre"),
        ("norm_affine", True),
        ("multi_latent_attention", False),
    ):
        if getattr(config.model, name) != needed:
            flag = f"--{name.replace('_', '-')} {getattr(config.model, name)}"
            raise ConfigError(flag, "is not written in Megatron-LM's format yet", "export to Hugging Face's")
    fold = quotient(forward_multipliers(config), plain_multipliers(config))
    tied = not config.model.untie_embeddings_and_output_weights
    untie = tied and fold.embedding != fold.logits
    model = replace(
        config.model,
        softmax_scale=None,
        untie_embeddings_and_output_weights=config.model.untie_embeddings_and_output_weights or untie,
    )
    return replace(config, model=model), Rescaling(fold, qk_norm=model.qk_layernorm)


def _theirs(saved: SavedModel, config: Config, fold: Rescaling) -> list[tuple[str, torch.Tensor]]:
    metas, out = dict(saved.metas), []
    unties = config.model.untie_embeddings_and_output_weights != saved.config.model.untie_embeddings_and_output_weights
    for meta in metas.values():
        tensor = saved.tensor(meta.name)
        if meta.experts is not None:
            matrices = _times(tensor, fold.factor(meta)).chunk(meta.experts)
            names = [meta.name.replace(".experts.", f".experts.local_experts.{n}.") for n in range(meta.experts)]
            out += [(name, matrix.clone()) for name, matrix in zip(names, matrices, strict=True)]
            continue
        if meta.role is Role.ROUTER and config.moe.moe_router_enable_expert_bias:
            name = expert_bias_of(meta)
            out.append((name, saved.tensor(name)))
        weight = metas.get(f"{meta.name.rpartition('.')[0]}.weight", meta)
        parts = split(tensor, weight.blocks)
        blocks: list[str | None] = [block.name for block in weight.blocks] or [None]
        parts = [_times(part, fold.factor(meta, name)) for part, name in zip(parts, blocks, strict=True)]
        value = torch.cat(parts) if is_gated(weight) else fuse(parts, weight.blocks)
        if meta.role in (Role.EMBEDDING, Role.READOUT):
            value = _padded(value, config.model.make_vocab_size_divisible_by)
        out.append((meta.name, value.contiguous()))
        if meta.role is Role.EMBEDDING and unties:
            head = _padded(_times(tensor, fold.factors.logits), config.model.make_vocab_size_divisible_by)
            out.append(("output_layer.weight", head.contiguous()))
    return out


def _times(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    return tensor if factor == 1.0 else (tensor.float() * factor).to(tensor.dtype)


def _padded(tensor: torch.Tensor, multiple: int) -> torch.Tensor:
    """Rows up to Megatron's padded vocabulary; the new ones are zero."""
    return torch.nn.functional.pad(tensor, (0, 0, 0, -tensor.shape[0] % multiple))


def _arguments(config: Config, padded: int) -> Namespace:
    """What Megatron-LM reads with ``--use-checkpoint-args``."""
    model = config.model
    values = {name: getattr(model, name) for name in _SAME if name != "softmax_scale"}
    values |= {
        "ffn_hidden_size": model.ffn_size,
        "kv_channels": model.head_dim,
        "num_query_groups": model.query_groups,
        "group_query_attention": model.query_groups != model.num_attention_heads,
        "add_bias_linear": model.linear_bias,
        "norm_epsilon": model.norm_epsilon,
        "layernorm_epsilon": model.norm_epsilon,
        "padded_vocab_size": padded,
        "max_position_embeddings": model.max_position_embeddings or config.training.seq_length,
        "seq_length": config.training.seq_length,
        "tokenizer_type": config.data.tokenizer_type,
        "tokenizer_model": config.data.tokenizer_model,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "ckpt_format": "torch",
        **_arguments_of_experts(config),
    }
    return Namespace(**values)


def _arguments_of_experts(config: Config) -> dict[str, Any]:
    """The same of experts and routers."""
    if config.moe.num_experts is None:
        return {"num_experts": None}
    return {
        **{name: getattr(config.moe, name) for name in _SAME_OF_EXPERTS},
        "moe_ffn_hidden_size": config.expert_ffn_size,
        "moe_layer_freq": [int(has_experts) for has_experts in config.moe.layers(config.model.num_layers)],
        "moe_grouped_gemm": False,
        "expert_model_parallel_size": 1,
        "expert_tensor_parallel_size": 1,
    }
