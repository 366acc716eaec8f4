"""Coefficients of Newton-Schulz: (a, b, c) of each step ``X <- (a I + b R + c R^2) X``, ``R = X X^T``.

A step maps each singular value by the odd polynomial ``p(x) = a x + b x^3 + c x^5``. The best p for values in
[low, high] deviates least from 1 there (Remez); composed step by step, on the interval that the step before leaves,
such polynomials are the best of all compositions (Polar Express, arXiv 2505.16932; CANS, arXiv 2506.10935).

A step with more numbers, three for each squaring, is ``X <- S X`` with S found by ``S <- a I + b R + c S^2`` over and
over, from S = R: k products of symmetric matrices for degree 2^(k+1) + 1. Such polynomials are few among those of their
degree, but for k = 3 the best of them is all but the best of all.
"""

from __future__ import annotations

import functools
import math

import torch

Step = tuple[float, ...]
"""(a, b, c), or three numbers for each squaring, in the order in which they are used."""

Coefficients = tuple[Step, ...]

NAMES = ("quintic", "jordan", "polar_express", "cans", "squaring", "generated")
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
# Each step takes what the one before leaves, the first all singular values above 0.0028 of the norm, to an interval
# with the least ratio of its ends: a local optimum, which benchmarks/squaring_coefficients.py finds again by linear
# programs. Up to 1.01 times the norm nothing grows, nor do values that rounding lifts by 0.006 after the first step.
# S is scaled so that it is 1 where R is 0, and stays in [-1, 1] until it is complete.
_SQUARING = (
    (
        *(1.0, -7.106267636, 6.718906906),
        *(-0.8538026772, 0.2529913917, 1.853802677),
        *(-0.6278061731, 0.4568884623, 1.627806173),
        *(-0.1688071729, 0.1073771183, 1.168807173),
        *(1.416047948, -1.326696282, 44.83719795),
    ),
    (
        *(1.0, -3.01687924, 2.360596781),
        *(-0.4601455997, 0.2484744354, 1.4601456),
        *(-0.1113126699, 1.023240312, 1.11131267),
        *(3.938145825, -8.792696841, 7.040672589),
    ),
)
_CONVERGED = 5e-6
"""Where low/high is this near 1, the best polynomial is the Taylor one to rounding."""
_POLAR_EXPRESS_STEPS = 7
"""Steps of the published list; from the next on it has converged."""


def squarings(step: Step) -> list[Step]:
    """The (a, b, c) of a step, one after another."""
    return [step[i : i + 3] for i in range(0, len(step), 3)]


def has_squarings(schedule: Coefficients) -> bool:
    """Whether some step is of a degree above 5."""
    return any(len(step) > 3 for step in schedule)


def polynomial(gram: torch.Tensor, step: Step) -> tuple[torch.Tensor, float]:
    """``S - a I`` and ``a`` of a step for Gram matrices R ``[batch, n, n]``: ``a X`` loses less when added apart."""
    s, (*before, (constant, b, c)) = gram, squarings(step)
    for first, second, third in before:
        s = torch.baddbmm(gram, s, s, beta=second, alpha=third)
        s.diagonal(dim1=-2, dim2=-1).add_(first)
    return torch.baddbmm(gram, s, s, beta=b, alpha=c), constant


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
    - ``squaring``: two steps of degree 65 and 33, for values above 0.0028 of the norm, which end in [0.978, 1.023];
      further ones are of degree 5 and converge.
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
        case "squaring", []:
            return (*_SQUARING[:steps], *[best_quintic(1.0, 1.0)] * (steps - len(_SQUARING)))
        case "generated", [lower, safety]:
            return generate(lower, steps, safety=safety)
    raise ValueError(f"no Newton-Schulz coefficients {name!r}")
