"""A dense model as one with experts that computes the same (sparse upcycling, arXiv 2212.05055).

Every expert is a copy of the MLP. A token's gates sum to one, so that whichever copies it goes to, it gets what the MLP
gave. With a granularity G each copy is cut into G experts of 1/G of its channels. They have one router row in common,
so that a token goes to all of them or to none (arXiv 2410.07524); their gates are 1/G of the copy's, which their output
weights make up for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megatron_mup.checkpoint.convert import logits
from megatron_mup.checkpoint.convert.derive import derive, initial
from megatron_mup.checkpoint.convert.names import fuse, split
from megatron_mup.checkpoint.whole import SavedModel, open_model
from megatron_mup.config import Config, ConfigError, MoEConfig, OptimizerConfig
from megatron_mup.config.bounds import check_bounds
from megatron_mup.config.moe_rules import check_moe
from megatron_mup.config.scheme_rules import check_scheme
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.parametrization.meta import ParamMeta, Role

_PARTS = {Role.EXPERT_IN: "linear_fc1", Role.EXPERT_OUT: "linear_fc2"}


def upcycle(
    folder: str | Path,
    target: str | Path,
    *,
    num_experts: int,
    topk: int = 2,
    granularity: int = 1,
    layer_freq: str = "1",
    step: int | None = None,
    say: Callable[[str], None] = print,
) -> logits.Comparison:
    """Writes a model with experts of the same function, weights only, as iteration 0.

    Args:
        folder: what ``--save`` named.
        target: a new folder.
        num_experts, topk: experts of a layer, and of them those of a token; both multiples of the granularity.
        granularity: into how many experts each copy of the MLP is cut.
        layer_freq: which layers get experts, as ``--moe-layer-freq``.
        step: iteration; default: the latest.
        say: told what happens.

    Raises:
        ConfigError: numbers that don't fit, or a model that experts have no place in.
        ConversionError: the result computes something else.
    """
    saved = open_model(folder, step)
    config = _with_experts(saved.config, num_experts, topk, granularity, layer_freq)
    metas = {meta.name: meta for meta in parameter_metas(config, saved.vocab_size)}
    source = _Source(saved, config, saved.metas, granularity)
    comparison = derive(saved, config, metas, source.value, target, {"upcycled": {"from": str(saved.path)}})
    say(f"{comparison}\nwrote {target}")
    return comparison


def _with_experts(config: Config, num_experts: int, topk: int, granularity: int, layer_freq: str) -> Config:
    if config.moe.num_experts is not None:
        raise ConfigError("--num-experts", "the model has experts already", "upcycle a dense model")
    ffn = config.model.ffn_size
    for flag, number in (("--num-experts", num_experts), ("--moe-router-topk", topk), ("--ffn-hidden-size", ffn)):
        if granularity < 1 or number % granularity:
            raise ConfigError(
                f"--moe-upcycling-granularity {granularity}, {flag} {number}",
                "each copy of the MLP is cut into so many experts, which a token visits together",
                "use a granularity that divides experts, top-k and the MLP's width",
            )
    moe = MoEConfig(
        num_experts=num_experts,
        moe_router_topk=topk,
        moe_layer_freq=layer_freq,
        moe_ffn_hidden_size=ffn // granularity,
    )
    # Weights alone are taken over; the run that goes on has an optimizer of its own.
    config = replace(config, moe=moe, optimizer=OptimizerConfig())
    check_bounds(config)
    check_scheme(config)
    check_moe(config, 1)
    return config


@dataclass(frozen=True)
class _Source:
    """Values of the model with experts.

    Attributes:
        saved: the dense one.
        config: of the one with experts.
        dense: parameters of the dense one.
        granularity: experts of each copy.
    """

    saved: SavedModel
    config: Config
    dense: Mapping[str, ParamMeta]
    granularity: int

    def value(self, meta: ParamMeta) -> torch.Tensor:
        """The value of a parameter."""
        if meta.role is Role.ROUTER:
            rows = torch.arange(meta.shape[0])
            return initial(meta, self.config)[rows - rows % self.granularity]
        if not meta.role.is_expert:
            return self.saved.tensor(meta.name)
        assert meta.experts is not None
        name = f"decoder.layers.{meta.layer}.mlp.{_PARTS[meta.role]}.weight"
        parts = split(self.saved.tensor(name), self.dense[name].blocks)
        if meta.role is Role.EXPERT_OUT:
            cuts = [[self.granularity * cut for cut in part.chunk(self.granularity, 1)] for part in parts]
        else:
            cuts = [list(part.chunk(self.granularity)) for part in parts]
        copy = [matrix for matrices in zip(*cuts, strict=True) for matrix in matrices]
        return fuse(copy * (meta.experts // self.granularity), meta.blocks)
