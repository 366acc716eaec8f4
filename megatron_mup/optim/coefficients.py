"""Coefficients of Newton-Schulz: (a, b, c) of each step ``X <- a X + (b A + c A^2) X``, ``A = X X^T``.

A step maps each singular value by the odd polynomial ``p(x) = a x + b x^3 + c x^5``. The best p for values in
[low, high] deviates least from 1 there (Remez); composed step by step, on the interval that the step before leaves,
such polynomials are the best of all compositions (Polar Express, arXiv 2505.16932; CANS, arXiv 2506.10935).
"""

from __future__ import annotations

import functools
import math

import torch

Coefficients = tuple[tuple[float, float, float], ...]

NAMES = ("quintic", "jordan", "polar_express", "cans", "generated")
"""Sets, as `coefficient_schedule` takes them. The last takes numbers after its name, polar_express may."""

CUSHION = 0.02407327424182761
"""Smallest ratio low/high that Polar Express optimizes for: on a wider interval p would dip too low inside."""
POLAR_EXPRESS_SAFETY = 1.01
LOWER = 1e-3
"""Smallest singular value, relative to the Frobenius norm, that the published sets are made for."""

_JORDAN = (3.4445, -4.7750, 2.0315)
_QUINTIC = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
_CONVERGED = 5e-6
"""Where low/high is this near 1, the best polynomial is the Taylor one to rounding."""
_POLAR_EXPRESS_STEPS = 7
"""Steps of the published list; from the next on it has converged."""


def best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic that deviates least from 1 on [low, high], by Remez' exchange.

    Its error has alternating signs and equal size at four points: both ends and the two extremes of p between them.
    """
    if low / high >= 1 - _CONVERGED:
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    first, second = (3 * low + high) / 4, (low + 3 * high) / 4
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    error = math.inf
    while True:
        points = torch.tensor([low, first, second, high], dtype=torch.float64)
        rows = torch.stack([points, points**3, points**5, signs], 1)
        a, b, c, found = torch.linalg.solve(rows, torch.ones(4, dtype=torch.float64)).tolist()
        if abs(found - error) <= 1e-15:
            return a, b, c
        error = found
        root = math.sqrt(9 * b * b - 20 * a * c)
        first, second = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))


@functools.cache
def generate(lower: float, steps: int, cushion: float = CUSHION, safety: float = 1.0) -> Coefficients:
    """The best composition of quintics for singular values from ``lower`` to 1, step by step.

    Args:
        lower: smallest singular value, relative to the norm that matrices are divided by.
        steps: how many.
        cushion: an interval counts as no wider than this ratio; what p then leaves is centred around 1.
        safety: values up to this times the interval's end stay harmless: every p but the last is that of x / safety.
    """
    low, high = lower, 1.0
    tuples = []
    for step in range(steps):
        a, b, c = best_quintic(max(low, cushion * high), high)
        at_low, at_high = (a * x + b * x**3 + c * x**5 for x in (low, high))
        if cushion * high > low:
            centre = 2 / (at_low + at_high)
            a, b, c = a * centre, b * centre, c * centre
        if step < steps - 1:
            a, b, c = a / safety, b / safety**3, c / safety**5
        tuples.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    return tuple(tuples)


def _polar_express(steps: int, safety: float) -> Coefficients:
    """The published list: made without a safety factor, and divided by it afterwards until it has converged."""
    raw, divided = generate(LOWER, steps), _POLAR_EXPRESS_STEPS
    return tuple((a / safety, b / safety**3, c / safety**5) for a, b, c in raw[:divided]) + raw[divided:]


@functools.cache
def coefficient_schedule(name: str, steps: int) -> Coefficients:
    """The tuples of ``steps`` steps.

    - ``jordan``: Keller Jordan's one tuple for all steps; singular values end in [0.68, 1.21].
    - ``quintic``: YouJiacheng's five, over and over; the flattest in five steps, [0.97, 1.15] for values above 0.01 of
      the norm.
    - ``polar_express``, ``polar_express:SAFETY``: for values above 1e-3 of the norm, with the safety factor 1.01 or the
      given one; five steps end in [0.86, 1.13], eight converge.
    - ``cans``: the same without cushion and safety.
    - ``generated:LOWER:SAFETY``: made for these steps, for values above LOWER of the norm; see `generate`.

    Raises:
        ValueError: no set has this name.
    """
    kind, *numbers = name.split(":")
    match kind, [float(number) for number in numbers]:
        case "jordan", []:
            return (_JORDAN,) * steps
        case "quintic", []:
            return tuple(_QUINTIC[i % len(_QUINTIC)] for i in range(steps))
        case "polar_express", []:
            return _polar_express(steps, POLAR_EXPRESS_SAFETY)
        case "polar_express", [safety]:
            return _polar_express(steps, safety)
        case "cans", []:
            return generate(LOWER, steps, cushion=0.0)
        case "generated", [lower, safety]:
            return generate(lower, steps, safety=safety)
    raise ValueError(f"no Newton-Schulz coefficients {name!r}")
