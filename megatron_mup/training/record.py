"""What a run recorded, read again: from its JSON lines, its TensorBoard events, its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_mup.checkpoint.files import newest_complete
from megatron_mup.checkpoint.manifest import read_manifest
from megatron_mup.config import ConfigError
from megatron_mup.training.sinks import RUN

Curve = dict[int, float]
"""Values by iteration, rising."""


@dataclass
class Record:
    """The history of one run, finished or not.

    Attributes:
        source: file or folder that it was read from.
        modified: when that was last written to, Unix time.
        curves: by name. Of an iteration that was done again, after a return to a checkpoint, the later value counts.
        starts: iteration after which the run went on, and what `about_run` said then.
    """

    source: Path
    modified: float
    curves: dict[str, Curve] = field(default_factory=dict)
    starts: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)

    def add(self, iteration: int, name: str, value: float | None) -> None:
        """One point; what isn't finite is left out."""
        if value is not None and math.isfinite(value):
            self.curves.setdefault(name, {})[iteration] = value

    def last(self, name: str) -> float | None:
        """The value of the last iteration that has one."""
        curve = self.curves.get(name)
        return curve[max(curve)] if curve else None

    @property
    def iteration(self) -> int:
        """The last iteration recorded; 0 before the first."""
        return max((max(curve) for curve in self.curves.values()), default=0)


def read_json_lines(file: Path) -> Record:
    """The record in a ``--metrics-file``. A torn last line, of a run that writes or was killed, is left out.

    Raises:
        ConfigError: the file can't be read, or a line in it is no record.
    """
    try:
        lines = file.read_bytes().splitlines(keepends=True)
        record = Record(file, file.stat().st_mtime)
    except OSError as error:
        raise ConfigError(f"--metrics-file {file}", f"can't be read: {error.strerror}", "correct the path") from None
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            values = json.loads(line)
            iteration = int(values.pop("iteration"))
            if about := values.pop(RUN, None):
                record.starts.append((iteration, about))
            for name, value in values.items():
                record.add(iteration, name, value)
        except (ValueError, KeyError, TypeError, AttributeError):
            what = f"--metrics-file {file}"
            raise ConfigError(what, f"line {number} is no record of a run", "give another file") from None
    for name, curve in record.curves.items():
        record.curves[name] = dict(sorted(curve.items()))
    return record


def read_tensorboard(folder: Path) -> Record:
    """The record in the event files of a ``--tensorboard-dir``.

    Raises:
        ConfigError: there are none.
    """
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        raise ConfigError(f"--tensorboard-dir {folder}", "holds no event files", "correct the path")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    record = Record(folder, max(file.stat().st_mtime for file in files))
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            record.add(event.step, name, event.value)
    text = f"{RUN}/text_summary"
    for event in events.Tensors(text) if text in events.Tags()["tensors"] else ():
        shown = event.tensor_proto.string_val[0].decode()
        record.starts.append((event.step, yaml.safe_load(shown.removeprefix("```yaml\n").removesuffix("```"))))
    return record


def find_record(folder: Path) -> Record:
    """The record of the run whose checkpoints or metrics lie in a folder.

    What the newest checkpoint names as its ``--metrics-file`` or ``--tensorboard-dir`` goes first, then what lies in
    the folder. A record without a start, of an older version, takes the checkpoint's configuration.

    Raises:
        ConfigError: there is none, or it can't be read.
    """
    checkpoint = newest_complete(folder)
    facts = read_manifest(checkpoint) if checkpoint is not None else None
    named: Mapping[str, Any] = facts.config.get("logging", {}) if facts is not None else {}
    candidates: list[tuple[Callable[[Path], Record], Path]] = [
        *((read_json_lines, Path(file)) for file in [named.get("metrics_file")] if file and Path(file).is_file()),
        *((read_tensorboard, Path(logs)) for logs in [named.get("tensorboard_dir")] if logs and Path(logs).is_dir()),
        *((read_json_lines, file) for file in sorted(folder.glob("*.jsonl"), key=lambda f: -f.stat().st_mtime)),
        *((read_tensorboard, file.parent) for file in sorted(folder.rglob("events.out.tfevents.*"))),
    ]
    if not candidates:
        raise ConfigError(
            f"--load {folder}",
            "neither the folder nor its newest checkpoint leads to a record of a run",
            "give --metrics-file FILE or --tensorboard-dir DIR",
        )
    read, path = candidates[0]
    record = read(path)
    if not record.starts and facts is not None:
        ranks = math.prod(facts.layout[axis] for axis in ("pp", "dp_replicate", "dp_shard", "tp"))
        record.starts.append((0, {"configuration": facts.config, "versions": facts.versions, "ranks": ranks}))
    return record
