"""One recipe at other sizes: what checks and sweeps compare, and what a proxy is."""

from __future__ import annotations

import argparse
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from megatron_mup.config import Config, ConfigError
from megatron_mup.config.fields import settings
from megatron_mup.parametrization.base import BaseSizes
from megatron_mup.parametrization.schemes import Operations
from megatron_mup.parametrization.table import scheme_of

Growth = Literal["heads", "head-dim"]
"""What grows with the hidden size: the number of heads at one head width, or the head width at one number of heads."""


class Size(NamedTuple):
    """What a check grows; ``num_experts`` None: as many as the recipe has."""

    hidden_size: int
    num_layers: int
    num_experts: int | None = None


def sizes_of(text: str) -> tuple[int, ...]:
    """Sizes on a command line, ``256,512``, by growing size; a type for argparse."""
    try:
        sizes = tuple(sorted({int(word) for word in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of sizes; write 256,512") from None
    if sizes[0] < 1:
        raise argparse.ArgumentTypeError("sizes are at least 1")
    return sizes


def pin_base(config: Config) -> Config:
    """The recipe with every base size written out, so that none of them follows a later change of size.

    Base sizes that the recipe leaves open are those that it means as it stands: in proportion to its base hidden size,
    or, without one, its own. A size that is no whole number stays open.
    """
    scheme = scheme_of(config)
    if scheme.operations is Operations.UMUP:
        return config  # has no base model
    rules, sizes = config.parametrization, BaseSizes.of(config)
    pinned = replace(
        rules,
        mup_base_hidden_size=_whole(sizes.hidden),
        mup_base_ffn_hidden_size=_whole(sizes.ffn),
        mup_base_num_attention_heads=_whole(sizes.heads),
        mup_base_head_dim=_whole(sizes.head_dim),
        mup_base_q_lora_rank=_whole(sizes.q_lora_rank),
        mup_base_kv_lora_rank=_whole(sizes.kv_lora_rank),
        mup_base_moe_ffn_hidden_size=_whole(sizes.expert_ffn) if config.moe.num_experts else None,
        base_num_layers=(rules.base_num_layers or config.model.num_layers) if scheme.depth else None,
    )
    return replace(config, parametrization=pinned)


def resize(
    config: Config, hidden_size: int, num_layers: int, grow: Growth = "heads", num_experts: int | None = None
) -> Config:
    """The recipe at another width and depth; everything else stays, base sizes too (see :func:`pin_base`).

    Widths of MLP, experts and latents, and heads and key/value heads or the head width, keep their proportion to the
    hidden size exactly.

    With another number of experts, of which a token still goes to as many, micro-batch and global batch grow along:
    an expert sees as many tokens as before.

    Raises:
        ConfigError: a size that would not be a whole number, or breaks an MLP's rows of eight.
    """
    model, training = config.model, config.training
    ratio = Fraction(hidden_size, model.hidden_size)
    sizes: dict[str, Any] = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": _scaled(model.ffn_size, ratio, "--ffn-hidden-size", 8 if model.swiglu else 1),
        "num_query_groups": model.query_groups,
        "kv_channels": None if model.multi_latent_attention else model.head_dim,
    }
    if grow == "heads":
        sizes["num_attention_heads"] = _scaled(model.num_attention_heads, ratio, "--num-attention-heads")
        sizes["num_query_groups"] = _scaled(model.query_groups, ratio, "--num-query-groups")
    else:
        widths = {"kv_channels": model.head_dim}
        if model.multi_latent_attention:
            parts = ("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
            widths = {name: getattr(model, name) for name in parts}
        sizes |= {name: _scaled(width, ratio, settings()[name].flag, 2) for name, width in widths.items()}
    sizes |= {
        name: _scaled(rank, ratio, settings()[name].flag)
        for name in ("q_lora_rank", "kv_lora_rank")
        if (rank := getattr(model, name)) is not None
    }
    experts: dict[str, Any] = {
        name: _scaled(size, ratio, settings()[name].flag, 8 if model.swiglu else 1)
        for name in ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
        if (size := getattr(config.moe, name)) is not None
    }
    if num_experts is not None:
        assert config.moe.num_experts is not None
        more = Fraction(num_experts, config.moe.num_experts)
        experts["num_experts"] = num_experts
        batch: dict[str, Any] = {
            name: _scaled(size, more, settings()[name].flag)
            for name, size in (
                ("micro_batch_size", training.micro_batch_size),
                ("global_batch_size", config.global_batch_size(1)),
            )
        }
        training = replace(training, **batch)
    return replace(
        config,
        model=replace(model, num_layers=num_layers, **sizes),
        moe=replace(config.moe, **experts),
        training=training,
    )


def _scaled(size: int, ratio: Fraction, flag: str, multiple: int = 1) -> int:
    scaled = size * ratio
    if scaled.denominator != 1 or scaled < multiple or scaled % multiple:
        unit = "a whole number" if multiple == 1 else f"a multiple of {multiple}"
        raise ConfigError(
            f"{flag} {size} at {float(ratio):g} times the size",
            f"{float(scaled):g} is not {unit}",
            f"choose a size at which {flag} {size} divides, or another {flag} in the recipe",
        )
    return int(scaled)


def _whole(size: float | None) -> int | None:
    return int(size) if size is not None and size == int(size) else None
