"""The loss curve of a run as a picture."""

from __future__ import annotations

import json
import math
import os

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter

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


def smoothed(values: np.ndarray) -> np.ndarray:
    """Moving average; its window grows from one point to 3 % of all, so that it follows a steep start."""
    result, average = np.empty_like(values), 0.0
    for index, value in enumerate(values):
        average += (value - average) / (1 + min(0.03 * len(values), 0.1 * index))
        result[index] = average
    return result
