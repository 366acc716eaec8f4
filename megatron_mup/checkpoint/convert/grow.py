"""A trained model made deeper or wider in its MLPs that computes what it did (arXiv 2308.06103).

New layers start with output projections of zero, so they add nothing to the residual stream; new MLP channels start
with output columns of zero. All else that is new has the initial values of a new run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from megatron_mup.checkpoint.convert import logits
from megatron_mup.checkpoint.convert.hf import scaled
from megatron_mup.checkpoint.convert.names import fuse, split
from megatron_mup.checkpoint.convert.output import ConversionError, staged
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.rescale import Rescaling, rescaling
from megatron_mup.checkpoint.save import save
from megatron_mup.checkpoint.state import MODEL, LazyPiece
from megatron_mup.checkpoint.whole import SavedModel, open_model
from megatron_mup.config import Config, ConfigError, to_dict
from megatron_mup.config.rules import check_layout, check_model
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parallel.mesh import AXES
from megatron_mup.parametrization.init import initial_values
from megatron_mup.parametrization.meta import ParamMeta
from megatron_mup.parametrization.report import table_rows
from megatron_mup.parametrization.table import scaling


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
    say: Callable[[str], None] = print,
) -> logits.Comparison:
    """Writes a larger model of the same function, weights only, as iteration 0.

    Args:
        folder: what ``--save`` named.
        target: a new folder.
        step: iteration; default: the latest.
        num_layers, ffn_hidden_size: the new sizes; default: as they are.
        say: told what happens.

    Raises:
        ConfigError: sizes that are smaller or impossible, a model with experts or other operations.
        ConversionError: the result computes something else.
    """
    saved = open_model(folder, step)
    config = _grown(saved.config, num_layers, ffn_hidden_size)
    change, layers = rescaling(saved.config, config), sources(saved.config.model.num_layers, config.model.num_layers)
    metas = {meta.name: meta for meta in parameter_metas(config, saved.vocab_size)}
    pieces = [
        LazyPiece(
            key=f"{MODEL}/{meta.name}",
            tensor=torch.empty(meta.shape, device="meta"),
            shape=meta.shape,
            offsets=(0,) * len(meta.shape),
            make=partial(_value, meta, metas, saved, config, change, layers),
        )
        for meta in metas.values()
    ]
    manifest = Manifest(
        iteration=0,
        consumed_samples=0,
        config=to_dict(config),
        parametrization=table_rows(list(metas.values()), config),
        layout=dict.fromkeys(AXES, 1),
        extra={"grown": {"from": str(saved.path), "layers": layers}},
    )
    with staged(target) as temporary:
        save(temporary, list(pieces), manifest)
        tokens = logits.random_tokens(saved.vocab_size)
        before, after = (logits.our_logits(one, tokens) for one in (saved, open_model(temporary)))
        comparison = logits.compare(after, before, logits.TOLERANCE[torch.float32])
        if not comparison.holds:
            raise ConversionError(comparison)
    say(f"layers: {', '.join('new' if layer is None else str(layer) for layer in layers)}; old weights are {change}")
    say(f"{comparison}\nwrote {target}")
    return comparison


def _grown(config: Config, num_layers: int | None, ffn_hidden_size: int | None) -> Config:
    model = config.model
    layers, ffn = num_layers or model.num_layers, ffn_hidden_size or model.ffn_size
    for flag, old, new in (("--num-layers", model.num_layers, layers), ("--ffn-hidden-size", model.ffn_size, ffn)):
        if new < old:
            raise ConfigError(f"{flag} {new}", f"the model has {old}, and growing only adds", f"use {old} or more")
    if config.moe.num_experts is not None:
        raise ConfigError("--num-experts", "models with experts can't be grown", "grow a dense model")
    if model.norm_position != "pre":
        raise ConfigError(
            f"--norm-position {model.norm_position}", "a norm behind a branch undoes its zeros", "grow a pre-norm model"
        )
    grown = replace(config, model=replace(model, num_layers=layers, ffn_hidden_size=ffn))
    check_model(grown)
    check_layout(grown, 1)
    return grown


def _value(
    meta: ParamMeta,
    metas: dict[str, ParamMeta],
    saved: SavedModel,
    config: Config,
    change: Rescaling,
    layers: list[int | None],
) -> torch.Tensor:
    """The value of a parameter of the larger model."""
    name = meta.name
    # What a branch puts out is zero where it is new.
    is_output = ".linear_proj." in name or ".linear_fc2." in name
    value = torch.zeros(meta.shape) if is_output else _initial(meta, config)
    if meta.layer is not None:
        source = layers[meta.layer]
        if source is None:
            return value
        name = name.replace(f".layers.{meta.layer}.", f".layers.{source}.", 1)
    weight = metas.get(f"{meta.name.rpartition('.')[0]}.weight", meta)
    old = saved.tensor(name)
    parts = split(old, weight.blocks)
    blocks: list[str | None] = [block.name for block in weight.blocks] or [None]
    parts = [scaled(part, change.factor(meta, block)) for part, block in zip(parts, blocks, strict=True)]
    value[tuple(slice(0, size) for size in old.shape)] = fuse(parts, weight.blocks)
    return value


def _initial(meta: ParamMeta, config: Config) -> torch.Tensor:
    std, seed = scaling(meta, config).init_std, config.training.seed
    first = (0,) * len(meta.shape)
    return initial_values(meta, std, seed, first, meta.shape, torch.device("cpu"), torch.float32)
