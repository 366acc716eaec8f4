"""One HTML page about a run: curves, parametrization, configuration, versions. It loads nothing from elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mup import __version__
from megatron_mup.config import Config, ConfigError, changed, from_dict, to_yaml
from megatron_mup.training.dashboard import DASHBOARD, Chart
from megatron_mup.training.main import scaling_tables
from megatron_mup.training.record import Curve, Record

TEMPLATE = "report.html"


def write_report(record: Record, file: Path, title: str) -> None:
    """Writes the page; its folder is made.

    Raises:
        OSError: the file can't be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("megatron_mup", "training")
    template = Environment(loader=loader, autoescape=True, undefined=StrictUndefined).get_template(TEMPLATE)
    config, tables, problem = _configuration(record)
    page = template.render(
        title=title,
        facts=_facts(record, config),
        groups=_pictures(record),
        starts=_starts(record),
        tables=tables,
        problem=problem,
        changed=to_yaml(changed(record.starts[-1][1]["configuration"])) if record.starts else None,
        whole=to_yaml(record.starts[-1][1]["configuration"]) if record.starts else None,
        version=__version__,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    # A reader who reloads the page while it is renewed sees the old one or the new one.
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(file)


def _configuration(record: Record) -> tuple[Config | None, str | None, str | None]:
    """The run's last configuration and its parametrization tables, or why there are none."""
    if not record.starts:
        return None, None, "the record doesn't hold it"
    try:
        config = from_dict(record.starts[-1][1]["configuration"], str(record.source))
        vocab_size = config.model.vocab_size
        return config, scaling_tables(config, vocab_size) if vocab_size else None, None
    except ConfigError as error:
        return None, None, str(error)


def _facts(record: Record, config: Config | None) -> dict[str, str]:
    """What stands at the top, in words."""
    length = f" of {config.training.train_iters:,}" if config and config.training.train_iters else ""
    facts = {
        "recorded": f"iteration {record.iteration:,}{length}, last {_time(record.modified)}",
        "record": str(record.source),
    }
    for title, name, text in (
        ("training loss", "train/lm loss", "{:.4f} nats per token"),
        ("validation loss", "validation/lm loss", "{:.4f} nats per token"),
        ("bits per byte", "validation/bits per byte", "{:.4f}"),
        ("tokens seen", "train/consumed tokens", "{:,.0f}"),
        ("tokens per s", "throughput/tokens per s", "{:,.0f}"),
        ("most GPU memory", "memory/max allocated GiB", "{:.1f} GiB"),
    ):
        if (value := record.last(name)) is not None:
            facts[title] = text.format(value)
    if best := record.curves.get("validation/lm loss"):
        place = min(best, key=lambda iteration: best[iteration])
        facts["best validation"] = f"{best[place]:.4f} nats per token at iteration {place:,}"
    if left_out := record.curves.get("train/left out"):
        facts["left out"] = f"{len(left_out):,} steps"
    if record.starts:
        about = record.starts[-1][1]
        facts["ran on"] = f"{about.get('ranks', '?')} ranks, {about.get('device', 'device unknown')}"
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    return facts


def _starts(record: Record) -> list[dict[str, Any]]:
    """Each start of the run, with the settings that weren't those of the start before."""
    rows, before = [], None
    for iteration, about in record.starts:
        settings = _flat(about["configuration"])
        differing = [] if before is None else [name for name in settings if before.get(name) != settings[name]]
        rows.append(
            {
                "iteration": iteration,
                "started": about.get("started", "unknown"),
                "ranks": about.get("ranks", "unknown"),
                "device": about.get("device", "unknown"),
                "changes": [f"{name}: {before.get(name)} → {settings[name]}" for name in differing] if before else [],
            }
        )
        before = settings
    return rows


def _flat(configuration: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {name: value for values in configuration.values() for name, value in values.items()}


def _pictures(record: Record) -> dict[str, list[str]]:
    """The charts that have curves, as SVG, by group."""
    from megatron_mup.training.plot import chart_svg

    pictures = {}
    for group, charts in DASHBOARD.items():
        drawn = [chart_svg(chart.title, curves) for chart in charts if (curves := _curves(record, chart))]
        if drawn:
            pictures[group] = drawn
    return pictures


def _curves(record: Record, chart: Chart) -> dict[str, Curve]:
    """A chart's curves, without the name's first part where all share it."""
    found = {n: c for n, c in record.curves.items() if any(re.fullmatch(name, n) for name in chart.names)}
    shared = len({name.split("/")[0] for name in found}) == 1
    return {name.split("/", 1)[1] if shared else name: curve for name, curve in found.items()}


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
