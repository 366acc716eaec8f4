"""Following runs that other processes make."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path


def lines_of(file: Path) -> list[dict[str, object]]:
    """The whole lines of a metrics file that is being written."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def iterations(file: Path) -> list[int]:
    """Logged iterations, in order."""
    return [int(str(line["iteration"])) for line in lines_of(file) if "train/lm loss" in line]


def starts(file: Path) -> list[int]:
    """Iterations done where the run started: 0, and where it went on."""
    return [int(str(line["iteration"])) for line in lines_of(file) if "run" in line]


def wait_for(there: Callable[[], object], what: str, *logs: Path, seconds: float = 300) -> None:
    """Waits, and fails with what the logs say where it takes too long."""
    end = time.monotonic() + seconds
    while not there():
        if time.monotonic() > end:
            said = "\n".join(f"{log.name}:\n{log.read_text()[-6000:]}" for log in logs if log.exists())
            raise AssertionError(f"no {what} within {seconds} s: {said or 'no output'}")
        time.sleep(0.1)
