"""A configuration as plain data: for checkpoints, recipes and --print-config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import yaml

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import nearest, sections, settings
from megatron_mup.config.schedules import schedule_name
from megatron_mup.config.scheme_rules import FOLLOWS_DEPTH


class _Dumper(yaml.SafeDumper):
    """One setting a line, lists included."""


_Dumper.add_representer(list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Settings by section, of JSON's types only."""
    plain = dataclasses.asdict(config)
    return {section: {name: _plain(value) for name, value in plain[section].items()} for section in sections()}


def from_dict(data: Mapping[str, Any], source: str) -> Config:
    """The inverse of :func:`to_dict`; settings that are missing take their defaults.

    Args:
        data: settings by section.
        source: where it is from, for errors.

    Raises:
        ConfigError: unknown section or setting, or a value of another type.
    """
    built = {}
    for section, values in data.items():
        if section not in sections():
            raise _unknown(source, section, sections())
        if not isinstance(values, Mapping):
            raise ConfigError(
                f"{source}: {section}: {values!r}", "is a section, not a value", "give a mapping of settings"
            )
        known = {name: setting for name, setting in settings().items() if setting.section == section}
        checked = {}
        for name, value in values.items():
            if name not in known:
                raise _unknown(f"{source}: {section}", name, known)
            checked[name] = known[name].checked(value, source)
        built[section] = sections()[section](**checked)
    return Config(**built)


def changed(data: Config | Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by section that aren't the defaults, of a configuration or of what :func:`to_dict` gave."""
    default = to_dict(Config())
    plain = to_dict(data) if isinstance(data, Config) else data
    differing = {
        section: {name: value for name, value in values.items() if default.get(section, {}).get(name) != value}
        for section, values in plain.items()
    }
    return {section: values for section, values in differing.items() if values}


def to_yaml(data: Config | Mapping[str, Any]) -> str:
    """A configuration, or plain data, as a recipe."""
    plain = to_dict(data) if isinstance(data, Config) else dict(data)
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, default_flow_style=False, allow_unicode=True, width=120)


def resolved(config: Config, world_size: int) -> dict[str, dict[str, Any]]:
    """Settings by section with the defaults filled in that follow from other settings.

    What has no effect in this run stays empty; so does what only the tokenizer knows, and base sizes "in proportion"
    that are no whole number. The result is a recipe for the same run.
    """
    model, parallel, optimizer = config.model, config.parallel, config.optimizer
    data = to_dict(config)
    fill: dict[str, dict[str, Any]] = {
        "model": {
            "ffn_hidden_size": model.ffn_size,
            "num_query_groups": model.query_groups,
            "embedding_init_method_std": model.init_method_std,
        },
        "moe": {"moe_ffn_hidden_size": config.expert_ffn_size} if config.moe.num_experts else {},
        "optimizer": {"decoupled_lr": optimizer.lr},
        "training": {"global_batch_size": config.global_batch_size(world_size)},
    }
    if parallel.pipeline_model_parallel_size > 1:
        fill["parallel"] = {"pipeline_schedule": schedule_name(config)}
    if not model.multi_latent_attention:
        fill["model"]["kv_channels"] = model.head_dim
    if model.position_embedding_type == "learned_absolute":
        fill["model"]["max_position_embeddings"] = config.training.seq_length
    if model.untie_embeddings_and_output_weights:
        fill["model"]["output_layer_init_method_std"] = model.init_method_std
    if optimizer.optimizer != "adam":
        fill["optimizer"]["muon_lr"] = optimizer.lr
    if config.schedule.lr_decay_style != "constant":
        fill["schedule"] = {
            "lr_decay_iters": config.training.train_iters,
            "lr_decay_samples": config.training.train_samples,
        }
    fill["parametrization"] = _base_sizes(config)
    for section, values in fill.items():
        for name, value in values.items():
            if data[section][name] is None:
                data[section][name] = value
    data["parallel"]["data_parallel_sharding_strategy"] = parallel.sharding
    data["parallel"] |= {"use_torch_fsdp2": False, "use_distributed_optimizer": False}
    data["training"] |= {"recompute_granularity": config.training.recompute, "recompute_activations": False}
    return data


def _base_sizes(config: Config) -> dict[str, int | None]:
    """Sizes of the base model as far as the parametrization reads them."""
    model, rules = config.model, config.parametrization
    if rules.parametrization in ("standard", "umup"):
        return {}
    hidden = rules.mup_base_hidden_size or model.hidden_size
    head = rules.mup_base_head_dim or model.head_dim
    sizes = {
        "mup_base_hidden_size": hidden,
        "mup_base_ffn_hidden_size": _whole(model.ffn_size * hidden, model.hidden_size),
        "mup_base_num_attention_heads": _whole(
            model.num_attention_heads * model.head_dim * hidden, model.hidden_size * head
        ),
        "mup_base_head_dim": head,
    }
    if model.multi_latent_attention:
        for name in ("q_lora_rank", "kv_lora_rank"):
            rank = getattr(model, name)
            sizes[f"mup_base_{name}"] = None if rank is None else _whole(rank * hidden, model.hidden_size)
    if config.moe.num_experts:
        sizes["mup_base_moe_ffn_hidden_size"] = _whole(config.expert_ffn_size * hidden, model.hidden_size)
    if rules.parametrization in FOLLOWS_DEPTH:
        sizes["base_num_layers"] = model.num_layers
    return sizes


def _whole(above: int, below: int) -> int | None:
    """The quotient, when it is a whole number."""
    return above // below if above % below == 0 else None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _unknown(source: str, name: str, known: Mapping[str, Any]) -> ConfigError:
    close = nearest(str(name), known)
    return ConfigError(
        f"{source}: {name}",
        "no such setting in this version",
        f"use {close}" if close else "drop it, or load it with the version that wrote it",
    )
