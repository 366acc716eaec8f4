"""Trials: short runs that differ in size, hyperparameters and seed, and the file that remembers them."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_mup.config import Config, ConfigError
from megatron_mup.config.fields import settings, value_of
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.training.guard import BrokenRunError
from megatron_mup.training.signals import EXIT_FINISHED
from megatron_mup.training.trainer import Trainer
from megatron_mup.transfer.sizes import Growth, resize

FINISHED, DIVERGED, FAILED = "finished", "diverged", "failed"
LAST = 0.1
"""Share of a run at its end whose mean training loss stands for it where there is no validation."""


@dataclass(frozen=True, order=True)
class Trial:
    """One short run.

    Attributes:
        hidden_size, num_layers: size of the model.
        values: swept settings by name, in the order of the axes.
        seed: of initial values and data.
    """

    hidden_size: int
    num_layers: int
    values: tuple[tuple[str, float], ...]
    seed: int

    @property
    def key(self) -> str:
        """Name under which its result is kept."""
        values = "-".join(f"{name}={value:.5g}" for name, value in self.values)
        return f"w{self.hidden_size}-l{self.num_layers}-{values}-s{self.seed}"


def configured(recipe: Config, trial: Trial, grow: Growth = "heads") -> Config:
    """The recipe (base sizes written out) at a trial's size, with its values and seed."""
    config = resize(recipe, trial.hidden_size, trial.num_layers, grow)
    changes: dict[str, dict[str, Any]] = {"training": {"seed": trial.seed}}
    for name, value in trial.values:
        changes.setdefault(settings()[name].section, {})[name] = value
    return replace(config, **{part: replace(getattr(config, part), **values) for part, values in changes.items()})


def start_value(recipe: Config, name: str) -> float:
    """The recipe's value of a swept setting, defaults resolved.

    Raises:
        ConfigError: no such number among the settings, or none above zero.
    """
    setting = settings().get(name)
    if setting is None or setting.kind != "float":
        raise ConfigError(f"--axis {name}", "is no setting that takes a number", "give lr, weight_decay, ...")
    value = value_of(recipe, name)
    if value is None and name in ("muon_lr", "decoupled_lr"):
        value = recipe.optimizer.lr
    if not value:
        raise ConfigError(f"--axis {name}", f"the recipe has {value}, which no factor moves", f"give {setting.flag}")
    return float(value)


def digest(recipe: Config) -> str:
    """Short hash of all that makes results comparable: everything but where files go and what is logged."""
    plain = asdict(recipe)
    for section in ("logging", "checkpoint"):
        del plain[section]
    plain["data"].pop("data_cache_path")
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]


class Results:
    """Finished trials, a JSON line each, in one file per worker: nobody waits for a lock, and a killed worker leaves at
    most one torn line, which counts as nothing.

    Args:
        folder: of the sweep; ``trials/`` in it holds the files.
        recipe: hash of the recipe; lines of another recipe are not its results.
    """

    def __init__(self, folder: str | Path, recipe: str) -> None:
        self.folder, self.recipe = Path(folder) / "trials", recipe

    def read(self) -> dict[str, dict[str, Any]]:
        """Results by trial key; of several the last finished one. Failed trials are left out: they are tried again."""
        found: dict[str, dict[str, Any]] = {}
        for file in sorted(self.folder.glob("*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record.get("recipe") == self.recipe and record.get("status") in (FINISHED, DIVERGED):
                    found[record["trial"]] = record
        return found

    def append(self, worker: str, record: Mapping[str, Any]) -> None:
        """Writes one result through to the disk."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{worker}.jsonl"
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        line = "\n" * torn + json.dumps({"recipe": self.recipe, **record}) + "\n"
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def agreed(self, name: str, trials: Sequence[Trial]) -> list[Trial]:
        """One list of trials for all workers that ask under a name: that of the first one.

        Jobs of a batch array start at different times; by then others have finished trials, and shares of what is left
        would overlap.
        """
        path = self.folder.parent / "rounds" / f"{name}-{self.recipe}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_suffix(f".{os.uname().nodename}-{os.getpid()}")
        mine.write_text(json.dumps([asdict(trial) for trial in trials]), encoding="utf-8")
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)  # whole at once, and the first one wins
        mine.unlink()
        return [
            Trial(**{**plain, "values": tuple((name, value) for name, value in plain["values"])})
            for plain in json.loads(path.read_text(encoding="utf-8"))
        ]


def run_trial(config: Config, trial: Trial, vocab_size: int, mesh: Mesh, folder: str | Path) -> dict[str, Any] | None:
    """Trains one trial in this process; its curve goes to ``curves/`` and its log to ``logs/`` in ``folder``.

    Returns:
        The record: settings, ``status``, ``loss`` (validation where the recipe has it, else the mean training loss of
        the last tenth), ``train_loss``, ``seconds``, ``tokens_per_s``; ``error`` where it failed. None where a signal
        stopped it.
    """
    curve, log = Path(folder) / "curves" / f"{trial.key}.jsonl", Path(folder) / "logs" / f"{trial.key}.log"
    for path in (curve, log):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    iterations = config.training.train_iters
    assert iterations is not None
    logging = replace(
        config.logging,
        metrics_file=str(curve),
        progress=False,
        log_interval=max(1, math.ceil(iterations / 10)),
        # Trials and workers would take them from each other.
        html_report=None,
        prometheus_port=None,
    )
    config = replace(config, logging=logging)
    record: dict[str, Any] = {
        "trial": trial.key,
        "hidden_size": trial.hidden_size,
        "num_layers": trial.num_layers,
        **dict(trial.values),
        "seed": trial.seed,
    }
    begin = time.perf_counter()
    try:
        with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
            with Trainer(config, vocab_size, mesh) as trainer:
                code = trainer.train()
            if code != EXIT_FINISHED:
                return None
            record |= {"status": FINISHED, **_final(curve, iterations)}
    except BrokenRunError as error:
        record |= {"status": DIVERGED, "loss": None, "error": str(error)[:100]}
    except (RuntimeError, ConfigError) as error:
        record |= {"status": FAILED, "loss": None, "error": str(error)[:500]}
    seconds = time.perf_counter() - begin
    tokens = iterations * config.global_batch_size(mesh.world.size()) * config.training.seq_length
    gc.collect()
    return record | {"seconds": round(seconds, 2), "tokens_per_s": round(tokens / seconds)}


def _final(curve: Path, iterations: int) -> dict[str, float]:
    records = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    train = [r["train/lm loss"] for r in records if "train/lm loss" in r and r["iteration"] > iterations * (1 - LAST)]
    validation = [r["validation/lm loss"] for r in records if "validation/lm loss" in r]
    mean = math.fsum(train) / len(train)
    return {"loss": validation[-1] if validation else mean, "train_loss": mean}


def work(
    trials: Sequence[Trial],
    recipe: Config,
    vocab_size: int,
    mesh: Mesh,
    results: Results,
    worker: str,
    grow: Growth = "heads",
    minutes: float | None = None,
) -> int:
    """Runs those trials that have no result yet, size by size, so that each size is compiled once.

    Args:
        trials: this worker's share.
        recipe: base sizes written out.
        vocab_size, mesh: as for a run.
        results: where they are kept.
        worker: name of its file.
        grow: what grows with the hidden size.
        minutes: no trial is begun that would end later, by the time that one of its size took, or twice the longest.

    Returns:
        How many trials are left.
    """
    begin, left, size = time.monotonic(), list(trials), (0, 0)
    lasted = {(r["hidden_size"], r["num_layers"]): float(r["seconds"]) for r in results.read().values()}
    while left:
        trial = left[0]
        # A size that is new takes longer than those before it: small ones come first.
        expected = lasted.get((trial.hidden_size, trial.num_layers), 2 * max(lasted.values(), default=0.0))
        if minutes is not None and time.monotonic() - begin + expected > 60 * minutes:
            break
        left.pop(0)
        if trial.key in results.read():
            continue
        if size != (trial.hidden_size, trial.num_layers):
            torch.compiler.reset()
            size = (trial.hidden_size, trial.num_layers)
        record = run_trial(configured(recipe, trial, grow), trial, vocab_size, mesh, results.folder.parent)
        if record is None:
            return len(left) + 1
        lasted[size] = record["seconds"]
        results.append(worker, record)
        loss = "diverged" if record["loss"] is None else f"{record['loss']:.4f}"
        told = f"{record.get('error') or loss} ({record['seconds']:.1f} s)"
        print(f"[{len(trials) - len(left)}/{len(trials)}] {trial.key}: {told}", flush=True)
    return len(left)
