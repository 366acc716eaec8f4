"""Pictures of coordinate checks and of sweeps."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from megatron_mup.transfer.coordinates import Row
from megatron_mup.transfer.optimum import levelled
from megatron_mup.transfer.sweep import Curves, Finding, SweepPlan
from megatron_mup.transfer.verdict import Axis, Verdict, size_of


def coordinate_curves(rows: Sequence[Row], verdicts: Sequence[Verdict], axis: Axis, png: str, title: str) -> None:
    """Draws every measured quantity against a size, log on log: a line per class, dashed where it failed.

    Args:
        rows: of all models; means over seeds, and over the other axes, are drawn.
        verdicts: what :func:`verdict.judge` made of them.
        axis: what runs to the right.
        png: file to write; its folder is made.
        title: shown above.
    """
    panels = sorted({(v.step, v.quantity) for v in verdicts if v.axis == axis}, key=lambda p: (p[0], p[1]))
    columns = 3
    figure = _figure(columns, math.ceil(len(panels) / columns))
    figure.suptitle(title)
    failed = {(v.quantity, v.name, v.step) for v in verdicts if v.axis == axis and not v.passed}
    for place, (step, quantity) in enumerate(panels):
        axes = figure.add_subplot(math.ceil(len(panels) / columns), columns, place + 1)
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"](range(20)))
        for name in sorted({v.name for v in verdicts if (v.step, v.quantity, v.axis) == (step, quantity, axis)}):
            points = defaultdict(list)
            for row in rows:
                if (row.step, row.quantity, row.name) == (step, quantity, name) and row.value > 0:
                    points[size_of(row, axis)].append(math.log(row.value))
            sizes = sorted(points)
            style = "--" if (quantity, name, step) in failed else "-"
            axes.plot(sizes, [math.exp(np.mean(points[s])) for s in sizes], style, marker="o", markersize=3, label=name)
        axes.set_title(f"{quantity}, step {step}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xlabel({"width": "hidden size", "depth": "layers", "experts": "experts"}[axis], fontsize=8)
        _plain_ticks(axes.xaxis, sizes)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=5, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        # At least a factor of eight from bottom to top, so that what is flat looks flat.
        low, high = np.log2(axes.get_ylim())
        room = max(0.0, 3 - (high - low)) / 2
        axes.set_ylim(2 ** (low - room), 2 ** (high + room))
    _save(figure, png)


def u_curves(plan: SweepPlan, curves: Curves, found: Sequence[Finding], png: str, title: str) -> None:
    """Draws loss over the main axis, a line per size as the muP papers do; one panel per finding.

    Bars span the seeds, brought to the level of the first one; stars are the fitted optima; a run that diverged has no
    point.

    Args:
        plan: the sweep.
        curves: losses that are known.
        found: what they say.
        png: file to write; its folder is made.
        title: shown above.
    """
    columns = min(3, len(found))
    figure = _figure(columns, math.ceil(len(found) / columns))
    figure.suptitle(title)
    for place, finding in enumerate(found):
        axes = figure.add_subplot(math.ceil(len(found) / columns), columns, place + 1)
        for number, (size, optimum) in enumerate(finding.optima.items()):
            model = (size, finding.fixed) if finding.axis == "width" else (finding.fixed, size)
            points = {k: list(v.values()) for k, v in sorted(levelled(curves[model, finding.others]).items())}
            points = {k: v for k, v in points.items() if all(map(math.isfinite, v))}
            values = [2 ** plan.axis.place(k) for k in points]
            means = np.array([np.mean(losses) for losses in points.values()])
            spans = np.array([[m - min(v), max(v) - m] for m, v in zip(means, points.values(), strict=True)]).T
            colour = matplotlib.colormaps["viridis"](number / max(1, len(finding.optima) - 1) * 0.9)
            label = f"{finding.axis} {size}"
            axes.errorbar(values, means, spans, color=colour, marker="o", markersize=3, capsize=2, label=label)
            if optimum.problem is None:
                axes.plot([2**optimum.place], [optimum.loss], "*", color=colour, markersize=11, markeredgecolor="black")
        stays = "layers" if finding.axis == "width" else "hidden size"
        others = "".join(f", {name} {value:g}" for name, value in finding.others)
        axes.set_title(f"{stays} {finding.fixed}{others}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(plan.axis.names[0], fontsize=8)
        axes.set_ylabel("loss (nats per token)", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, frameon=False)
    _save(figure, png)


def _figure(columns: int, rows: int) -> Figure:
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows + 0.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    axis.set_ticks(list(values))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, png: str) -> None:
    os.makedirs(os.path.dirname(png) or ".", exist_ok=True)
    figure.savefig(png)
