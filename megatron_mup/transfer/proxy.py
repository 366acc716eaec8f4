"""The small model on which a big one is tuned, as a recipe, and what carries over from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_mup.config import Config, ConfigError, ModelConfig, ParallelConfig
from megatron_mup.parametrization.schemes import Operations
from megatron_mup.parametrization.table import decay_rule, scheme_of
from megatron_mup.transfer.sizes import resize

UNTUNED = ("train_iters", "train_samples", "global_batch_size", "seq_length")
"""What a proxy should share with the big run, for no rule of this package follows it by itself."""


@dataclass(frozen=True)
class Claim:
    """One line on what carries over.

    Attributes:
        what: hyperparameters.
        holds: whether they carry over by rule; None: with a condition.
        why: rule and source.
    """

    what: str
    holds: bool | None
    why: str


def make_proxy(big: Config, width_ratio: int, depth_ratio: int, num_query_groups: int | None = None) -> Config:
    """The proxy's recipe: the big one with a smaller model on one rank, whose own sizes are the base sizes.

    Head width, data, optimizer, schedule and lengths stay. A parametrization that follows nothing becomes CompleteP.

    Args:
        big: recipe of the big model.
        width_ratio: hidden size, MLP width, heads and key/value heads are divided by it.
        depth_ratio: layers are divided by it.
        num_query_groups: key/value heads, where they don't divide.

    Raises:
        ConfigError: something doesn't divide.
    """
    model = big.model
    for flag, size, ratio in (
        ("--hidden-size", model.hidden_size, width_ratio),
        ("--num-layers", model.num_layers, depth_ratio),
    ):
        if size % ratio:
            raise ConfigError(
                f"{flag} {size}", f"does not divide by {ratio}", f"choose a ratio among {_divisors(size)}"
            )
    groups = model.query_groups
    if num_query_groups is None and groups % width_ratio:
        heads = model.num_attention_heads // width_ratio
        raise ConfigError(
            f"--num-query-groups {groups}",
            f"{groups} key/value heads don't divide by {width_ratio}",
            f"choose --width-ratio among {_divisors(groups)}, or the proxy's own with --proxy-query-groups "
            f"{_divisors(max(heads, 1))}; more or fewer query heads per key/value head is a small change that no rule "
            "follows",
        )
    # So that what doesn't divide is told for the settings that do matter.
    undivided = replace(model, num_query_groups=width_ratio) if num_query_groups is not None else model
    small = resize(replace(big, model=undivided), model.hidden_size // width_ratio, model.num_layers // depth_ratio)
    own = small.model if num_query_groups is None else replace(small.model, num_query_groups=num_query_groups)
    if own.num_attention_heads % own.query_groups:
        raise ConfigError(
            f"--num-query-groups {own.query_groups}",
            f"the proxy's {own.num_attention_heads} query heads don't divide by it",
            f"use one of {_divisors(own.num_attention_heads)}",
        )
    rules = big.parametrization
    if rules.parametrization == "standard":
        rules = replace(rules, parametrization="completep")
    proxy = replace(
        small,
        model=own,
        parallel=ParallelConfig(),
        parametrization=rules,
        training=replace(big.training, micro_batch_size=1),
    )
    return replace(proxy, parametrization=replace(rules, **base_sizes(proxy)))


def base_sizes(config: Config) -> dict[str, Any]:
    """A model's own sizes as the base sizes that a recipe states; none where the parametrization has no base model."""
    model = config.model
    if scheme_of(config).operations is Operations.UMUP:
        return {}
    return {
        "mup_base_hidden_size": model.hidden_size,
        "mup_base_ffn_hidden_size": model.ffn_size,
        "mup_base_num_attention_heads": model.num_attention_heads,
        "mup_base_head_dim": model.head_dim,
        "mup_base_q_lora_rank": model.q_lora_rank,
        "mup_base_kv_lora_rank": model.kv_lora_rank,
        "base_num_layers": model.num_layers,
    }


def claims(proxy: Config, big: Config) -> list[Claim]:
    """What carries over from the proxy to the big model, and what does not."""
    depth = big.model.num_layers != proxy.model.num_layers
    name = proxy.parametrization.parametrization
    muon = proxy.optimizer.optimizer
    follows_depth = scheme_of(proxy).depth
    lines = [
        Claim("lr, decoupled_lr, init_method_std, mup_*_mult over width", True, "Tensor Programs V, arXiv 2203.03466"),
        Claim(
            "the same over depth",
            follows_depth if depth else True,
            "CompleteP, arXiv 2505.01618" if follows_depth else f"{name} has no rule for depth: keep the depth",
        ),
        Claim("adam_eps", True, "scaled with the gradients: CompleteP's table, Complete(d)P, arXiv 2512.22382"),
        Claim(
            "weight_decay",
            None,
            f"--weight-decay-rule {decay_rule(proxy)}: sources disagree (independent: arXiv "
            "2510.19093; sqrt-width: 2510.15262); check by a sweep over --axis weight_decay",
        ),
        Claim("adam_beta1, adam_beta2, clip_grad, warm-up as a share", None, "held fixed by the theory, by experience"),
        Claim(
            ", ".join(UNTUNED),
            False,
            "no rule is applied: keep tokens per step and their number, or follow arXiv 2512.22382 (SDE rules)",
        ),
        Claim("dropout and other regularisation, vocabulary, data", False, "Tensor Programs V, section 6: not covered"),
        Claim("num_query_groups per head, head width, MLP width over hidden size", None, "keep the proportions"),
    ]
    if muon != "adam":
        mode = proxy.optimizer.muon_scale_mode
        scaled = f"its steps keep the spectral norm (arXiv 2310.17813), --muon-scale-mode {mode}"
        lines.insert(2, Claim(f"muon_lr ({muon})", True, scaled))
    return lines


def format_claims(lines: list[Claim]) -> str:
    """The claims as text."""
    words: Mapping[bool | None, str] = {True: "carries over", False: "does not", None: "with care"}
    return "\n".join(f"{words[line.holds]:13} {line.what}: {line.why}" for line in lines)


def _divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def parameters(model: ModelConfig, vocab_size: int) -> int:
    """Parameters in matrices, about the size of a model."""
    layer = model.attention_weights + model.hidden_size * (3 if model.swiglu else 2) * model.ffn_size
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    return model.num_layers * layer + tables * vocab_size * model.hidden_size
