"""Curves of a run as pictures."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

POINTS = 600
"""Most points of a curve in a chart; what has more is averaged."""

TRAIN, TOKENS, VALIDATION = "train/lm loss", "train/consumed tokens", "validation/lm loss"


def loss_curve(metrics_file: str, png: str, title: str) -> None:
    """Draws train and validation loss over tokens, with perplexity on the right.

    Args:
        metrics_file: what ``--metrics-file`` wrote.
        png: file to write; its folder is made.
        title: shown above.

    Raises:
        ValueError: the file holds no training step.
    """
    with open(metrics_file, encoding="utf-8") as file:
        records = [json.loads(line) for line in file if line.endswith("\n")]
    steps = [r for r in records if r.get(TRAIN) is not None]
    if not steps:
        raise ValueError(f"{metrics_file}: no training step recorded")
    tokens = np.array([r[TOKENS] for r in steps], dtype=float)
    loss = np.array([r[TRAIN] for r in steps], dtype=float)
    evaluations = [(r["iteration"], r[VALIDATION]) for r in records if r.get(VALIDATION) is not None]

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(tokens, loss, color="tab:blue", alpha=0.25, linewidth=0.8)
    smooth = smoothed(loss)
    axes.plot(tokens, smooth, color="tab:blue", linewidth=1.8, label=f"train, smoothed ({smooth[-1]:.3f} at the end)")
    if evaluations:
        iterations, values = np.array(evaluations, dtype=float).T
        places = np.interp(iterations, [r["iteration"] for r in steps], tokens)
        label = f"validation ({values[-1]:.3f} at the end)"
        axes.plot(places, values, color="tab:orange", marker="o", markersize=4, linewidth=1.5, label=label)
    axes.set_title(title)
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    right = axes.twinx()
    right.set_ylim(axes.get_ylim())
    right.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{math.exp(value):,.0f}" if value > math.log(100) else f"{math.exp(value):.3g}")
    )
    right.set_ylabel("perplexity")
    os.makedirs(os.path.dirname(png) or ".", exist_ok=True)
    figure.savefig(png)


def chart_svg(title: str, curves: Mapping[str, Mapping[int, float]]) -> str:
    """A chart over iterations as an ``<svg>`` element; each curve has values by rising iteration, and at least one."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        iterations, values = thinned(np.array(list(curve)), np.array(list(curve.values()), dtype=float))
        # There are ten colours.
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        marker = "o" if len(values) < 40 else None
        axes.plot(iterations, values, linewidth=1.2, linestyle=style, marker=marker, markersize=3, label=name)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize=7, ncols=1 + (len(curves) - 1) // 8)
    text = io.StringIO()
    # Text stays text; nothing about time and program.
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def thinned(places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points: means over equal stretches of a longer curve."""
    if len(values) <= POINTS:
        return places, values
    stretch = np.minimum((places - places[0]) * POINTS // (places[-1] - places[0]), POINTS - 1)
    count = np.bincount(stretch, minlength=POINTS)
    there = count > 0
    means = (np.bincount(stretch, weights=sums, minlength=POINTS)[there] / count[there] for sums in (places, values))
    return next(means), next(means)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Moving average; its window grows from one point to 3 % of all, so that it follows a steep start."""
    result, average = np.empty_like(values), 0.0
    for index, value in enumerate(values):
        average += (value - average) / (1 + min(0.03 * len(values), 0.1 * index))
        result[index] = average
    return result
