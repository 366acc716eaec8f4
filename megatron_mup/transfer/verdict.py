"""From measured coordinates to slopes, and from slopes to a verdict."""

from __future__ import annotations

import csv
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Literal, get_args

import numpy as np

from megatron_mup.parametrization.meta import Role
from megatron_mup.training.observe import ATTENTION_LOGITS
from megatron_mup.transfer.coordinates import (
    ACTIVATION,
    CHANGE,
    EPSILON,
    UPDATE,
    VECTOR_CHANGE,
    WEIGHT_CHANGE,
    Row,
)

Axis = Literal["width", "depth", "experts"]

TOLERANCE = 0.25
"""Slopes of log2(value) against log2(size) up to which a quantity counts as flat. A wrong rule is off by an exponent of
a half or more, and this is half of that; docs/transfer.md has the argument, what was measured, and when to ask for
less."""

RANDOM = -0.5
"""Slope of a sum of many independent terms under a factor 1/many: logits before training (Tensor Programs V), and the
sum of all branches before training at depth exponent 1."""


FEW = ("mlp.router", "self_attention.linear_k_pos_proj")
RANDOM_LONG = (ATTENTION_LOGITS, *FEW)
"""Sums over the width into a few numbers that keep what is random in them until they align, which takes longer than a
few steps."""
EXPERTS = (Role.EXPERT_IN.value, Role.EXPERT_OUT.value)


@dataclass(frozen=True)
class Verdict:
    """How one quantity follows one size.

    Attributes:
        axis: the size.
        slope: of log2(value) against log2(size), mean over seeds.
        error: its standard error over seeds; 0 with one seed.
        low, high: what is accepted.
        first, last: geometric means over seeds (and the other axes) at the smallest and the largest size.
    """

    axis: Axis
    quantity: str
    name: str
    step: int
    slope: float
    error: float
    low: float
    high: float
    first: float
    last: float

    @property
    def passed(self) -> bool:
        """Whether the slope is accepted."""
        return self.low <= self.slope <= self.high


@dataclass(frozen=True)
class Exponents:
    """Where a parametrization means a quantity to follow size.

    Attributes:
        depth_alpha: exponent of the depth rule, 0.5 or 1. What one layer does to its own weights shrinks with depth as
            ``m_L^(alpha-1)``, so that all layers together move the residual stream by the same.
        embedding: of the embedding's update over width: -0.5 in u-muP, whose learning rate there is a finding, not a
            rule of muP.
    """

    depth_alpha: float = 1.0
    embedding: float = 0.0


MUP = Exponents()


def limits(
    axis: Axis, quantity: str, name: str, step: int, exponents: Exponents = MUP, tolerance: float = TOLERANCE
) -> tuple[float, float]:
    """Slopes that are accepted.

    Args:
        axis: what grows.
        quantity, name, step: as in `coordinates.Value`.
        exponents: what the parametrization means.
        tolerance: distance from flat.
    """
    low, high = -tolerance, tolerance
    if quantity == EPSILON:
        if axis == "experts" and name in EXPERTS:
            # Of more experts each gets a smaller share of the tokens: a gradient that falls as experts^-1/2 if tokens
            # disagree, as experts^-1 if they agree. No source has a rule for it.
            return 0.5 - tolerance, 1 + tolerance
        if axis == "experts" and name == Role.ROUTER.value:
            # A sigmoid's row learns from its expert's tokens alone, a softmax's from all.
            return -2 * tolerance, 1 + tolerance
        # A wrong rule is off by a whole exponent, and gradients have no limit as clean as that of activations. What all
        # heads share sums over heads: aligned, that gives the width back that the logits' factor took, before training
        # only half of it.
        shared = axis == "width" and name in (Role.QK_NORM.value, Role.SHARED_KEY.value)
        return -2 * tolerance, (3 if shared else 2) * tolerance
    if axis == "width" and name.startswith("embedding") and quantity in (CHANGE, UPDATE):
        low += exponents.embedding
    if axis == "width" and quantity == ACTIVATION and (name in RANDOM_LONG or (name == "logits" and step == 0)):
        low += RANDOM
    # What its first weights make of a change of the input is random too; its own update is what has to be flat.
    if axis == "width" and quantity == CHANGE and name in FEW:
        low += RANDOM
    # The mean over layers of sums up to each, (L + 1) / 2L of the last one.
    if axis == "depth" and name == "residual":
        low += RANDOM
    if axis == "depth" and _in_block(name):
        own = exponents.depth_alpha - 1
        if quantity in (UPDATE, WEIGHT_CHANGE, VECTOR_CHANGE):
            # Beside the first order there is the product of two updates in one branch, which shrinks twice.
            return low + (2 * own if quantity == UPDATE else own), high + own
        low += own
    if axis == "depth" and step == 0 and quantity == ACTIVATION:
        low += RANDOM
    return low, high


def _in_block(name: str) -> bool:
    return not name.startswith(("embedding", "logits", "final", "readout", "position"))


def judge(rows: Sequence[Row], exponents: Exponents = MUP, tolerance: float = TOLERANCE) -> list[Verdict]:
    """A verdict for each quantity and class before the first and after the last step, by growing size; failures first.

    Where several sizes vary, one plane through all models gives all slopes. A quantity that is zero in a model,
    like the logits of a zero-initialised output layer, is left out.

    Args:
        rows: of all models and seeds.
        exponents, tolerance: see :func:`limits`.

    Raises:
        ValueError: all models have the same size.
    """
    axes = _axes(rows)
    if not axes:
        raise ValueError("slopes need at least two sizes")
    last = max(row.step for row in rows)
    grouped: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row.step in (0, last):
            grouped[row.quantity, row.name, row.step].append(row)
    verdicts = []
    for (quantity, name, step), group in grouped.items():
        if any(row.value == 0 for row in group):
            continue
        slopes = [_slopes([row for row in group if row.seed == seed], axes) for seed in {row.seed for row in group}]
        for place, axis in enumerate(axes):
            mine = np.array(slopes)[:, place]
            error = float(mine.std(ddof=1) / math.sqrt(len(mine))) if len(mine) > 1 else 0.0
            low, high = limits(axis, quantity, name, step, exponents, tolerance)
            # A number that is not finite is no slope, and passes nothing.
            verdicts.append(
                Verdict(axis, quantity, name, step, float(mine.mean()), error, low, high, *_ends(group, axis))
            )
    return sorted(verdicts, key=lambda v: (v.passed, v.axis, -max(v.low - v.slope, v.slope - v.high)))


def _axes(rows: Iterable[Row]) -> list[Axis]:
    rows, axes = list(rows), get_args(Axis)
    return [axis for axis in axes if len({size_of(row, axis) for row in rows}) > 1]


def size_of(row: Row, axis: Axis) -> int:
    """Where on an axis a row lies."""
    return {"width": row.hidden_size, "depth": row.num_layers, "experts": row.num_experts}[axis]


def _slopes(rows: list[Row], axes: list[Axis]) -> list[float]:
    """Least squares of log2(value) on log2 of each size, with a constant."""
    inputs = np.array([[math.log2(size_of(row, axis)) for axis in axes] + [1.0] for row in rows])
    values = np.array([row.value for row in rows])
    if not np.isfinite(values).all():
        return [math.nan] * len(axes)
    slopes: list[float] = np.linalg.lstsq(inputs, np.log2(values), rcond=None)[0][:-1].tolist()
    return slopes


def _ends(rows: list[Row], axis: Axis) -> tuple[float, float]:
    """Geometric means at the smallest and the largest size."""
    sizes = [size_of(row, axis) for row in rows]
    return tuple(  # type: ignore[return-value]
        math.exp(np.mean([math.log(row.value) for row, size in zip(rows, sizes, strict=True) if size == end]))
        for end in (min(sizes), max(sizes))
    )


def write_csv(path: str, records: Sequence[Row] | Sequence[Verdict]) -> None:
    """Writes measured rows or verdicts, one a line; makes the folder."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(records[0])] + ["passed"] * isinstance(records[0], Verdict))
        for record in records:
            line = list(asdict(record).values())
            writer.writerow([*line, record.passed] if isinstance(record, Verdict) else line)


def format_verdicts(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as text, failures first."""
    lines = [
        f"{'':5}{'axis':7} {'quantity':25} {'class':34} {'step':>4} {'first':>9} {'last':>9} {'slope':>7} "
        f"{'error':>6}  accepted"
    ]
    lines += [
        f"{'ok' if v.passed else 'FAIL':5}{v.axis:7} {v.quantity:25} {v.name:34} {v.step:4d} {v.first:9.3g} "
        f"{v.last:9.3g} {v.slope:7.2f} {v.error:6.2f}  {v.low:.2f} to {v.high:.2f}"
        for v in verdicts
    ]
    return "\n".join(lines)
