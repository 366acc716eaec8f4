"""Where metrics are recorded: TensorBoard, Weights & Biases, a file of JSON lines, a Prometheus endpoint."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megatron_mup.config import Config, ConfigError, to_yaml
from megatron_mup.training.dashboard import DASHBOARD
from megatron_mup.training.prometheus import Prometheus

Scalars = Mapping[str, float]

RUN = "run"
"""Name under which a record says what `about_run` gives."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Of a full disk, a spent quota, a file as long as it may be."""
_MOST_WAITING = 1 << 25
"""Bytes of lines that wait for room on a disk; later ones are dropped."""


class Sink(Protocol):
    """A place that takes scalars by name, iteration by iteration, never backwards."""

    def write(self, iteration: int, scalars: Scalars) -> None:
        """Records the scalars of one iteration; a second call for the same iteration adds to the first."""

    def flush(self) -> None:
        """Brings what was written to where a reader sees it."""

    def close(self) -> None:
        """Ends the record."""


def check_sinks(config: Config) -> None:
    """Refuses sinks whose package is missing; called on every rank, so that all of them stop.

    Raises:
        ConfigError: ``--wandb-project`` or ``--prometheus-port`` without its package.
    """
    logging = config.logging
    for flag, value, package, module in (
        ("--wandb-project", logging.wandb_project, "wandb", "wandb"),
        ("--prometheus-port", logging.prometheus_port, "prometheus", "prometheus_client"),
    ):
        if value is not None and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{flag} {value}",
                f"the package {module} is not installed",
                f"pip install 'megatron-mup[{package}]', or leave the flag out (--tensorboard-dir needs no extra)",
            )


def open_sinks(config: Config, start_iteration: int, about: Mapping[str, Any]) -> list[Sink]:
    """The sinks that the configuration names, going on after ``start_iteration``; ``about`` is of `about_run`."""
    logging, sinks = config.logging, list[Sink]()
    # First, for it may fail.
    if logging.prometheus_port is not None:
        sinks.append(Prometheus(logging.prometheus_port, about))
    folder, file = logging.tensorboard_dir, logging.metrics_file
    if folder is not None:
        sinks.append(Dispensable(f"--tensorboard-dir {folder}", lambda: TensorBoard(folder, start_iteration, about)))
    if logging.wandb_project is not None:
        where = f"--wandb-save-dir {logging.wandb_save_dir or '(working directory)'}"
        sinks.append(Dispensable(where, lambda: Wandb(config, about)))
    if file is not None:
        sinks.append(JsonLines(file, start_iteration, about))
    return sinks


def _unusable(where: str, error: OSError) -> ConfigError:
    return ConfigError(where, f"can't be written: {error.strerror or error}", "give a place where you may write")


class Dispensable:
    """A sink of a library that a run can do without: if it fails, on a full disk say, that is told once, and training
    goes on. What was recorded stays.

    Args:
        where: flag and value, for the message.
        make: opens the sink.

    Raises:
        ConfigError: it can't be opened, for another reason than a full disk.
    """

    def __init__(self, where: str, make: Callable[[], Sink]) -> None:
        self._where = where
        self._sink: Sink | None = None
        try:
            self._sink = make()
        except OSError as error:
            if error.errno not in _FULL:
                raise _unusable(where, error) from error
            self._give_up(error)

    def write(self, iteration: int, scalars: Scalars) -> None:
        """Passes on."""
        self._try(lambda sink: sink.write(iteration, scalars))

    def flush(self) -> None:
        """Passes on."""
        self._try(lambda sink: sink.flush())

    def close(self) -> None:
        """Passes on."""
        self._try(lambda sink: sink.close())

    def _try(self, call: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            call(self._sink)
        except Exception as error:  # libraries write in threads and processes of their own, which fail in many ways
            self._sink = None
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        print(f"warning: {self._where}: {reason}; nothing more is recorded there", file=sys.stderr, flush=True)


class TensorBoard:
    """Event files in a folder, with charts of `DASHBOARD` under *Custom scalars* and the configuration under *Text*.

    Events beyond ``start_iteration`` from an earlier start are hidden (``purge_step``).
    """

    def __init__(self, folder: str, start_iteration: int, about: Mapping[str, Any]) -> None:
        """Opens a new event file in the folder."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=start_iteration + 1)
        self._writer.add_custom_scalars(
            {
                group: {chart.title: ["Multiline", [f"^{name}$" for name in chart.names]] for chart in charts}
                for group, charts in DASHBOARD.items()
            }
        )
        self._writer.add_text(RUN, f"```yaml\n{to_yaml(about)}```", start_iteration)

    def write(self, iteration: int, scalars: Scalars) -> None:
        """Adds one point to each curve."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)

    def flush(self) -> None:
        """Writes waiting events to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Wandb:
    """A Weights & Biases run with the configuration attached. The x axis of its charts is the iteration.

    Its own environment variables hold: ``WANDB_MODE=offline`` keeps the run on disk, ``WANDB_RUN_ID`` continues a run.
    """

    def __init__(self, config: Config, about: Mapping[str, Any]) -> None:
        """Starts the run, or continues the one of ``WANDB_RUN_ID``."""
        import wandb

        logging = config.logging
        if logging.wandb_save_dir is not None:
            os.makedirs(logging.wandb_save_dir, exist_ok=True)
        self._run = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_exp_name,
            entity=logging.wandb_entity,
            dir=logging.wandb_save_dir,
            config={RUN: {k: v for k, v in about.items() if k != "configuration"}, **about["configuration"]},
            resume="allow",
        )
        # wandb's own steps never go back, and it drops what comes for one that has passed; a run that goes on from a
        # checkpoint repeats iterations.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        self._run.define_metric("validation/lm loss", step_metric="iteration", summary="min,last")

    def write(self, iteration: int, scalars: Scalars) -> None:
        """Logs the scalars at the iteration."""
        self._run.log({"iteration": iteration, **scalars})

    def flush(self) -> None:
        """Nothing to do: wandb uploads in the background."""

    def close(self) -> None:
        """Finishes the run, waiting for its upload."""
        self._run.finish()


class JsonLines:
    """A file with one JSON object per line: ``iteration`` and the scalars by name; ``null`` where not finite.

    Each start of the run begins with a line that holds what `about_run` gives under ``run``. The file stays the
    history of one run: lines of iterations beyond ``start_iteration``, which the run that goes on is about to repeat,
    and a torn last line are cut off. A run that starts at iteration 0 moves an older file aside, to the first free one
    of ``<file>.1``, ``<file>.2``, …

    Lines that can't be written, because the disk is full say, wait in memory until they can, which is told once.
    """

    def __init__(self, path: str, start_iteration: int, about: Mapping[str, Any]) -> None:
        """Opens the file for appending and writes the line of this start.

        Raises:
            ConfigError: a file to go on with that holds something else, or a place where nobody may write.
        """
        self._where, self._waiting, self._told = f"--metrics-file {path}", b"", False
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            if os.path.isfile(path) and os.path.getsize(path):
                if start_iteration == 0:
                    _move_aside(path)
                else:
                    os.truncate(path, _history_length(path, start_iteration))
            # Without a buffer, which would be half written when a disk is full.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise _unusable(self._where, error) from error
        self._append({"iteration": start_iteration, RUN: about})
        self.flush()

    def write(self, iteration: int, scalars: Scalars) -> None:
        """Appends one line."""
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        self._append({"iteration": iteration, **finite})

    def _append(self, record: Mapping[str, Any]) -> None:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting += json.dumps(record).encode() + b"\n"

    def flush(self) -> None:
        """Hands waiting lines to the operating system."""
        try:
            while self._waiting:
                written = self._file.write(self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            if not self._told:
                self._told = True
                reason = f"{error.strerror}; lines wait in memory until there is room"
                print(f"warning: {self._where}: {reason}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Writes what can be written and closes the file."""
        self.flush()
        self._file.close()


def _history_length(path: str, last_iteration: int) -> int:
    """Bytes of the file in front of the first line beyond ``last_iteration``, or of a last line that is torn."""
    length = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                iteration = json.loads(line)["iteration"]
            except (ValueError, KeyError, TypeError):
                raise ConfigError(
                    f"--metrics-file {path}", f"line {number} is no record of a run", "give another file"
                ) from None
            if iteration > last_iteration:
                break
            length += len(line)
    return length


def _move_aside(path: str) -> None:
    number = 1
    while os.path.exists(f"{path}.{number}"):
        number += 1
    os.replace(path, f"{path}.{number}")
