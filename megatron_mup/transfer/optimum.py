"""Where the minima of U-curves lie, how surely, and how they drift with the size of the model.

All curves of a sweep are fitted at once: near its minimum each is a cubic in log2 of the hyperparameter with a place
and a height of its own, and they share their shape. That is what lets flat curves under the noise of seeds be told
apart: the noise is estimated from all runs, the curvature from all sizes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

Curve = Mapping[float, Mapping[int, float]]
"""Losses by seed, by log2 of the hyperparameter; inf where a run diverged."""
Size = tuple[int, ...]
Place = TypeVar("Place", int, float)

WINDOW = 1.5
"""Octaves on each side of the minimum that the fit takes. Farther out no curve is a cubic."""
FEWEST = 3
"""Points without which a curve has no minimum."""
DRAWS = 4000
ROUNDS = 8
NOISE_FREEDOM, SHAPE_FREEDOM = 2, 4
"""Degrees of freedom that the noise needs to be stated at all, and that must be left where a term of the shape is
added."""


@dataclass(frozen=True)
class Optimum:
    """The minimum of one curve of losses over log2 of a hyperparameter.

    Attributes:
        place: log2 of the hyperparameter at the minimum.
        loss: at the minimum of the fit, for the first seed.
        edge: ``low`` or ``high`` where the point of the grid nearest to the minimum is the last one at that end.
        points: of the grid, that the fit took; below three ``place`` is only the best of them.
        draws: places that are as likely as the noise of the runs makes them; those of all optima of a fit go together.
            None where nothing tells the noise (three points of one size with one seed each).
        noise: standard deviation of a run's loss beside the fit; nan without draws.
    """

    place: float
    loss: float
    edge: Literal["low", "high"] | None
    points: int
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)
    noise: float = math.nan

    @property
    def error(self) -> float:
        """Half the width of the middle 68 % of ``draws``; nan without them."""
        return math.nan if self.draws is None else _half_width(self.draws)

    @property
    def problem(self) -> str | None:
        """Why this is no optimum that a drift may be taken from; None where it is one."""
        if self.points < FEWEST:
            return f"{self.points} of at least {FEWEST} points"
        return None if self.edge is None else f"at the {self.edge} edge of the grid: extend it (--extend)"


def _half_width(draws: np.ndarray) -> float:
    low, high = np.percentile(draws, (15.865, 84.135))
    return float(high - low) / 2


def levelled(curve: Mapping[Place, Mapping[int, float]]) -> dict[Place, dict[int, float]]:
    """A curve without what tells its seeds apart at every point alike: the tokens that a seed is validated on.

    From each loss the mean distance of its seed from the first one is taken, over the points that both have run.
    """
    first = min(seed for losses in curve.values() for seed in losses)
    apart: dict[int, list[float]] = defaultdict(list)
    for losses in curve.values():
        for seed, loss in losses.items():
            if first in losses and math.isfinite(loss - losses[first]):
                apart[seed].append(loss - losses[first])
    offsets = {seed: sum(some) / len(some) for seed, some in apart.items()}
    return {x: {seed: loss - offsets.get(seed, 0.0) for seed, loss in losses.items()} for x, losses in curve.items()}


def find_optimum(curve: Curve) -> Optimum:
    """The minimum of one curve by itself; see :func:`find_optima`."""
    return find_optima({(1,): curve})[1,]


def find_optima(curves: Mapping[Size, Curve]) -> dict[Size, Optimum]:
    """Minima of curves that are alike in shape, by least squares over all runs near them.

    The loss of a run is an offset of its size and seed, plus ``slope u + curvature (u² + skew u³)`` with ``u`` the
    distance from the middle of its size's window. Slopes are each size's own; the curvature may follow log2 of each
    part of the size; the skew is common. Where there are too few runs for them, skew and trend are left out. The window
    moves with the minimum until it stays. Errors are those of the coefficients (Student's t).

    A point at which a seed diverged takes no part in the fit, and bounds the grid.

    Args:
        curves: by size, the same number of parts in all; the trend is over those that vary.

    Raises:
        ValueError: a curve without a finite loss.
    """
    finite = {size: _finite(curve) for size, curve in curves.items()}
    if not all(finite.values()):
        raise ValueError("every run diverged; lower the learning rates")
    means = {
        size: {x: float(np.mean(list(losses.values()))) for x, losses in levelled(curve).items()}
        for size, curve in finite.items()
    }
    best = {size: min(mean, key=lambda x: mean[x]) for size, mean in means.items()}
    found = {size: Optimum(best[size], means[size][best[size]], None, len(means[size])) for size in curves}
    fitted = {size: curve for size, curve in finite.items() if len(curve) >= FEWEST}
    if not fitted:
        return found
    centres = {size: best[size] for size in fitted}
    fit = _Fit({size: _near(curve, centres[size]) for size, curve in fitted.items()}, centres, None)
    for _ in range(ROUNDS):
        before, centres = centres, {size: fit.place(size) for size in fitted}
        fit = _Fit({size: _near(curve, centres[size]) for size, curve in fitted.items()}, centres, fit)
        if max(abs(centres[size] - before[size]) for size in fitted) < 0.01:
            break
    for size in fitted:
        place, points = fit.place(size), len(fit.curves[size])
        edge = _edge(place, curves[size])
        found[size] = Optimum(place, fit.loss(size), edge, points, fit.draws(size), fit.noise)
    return found


def _finite(curve: Curve) -> Curve:
    return {x: seeds for x, seeds in sorted(curve.items()) if all(map(math.isfinite, seeds.values()))}


def _near(curve: Curve, centre: float) -> Curve:
    """Points within the window, and never fewer than the nearest three."""
    near = sorted(curve, key=lambda x: abs(x - centre))
    return {x: curve[x] for i, x in enumerate(near) if i < FEWEST or abs(x - centre) <= WINDOW + 1e-6}


def _edge(place: float, curve: Curve) -> Literal["low", "high"] | None:
    """The end of the grid, divergences included, that a place is nearest to."""
    nearest = min(curve, key=lambda x: abs(x - place))
    return "low" if nearest == min(curve) else "high" if nearest == max(curve) else None


class _Fit:
    """One least-squares fit to the runs of several curves; a Gauss-Newton step in what is not linear, the skew.

    Coefficients are offsets of sizes and seeds, slopes of sizes, curvature and its trends, and the skew.

    Args:
        curves: points to fit, by size.
        centres: middle of each window.
        former: fit that the step starts from; None: curvature 1 and no skew.
    """

    def __init__(self, curves: Mapping[Size, Curve], centres: Mapping[Size, float], former: _Fit | None) -> None:
        self.curves, self.centres, self.sizes = curves, centres, sorted(curves)
        runs = [(s, x - centres[s], seed, y) for s in self.sizes for x, v in curves[s].items() for seed, y in v.items()]
        self.offsets = sorted({(size, seed) for size, _, seed, _ in runs})
        self.linear = len(self.offsets) + len(self.sizes)
        logs = np.log2(np.array(self.sizes, dtype=float))
        logs = logs[:, np.ptp(logs, axis=0) > 0]
        free = len(runs) - self.linear - 1 - logs.shape[1]
        if free < SHAPE_FREEDOM:  # no trends
            free, logs = free + logs.shape[1], logs[:, :0]
        self.shapes = {
            size: np.array([1.0, *trends]) for size, trends in zip(self.sizes, logs - logs.mean(0), strict=True)
        }
        self.skewed = free > SHAPE_FREEDOM and any(len(curve) > FEWEST for curve in curves.values())
        self.skew, self.curvatures = 0.0, dict.fromkeys(self.sizes, 1.0)
        if self.skewed and former is not None:
            self.skew, self.curvatures = former.shape()
        matrix = np.array([self._row(size, u, seed) for size, u, seed, _ in runs])
        losses = np.array([loss + self.skew * self.curvatures[size] * u**3 for size, u, _, loss in runs])
        self.coefficients = np.linalg.lstsq(matrix, losses, rcond=None)[0]
        free -= self.skewed
        left_over = losses - matrix @ self.coefficients
        self.noise = math.sqrt(float(left_over @ left_over) / free) if free >= NOISE_FREEDOM else math.nan
        self.samples = self._drawn(matrix, free) if free >= NOISE_FREEDOM else None

    def _row(self, size: Size, u: float, seed: int) -> np.ndarray:
        """How a run's loss changes with each coefficient."""
        offsets = [float(mine == (size, seed)) for mine in self.offsets]
        # A place that moves takes the whole shape along, its skew too.
        slopes = [(u + 1.5 * self.skew * u**2) * (mine == size) for mine in self.sizes]
        bent = (u**2 + self.skew * u**3) * self.shapes[size]
        return np.array([*offsets, *slopes, *bent, *([self.curvatures[size] * u**3] if self.skewed else [])])

    def _drawn(self, matrix: np.ndarray, free: int) -> np.ndarray:
        """Coefficients that the runs leave possible, a row each: their posterior under a flat prior."""
        generator = np.random.default_rng(0)
        root = np.linalg.pinv(matrix)
        # root root^T is the inverse of matrix^T matrix.
        normal = generator.standard_normal((DRAWS, len(matrix))) @ root.T
        scale = np.sqrt(free / generator.chisquare(free, (DRAWS, 1)))
        drawn: np.ndarray = self.coefficients + self.noise * scale * normal
        return drawn

    def _curvature(self, size: Size, coefficients: np.ndarray) -> np.ndarray:
        shape = self.shapes[size]
        curvature: np.ndarray = coefficients[:, self.linear : self.linear + len(shape)] @ shape
        return curvature

    def shape(self) -> tuple[float, dict[Size, float]]:
        """Skew and curvatures that the next step may start from; none below a quarter of the mean, nor a wild skew."""
        found = {size: float(self._curvature(size, self.coefficients[None])[0]) for size in self.sizes}
        mean = sum(found.values()) / len(found)
        if mean <= 0:
            return 0.0, dict.fromkeys(self.sizes, 1.0)
        skew = float(self.coefficients[-1]) * sum(self.curvatures.values()) / len(found) / mean if self.skewed else 0.0
        return float(np.clip(skew, -1, 1)), {size: max(curvature, mean / 4) for size, curvature in found.items()}

    def _minima(self, size: Size, coefficients: np.ndarray) -> np.ndarray:
        """Places of the minimum within reach of a size's points, for rows of coefficients."""
        slope = coefficients[:, len(self.offsets) + self.sizes.index(size)]
        curvature = self._curvature(size, coefficients)
        cubic = self._cubic(size, coefficients, curvature)
        curvature = curvature + 1.5 * self.skew * slope
        with np.errstate(all="ignore"):
            u = -slope / (curvature + np.sqrt(curvature**2 - 3 * cubic * slope))
        points = np.array([x - self.centres[size] for x in self.curves[size]])
        low, high = points.min(), points.max()
        values = [slope * end + curvature * end**2 + cubic * end**3 for end in (low, high)]
        # Where there is no valley the lower end stands.
        u = np.where(np.isfinite(u), u, np.where(values[0] <= values[1], low, high))
        clipped: np.ndarray = np.clip(u, low, high) + self.centres[size]
        return clipped

    def _cubic(self, size: Size, coefficients: np.ndarray, curvature: np.ndarray) -> np.ndarray:
        """Factor of the cube: to first order around what the step started from."""
        if not self.skewed:
            return np.zeros(len(coefficients))
        known = self.curvatures[size]
        return self.skew * (curvature - known) + coefficients[:, -1] * known

    def place(self, size: Size) -> float:
        """Where a size's minimum lies, held inside its points."""
        return float(self._minima(size, self.coefficients[None])[0])

    def draws(self, size: Size) -> np.ndarray | None:
        """Where it might lie as well."""
        return None if self.samples is None else self._minima(size, self.samples)

    def loss(self, size: Size) -> float:
        """Of the fit at the minimum, for the size's first seed."""
        seed = min(seed for mine, seed in self.offsets if mine == size)
        u = self.place(size) - self.centres[size]
        before = self.skew * self.curvatures[size] * u**3
        return float(self._row(size, u, seed) @ self.coefficients) - before


@dataclass(frozen=True)
class Drift:
    """How the optimum moves when a size doubles.

    Attributes:
        per_doubling: in log2 of the hyperparameter: slope of the weighted line through the optima.
        error: its standard error; nan where the optima have none.
        shifts: from each size to the next, per doubling.
        limit: half a grid step.
        verdict: ``holds`` where the drift is within the limit by its error, ``drifts`` where it is beyond it by its
            error, ``undecided`` between.
    """

    per_doubling: float
    error: float
    shifts: tuple[float, ...]
    limit: float
    verdict: Literal["holds", "drifts", "undecided"]


def find_drift(optima: Mapping[int, Optimum], spacing: float) -> Drift | None:
    """Drift of the optima over a size; None where one of them has a ``problem``.

    Args:
        optima: by size, at least two, of one fit.
        spacing: log2 of the grid's spacing.
    """
    if any(optimum.problem for optimum in optima.values()):
        return None
    sizes = sorted(optima)
    x = np.log2(sizes)
    y = np.array([optima[size].place for size in sizes])
    errors = np.array([optima[size].error for size in sizes])
    known = bool(np.isfinite(errors).all())
    # However small an error, no optimum decides alone.
    weights = 1 / np.maximum(errors, spacing / 20) ** 2 if known else np.ones(len(x))
    slopes = weights * (x - np.average(x, weights=weights))
    slopes /= (slopes * x).sum()
    slope = float(slopes @ y)
    error = math.nan
    if known:
        error = _half_width(slopes @ np.array([optima[size].draws for size in sizes]))
        # Optima that lie off the line by more than their errors make the slope as unsure as that.
        off = y - slope * x
        left_over = float((weights * (off - np.average(off, weights=weights)) ** 2).sum())
        error *= math.sqrt(max(1.0, left_over / (len(x) - 2))) if len(x) > 2 else 1.0
    verdict: Literal["holds", "drifts", "undecided"] = "undecided"
    if math.isfinite(error):
        if abs(slope) + error <= spacing / 2:
            verdict = "holds"
        elif abs(slope) - error > spacing / 2:
            verdict = "drifts"
    return Drift(slope, error, tuple(float(v) for v in np.diff(y) / np.diff(x)), spacing / 2, verdict)
