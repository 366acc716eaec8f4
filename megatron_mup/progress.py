"""A bar on standard error for long work, where a person looks at a terminal; nothing elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

_shown = False


@contextmanager
def bar(what: str, total: float | None) -> Iterator[Callable[[float], None]]:
    """Shows a bar while the block runs; yields a function that advances it.

    Silent where standard error is no terminal, on all ranks but the first, and inside another bar.

    Args:
        what: a few words, on its left.
        total: where it ends; None where that isn't known.
    """
    global _shown
    if _shown or not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    _shown = True
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda steps: progress.update(task, advance=steps)
    finally:
        _shown = False


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """The items, with a bar that moves as each is done; ``total`` where they have no length."""
    with bar(what, len(items) if isinstance(items, Sized) else total) as advance:
        for item in items:
            yield item
            advance(1)
