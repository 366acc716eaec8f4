"""Configurations that tests of the config room start from."""

from __future__ import annotations

from megatron_mup.config import Config, parse_config, validate
from megatron_mup.config.fields import sections, settings

GOOD = ["--mock-data", "--vocab-size", "256", "--train-iters", "10"]
"""The least that a run needs."""


def build(*argv: str, good: bool = True) -> Config:
    """The configuration of a command line."""
    return parse_config([*(GOOD if good else []), *argv]).config


def warnings(*argv: str, world_size: int = 1) -> list[str]:
    """What a valid command line is warned of."""
    parsed = parse_config([*GOOD, *argv])
    return validate(parsed.config, world_size, parsed.explicit)


def with_value(config: Config, name: str, value: object) -> Config:
    """The configuration with one setting changed, types unchecked."""
    section = settings()[name].section
    return Config(
        **{
            key: cls(**(vars(getattr(config, key)) | ({name: value} if key == section else {})))
            for key, cls in sections().items()
        }
    )
