"""Learning-rate schedules: pure functions from progress to a factor in [0, 1] on every group's peak."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_mup.config import Config, ConfigError

TAILS = {
    "exponential": lambda r: 2.0 * 0.5**r - 1.0,
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: 0.5 * (math.cos(math.pi * r) + 1.0),
    "minus_sqrt": lambda r: 1.0 - math.sqrt(r),
}
"""Tails of WSD over progress r in [0, 1], from 1 to 0 (Megatron-LM's ``--lr-wsd-decay-style``)."""


@dataclass(frozen=True, kw_only=True)
class LRSchedule:
    """Factor on the peak learning rate of every parameter group.

    The formulas and edges are those of Megatron-LM's ``OptimizerParamScheduler``. Progress is what was done *before*
    the step, in iterations, or in samples when the run is given in ``--train-samples``: the first step runs at the
    warm-up's start (zero by default), the first step after ``warmup`` at the peak, and a step at progress ``length``
    would run at the floor. Floor and warm-up start are ratios to ``--lr``, the same for every group.

    Attributes:
        style: ``--lr-decay-style``.
        warmup: length of the linear warm-up, in progress; a fraction may end between two steps.
        length: progress at which the floor is reached, warm-up included.
        floor: smallest factor after warm-up, ``min_lr / lr``.
        start: factor at progress 0 when there is warm-up, ``lr_warmup_init / lr``.
        tail_style, tail: shape and length of the last part (WSD; optional for power).
        power_scale, power_exponent: a and b of the power schedule min(1, a n^b), n in progress.
    """

    style: str
    warmup: float
    length: int
    floor: float = 0.0
    start: float = 0.0
    tail_style: str = "exponential"
    tail: int = 0
    power_scale: float = 1.0
    power_exponent: float = 0.0

    @classmethod
    def from_config(cls, config: Config, global_batch_size: int) -> LRSchedule:
        """Schedule of a run with ``global_batch_size`` sequences per step (only ``--lr-power-scale`` needs it).

        Raises:
            ConfigError: lengths that are missing or do not fit in one another; rates above ``--lr``.
        """
        schedule, optimizer = config.schedule, config.optimizer
        samples = config.training.train_samples is not None
        unit = "samples" if samples else "iters"
        length = getattr(schedule, f"lr_decay_{unit}") or getattr(config.training, f"train_{unit}")
        if not length:
            raise ConfigError(
                f"--lr-decay-style {schedule.lr_decay_style}",
                "the run has no length",
                "give --train-iters or --train-samples",
            )
        warmup: float = getattr(schedule, f"lr_warmup_{unit}")
        if schedule.lr_warmup_fraction is not None:
            warmup = schedule.lr_warmup_fraction * length
        if not 0 <= warmup < length:
            raise ConfigError(
                f"warm-up over {warmup:g} {unit}",
                f"it must be shorter than the schedule's {length} {unit}",
                f"shorten --lr-warmup-{unit} or lengthen --lr-decay-{unit}",
            )
        tail = getattr(schedule, f"lr_wsd_decay_{unit}") or 0
        if schedule.lr_decay_style == "WSD" and not tail:
            raise ConfigError("--lr-decay-style WSD", "its tail has no length", f"give --lr-wsd-decay-{unit}")
        if not 0 <= tail <= length - warmup:
            raise ConfigError(
                f"--lr-wsd-decay-{unit} {tail}",
                f"only {length - warmup:g} {unit} of the schedule remain after warm-up",
                f"shorten the tail or lengthen --lr-decay-{unit}",
            )
        if optimizer.lr < 0:
            raise ConfigError(f"--lr {optimizer.lr:g}", "the peak must not be negative", "give --lr 0 or more")
        for flag, value in (("--min-lr", optimizer.min_lr), ("--lr-warmup-init", schedule.lr_warmup_init)):
            if not 0 <= value <= optimizer.lr:
                raise ConfigError(
                    f"{flag} {value:g}", f"it must lie between 0 and --lr {optimizer.lr:g}", f"mend {flag}"
                )
        scale = 1.0
        if schedule.lr_decay_style == "power":
            if schedule.lr_power_scale is not None:
                per_unit = 1 if samples else global_batch_size
                scale = schedule.lr_power_scale * per_unit**schedule.lr_power_exponent
            elif warmup > 0:
                scale = warmup**-schedule.lr_power_exponent
            else:
                raise ConfigError(
                    "--lr-decay-style power",
                    "without warm-up nothing says where the curve leaves the peak",
                    f"give --lr-warmup-{unit} or --lr-power-scale",
                )
        return cls(
            style=schedule.lr_decay_style,
            warmup=warmup,
            length=length,
            floor=optimizer.min_lr / optimizer.lr if optimizer.lr else 0.0,
            start=schedule.lr_warmup_init / optimizer.lr if optimizer.lr else 0.0,
            tail_style=schedule.lr_wsd_decay_style,
            tail=tail,
            power_scale=scale,
            power_exponent=schedule.lr_power_exponent,
        )

    def factor(self, progress: int) -> float:
        """Factor for the step that starts at ``progress`` iterations (or samples) done."""
        if self.warmup > 0 and progress <= self.warmup:
            top = self._power(self.warmup) if self.style == "power" else 1.0
            return self.start + (top - self.start) * progress / self.warmup
        if self.style == "constant":
            return 1.0
        if progress > self.length:
            return self.floor
        if self.style == "inverse-square-root":
            return max(self.floor, math.sqrt(max(self.warmup, 1) / max(progress, 1)))
        if self.style in ("WSD", "power"):
            tail_start = self.length - self.tail
            top = self._power(min(progress, tail_start)) if self.style == "power" else 1.0
            if progress <= tail_start:
                return top
            return self.floor + TAILS[self.tail_style]((progress - tail_start) / self.tail) * (top - self.floor)
        ratio = (progress - self.warmup) / (self.length - self.warmup)
        return self.floor + TAILS[self.style](ratio) * (1.0 - self.floor)

    def _power(self, progress: float) -> float:
        """min(1, a n^b), not below the floor (IBM's power scheduler, arXiv 2408.13359)."""
        return max(self.floor, min(1.0, self.power_scale * max(progress, 1) ** self.power_exponent))
