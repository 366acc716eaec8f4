"""Where the minimum of a U-curve lies, how surely, and how it drifts with the size of the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

RESAMPLES = 400


@dataclass(frozen=True)
class Optimum:
    """The minimum of one curve of losses over log2 of a hyperparameter.

    Attributes:
        place: log2 of the hyperparameter at the minimum.
        error: standard error of ``place``; nan where nothing tells (three points with one seed each, and no scatter
            borrowed).
        loss: at the minimum of the fit.
        edge: ``low`` or ``high`` where the minimum lies at or beyond that end of the grid: then ``place`` is only the
            best point of the grid, and the grid has to be extended.
        points: points that the parabola was fitted to.
    """

    place: float
    error: float
    loss: float
    edge: Literal["low", "high"] | None
    points: int


def scatter(samples: Iterable[Sequence[float]]) -> float | None:
    """Standard deviation between seeds, pooled over all points that have several; None where none has."""
    spreads = [float(np.var(s, ddof=1)) for s in samples if len(s) > 1 and all(map(math.isfinite, s))]
    return math.sqrt(sum(spreads) / len(spreads)) if spreads else None


def find_optimum(losses: Mapping[float, Sequence[float]], window: float = 1.0, noise: float | None = None) -> Optimum:
    """Fits a parabola to the mean losses around the best point of the grid.

    A divergence counts as a loss above all others: it bounds the curve but takes no part in the fit. The error is by
    bootstrap over draws with the scatter of seeds, or with what the parabola leaves over, whichever is more.

    Args:
        losses: by log2 of the hyperparameter, those of all seeds; inf for a run that diverged.
        window: octaves on each side of the best point that the fit takes, its neighbours in any case. Farther out no
            curve is a parabola.
        noise: scatter of seeds that other curves have shown, for a curve with one seed.

    Raises:
        ValueError: no finite loss.
    """
    places = sorted(losses)
    means = [float(np.mean(losses[place])) for place in places]
    finite = [i for i, mean in enumerate(means) if math.isfinite(mean)]
    if not finite:
        raise ValueError("every run diverged; lower the learning rates")
    best = min(finite, key=lambda i: means[i])
    if best in (0, len(places) - 1):
        edge: Literal["low", "high"] = "low" if best == 0 else "high"
        return Optimum(places[best], math.nan, means[best], edge, 1)
    chosen = [i for i in finite if abs(i - best) <= 1 or abs(places[i] - places[best]) <= window + 1e-6]
    if len(chosen) < 3:  # a divergence right beside the best point
        step = places[best] - places[best - 1]
        return Optimum(places[best], step / 2, means[best], None, len(chosen))
    x = np.array([places[i] for i in chosen])
    y = np.array([means[i] for i in chosen])
    place, loss, fitted = _vertex(x, y)
    error = _bootstrap(x, [np.asarray(losses[p]) for p in x], y - fitted, noise)
    return Optimum(place, error, loss, None, len(chosen))


def _vertex(x: np.ndarray, y: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Place and value of the least-squares parabola's minimum, held inside ``x``, and its values at ``x``."""
    a, b, c = np.polyfit(x - x.mean(), y, 2)
    fitted = np.polyval((a, b, c), x - x.mean())
    if a <= 0:  # no valley: the lowest point stands
        return float(x[y.argmin()]), float(y.min()), fitted
    place = float(np.clip(x.mean() - b / (2 * a), x.min(), x.max()))
    return place, float(np.polyval((a, b, c), place - x.mean())), fitted


def _bootstrap(x: np.ndarray, samples: list[np.ndarray], residuals: np.ndarray, borrowed: float | None) -> float:
    """Standard deviation of the vertex over resampled losses."""
    generator = np.random.default_rng(0)
    # Points with one seed borrow the scatter of those with several.
    own = scatter(list(map(float, s)) for s in samples)
    known = own if own is not None else borrowed
    if known is None and len(x) <= 3:
        return math.nan
    noise = known or 0.0
    misfit = float(np.sqrt(np.square(residuals).sum() / (len(x) - 3))) if len(x) > 3 else 0.0
    means = np.array([s.mean() for s in samples])
    errors = np.maximum(noise / np.sqrt([len(s) for s in samples]), misfit)
    places = [_vertex(x, means + errors * generator.standard_normal(len(x)))[0] for _ in range(RESAMPLES)]
    return float(np.std(places))


@dataclass(frozen=True)
class Drift:
    """How the optimum moves when a size doubles.

    Attributes:
        per_doubling: in log2 of the hyperparameter: slope of the weighted line through the optima.
        error: its standard error; nan where the optima have none.
        shifts: from each size to the next, per doubling.
        limit: half a grid step.
        verdict: ``holds`` where the drift is within the limit by its error, ``drifts`` where it is beyond it by its
            error, ``undecided`` between, and where an optimum lies at the edge of its grid.
    """

    per_doubling: float
    error: float
    shifts: tuple[float, ...]
    limit: float
    verdict: Literal["holds", "drifts", "undecided"]


def find_drift(optima: Mapping[int, Optimum], spacing: float) -> Drift:
    """Drift of the optima over a size.

    Args:
        optima: by size, at least two.
        spacing: log2 of the grid's spacing.
    """
    sizes = sorted(optima)
    x = np.log2(sizes)
    y = np.array([optima[size].place for size in sizes])
    errors = np.array([optima[size].error for size in sizes])
    known = np.isfinite(errors)
    # A fit can't know its place better than the noise that its few points hide.
    weights = 1 / np.maximum(np.where(known, errors, spacing / 2), spacing / 20) ** 2
    centre = np.average(x, weights=weights)
    spread = (weights * (x - centre) ** 2).sum()
    slope = float((weights * (x - centre) * y).sum() / spread)
    # Optima that lie off the line by more than their errors make the slope as unsure as that.
    left_over = (weights * (y - np.average(y, weights=weights) - slope * (x - centre)) ** 2).sum()
    inflation = math.sqrt(max(1.0, left_over / (len(x) - 2))) if len(x) > 2 else 1.0
    error = inflation / math.sqrt(spread) if known.all() else math.nan
    shifts = tuple(float(v) for v in np.diff(y) / np.diff(x))
    verdict: Literal["holds", "drifts", "undecided"] = "undecided"
    if not any(optimum.edge for optimum in optima.values()) and math.isfinite(error):
        if abs(slope) + error <= spacing / 2:
            verdict = "holds"
        elif abs(slope) - error > spacing / 2:
            verdict = "drifts"
    return Drift(slope, error, shifts, spacing / 2, verdict)
