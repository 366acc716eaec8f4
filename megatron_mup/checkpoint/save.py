"""Saving: all ranks together, all or nothing."""

from __future__ import annotations

import logging
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from megatron_mup.checkpoint import files, rng
from megatron_mup.checkpoint.agree import Group, gathered, on_all, on_first, rank_of, reason
from megatron_mup.checkpoint.dcp import ShardError, write
from megatron_mup.checkpoint.manifest import FILE, Manifest
from megatron_mup.checkpoint.state import Piece
from megatron_mup.config import ConfigError

T = TypeVar("T")

log = logging.getLogger(__name__)


def save(
    folder: str | Path,
    pieces: list[Piece],
    manifest: Manifest,
    keep_last: int | None = None,
    group: Group = None,
    rng_state: dict[str, Any] | None = None,
    retain_interval: int | None = None,
) -> Path:
    """Saves a checkpoint of ``manifest.iteration`` and makes it the latest. Collective over the group.

    Args:
        folder: where checkpoints stand; made if missing. All ranks must see it, and no other run may save to it.
        pieces: this rank's shards.
        manifest: facts of the checkpoint, the same on all ranks; its list of files is filled in here.
        keep_last: number of newest checkpoints to keep; None keeps all.
        group: the ranks that save; None means all.
        rng_state: of this rank's generators; None takes it now.
        retain_interval: checkpoints of iterations divisible by this are kept beside the newest.

    Returns:
        The checkpoint's folder.

    Raises:
        ConfigError: it can't be written; the same on all ranks. Checkpoints that stood there before still do.
    """
    root = Path(folder).absolute()
    final = root / files.folder_name(manifest.iteration)
    temporary = on_first(lambda: _told(root, lambda: _begin(final)), group)
    try:
        on_all(lambda: _check_shared(temporary, group), group)
        write(temporary, pieces, group)
        states = gathered(rng_state or rng.rng_state(), group)
        sums = gathered(on_all(lambda: _checksums(temporary, rank_of(group)), group), group)
        on_first(lambda: _told(root, lambda: _finish(temporary, final, manifest, states, sums)), group)
    except ShardError as error:
        _drop(temporary, group)
        raise _unwritable(root, f"on rank {error.rank}, {reason(error.cause)}") from None
    except Exception:
        _drop(temporary, group)
        raise
    if keep_last is not None and rank_of(group) == 0:
        try:
            files.prune(final, keep_last, retain_interval)
        except OSError as error:
            log.warning("old checkpoints in %s can't be removed: %s", root, reason(error))
    return final


def clean(folder: str | Path, group: Group = None) -> None:
    """Removes what dead runs left half done in a folder that this run saves to. Collective; `save` does it too.

    Raises:
        ConfigError: it can't be removed; the same on all ranks.
    """
    root = Path(folder).absolute()
    on_first(lambda: _told(root, lambda: files.sweep(root)), group)


def _begin(final: Path) -> Path:
    final.parent.mkdir(parents=True, exist_ok=True)
    files.sweep(final.parent)
    temporary = files.hidden(final, "tmp")
    temporary.mkdir()
    return temporary


def _check_shared(temporary: Path, group: Group) -> None:
    """Every rank must see the folder that rank 0 made: DCP would make one of the same name on a node's own disk."""
    if not temporary.is_dir():
        raise ConfigError(
            f"--save {temporary.parent}",
            f"rank {rank_of(group)} on {socket.gethostname()} doesn't see the folder that rank 0 made in it",
            "save to a file system that all nodes share",
        )


def _checksums(temporary: Path, rank: int) -> dict[str, str]:
    """Checksums of the files that this rank wrote."""
    return {file.name: files.checksum(file) for file in sorted(temporary.glob(f"__{rank}_*"))}


def _finish(
    temporary: Path,
    final: Path,
    manifest: Manifest,
    states: list[dict[str, Any]],
    sums: list[dict[str, str]],
) -> None:
    """Adds the small files, then makes the folder a checkpoint, then the latest. Runs on rank 0."""
    rng.write_states(temporary, states)
    known = {name: value for one in sums for name, value in one.items()}
    sizes, checksums = {}, {}
    for path in sorted(temporary.iterdir()):
        sizes[path.name] = path.stat().st_size
        if not sizes[path.name]:
            # DCP makes a file for a rank to which it dealt nothing.
            path.unlink()
            del sizes[path.name]
            continue
        checksums[path.name] = known.get(path.name) or files.checksum(path)
    files.write_text(temporary / FILE, replace(manifest, files=sizes, checksums=checksums).to_json())
    files.sync(temporary / rng.FILE)
    files.publish(temporary, final)
    files.point_to(final)


def _drop(temporary: Path, group: Group) -> None:
    """Removes an unfinished checkpoint; what can't be removed now goes with the next `clean`."""
    if rank_of(group) == 0:
        shutil.rmtree(temporary, ignore_errors=True)


def _told(root: Path, action: Callable[[], T]) -> T:
    try:
        return action()
    except OSError as error:
        raise _unwritable(root, reason(error)) from None


def _unwritable(root: Path, why: str) -> ConfigError:
    return ConfigError(
        f"--save {root}",
        f"the checkpoint can't be written: {why}",
        "make room there, or save to another folder; earlier checkpoints are untouched",
    )
