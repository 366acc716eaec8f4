"""Checkpoints on each node's own disk: every rank saves what it holds, for itself.

Each run has a folder of its own, in it each rank one, ``rank_00003``, and in that a checkpoint of the ordinary form
whose tensors are this rank's shards. Such a checkpoint is good for the layout that saved it, and only while every rank
finds its part.
"""

from __future__ import annotations

import logging
import shutil
import socket
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint import files
from megatron_mup.checkpoint.agree import ALONE, Group, gathered, on_all, rank_of
from megatron_mup.checkpoint.load import load as load_any
from megatron_mup.checkpoint.manifest import Manifest, read_manifest
from megatron_mup.checkpoint.save import save as save_any
from megatron_mup.checkpoint.state import Piece
from megatron_mup.config import Config, ConfigError

RUN = "save"
"""Key in the manifest's ``extra``: the folder to which the run saves for good, which says whose checkpoint it is."""

log = logging.getLogger(__name__)


def save(folder: str | Path, pieces: list[Piece], manifest: Manifest, run: str, group: Group = None) -> Path:
    """Saves this rank's shards, and when all ranks have done so removes the run's local checkpoints before. Collective.

    Args:
        folder: on a disk of this node.
        pieces: this rank's shards.
        manifest: as `checkpoint.save` takes it.
        run: the folder to which the run saves for good.
        group: the ranks that save; None means all.

    Returns:
        This rank's checkpoint.

    Raises:
        ConfigError: a rank can't write it; the same on all ranks. What stood there before still does.
    """
    manifest = replace(manifest, extra={**manifest.extra, RUN: run})
    root = rank_folder(folder, run, group)
    path = on_all(lambda: save_any(root, _own(pieces), manifest, group=ALONE), group)
    clear(folder, run, path, group)
    return path


def find(
    folder: str | Path, run: str, layout: Mapping[str, int], after: int | None = None, group: Group = None
) -> Path | None:
    """This rank's part of the newest local checkpoint that all ranks have whole. Collective.

    A newer one that some rank lacks is passed over with a warning.

    Args:
        folder: what `save` was given.
        run: the folder to which the run saves for good; checkpoints of other runs don't count.
        layout: ranks along each axis; checkpoints of other layouts don't count.
        after: iteration of the checkpoint to load otherwise; older ones don't count.
        group: the ranks that load; None means all.
    """
    mine = {
        iteration: path
        for root in _roots(folder, run, group)
        for iteration, path in files.checkpoints(root).items()
        if (after is None or iteration > after) and _belongs(path, run, layout)
    }
    everyones = gathered((socket.gethostname(), sorted(mine)), group)
    for iteration in sorted({i for _, there in everyones for i in there}, reverse=True):
        lacking = [f"rank {rank} on {host}" for rank, (host, there) in enumerate(everyones) if iteration not in there]
        if not lacking:
            return mine[iteration]
        if rank_of(group) == 0:
            log.warning(
                "the local checkpoint of iteration %d is not whole: %s lacks it; going on from an older one",
                iteration,
                ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else ""),
            )
    return None


def load(path: Path, pieces: list[Piece], config: Config, group: Group = None) -> Manifest:
    """Fills this rank's shards from what `find` gave. Collective.

    Raises:
        ConfigError: it is another model's; the same on all ranks.
    """
    return on_all(lambda: load_any(path, _own(pieces), config, ALONE), group)


def clear(folder: str | Path, run: str, keep: Path | None, group: Group = None) -> None:
    """Removes this rank's local checkpoints of a run but one; those of other runs stay."""
    for root in _roots(folder, run, group):
        for path in files.checkpoints(root).values():
            if path != keep and _is_of(path, run):
                shutil.rmtree(path, ignore_errors=True)


def run_folder(folder: str | Path, run: str) -> Path:
    """Where the ranks of a run save: runs that share a disk may have the same name, but no two the same path."""
    return Path(folder).absolute() / f"{Path(run).name}-{zlib.crc32(run.encode()):08x}"


def rank_folder(folder: str | Path, run: str, group: Group = None) -> Path:
    """Where this rank of a run saves."""
    return run_folder(folder, run) / f"rank_{rank_of(group):05d}"


def _roots(folder: str | Path, run: str, group: Group) -> list[Path]:
    """Where checkpoints of this rank may stand: all runs once shared one folder."""
    own = rank_folder(folder, run, group)
    return [Path(folder).absolute() / own.name, own]


def _own(pieces: list[Piece]) -> list[Piece]:
    """The shards as tensors of their own, each under a key that says where it lies."""
    return [
        Piece(f"{piece.key}@{','.join(map(str, piece.offsets))}", piece.tensor, tuple(piece.tensor.shape), zeros)
        for piece in pieces
        if piece.tensor.numel()
        for zeros in [(0,) * piece.tensor.dim()]
    ]


def _is_of(path: Path, run: str) -> bool:
    try:
        return read_manifest(path).extra.get(RUN) == run
    except ConfigError:
        return False


def _belongs(path: Path, run: str, layout: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is whole, of this run and of this layout."""
    try:
        manifest = files.check_complete(path)
    except ConfigError:
        return False
    if manifest.extra.get(RUN) != run or dict(manifest.layout) != dict(layout):
        return False
    return files.flipped(path, manifest) is None
