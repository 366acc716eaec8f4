"""Whether a configuration can run, before any process group starts."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_mup.config import rules
from megatron_mup.config.bounds import check_bounds
from megatron_mup.config.config import Config
from megatron_mup.config.context_rules import check_context
from megatron_mup.config.engine_rules import check_engine
from megatron_mup.config.fp8_rules import check_fp8
from megatron_mup.config.moe_rules import check_moe
from megatron_mup.config.pipeline_rules import check_pipeline
from megatron_mup.config.unused import unused


def validate(config: Config, world_size: int, explicit: Iterable[str] = ()) -> list[str]:
    """Checks a configuration for a world; touches no file.

    Args:
        config: what to check.
        world_size: number of ranks.
        explicit: names of the settings that the user gave, as in ``ParsedConfig``.

    Returns:
        Warnings: settings among ``explicit`` that have no effect in this run.

    Raises:
        ConfigError: a value out of range, a contradiction or an impossible layout, the first that is found.
    """
    given = frozenset(explicit)
    check_bounds(config)
    rules.check_spellings(config, given)
    rules.check_model(config)
    rules.check_parametrization(config)
    rules.check_optimizer(config)
    rules.check_layout(config, world_size)
    check_context(config)
    check_moe(config, world_size)
    check_engine(config)
    rules.check_batch(config, world_size)
    check_pipeline(config, world_size)
    rules.check_schedule(config)
    rules.check_kernels(config)
    rules.check_cuda_graph(config, world_size)
    check_fp8(config)
    rules.check_data(config)
    rules.check_checkpoint(config)
    rules.check_logging(config, world_size)
    return unused(config, world_size, given)
