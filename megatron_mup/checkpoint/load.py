"""Loading: the right checkpoint, checked, into any layout."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_mup.checkpoint import files, rng
from megatron_mup.checkpoint.agree import Group, gathered, on_all, on_first, rank_of, reason, size_of
from megatron_mup.checkpoint.compare import compare_configs, told_differences
from megatron_mup.checkpoint.dcp import METADATA_FILE, MismatchError, ShardError, read, read_metadata
from megatron_mup.checkpoint.manifest import Manifest, read_manifest
from megatron_mup.checkpoint.state import OPTIMIZER, Piece
from megatron_mup.config import Config, ConfigError, from_dict

log = logging.getLogger(__name__)


def find(folder: str | Path, step: int | None = None, group: Group = None) -> Path | None:
    """The checkpoint to load from a folder: that of ``step``, or the latest. Collective over the group.

    Where the latest is damaged or missing, the newest good one before it is taken, with a warning. Files are read
    once to compare their checksums, dealt out over the ranks.

    Returns:
        Its folder; None when the folder holds no checkpoint at all.

    Raises:
        ConfigError: the checkpoint of ``step`` is missing or damaged; or there are checkpoints and none is complete.
    """
    root, damage = Path(folder).absolute(), dict[Path, str]()
    while True:
        path = on_first(lambda: _find(root, step, damage), group)
        if path is None:
            return None
        flipped = _flipped(path, group)
        if flipped is None:
            return path
        if step is not None:
            what, _, why = flipped.partition(": ")
            raise ConfigError(what, why, on_first(partial(files.other_choice, path, "restore the file"), group))
        damage[path] = flipped


def load(path: str | Path, pieces: list[Piece], config: Config | None = None, group: Group = None) -> Manifest:
    """Fills the pieces of all ranks from a checkpoint, in whatever layout it was saved. Collective over the group.

    Values are cast to the pieces' precision. Every tensor of the checkpoint must be asked for by some rank, save that
    optimizer state is left alone when no rank asks for any.

    Args:
        path: the checkpoint's folder.
        pieces: this rank's shards, written in place.
        config: this run's configuration, to say what differs when tensors don't fit.
        group: the ranks that load; None means all.

    Returns:
        The checkpoint's manifest.

    Raises:
        ConfigError: files are missing or damaged, or the tensors are another model's; the same on all ranks. Pieces
            may have been written to if files were damaged inside.
    """
    path = Path(path).absolute()
    manifest, metadata = on_first(lambda: open_checkpoint(path), group)
    try:
        read(path, metadata, pieces, group)
    except ShardError as error:
        if isinstance(error.cause, MismatchError):
            raise _mismatch(path, manifest, metadata, error.cause, config) from None
        raise ConfigError(
            str(path),
            f"rank {error.rank} can't read it: {reason(error.cause)}",
            on_first(lambda: files.other_choice(path, "restore its files"), group),
        ) from None
    return manifest


def load_iteration(path: str | Path, group: Group = None) -> int:
    """Iterations that were done when a checkpoint was saved. Collective."""
    path = Path(path).absolute()
    return on_first(lambda: read_manifest(path).iteration, group)


def saved_config(path: str | Path, group: Group = None) -> Config:
    """The configuration that a checkpoint was saved with. Collective."""
    path = Path(path).absolute()
    return on_first(lambda: from_dict(read_manifest(path).config, str(path)), group)


def load_rng(path: str | Path, layout: dict[str, int], group: Group = None) -> bool:
    """Restores each rank's random generators, if the checkpoint was saved in this ``layout``. Collective.

    Returns:
        Whether they were restored; in another layout they mean nothing.
    """
    path = Path(path).absolute()
    if on_first(lambda: dict(read_manifest(path).layout) != layout, group):
        return False
    rng.set_rng_state(on_all(lambda: _rng_state(path, rank_of(group)), group))
    return True


def _flipped(path: Path, group: Group) -> str | None:
    """The first file whose contents changed since it was written. Each rank looks at its share. Collective."""
    facts = on_first(lambda: read_manifest(path), group)
    found = gathered(files.flipped(path, facts, rank_of(group), size_of(group)), group)
    return next((problem for problem in found if problem is not None), None)


def _find(folder: Path, step: int | None, damage: Mapping[Path, str]) -> Path | None:
    """The checkpoint to take, other than those that are known to be damaged."""
    try:
        found, latest = files.checkpoints(folder), files.pointed(folder)
    except OSError as error:
        raise ConfigError(f"--load {folder}", f"can't be read: {reason(error)}", "correct the path") from None
    if step is not None:
        return _of_step(folder, step, found)
    wanted = found.get(latest) if latest is not None else None
    if wanted is not None and wanted not in damage and files.is_complete(wanted):
        return wanted
    if latest is None and not found:
        return None
    good = files.newest_complete(folder, latest, damage)
    if wanted is not None:
        problem = damage.get(wanted) or _damage(wanted)
    elif latest is not None:
        problem = f"{folder / files.POINTER} names iteration {latest}, which is missing"
    else:
        problem = f"{folder / files.POINTER} is missing or unreadable"
    if good is None:
        raise ConfigError(
            f"--load {folder}", f"none of its checkpoints is complete; {problem}", "restore one, or drop --load"
        )
    log.warning("%s; falling back to %s", problem, good)
    return good


def _of_step(folder: Path, step: int, found: dict[int, Path]) -> Path:
    if step not in found:
        there = ", ".join(map(str, found)) or "none"
        raise ConfigError(f"--ckpt-step {step}", f"{folder} has no such checkpoint", f"choose from: {there}")
    files.check_complete(found[step])
    return found[step]


def _damage(path: Path) -> str:
    try:
        files.check_complete(path)
    except ConfigError as error:
        return f"{error.what}: {error.why}"
    return f"{path} can't be read"


def open_checkpoint(path: Path) -> tuple[Manifest, Metadata]:
    """Facts of a checkpoint, and where its tensors lie. Not collective.

    Raises:
        ConfigError: it is incomplete or damaged.
    """
    manifest = files.check_complete(path)
    try:
        return manifest, read_metadata(path)
    except Exception as error:
        raise ConfigError(
            str(path / METADATA_FILE),
            f"damaged: {reason(error)}",
            files.other_choice(path, "restore the file"),
        ) from None


def _rng_state(path: Path, rank: int) -> dict[str, Any]:
    try:
        return rng.read_state(path, rank)
    except Exception as error:
        raise ConfigError(
            str(path / rng.FILE), f"damaged: {reason(error)}", "go on without it by --no-load-rng"
        ) from None


def _mismatch(
    path: Path, manifest: Manifest, metadata: Metadata, found: MismatchError, config: Config | None
) -> ConfigError:
    """Why a checkpoint doesn't fit the model, by flag where the configurations tell."""
    keys = [*found.missing, *found.unread, *(key for key, _, _ in found.shapes)]
    details = [f"{key} is {list(was)} there and {list(now)} here" for key, was, now in found.shapes[:1]]
    details += [f"it lacks {key}" for key in found.missing[:1]] + [
        f"{key} has no place here" for key in found.unread[:1]
    ]
    if all(key.startswith(f"{OPTIMIZER}/") for key in keys):
        fix = "load weights only: --no-load-optim or --finetune"
        if not any(key.startswith(f"{OPTIMIZER}/") for key in metadata.state_dict_metadata):
            why = "a checkpoint without optimizer state (--no-save-optim)"
        else:
            differences = compare_configs(manifest.config, config, "state") if config else []
            if any((flag, before) == ("--optimizer", "adam") for flag, before, _ in differences):
                fix = f"{fix}; or change optimizers where it was saved: --optimizer-switch-at {manifest.iteration}"
            told = told_differences(differences)
            why = f"a checkpoint of another optimizer: {'; '.join([told, *details] if told else details)}"
        return ConfigError(f"--load {path}", why, fix)
    differences = compare_configs(manifest.config, config) if config else []
    told = told_differences(differences)
    return ConfigError(
        f"--load {path}",
        f"a checkpoint of another architecture: {'; '.join([told, *details] if told else details)}",
        "use the checkpoint's flags, or another --load",
    )
