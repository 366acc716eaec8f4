"""The scaling table of one model, printed at the start of a run and kept in its checkpoints."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_mup.config import Config
from megatron_mup.parametrization.meta import ParamMeta, Role
from megatron_mup.parametrization.operations import residual
from megatron_mup.parametrization.schemes import Kind, Operations, kind_of
from megatron_mup.parametrization.table import decay_rule, forward_multipliers, ratios, scaling, scheme_of

Row = dict[str, Any]

# Shorter than the role's own name, so that the table keeps to its width.
_LABELS = {Role.POSITION_EMBEDDING: "position", Role.ATTENTION_OUTPUT: "attn out"}

_COLUMNS = {
    "class": "class",
    "count": "n",
    "shape": "shape",
    "fan_in": "in",
    "fan_out": "out",
    "base_ratio": "ratio",
    "init_std": "init std",
    "multiplier": "mult",
    "lr": "lr",
    "weight_decay": "wd",
    "eps": "eps",
    "optimizer": "optim",
}


def table_rows(metas: Iterable[ParamMeta], config: Config) -> list[Row]:
    """One row per class of parameters with the same shape and the same numbers, in order of first appearance.

    Copies of a tied parameter are left out: ``sum(row["count"] * numel(shape))`` counts every parameter once. Values
    are plain numbers, strings and lists, so a row goes into JSON as it is.
    """
    sources = {kind: row.source for kind, row in scheme_of(config).rows.items()}
    rows: dict[str, Row] = {}
    for meta in metas:
        if meta.tied_to is not None:
            continue
        kind, label = kind_of(meta), _LABELS.get(meta.role, meta.role.value.replace("_", " "))
        facts: Row = {
            "class": ("final " if kind is Kind.FINAL_VECTOR else "") + label,
            "shape": list(meta.shape),
            "fan_in": meta.fan_in,
            "fan_out": meta.fan_out,
            "base_ratio": meta.width_ratio,
            **asdict(scaling(meta, config)),
            "source": sources[kind],
        }
        row = rows.setdefault(json.dumps(facts), {**facts, "count": 0, "parameters": 0})
        row["count"] += 1
        row["parameters"] += meta.numel
    return list(rows.values())


def format_table(rows: list[Row], config: Config | None = None) -> str:
    """The rows as plain text, at most 100 columns wide, with totals and, given ``config``, the forward multipliers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for key, title in _COLUMNS.items():
        table.add_column(title, justify="left" if key in ("class", "optimizer") else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in _COLUMNS))
    # A console of fixed width that is no terminal: the same text on a screen, in a log and in a file.
    console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    tensors, parameters = sum(row["count"] for row in rows), sum(row["parameters"] for row in rows)
    lines.append(f"total: {parameters:,} parameters in {tensors:,} tensors")
    return "\n".join(lines + (_summary(config) if config else [])) + "\n"


def to_json(rows: list[Row]) -> str:
    """The rows as JSON, for checkpoints and for other programs."""
    return json.dumps(rows, indent=1)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return "x".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _summary(config: Config) -> list[str]:
    flags, forward, r = config.parametrization, forward_multipliers(config), ratios(config)
    scheme = scheme_of(config)
    head = [f"parametrization: {flags.parametrization}"]
    if scheme.operations is not Operations.UMUP:
        if scheme.width:
            head.append(f"width ratio {r.hidden:.4g}")
        if scheme.depth:
            head.append(f"depth ratio {r.depth:.4g}, alpha {r.alpha:g}")
    head.append(f"weight decay {decay_rule(config)}")
    factors = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in asdict(forward).items())
    lines = ["; ".join(head), f"factors: {factors}"]
    if scheme.operations is not Operations.PLAIN:
        places = {"first": 0, "last": config.model.num_layers - 1}
        shares = (
            f"{place} {branch} {residual(config, layer, branch).branch:.3g}"
            for place, layer in places.items()
            for branch in ("attention", "mlp")
        )
        lines.append(f"weights of the branches: {', '.join(shares)}")
    return lines
