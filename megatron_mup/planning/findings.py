"""What `tools/doctor.py` finds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from rich.console import Console
from rich.markup import escape
from rich.table import Table


class Verdict(Enum):
    """How a finding is to be taken."""

    GOOD = "ok"
    NOTE = "note"
    """Something that a run may miss."""
    BAD = "bad"
    """A run would fail, or be far slower than it should."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's page."""

    what: str
    verdict: Verdict
    text: str


_COLOURS = {Verdict.GOOD: "green", Verdict.NOTE: "yellow", Verdict.BAD: "bold red"}


def show(findings: Iterable[Finding], console: Console) -> None:
    """Prints findings, one line each where the terminal is wide enough."""
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        colour = _COLOURS[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict.value}[/]", escape(finding.what), escape(finding.text))
    console.print(table)


def healthy(findings: Iterable[Finding]) -> bool:
    """Whether nothing is bad."""
    return all(finding.verdict is not Verdict.BAD for finding in findings)
