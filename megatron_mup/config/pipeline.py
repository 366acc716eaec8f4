"""Which layers each pipeline stage holds."""

from __future__ import annotations

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import told
from megatron_mup.config.pipeline_layout import layout_stages
from megatron_mup.config.schedules import VIRTUAL, stages_per_rank

COUNTS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
ACCOUNTS = ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split")


def stage_layers(config: Config) -> tuple[tuple[int, int], ...]:
    """Range ``[start, end)`` of layers of each pipeline stage, in order.

    Stages without a given count share the rest evenly. ``account_for_*`` count the embedding, and the output layer with
    the loss, as one layer each. What does not divide goes to middle stages first, earlier ones before later ones, then
    to the first stage, then to the last, which has the output layer to do.

    Raises:
        ConfigError: counts that don't add up, or a stage without work.
    """
    layers, ranks = config.model.num_layers, config.parallel.pipeline_model_parallel_size
    if ranks == 1:
        return ((0, layers),)
    stages, written = ranks * stages_per_rank(config), layout_stages(config)
    counts = _given(config, stages)
    if written is not None:
        return written
    free = [stage for stage in range(stages) if stage not in counts]
    loads = dict.fromkeys(free, 0)
    if config.parallel.account_for_embedding_in_pipeline_split:
        loads[0] = 1
    if config.parallel.account_for_loss_in_pipeline_split:
        loads[stages - 1] = 1
    rest = layers - sum(counts.values())
    if rest < 0 or (rest > 0 and not free):
        raise ConfigError(
            f"{_flags(config)}, {told(config, 'num_layers', 'pipeline_model_parallel_size')}",
            f"the stages given hold {sum(counts.values())} of {layers} layers",
            "let the counts add up to the layers" if not free else "give these stages fewer layers",
        )
    share, extra = divmod(rest + sum(loads.values()), len(free)) if free else (0, 0)
    if free and share == 0:
        raise ConfigError(
            f"{_flags(config)}, {told(config, 'num_layers')}",
            f"{rest} layers can't be shared by {len(free)} stages: one would have nothing to do",
            f"use at most {stages - len(free) + rest + sum(loads.values())} stages, or more layers",
        )
    # Falsehood sorts first: middle stages, then the first, then the last.
    order = sorted(free, key=lambda stage: (stage == stages - 1, stage == 0, stage))
    for stage in free:
        counts[stage] = share - loads[stage] + (stage in order[:extra])
    ends = [sum(counts[stage] for stage in range(last + 1)) for last in range(stages)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def _given(config: Config, stages: int) -> dict[int, int]:
    """Layers of the stages whose count is given."""
    parallel, counts = config.parallel, {}
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    _check_one_way(config, stages)
    if first is not None:
        counts[0] = first
        if parallel.account_for_embedding_in_pipeline_split:
            raise _both(config, "decoder_first_pipeline_num_layers", "account_for_embedding_in_pipeline_split")
    if last is not None:
        counts[stages - 1] = last
        if parallel.account_for_loss_in_pipeline_split:
            raise _both(config, "decoder_last_pipeline_num_layers", "account_for_loss_in_pipeline_split")
    return counts


def _check_one_way(config: Config, stages: int) -> None:
    """The layout says all; and it is the one way to give counts to several stages of a rank."""
    parallel = config.parallel
    counts = [name for name in COUNTS if getattr(parallel, name) is not None]
    accounts = [name for name in ACCOUNTS if getattr(parallel, name)]
    if parallel.pipeline_model_parallel_layout is not None and counts + accounts:
        raise ConfigError(
            told(config, "pipeline_model_parallel_layout", *counts, *accounts),
            "the layout says what every stage holds",
            "drop the others",
        )
    if counts and stages > parallel.pipeline_model_parallel_size:
        raise ConfigError(
            f"{told(config, *counts)} with {stages // parallel.pipeline_model_parallel_size} stages on a rank",
            "it doesn't say which of them holds how many layers",
            "use --pipeline-model-parallel-layout",
        )


def _both(config: Config, count: str, account: str) -> ConfigError:
    return ConfigError(told(config, count, account), "both say how many layers that stage gets", "drop one of them")


def _flags(config: Config) -> str:
    """The flags that decide, with the values of those that are set."""
    names = [name for name in (*COUNTS, *VIRTUAL, "pipeline_schedule") if getattr(config.parallel, name) is not None]
    return told(config, "pipeline_model_parallel_size", *names)
