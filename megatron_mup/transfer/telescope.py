"""Telescoping (Essential AI, arXiv 2505.02222): each doubling of the width searches a smaller, finer grid.

Under muP the optimum of width n lies within a constant over n of that of the infinite width, so the window halves at
each level, and its points become fewer as the models become dearer: ``m * 4^(-1/k)`` per axis for k axes,
and at least three.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_mup.transfer.sweep import GridAxis
from megatron_mup.transfer.trials import Trial


@dataclass(frozen=True)
class Level:
    """One width of a telescope.

    Attributes:
        hidden_size: width.
        centre: place of its grid's middle on each axis, in steps of that axis's first spacing.
        step: distance of its grid points, in the same unit.
        points: grid points per axis.
        winner: best point, as ``centre``; None while trials are missing or all diverged.
        widened: whether the winner lies on the grid's edge, so that the next level keeps the window as wide.
    """

    hidden_size: int
    centre: tuple[float, ...]
    step: float
    points: int
    winner: tuple[float, ...] | None = None
    widened: bool = False

    def grid(self) -> list[tuple[float, ...]]:
        """Its points, as ``centre``."""
        offsets = [(i - (self.points - 1) / 2) * self.step for i in range(self.points)]
        return [
            tuple(c + o for c, o in zip(self.centre, chosen, strict=True))
            for chosen in itertools.product(offsets, repeat=len(self.centre))
        ]


@dataclass(frozen=True, kw_only=True)
class TelescopePlan:
    """A telescope over widths.

    Attributes:
        widths: in growing order.
        num_layers: depth of all of them.
        axes: what is searched; ``low`` and ``high`` of the first give the first level's number of points.
        seed: of all trials.
    """

    widths: tuple[int, ...]
    num_layers: int
    axes: tuple[GridAxis, ...]
    seed: int = 1234

    def trial(self, level: Level, place: tuple[float, ...]) -> Trial:
        """The trial at a place on the axes."""
        values = itertools.chain.from_iterable(axis.at(k) for axis, k in zip(self.axes, place, strict=True))
        return Trial(level.hidden_size, self.num_layers, tuple(values), self.seed)


def telescope(plan: TelescopePlan, done: Mapping[str, float]) -> tuple[list[Level], list[Trial]]:
    """Levels as far as results reach, and the trials that the last of them still needs.

    A winner on the edge of its grid has not been bracketed: the next level is centred on it but keeps step and points.

    Args:
        plan: the telescope.
        done: loss by trial key, inf where one diverged.
    """
    axis = plan.axes[0]
    centre = tuple((a.low + a.high) / 2 for a in plan.axes)
    level = Level(plan.widths[0], centre, 1.0, axis.high - axis.low + 1)
    levels: list[Level] = []
    for hidden_size in plan.widths:
        level = replace(level, hidden_size=hidden_size)
        trials = {place: plan.trial(level, place) for place in level.grid()}
        missing = [trial for trial in trials.values() if trial.key not in done]
        if missing:
            return [*levels, level], missing
        losses = {place: done[trial.key] for place, trial in trials.items()}
        best = min(losses, key=lambda place: losses[place])
        if not math.isfinite(losses[best]):
            return [*levels, level], []
        half = (level.points - 1) / 2 * level.step
        edge = level.points > 1 and any(abs(abs(b - c) - half) < 1e-9 for b, c in zip(best, level.centre, strict=True))
        levels.append(replace(level, winner=best, widened=edge))
        if edge:
            level = Level(hidden_size, best, level.step, level.points)
        else:
            # Two points would be edges both.
            fewer = min(level.points, max(3, round(level.points * 4 ** (-1 / len(plan.axes)))))
            level = Level(hidden_size, best, level.step / 2, fewer)
    return levels, []


def format_levels(plan: TelescopePlan, levels: list[Level]) -> str:
    """The levels as text."""
    lines = []
    for level in levels:
        grid = f"width {level.hidden_size:6d}: {level.points ** len(plan.axes)} points, spacing " + ", ".join(
            f"x{axis.spacing**level.step:.3g}" for axis in plan.axes
        )
        if level.winner is None:
            lines.append(f"{grid}: no winner yet")
            continue
        values = ", ".join(
            f"{name} {value:.4g}" for axis, k in zip(plan.axes, level.winner, strict=True) for name, value in axis.at(k)
        )
        edge = ""
        if level.widened:
            last = level.hidden_size == plan.widths[-1]
            then = "the optimum lies beyond" if last else "so the next level is as wide"
            edge = f"; on the edge of the grid, {then}"
        lines.append(f"{grid}: {values}{edge}")
    return "\n".join(lines)
