"""Which trials a sweep still needs, and what its results say. Both are functions of the plan and of what is done."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_mup.config import Config
from megatron_mup.transfer.optimum import Drift, Optimum, find_drift, find_optima, levelled
from megatron_mup.transfer.trials import Trial, start_value

Others = tuple[tuple[str, float], ...]

OCTAVES = 1.0
"""Distance from the best point within which further seeds are run, its neighbours in any case. Where a minimum lies is
told by the slope through the points around it, in which a run counts by its distance squared: seeds at the best point
alone would tell next to nothing."""


@dataclass(frozen=True)
class GridAxis:
    """A grid over one or several settings that move together: each is its start value times ``spacing^k``.

    Attributes:
        names: of the settings; the first one names the axis.
        starts: their values at k = 0.
        spacing: factor between neighbours.
        low, high: smallest and largest k.
    """

    names: tuple[str, ...]
    starts: tuple[float, ...]
    spacing: float
    low: int
    high: int

    @classmethod
    def of(cls, recipe: Config, names: Sequence[str], spacing: float, low: int, high: int) -> GridAxis:
        """An axis around the recipe's values."""
        return cls(tuple(names), tuple(start_value(recipe, name) for name in names), spacing, low, high)

    def at(self, k: float) -> tuple[tuple[str, float], ...]:
        """Values at a grid point."""
        # Six digits, so that a point reached by another sum is the same trial.
        return tuple((n, float(f"{s * self.spacing**k:.6g}")) for n, s in zip(self.names, self.starts, strict=True))

    def place(self, k: float) -> float:
        """log2 of the first setting's value at a grid point."""
        return math.log2(self.starts[0]) + k * math.log2(self.spacing)

    def nearest(self, place: float) -> int:
        """The grid point nearest to log2 of a value."""
        return round((place - math.log2(self.starts[0])) / math.log2(self.spacing))


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """A sweep: a U-curve over the main axis for each size, and each point of the other axes.

    Attributes:
        sizes: hidden size and number of layers of each model.
        axis: the main axis.
        others: further axes; each combination of their points has curves of its own.
        first_seed: seed of the first round.
        seeds: trials at every point within ``OCTAVES`` of the best one.
        extend: how many points may be added beyond each end where a curve is still falling there.
    """

    sizes: tuple[tuple[int, int], ...]
    axis: GridAxis
    others: tuple[GridAxis, ...] = ()
    first_seed: int = 1234
    seeds: int = 1
    extend: int = 0

    def combinations(self) -> list[Others]:
        """Values of the other axes."""
        points = [[other.at(k) for k in range(other.low, other.high + 1)] for other in self.others]
        return [tuple(itertools.chain.from_iterable(chosen)) for chosen in itertools.product(*points)]

    def trial(self, size: tuple[int, int], k: int, others: Others, seed: int) -> Trial:
        """The trial at a grid point; ``seed`` counts from 0."""
        return Trial(*size, (*self.axis.at(k), *others), self.first_seed + seed)

    def reach(self) -> range:
        """All grid points that the sweep may come to."""
        return range(self.axis.low - self.extend, self.axis.high + self.extend + 1)


Points = dict[int, dict[int, float]]
"""Losses by seed, by grid point."""
Curves = dict[tuple[tuple[int, int], Others], Points]
"""By size and values of the other axes."""


def curves_of(plan: SweepPlan, done: Mapping[str, float]) -> Curves:
    """Losses that are known.

    Args:
        plan: the sweep.
        done: loss by trial key, inf where one diverged.
    """
    curves: Curves = {}
    for size, others in itertools.product(plan.sizes, plan.combinations()):
        points = {}
        for k in plan.reach():
            keys = {seed: plan.trial(size, k, others, seed).key for seed in range(plan.seeds)}
            if known := {seed: done[key] for seed, key in keys.items() if key in done}:
                points[k] = known
        curves[size, others] = points
    return curves


def wanted(plan: SweepPlan, done: Mapping[str, float]) -> list[Trial]:
    """The trials of the next round, small models first; none when the sweep is complete.

    First the grid with one seed; then one more point beyond an end at which a curve has its minimum, as far as
    ``extend`` allows; then the other seeds at the points around the best one.
    """
    trials: list[Trial] = []
    for (size, others), points in curves_of(plan, done).items():
        grid = [plan.trial(size, k, others, 0) for k in range(plan.axis.low, plan.axis.high + 1)]
        missing = [trial for trial in grid if trial.key not in done]
        if not missing:
            missing = _next(plan, size, others, points, done)
        trials += missing
    return sorted(trials, key=lambda t: (t.hidden_size**2 * t.num_layers, t))


def _next(
    plan: SweepPlan,
    size: tuple[int, int],
    others: Others,
    points: dict[int, dict[int, float]],
    done: Mapping[str, float],
) -> list[Trial]:
    finite = {k: losses for k, losses in points.items() if all(map(math.isfinite, losses.values()))}
    if not finite:
        return []
    level = levelled(finite)
    best = min(finite, key=lambda k: sum(level[k].values()) / len(level[k]))
    beyond = best - 1 if best == min(points) else best + 1 if best == max(points) else None
    if beyond is not None and beyond in plan.reach():
        return [plan.trial(size, beyond, others, 0)]
    reach = max(1, math.floor(OCTAVES / math.log2(plan.axis.spacing) + 1e-6))
    again = [
        plan.trial(size, k, others, seed)
        for k in range(best - reach, best + reach + 1)
        if k in points
        for seed in range(plan.seeds)
    ]
    return [trial for trial in again if trial.key not in done]


@dataclass(frozen=True)
class Finding:
    """What a sweep says about one way to grow, at one point of the other axes.

    Attributes:
        axis: ``width`` or ``depth``.
        fixed: the size that stays.
        others: values of the other axes.
        optima: by size.
        drift: over them; None with one size, and where an optimum has a ``problem``.
    """

    axis: str
    fixed: int
    others: Others
    optima: dict[int, Optimum]
    drift: Drift | None


def findings(plan: SweepPlan, done: Mapping[str, float]) -> list[Finding]:
    """Optima and drifts: over width for each depth that has several widths, and over depth likewise."""
    found = []
    curves = {key: points for key, points in curves_of(plan, done).items() if _fits(points)}
    for others in plan.combinations():
        mine = {size: points for (size, values), points in curves.items() if values == others}
        optima = find_optima(
            {size: {plan.axis.place(k): losses for k, losses in points.items()} for size, points in mine.items()}
        )
        for axis, growing, fixed in (("width", 0, 1), ("depth", 1, 0)):
            lines: dict[int, dict[int, Optimum]] = defaultdict(dict)
            for size, optimum in optima.items():
                lines[size[fixed]][size[growing]] = optimum
            for stays, line in sorted(lines.items()):
                if len(line) > 1 or (axis == "width" and len(optima) == 1):
                    drift = find_drift(line, math.log2(plan.axis.spacing)) if len(line) > 1 else None
                    found.append(Finding(axis, stays, others, dict(sorted(line.items())), drift))
    return found


def _fits(points: Mapping[int, Mapping[int, float]]) -> bool:
    return any(all(map(math.isfinite, losses.values())) for losses in points.values())


def format_findings(plan: SweepPlan, found: Sequence[Finding]) -> str:
    """Findings as text: a line per size, and what they say together."""
    name, lines = plan.axis.names[0], list[str]()
    for finding in found:
        also = "".join(f", {other} {value:g}" for other, value in finding.others)
        fixed = "layers" if finding.axis == "width" else "hidden size"
        lines.append(f"over {finding.axis} at {fixed} {finding.fixed}{also}:")
        for size, optimum in finding.optima.items():
            lines.append(f"  {finding.axis} {size:6d}: {name} {_shown(optimum)}, loss {optimum.loss:.4f}")
        if finding.drift is not None:
            drift = finding.drift
            shifts = ", ".join(f"{shift:+.2f}" for shift in drift.shifts)
            lines.append(
                f"  drift per doubling {drift.per_doubling:+.3f}{_margin(drift.error, 3)} in log2 (from size to size "
                f"{shifts}); half a grid step is {drift.limit:.3f}: {drift.verdict}"
            )
        elif problems := [str(size) for size, optimum in finding.optima.items() if optimum.problem]:
            lines.append(f"  no drift: {finding.axis} {', '.join(problems)} has no optimum inside its grid")
    noises = sorted({o.noise for finding in found for o in finding.optima.values() if math.isfinite(o.noise)})
    if noises:
        lines.append(f"a run's own noise, beside its seed's offset: {', '.join(f'{noise:.4f}' for noise in noises)}")
    inside = [o for finding in found for o in finding.optima.values() if not o.problem]
    if any(math.isnan(optimum.error) for optimum in inside):
        lines.append("± ?: so few points with one seed each don't tell; take --seeds 2, or a finer grid")
    return "\n".join(lines)


def _shown(optimum: Optimum) -> str:
    if optimum.problem:
        return f"{2**optimum.place:.4g} is the best, {optimum.problem}"
    return f"{2**optimum.place:.4g} (log2 {optimum.place:.2f}{_margin(optimum.error, 2)})"


def _margin(error: float, digits: int) -> str:
    return f" ± {error:.{digits}f}" if math.isfinite(error) else " ± ?"


def share(trials: Sequence[Trial], worker: int, of: int) -> list[Trial]:
    """One worker's trials of a round: dealt out by size of model, the largest first to whoever has least."""
    loads, mine = [0.0] * of, list[Trial]()
    for trial in sorted(trials, key=lambda t: (-(t.hidden_size**2) * t.num_layers, t)):
        least = loads.index(min(loads))
        loads[least] += trial.hidden_size**2 * trial.num_layers
        if least == worker:
            mine.append(trial)
    return mine[::-1]
