"""Pipeline schedules: how many stages they put on a rank, and which ones."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import told
from megatron_mup.config.pipeline_layout import layout_stages


@dataclass(frozen=True)
class Schedule:
    """Facts of a schedule of ``torch.distributed.pipelining``.

    Attributes:
        fewest, most: stages on a rank that it takes.
        usual: stages on a rank where nothing says how many.
        v_shaped: stages go down the ranks and up again, so that the first rank holds the first and the last; else each
            further round of stages starts at the first rank.
        splits_backward: gradients of weights are taken by themselves, some time after those of inputs.
        in_rounds: micro-batches go in rounds of equal size, of at least one for each rank.
    """

    fewest: int = 1
    most: int = 1
    usual: int = 1
    v_shaped: bool = False
    splits_backward: bool = False
    in_rounds: bool = False

    def holds(self, stages: int) -> bool:
        """Whether it takes so many stages on a rank."""
        return self.fewest <= stages <= self.most


MANY = 10**6
SCHEDULES = {
    "1F1B": Schedule(),
    "GPipe": Schedule(),
    "Interleaved1F1B": Schedule(fewest=2, most=MANY, usual=2, in_rounds=True),
    "InterleavedZeroBubble": Schedule(most=MANY, usual=2, splits_backward=True, in_rounds=True),
    "ZBVZeroBubble": Schedule(fewest=2, most=2, usual=2, v_shaped=True, splits_backward=True),
    "DualPipeV": Schedule(fewest=2, most=2, usual=2, v_shaped=True, splits_backward=True),
}
VIRTUAL = ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage")


def schedule_name(config: Config) -> str:
    """The run's schedule: the flag, or what goes with the number of stages on a rank. One rank needs none: 1F1B."""
    named = config.parallel.pipeline_schedule
    if config.parallel.pipeline_model_parallel_size == 1:
        return "1F1B"
    return named or ("1F1B" if (_stages_asked(config) or 1) == 1 else "Interleaved1F1B")


def schedule_of(config: Config) -> Schedule:
    """Facts of the run's schedule."""
    return SCHEDULES[schedule_name(config)]


def stages_per_rank(config: Config) -> int:
    """Stages that each pipeline rank holds.

    Raises:
        ConfigError: flags that contradict each other, or a number that the schedule doesn't take.
    """
    if config.parallel.pipeline_model_parallel_size == 1:
        return 1
    asked, schedule, name = _stages_asked(config), schedule_of(config), schedule_name(config)
    if asked is None:
        return schedule.usual
    if not schedule.holds(asked):
        wanted = "one stage" if schedule.most == 1 else "two stages" if schedule.most == 2 else "two stages or more"
        fitting = [other for other, facts in SCHEDULES.items() if facts.holds(asked)]
        raise ConfigError(
            f"--pipeline-schedule {name}, {told(config, *_asking(config))}",
            f"it has {wanted} on each rank, not {asked}",
            f"use --pipeline-schedule {' or '.join(fitting)}, or another number of stages",
        )
    return asked


def stages_of_rank(config: Config, rank: int) -> tuple[int, ...]:
    """Numbers of the stages that a pipeline rank holds, in order."""
    ranks, held = config.parallel.pipeline_model_parallel_size, stages_per_rank(config)
    if held == 2 and schedule_of(config).v_shaped:
        return rank, 2 * ranks - 1 - rank
    return tuple(rank + ranks * place for place in range(held))


def rank_of_stage(config: Config, stage: int) -> int:
    """Pipeline rank that holds a stage."""
    ranks = config.parallel.pipeline_model_parallel_size
    round_, place = divmod(stage, ranks)
    return ranks - 1 - place if round_ % 2 and schedule_of(config).v_shaped else place


def _asking(config: Config) -> list[str]:
    """Settings that say how many stages a rank holds."""
    names = (*VIRTUAL, "pipeline_model_parallel_layout")
    return [name for name in names if getattr(config.parallel, name) is not None]


def _stages_asked(config: Config) -> int | None:
    """Stages on a rank as the flags say; None where none does."""
    parallel, asking = config.parallel, _asking(config)
    ranks = parallel.pipeline_model_parallel_size
    if len(asking) > 1:
        raise ConfigError(told(config, *asking), "each says how many stages a rank holds", "keep one of them")
    layout = layout_stages(config)
    if layout is not None:
        return _shared(config, len(layout), ranks, "pipeline_model_parallel_layout", "stages")
    if parallel.num_layers_per_virtual_pipeline_stage is None:
        return parallel.num_virtual_stages_per_pipeline_rank
    layers = config.model.num_layers
    layers += parallel.account_for_embedding_in_pipeline_split + parallel.account_for_loss_in_pipeline_split
    size = parallel.num_layers_per_virtual_pipeline_stage * ranks
    return _shared(config, layers, size, "num_layers_per_virtual_pipeline_stage", "layers")


def _shared(config: Config, things: int, by: int, flag: str, what: str) -> int:
    each, rest = divmod(things, by)
    if rest or not each:
        raise ConfigError(
            told(config, flag, "num_layers", "pipeline_model_parallel_size"),
            f"{things} {what} don't divide by {by}",
            f"use a number of {what} that is a multiple of {by}",
        )
    return each
