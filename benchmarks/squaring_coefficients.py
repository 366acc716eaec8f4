"""The coefficients of `squaring` (optim/coefficients.py), by linear programs; prints them. Needs scipy.

    python benchmarks/squaring_coefficients.py [--lower 0.0028] [--digits 2]

Each step is to take an interval of singular values to one with the least ratio of its ends. That is no linear problem
in the coefficients, but for small changes it is: a linear program finds the best change within a trust region, over and
over, until none helps. It begins at the table, rounded to ``--digits``, and finds all of its digits again (scipy 1.17);
the table began at the best of some hundred random starts.
"""

from __future__ import annotations

import argparse

import numpy as np
from scipy.optimize import linprog

from megatron_mup.optim.coefficients import coefficient_schedule, squarings

UP_TO, BETWEEN = 1.01, 1.006  # how far above the norm, and above what the first step leaves, nothing grows
POINTS, ROUNDS = 600, 200


def unpack(free: np.ndarray) -> list[tuple[float, float, float]]:
    """(a, b, c) of each squaring from what is free in them: S stays 1 at R = 0 until the last."""
    *pairs, last = np.split(free, range(2, len(free) - 2, 2))
    return [(a, b, 1 - a) if i else (1.0, a, b) for i, (a, b) in enumerate(pairs)] + [tuple(last)]


def pack(step: tuple[float, ...]) -> np.ndarray:
    """The opposite of :func:`unpack`."""
    (_, b, c), *middle, last = squarings(step)
    return np.array([b, c, *(number for a, b, _ in middle for number in (a, b)), *last])


def evaluate(free: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S at values r of R, and its derivatives ``[free, r]``."""
    s, change, place = r, np.zeros((len(free), len(r))), 0
    steps = unpack(free)
    for number, (a, b, c) in enumerate(steps):
        before, s = s, a + b * r + c * s * s
        change = 2 * c * before * change
        if number == 0:
            own = [r, before**2]
        elif number < len(steps) - 1:
            own = [1 - before**2, r]
        else:
            own = [np.ones_like(r), r, before**2]
        change[place : place + len(own)] += own
        place += len(own)
    return s, change


def improve(free: np.ndarray, low: float, high: float) -> np.ndarray:
    """Where ``max |x S(x^2) - 1|`` on [low, high] is least."""
    half = (1 - np.cos(np.linspace(0, np.pi, POINTS))) / 2
    x = np.unique(np.concatenate([low + (high - low) * half, np.exp(np.log(low) + np.log(high / low) * half)]))
    region, ones = 0.05, np.ones((len(x), 1))
    s, change = evaluate(free, x * x)
    worst = np.abs(x * s - 1).max()
    for _ in range(ROUNDS):
        rows, rest = (change * x).T, 1 - x * s
        bounds = [(-d, d) for d in region * np.maximum(np.abs(free), 0.05)]
        found = linprog(
            [0.0] * len(free) + [1.0],
            A_ub=np.block([[rows, -ones], [-rows, -ones]]),
            b_ub=np.concatenate([rest, -rest]),
            bounds=[*bounds, (0, None)],
        )
        tried = free + found.x[:-1]
        s_tried, change_tried = evaluate(tried, x * x)
        error = np.abs(x * s_tried - 1).max()
        if error < worst:
            region = min(1.0, 2 * region)
            gain, free, s, change, worst = worst - error, tried, s_tried, change_tried, error
            if gain < 1e-12:
                break
        else:
            region /= 4
            if region < 1e-10:
                break
    return free


def main() -> None:
    """Prints both steps and the intervals that they leave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lower", type=float, default=0.0028, help="smallest singular value, as a share of the norm")
    parser.add_argument("--digits", type=int, default=2, help="of the table that are kept to begin with")
    args = parser.parse_args()
    low, high = args.lower, UP_TO
    for number, step in enumerate(coefficient_schedule("squaring", 2)):
        start = pack(step)
        start[-3:] *= 1 if number else 1.78  # the table has the first step's end at 1
        free = improve(np.array([float(f"{number:.{args.digits}g}") for number in start]), low, high)
        x = np.geomspace(low, high, 100_001)
        ends = x * evaluate(free, x * x)[0]
        scale = 1.0 if number else ends.max() * BETWEEN
        free[-3:] /= scale
        print(f"[{low:.5f}, {high:.5f}] -> [{ends.min() / scale:.5f}, {ends.max() / scale:.5f}]")
        for triple in unpack(free):
            print("    *(" + ", ".join(f"{number:.10g}" for number in triple) + "),")
        low, high = ends.min() / scale, 1.0


if __name__ == "__main__":
    main()
