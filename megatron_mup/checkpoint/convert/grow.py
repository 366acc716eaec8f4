"""A trained model made deeper or wider that computes what it did (arXiv 2308.06103).

New layers start with output projections of zero, so they add nothing to the residual stream; new MLP channels start
with output columns of zero; new channels of the residual stream are zero, because nothing writes to them yet. All else
that is new has the initial values of a new run.

A stream of H channels and H' - H zeros has a mean square that is H / H' of what it was. RMSNorm makes of it the same
where its epsilon shrinks as much and its gains take up sqrt(H / H'). Norms on queries and keys have the same epsilon;
they give the same where queries and keys shrink by sqrt(H / H').
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mup.checkpoint.convert import logits
from megatron_mup.checkpoint.convert.derive import derive, initial
from megatron_mup.checkpoint.convert.hf import scaled
from megatron_mup.checkpoint.convert.names import fuse, split
from megatron_mup.checkpoint.rescale import Rescaling, rescaling
from megatron_mup.checkpoint.whole import SavedModel, open_model
from megatron_mup.config import Config, ConfigError
from megatron_mup.config.rules import check_layout, check_model
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.schemes import Operations
from megatron_mup.parametrization.table import scheme_of


def sources(old: int, new: int) -> list[int | None]:
    """Which old layer each of the new ones is, spread evenly; None: one that is added."""
    places = {layer * new // old: layer for layer in range(old)}
    return [places.get(place) for place in range(new)]


def grow(
    folder: str | Path,
    target: str | Path,
    *,
    step: int | None = None,
    num_layers: int | None = None,
    ffn_hidden_size: int | None = None,
    hidden_size: int | None = None,
    say: Callable[[str], None] = print,
) -> logits.Comparison:
    """Writes a larger model of the same function, weights only, as iteration 0.

    Args:
        folder: what ``--save`` named.
        target: a new folder.
        step: iteration; default: the latest.
        num_layers, ffn_hidden_size, hidden_size: the new sizes; default: as they are.
        say: told what happens.

    Raises:
        ConfigError: sizes that are smaller or impossible, a model with experts or other operations.
        ConversionError: the result computes something else.
    """
    saved = open_model(folder, step)
    config = grown_config(saved.config, num_layers, ffn_hidden_size, hidden_size)
    metas = {meta.name: meta for meta in parameter_metas(config, saved.vocab_size)}
    layers = sources(saved.config.model.num_layers, config.model.num_layers)
    growth = _Growth(saved, config, metas, rescaling(saved.config, config), layers)
    comparison = derive(
        saved, config, metas, growth.value, target, {"grown": {"from": str(saved.path), "layers": layers}}
    )
    told = ", ".join("new" if layer is None else str(layer) for layer in layers)
    say(f"layers: {told}; old weights are {growth.change}")
    if growth.shrink != 1.0:
        say(
            f"gains of norms are multiplied by {growth.shrink:.6g}; --norm-epsilon {config.model.norm_epsilon!r} and "
            f"--kv-channels {config.model.kv_channels} belong to the new model"
        )
    say(f"{comparison}\nwrote {target}")
    return comparison


def grown_config(
    config: Config, num_layers: int | None = None, ffn_hidden_size: int | None = None, hidden_size: int | None = None
) -> Config:
    """The configuration of a larger model; None leaves a size as it is.

    Raises:
        ConfigError: it can't compute what the model computes, or sizes don't fit.
    """
    model = config.model
    layers, ffn = num_layers or model.num_layers, ffn_hidden_size or model.ffn_size
    hidden = hidden_size or model.hidden_size
    for flag, old, new in (
        ("--num-layers", model.num_layers, layers),
        ("--ffn-hidden-size", model.ffn_size, ffn),
        ("--hidden-size", model.hidden_size, hidden),
    ):
        if new < old:
            raise ConfigError(f"{flag} {new}", f"the model has {old}, and growing only adds", f"use {old} or more")
    if config.moe.num_experts is not None:
        raise ConfigError("--num-experts", "models with experts can't be grown", "grow a dense model")
    if model.norm_position != "pre":
        raise ConfigError(
            f"--norm-position {model.norm_position}", "a norm behind a branch undoes its zeros", "grow a pre-norm model"
        )
    grown = replace(model, num_layers=layers, ffn_hidden_size=ffn)
    if hidden != model.hidden_size:
        _check_width(config, hidden)
        epsilon = model.norm_epsilon * model.hidden_size / hidden
        grown = replace(grown, hidden_size=hidden, kv_channels=model.head_dim, norm_epsilon=epsilon)
    result = replace(config, model=grown)
    check_model(result)
    check_layout(result, 1)
    return result


def _check_width(config: Config, hidden: int) -> None:
    """Refuses models that can't keep their function in a wider residual stream."""
    model = config.model
    why = None
    if model.normalization != "RMSNorm":
        why = f"--normalization {model.normalization} subtracts a mean, which zeros would change"
    elif not model.norm_affine:
        why = "norms have no gains that could make up for the zeros (--no-norm-affine)"
    elif model.multi_latent_attention:
        why = "the norms of latents (--multi-latent-attention) have the same epsilon as the stream's"
    elif scheme_of(config).operations is not Operations.PLAIN:
        why = f"operations are unit-scaled (--parametrization {config.parametrization.parametrization})"
    if why:
        raise ConfigError(f"--hidden-size {hidden}", why, "grow in layers and MLP width only")


@dataclass(frozen=True)
class _Growth:
    """Values of a larger model.

    Attributes:
        saved: the small one.
        config, metas: of the large one.
        change: what its multipliers ask of the old weights.
        layers: old number of each layer; None: a new one.
    """

    saved: SavedModel
    config: Config
    metas: Mapping[str, ParamMeta]
    change: Rescaling
    layers: list[int | None]

    @property
    def shrink(self) -> float:
        """What the root of the stream's mean square is multiplied by."""
        return math.sqrt(self.saved.config.model.hidden_size / self.config.model.hidden_size)

    def value(self, meta: ParamMeta) -> torch.Tensor:
        """The value of a parameter."""
        name = meta.name
        # What is new in the stream is zero: in what starts it, and in what branches put out.
        writes = meta.role in (Role.EMBEDDING, Role.POSITION_EMBEDDING) or ".linear_proj." in name
        value = torch.zeros(meta.shape) if writes or ".linear_fc2." in name else initial(meta, self.config)
        if meta.layer is not None:
            source = self.layers[meta.layer]
            if source is None:
                return value
            name = name.replace(f".layers.{meta.layer}.", f".layers.{source}.", 1)
        weight = self.metas.get(f"{meta.name.rpartition('.')[0]}.weight", meta)
        old = self.saved.tensor(name)
        blocks: list[str | None] = [block.name for block in weight.blocks] or [None]
        parts = zip(split(old, weight.blocks), blocks, strict=True)
        value[tuple(slice(0, size) for size in old.shape)] = fuse(
            [scaled(part, self._factor(meta, block)) for part, block in parts], weight.blocks
        )
        return value

    def _factor(self, meta: ParamMeta, block: str | None) -> float:
        normed = self.config.model.qk_layernorm and block in ("query", "key")
        shrinks = meta.role is Role.NORM or normed
        return self.change.factor(meta, block) * (self.shrink if shrinks else 1.0)
