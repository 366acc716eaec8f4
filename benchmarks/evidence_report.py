"""Tables and figures of what `evidence.py` has trained; a part that has not run is left out."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

import numpy as np
from evidence_plan import THINNED, Done, Part
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_mup.transfer.plots import u_curves
from megatron_mup.transfer.sweep import curves_of, findings, format_findings

Row = Mapping[str, str]
REACH = 8
"""Points beside the proxy's rate among which the target's runs are looked for."""


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
    alone = {(row["part"], row["trial"]) for row in rows if row.get("alone") == "yes"}
    compared = [part for name, part in by_name.items() if name.startswith("optimizer")]
    sections.append(optimizers(folder, results, compared, alone))
    sections += [coefficients(rows), fp8(rows)]
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
    """The big model at the proxy's rate, beside its neighbours, and what noise makes of the differences."""
    done = results.get(part.name, {})
    assert part.proxy is not None
    best = part.proxy.best_of_proxies(results.get(part.proxy.name, {}))
    if best is None or not done:
        return ""
    axis, (size,) = part.plan.axis, part.plan.sizes
    seeds = range(part.repeats)

    def losses(k: int) -> dict[int, float]:
        known = {seed: done.get(part.plan.trial(size, k, (), seed).key) for seed in seeds}
        return {seed: loss for seed, loss in known.items() if loss is not None}

    ours = losses(best)
    noises = [o.noise for found in findings(part.proxy.plan, results[part.proxy.name]) for o in found.optima.values()]
    lines = ["| rate | loss, by seed | above the proxy's rate, same seeds | |", "|---|---|---|---|"]
    for k in (k for k in range(best - REACH, best + REACH + 1) if losses(k)):
        both = [loss - ours[seed] for seed, loss in losses(k).items() if seed in ours]
        apart = f"{sum(both) / len(both):+.4f}" if both else "?"
        if k != best and both and noises:
            apart += f" ± {math.sqrt(2 / len(both)) * noises[0]:.4f}"
        told = ", ".join(f"{loss:.4f}" for loss in losses(k).values())
        lines.append(f"| {axis.at(k)[0][1]:.4g} | {told} | {apart} | {'the proxy says so' if k == best else ''} |")
    proxy = part.proxy.proxies[-1]
    return (
        f"## {part.name}: width {size[0]}, {size[1]} layers; rate from width {proxy[0]}, {proxy[1]} layers\n\n"
        + "\n".join(lines)
        + "\n\n±: one deviation of a mean of differences, from the proxies' noise."
    )


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


def optimizers(folder: Path, results: Mapping[str, Done], parts: Sequence[Part], alone: Set[tuple[str, str]]) -> str:
    """The best rate of each optimizer: final losses, and tokens and time to the loss with which AdamW ends, by seed.

    A step's time is that of the fastest run, for rate and seed change nothing in it.

    Args:
        folder: of the results.
        results: losses by trial, by part.
        parts: what is compared.
        alone: parts and trials that had their GPU to themselves; an optimizer without one is not timed.
    """
    curves = {}
    for part in parts:
        if best := best_of(part, results[part.name]):
            runs = [curve(folder, part.name, other) for other in results[part.name] if (part.name, other) in alone]
            pace = min((run[-1][1] / run[-1][0] for run in runs if run), default=math.nan)
            found = {trial: smooth(curve(folder, part.name, trial)) for trial in best}
            paced = {t: [(n, pace * n, loss) for n, _, loss in points] for t, points in found.items() if points}
            if paced:
                curves[part.name] = paced
    if not curves:
        return ""
    draw({name: next(iter(found.values())) for name, found in curves.items()}, folder / "optimizers.png")
    goals = {seed_of(trial): points[-1][2] for trial, points in curves.get("optimizer-adam", {}).items()}
    plain = {
        seed_of(trial): results[part.name][trial]
        for part in parts
        if part.name == "optimizer-adam"
        for trial in best_of(part, results[part.name])
    }
    lines = [
        "| optimizer | rates tried | best | validation, by seed | against adam, same seeds | ms per step "
        "| tokens to adam's end | seconds |",
        "|---" * 8 + "|",
    ]
    for part in (part for part in parts if part.name in curves):
        done, found = results[part.name], curves[part.name]
        tried = [key for key in first_seeds(part) if key in done]
        ends = [
            next(((tokens, seconds) for tokens, seconds, loss in points if loss <= goals[seed_of(trial)]), None)
            for trial, points in found.items()
            if seed_of(trial) in goals
        ]
        apart = [done[trial] - plain[seed_of(trial)] for trial in best_of(part, done) if seed_of(trial) in plain]
        last = next(iter(found.values()))[-1]
        timed = not math.isnan(last[1])
        cells = [
            part.name.removeprefix("optimizer-"),
            ", ".join(f"{rate_of(key):g}: {done[key]:.4f}" for key in tried),
            f"{rate_of(next(iter(found))):g}",
            ", ".join(f"{done[trial]:.4f}" for trial in best_of(part, done)),
            mean_of(apart, ".3f") if part.name != "optimizer-adam" else "",
            f"{1e3 * last[1] / (len(next(iter(found.values()))) * THINNED):.1f}" if timed else "not timed alone",
            ", ".join(f"{end[0] / 1e6:.1f} M" if end else "not reached" for end in ends),
            ", ".join(f"{end[1]:.1f}" if end else "not reached" for end in ends) if timed else "not timed alone",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "## Optimizers\n\n" + "\n".join(lines)


def first_seeds(part: Part) -> list[str]:
    """Trials of the first seed at all points that a part may come to, from low to high."""
    return [part.plan.trial(part.plan.sizes[0], k, (), 0).key for k in part.plan.reach()]


def best_of(part: Part, done: Done) -> list[str]:
    """Trials of all seeds that ran at the point that is best with the first one, which comes first."""
    first = min((key for key in first_seeds(part) if key in done), key=lambda key: done[key], default=None)
    if first is None:
        return []
    point = first.rpartition("-s")[0]
    return [first, *sorted(key for key in done if key.startswith(f"{point}-s") and key != first)]


def seed_of(trial: str) -> str:
    """The seed in a trial's name."""
    return trial.rpartition("-s")[2]


def draw(curves: Mapping[str, Sequence[tuple[float, float, float]]], file: Path) -> None:
    """Training loss over tokens and over seconds, where those are known."""
    figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (label, column) in enumerate((("tokens", 0), ("seconds of steady training", 1))):
        axes = figure.add_subplot(1, 2, place + 1)
        for name, points in curves.items():
            if not math.isnan(points[-1][column]):
                axes.plot([p[column] for p in points], [p[2] for p in points], label=name.removeprefix("optimizer-"))
        axes.set_xlabel(label)
        axes.set_ylabel("training loss (nats per token)")
        low = min(points[-1][2] for points in curves.values())
        axes.set_ylim(low - 0.1, low + 1.5)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file)


def rate_of(trial: str) -> float:
    """The first setting's value in a trial's name."""
    return float(trial.split("=")[1].rsplit("-", 1)[0])


def fp8(rows: Sequence[Row]) -> str:
    """Final losses of FP8 against bf16's of the same model and seed."""
    return paired(rows, "FP8", "fp8", "bf16", lambda name: f"fp8-{name.split('-')[1]}-bf16")


def coefficients(rows: Sequence[Row]) -> str:
    """Final losses of Muon by coefficient set, against those of the default."""
    return paired(rows, "Newton-Schulz coefficients", "coefficients", "quintic", lambda _: "coefficients-quintic")


def paired(rows: Sequence[Row], title: str, kind: str, base: str, base_of: Callable[[str], str]) -> str:
    """Final losses against another part's with the same seed: mean, and its error where there are several seeds.

    Runs of the same seed train on the same tokens and are validated on the same. Seeds that the other part lacks don't
    count.

    Args:
        rows: all trials.
        title: of the section.
        kind: with which names of its parts begin.
        base: what the others are compared with, in words.
        base_of: name of the part that a part is compared with.
    """
    columns = {"loss": "validation", "train_loss": "last tenth of training"}
    losses = {
        column: {
            (row["part"], row["trial"]): float(row[column] or "inf")
            for row in rows
            if row["part"].startswith(f"{kind}-")
        }
        for column in columns
    }
    names = sorted({name for name, _ in losses["loss"]})
    heads = [f"{told} | against {base}, same seeds" for told in columns.values()]
    lines = [f"| run | seeds | {' | '.join(heads)} |", "|---" * 6 + "|"]
    for name in names:
        plain = base_of(name)
        cells = [name.removeprefix(f"{kind}-")]
        for column in columns:
            every = {trial: loss for (part, trial), loss in losses[column].items() if part == name}
            mine = {trial: loss for trial, loss in every.items() if (plain, trial) in losses[column]}
            cells += [str(len(mine or every))] if len(cells) == 1 else []
            ratios = [100 * (loss / losses[column][plain, trial] - 1) for trial, loss in mine.items()]
            mine = mine or every
            cells += [f"{np.mean(list(mine.values())):.4f}", mean_of(ratios, ".2f", " %") if name != plain else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return f"## {title}\n\n" + "\n".join(lines) if names else ""


def mean_of(values: Sequence[float], digits: str, unit: str = "") -> str:
    """A mean, with its standard error where there are several."""
    if not values:
        return "not run"
    told = f"{np.mean(values):+{digits}}{unit}"
    if len(values) > 1:
        told += f" ± {np.std(values, ddof=1) / math.sqrt(len(values)):{digits}}{unit}"
    return told
