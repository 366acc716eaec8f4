"""In which settings a checkpoint's run differs from this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from megatron_mup.config import Config, from_dict, resolved
from megatron_mup.config.fields import settings

Kind = Literal["architecture", "schedule", "state", "momentum"]
Difference = tuple[str, Any, Any]

_NOT_ARCHITECTURE = {
    "make_vocab_size_divisible_by",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "embedding_init_method_std",
    "output_layer_init_method_std",
    "weight_decay_rule",
    "moe_router_bias_update_rate",
    "moe_router_load_balancing_type",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_pad_expert_input_to_capacity",
    "moe_per_layer_logging",
    "moe_shared_expert_overlap",
}
_RATES = ("lr", "muon_lr", "decoupled_lr", "min_lr", "weight_decay")
_SPLITS = ("muon_split_qkv", "muon_split_heads", "muon_split_fc1")
_STATE = ("optimizer", "optimizer_switch_at", "scalar_optimizer", "muon_moe_router", *_SPLITS, "dion_rank_fraction")


def flags_of(kind: Kind) -> list[str]:
    """Names of the settings that make up the model's function, the schedule of rates and decay, or which state the
    optimizers keep, in which shapes; or that saved momenta are measured by.
    """
    if kind == "state":
        return list(_STATE)
    if kind == "momentum":
        return ["muon_momentum_style"]
    if kind == "schedule":
        return [name for name, setting in settings().items() if setting.section == "schedule"] + list(_RATES)
    sections = ("model", "moe", "parametrization")
    return [n for n, s in settings().items() if s.section in sections and n not in _NOT_ARCHITECTURE]


def compare_configs(
    saved: Mapping[str, Any], current: Config | Mapping[str, Any], kind: Kind = "architecture"
) -> list[Difference]:
    """Flags whose values differ, defaults filled in: ``(flag, saved, current)`` in the order of the settings.

    A vocabulary size that only one side knows is no difference. Settings of a checkpoint that this version doesn't
    have are passed over.
    """
    old, new = _plain(saved), _plain(current)
    differences = []
    for name in flags_of(kind):
        setting = settings()[name]
        before, now = old[setting.section][name], new[setting.section][name]
        if before != now and not (name == "vocab_size" and None in (before, now)):
            differences.append((setting.flag, before, now))
    return differences


def told_differences(differences: list[Difference], most: int = 4) -> str:
    """The first few differences in words."""
    words = [f"{flag} was {before} and is {now}" for flag, before, now in differences[:most]]
    more = len(differences) - most
    return "; ".join(words) + (f"; and {more} more" if more > 0 else "")


def _plain(config: Config | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    if not isinstance(config, Config):
        known = {
            section: {name: value for name, value in values.items() if _is_setting(section, name)}
            for section, values in config.items()
        }
        config = from_dict({section: values for section, values in known.items() if values}, "checkpoint")
    # The world size fills in the batch size only, which isn't compared.
    return resolved(config, config.parallel.model_parallel_size)


def _is_setting(section: str, name: str) -> bool:
    setting = settings().get(name)
    return setting is not None and setting.section == section
