"""Which layers each pipeline stage holds."""

from __future__ import annotations

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import told


def stage_layers(config: Config) -> tuple[tuple[int, int], ...]:
    """Range ``[start, end)`` of layers of each pipeline stage, in order.

    Stages without a given count share the rest evenly. ``account_for_*`` count the embedding, and the output layer with
    the loss, as one layer each. What does not divide goes to middle stages first, earlier ones before later ones, then
    to the first stage, then to the last, which has the output layer to do.

    Raises:
        ConfigError: counts that don't add up, or a stage without work.
    """
    layers, stages = config.model.num_layers, config.parallel.pipeline_model_parallel_size
    if stages == 1:
        return ((0, layers),)
    counts = _given(config)
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


def _given(config: Config) -> dict[int, int]:
    """Layers of the stages whose count is given."""
    parallel, counts = config.parallel, {}
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if first is not None:
        counts[0] = first
        if parallel.account_for_embedding_in_pipeline_split:
            raise _both(config, "decoder_first_pipeline_num_layers", "account_for_embedding_in_pipeline_split")
    if last is not None:
        counts[parallel.pipeline_model_parallel_size - 1] = last
        if parallel.account_for_loss_in_pipeline_split:
            raise _both(config, "decoder_last_pipeline_num_layers", "account_for_loss_in_pipeline_split")
    return counts


def _both(config: Config, count: str, account: str) -> ConfigError:
    return ConfigError(told(config, count, account), "both say how many layers that stage gets", "drop one of them")


def _flags(config: Config) -> str:
    """The flags that decide, with the values of those that are set."""
    names = ["pipeline_model_parallel_size"]
    parallel = config.parallel
    for name in ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"):
        if getattr(parallel, name) is not None:
            names.append(name)
    return told(config, *names)
