"""Tables and figures of what `evidence.py` has trained; a part that has not run is left out."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evidence_plan import Done, Part
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_mup.transfer.plots import u_curves
from megatron_mup.transfer.sweep import curves_of, findings, format_findings

Row = Mapping[str, str]


def report(folder: Path, parts: Sequence[Part]) -> int:
    """Writes ``evidence.md`` and figures into the folder of results; 1: there is nothing to report."""
    with open(folder / "trials.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["status"] != "failed"]
    results: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        results[row["part"]][row["trial"]] = float(row["loss"]) if row["loss"] else math.inf
    by_name = {part.name: part for part in parts}
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    sections = [f"# Evidence\n\n{described(about)}"]
    sections += [transfer(part, results[part.name], folder) for part in parts if _grows(part)]
    sections += [target(part, results) for part in parts if part.proxy is not None]
    sections.append(
        optimizers(folder, results, [part for name, part in by_name.items() if name.startswith("optimizer")])
    )
    sections.append(fp8(results))
    text = "\n\n".join(section for section in sections if section)
    (folder / "evidence.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(not rows)


def described(about: Mapping[str, object]) -> str:
    """Where and on what it ran."""
    data = about["data"]
    assert isinstance(data, Mapping)
    gpus = about["gpus"]
    assert isinstance(gpus, list)
    places = about["places"]
    assert isinstance(places, list)
    machine = f"{len({place['gpu'] for place in places})} x {gpus[0]}" if gpus else "a CPU"
    words = about["command"]
    assert isinstance(words, list)
    return (
        f"{machine}, PyTorch {about['torch']}; Python sources, {data['train']:,} tokens for training and "
        f"{data['validation']:,} for validation.\n\n    python {' '.join(words)}"
    )


def _grows(part: Part) -> bool:
    return len(part.plan.sizes) > 1


def transfer(part: Part, done: Done, folder: Path) -> str:
    """Optima over sizes, their drift, and the curves."""
    found = findings(part.plan, done)
    if not found:
        return ""
    u_curves(part.plan, curves_of(part.plan, done), found, str(folder / f"{part.name}.png"), part.name)
    return f"## {part.name}: {len(done)} runs\n\n```\n{format_findings(part.plan, found)}\n```"


def target(part: Part, results: Mapping[str, Done]) -> str:
    """The big model at the proxy's rate, beside its neighbours, and what the proxies' noise makes of the difference."""
    done = results.get(part.name, {})
    assert part.proxy is not None
    best = part.proxy.best_at_base(results.get(part.proxy.name, {}))
    if best is None or not done:
        return ""
    axis, (size,) = part.plan.axis, part.plan.sizes
    lines = ["| rate | loss | |", "|---|---|---|"]
    for k in range(best + axis.low, best + axis.high + 1):
        loss = done.get(part.plan.trial(size, k, (), 0).key)
        if loss is not None:
            lines.append(f"| {axis.at(k)[0][1]:.4g} | {loss:.4f} | {'the proxy says so' if k == best else ''} |")
    text = f"## {part.name}: width {size[0]}, {size[1]} layers\n\n" + "\n".join(lines)
    ours = done.get(part.plan.trial(size, best, (), 0).key)
    noises = [o.noise for found in findings(part.proxy.plan, results[part.proxy.name]) for o in found.optima.values()]
    if ours is not None and noises:
        text += (
            f"\n\nThe proxy's rate is {ours - min(done.values()):.4f} above the best; two runs that only chance tells "
            f"apart differ by {math.sqrt(2) * noises[0]:.4f} (one deviation, from the proxies' noise)."
        )
    return text


def curve(folder: Path, name: str, trial: str) -> list[tuple[float, float, float]]:
    """Tokens, seconds and loss of a kept curve."""
    file = folder / f"{name}--{trial}.csv"
    if not file.exists():
        return []
    with open(file, newline="", encoding="utf-8") as lines:
        return [(float(r["tokens"]), float(r["seconds"]), float(r["loss"])) for r in csv.DictReader(lines)]


def smooth(points: Sequence[tuple[float, float, float]], width: int = 5) -> list[tuple[float, float, float]]:
    """Running mean of the losses."""
    return [
        (tokens, seconds, sum(p[2] for p in points[max(0, i - width + 1) : i + 1]) / min(width, i + 1))
        for i, (tokens, seconds, _) in enumerate(points)
    ]


def optimizers(folder: Path, results: Mapping[str, Done], parts: Sequence[Part]) -> str:
    """The best run of each optimizer: final loss, and tokens and time to the loss that AdamW ends with."""
    best = {p.name: min(results[p.name], key=lambda key: results[p.name][key]) for p in parts if results.get(p.name)}
    curves = {name: smooth(curve(folder, name, trial)) for name, trial in best.items()}
    curves = {name: points for name, points in curves.items() if points}
    if not curves:
        return ""
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (label, column) in enumerate((("tokens", 0), ("seconds of steady training", 1))):
        axes = figure.add_subplot(1, 2, place + 1)
        for name, points in curves.items():
            axes.plot([p[column] for p in points], [p[2] for p in points], label=name.removeprefix("optimizer-"))
        axes.set_xlabel(label)
        axes.set_ylabel("training loss (nats per token)")
        low = min(points[-1][2] for points in curves.values())
        axes.set_ylim(low - 0.1, low + 1.5)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(folder / "optimizers.png")
    goal = curves["optimizer-adam"][-1][2] if "optimizer-adam" in curves else math.nan
    lines = [
        "| optimizer | rates tried | best | validation loss | ms per step | tokens to AdamW's end | seconds to it |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, points in curves.items():
        tried = ", ".join(f"{t.split('-')[2].split('=')[1]}: {v:.4f}" for t, v in sorted(results[name].items()))
        reached = next(((t, s) for t, s, loss in points if loss <= goal), None)
        tokens, seconds = (f"{reached[0] / 1e6:.1f} M", f"{reached[1]:.1f}") if reached else ("not reached",) * 2
        step = 1e3 * points[-1][1] / (len(points) * 10)
        trial = best[name]
        lines.append(
            f"| {name.removeprefix('optimizer-')} | {tried} | {trial} | {results[name][trial]:.4f} | {step:.1f} | "
            f"{tokens} | {seconds} |"
        )
    return "## Optimizers\n\n" + "\n".join(lines)


def fp8(results: Mapping[str, Done]) -> str:
    """Final losses against bf16's of the same model and seed: mean, and its error where there are several seeds."""
    lines = ["| run | seeds | validation loss | against bf16, same seeds |", "|---|---|---|---|"]
    for family in ("umup", "te"):
        plain = results.get(f"fp8-{family}-bf16", {})
        for name, done in sorted(results.items()):
            if name.startswith(f"fp8-{family}"):
                ratios = np.array([100 * (loss / plain[trial] - 1) for trial, loss in done.items() if trial in plain])
                told = f"{ratios.mean():+.2f} %" if len(ratios) else "not run"
                if len(ratios) > 1:
                    told += f" ± {ratios.std(ddof=1) / math.sqrt(len(ratios)):.2f} % ({len(ratios)} seeds)"
                mean = sum(done.values()) / len(done)
                lines.append(f"| {name.removeprefix('fp8-')} | {len(done)} | {mean:.4f} | {told} |")
    return "## FP8\n\n" + "\n".join(lines) if len(lines) > 2 else ""
