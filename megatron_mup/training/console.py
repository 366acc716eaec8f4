"""What a run shows while it trains: a progress bar on a terminal, log lines elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_mup.config import Config


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What happened between two log lines."""

    iteration: int
    """Last iteration of the interval."""
    consumed_samples: int
    """Sequences trained on since the start of the run."""
    batch_size: int
    """Sequences of the last step."""
    loss: float
    """Mean over the interval's steps, nats per token."""
    grad_norm: float
    """Of the last step, before clipping."""
    learning_rates: Mapping[str, float]
    """Of the last step, by parameter class."""
    step_seconds: float
    """Mean time of a step."""
    tokens_per_s: float
    """Over all devices."""
    tokens_per_s_per_device: float
    """Per device."""
    tflops: Mapping[str, float]
    """TFLOP/s per device by formula."""
    mfu: Mapping[str, float]
    """Share of the device's peak by formula; empty where the peak is unknown."""


class Console(ABC):
    """Shows the progress of a run of ``train_iters`` iterations."""

    def __init__(self, train_iters: int) -> None:
        """Shows nothing yet."""
        self.train_iters = train_iters

    @abstractmethod
    def advance(self, iteration: int) -> None:
        """A step was started on the device; nothing about it is known yet."""

    @abstractmethod
    def interval(self, interval: Interval) -> None:
        """A log interval is complete."""

    @abstractmethod
    def message(self, text: str) -> None:
        """A line of text for the reader."""

    def evaluation(self, iteration: int, split: str, results: Mapping[str, float]) -> None:
        """Results of an evaluation by name, loss first."""
        parts = [f"iteration {iteration:8d}/{self.train_iters:8d}"]
        parts += [f"{split} {name}: {value:.6f}" for name, value in results.items()]
        self.message(" | ".join(parts) + " |")

    @abstractmethod
    def close(self) -> None:
        """Ends the display."""

    def eta(self, interval: Interval) -> str:
        """Time left at the interval's pace, evaluations and saves not counted."""
        return str(timedelta(seconds=round((self.train_iters - interval.iteration) * interval.step_seconds)))


class LogLines(Console):
    """One line per log interval, in the manner of Megatron-LM's, for files and batch systems."""

    def advance(self, iteration: int) -> None:
        """Nothing: lines come by interval."""

    def interval(self, interval: Interval) -> None:
        """Prints the interval's line."""
        rates = sorted(set(interval.learning_rates.values()))
        shown = [f"{rate:.6E}" for rate in (rates if len(rates) < 2 else [rates[0], rates[-1]])]
        parts = [
            f"iteration {interval.iteration:8d}/{self.train_iters:8d}",
            f"consumed samples: {interval.consumed_samples:12d}",
            f"elapsed time per iteration (ms): {interval.step_seconds * 1e3:.1f}",
            f"tokens/s per device: {interval.tokens_per_s_per_device:.1f}",
            *(f"TFLOP/s per device ({name}): {digits(value)}" for name, value in interval.tflops.items()),
            *(f"MFU ({name}): {digits(100 * value)}%" for name, value in interval.mfu.items()),
            f"learning rate: {' to '.join(shown)}",
            f"global batch size: {interval.batch_size:5d}",
            f"lm loss: {interval.loss:.6E}",
            f"grad norm: {interval.grad_norm:.3f}",
            f"time left: {self.eta(interval)}",
        ]
        self.message(" | ".join(parts) + " |")

    def message(self, text: str) -> None:
        """Prints a line with the time."""
        print(f" [{time.strftime('%Y-%m-%d %H:%M:%S')}] {text}", flush=True)

    def close(self) -> None:
        """Nothing: every line is out already."""


class ProgressBar(Console):
    """A bar with loss, validation loss, speed and time left; evaluations stay on the screen as lines above it."""

    def __init__(self, train_iters: int, start_iteration: int, console: RichConsole | None = None) -> None:
        """Draws the empty bar."""
        super().__init__(train_iters)
        self._progress = Progress(
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("loss [bold]{task.fields[loss]}[/] val {task.fields[validation]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("ETA {task.fields[eta]}"),
            console=console,
            expand=True,
        )
        waiting = {"loss": "–", "validation": "–", "speed": "–", "eta": "–"}
        self._task = self._progress.add_task("", total=train_iters, completed=start_iteration, **waiting)
        self._progress.start()

    def advance(self, iteration: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=iteration)

    def interval(self, interval: Interval) -> None:
        """Renews the numbers beside the bar."""
        self._progress.update(
            self._task, loss=f"{interval.loss:.3f}", speed=short(interval.tokens_per_s), eta=self.eta(interval)
        )

    def evaluation(self, iteration: int, split: str, results: Mapping[str, float]) -> None:
        """Shows the loss beside the bar and all results above it."""
        self._progress.update(self._task, validation=f"{next(iter(results.values())):.3f}")
        super().evaluation(iteration, split, results)

    def message(self, text: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        self._progress.stop()


def open_console(config: Config, train_iters: int, start_iteration: int) -> Console:
    """The bar where standard output is a terminal that can show it and ``--progress`` is on, log lines elsewhere."""
    if config.logging.progress and sys.stdout.isatty() and not RichConsole().is_dumb_terminal:
        return ProgressBar(train_iters, start_iteration)
    return LogLines(train_iters)


def digits(number: float) -> str:
    """A number with one decimal, or, of small models, with three digits: ``343.0``, ``0.00216``."""
    return f"{number:.1f}" if number >= 10 else f"{number:.3g}"


def short(number: float) -> str:
    """A number in four characters or so: ``950``, ``12.3k``, ``4.56M``."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"
