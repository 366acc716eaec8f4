"""Folders and files of checkpoints: what is complete, what is newest, and how one comes and goes without a gap.

A checkpoint is a folder ``iter_0000123``. It gets this name by a rename when every file in it is on the disk, so that a
run that dies at any moment leaves hidden folders behind, never a broken checkpoint under a checkpoint's name.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Collection
from pathlib import Path

from megatron_mup.checkpoint import manifest
from megatron_mup.checkpoint.agree import reason
from megatron_mup.config import ConfigError

POINTER = "latest_checkpointed_iteration.txt"

_NAME = re.compile(r"iter_(\d+)")
_HIDDEN = re.compile(r"\.(iter_\d+)\.(tmp|old)-.+")

log = logging.getLogger(__name__)


def folder_name(iteration: int) -> str:
    """Name of the checkpoint of an iteration."""
    return f"iter_{iteration:07d}"


def hidden(path: Path, kind: str) -> Path:
    """A free name beside a checkpoint: ``tmp`` for one that comes or goes, ``old`` for one being replaced."""
    return path.with_name(f".{path.name}.{kind}-{uuid.uuid4().hex[:8]}")


def checkpoints(folder: Path) -> dict[int, Path]:
    """Checkpoint folders by iteration, rising, complete or not."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def check_complete(path: Path) -> manifest.Manifest:
    """The manifest of a checkpoint whose files are all there in full size.

    Raises:
        ConfigError: names the first file that isn't, and the last good checkpoint.
    """
    try:
        return _checked(path)
    except ConfigError as error:
        raise ConfigError(error.what, error.why, other_choice(path, error.fix)) from None


def is_complete(path: Path) -> bool:
    """Whether a checkpoint can be loaded, as far as its manifest and the sizes of its files tell."""
    try:
        _checked(path)
    except ConfigError:
        return False
    return True


def _checked(path: Path) -> manifest.Manifest:
    facts = manifest.read_manifest(path)
    for name, size in facts.files.items():
        _check_size(path / name, size)
    return facts


def _check_size(file: Path, size: int) -> None:
    fix = "restore the file, or load another checkpoint"
    try:
        actual = file.stat().st_size
    except FileNotFoundError:
        raise ConfigError(str(file), "missing", fix) from None
    except OSError as error:
        raise ConfigError(str(file), f"can't be read: {reason(error)}", fix) from None
    if actual != size:
        raise ConfigError(str(file), f"damaged: it has {actual:,} bytes of {size:,}", fix)


def checksum(file: Path) -> str:
    """CRC-32 of a file, eight hexadecimal digits: finds every flipped bit, and costs little beside writing."""
    value = 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def flipped(path: Path, facts: manifest.Manifest, part: int = 0, parts: int = 1) -> str | None:
    """The first file of a checkpoint whose contents aren't what was written, in words.

    Args:
        path: the checkpoint.
        facts: its manifest.
        part, parts: look at every ``parts``-th file only, from the ``part``-th on.
    """
    for name in sorted(facts.checksums)[part::parts]:
        try:
            actual = checksum(path / name)
        except OSError as error:
            return f"{path / name}: can't be read: {reason(error)}"
        if actual != facts.checksums[name]:
            return f"{path / name}: damaged: its checksum is {actual} and was {facts.checksums[name]}"
    return None


def newest_complete(folder: Path, before: int | None = None, skip: Collection[Path] = ()) -> Path | None:
    """The complete checkpoint with the highest iteration, below ``before`` if there is one there."""
    found = [(i, path) for i, path in checkpoints(folder).items() if path not in skip]
    earlier = [path for i, path in found if before is not None and i < before]
    later = [path for i, path in found if before is None or i >= before]
    return next((path for path in [*reversed(earlier), *reversed(later)] if is_complete(path)), None)


def other_choice(path: Path, otherwise: str) -> str:
    """What to do when ``path`` can't be loaded: take the last good checkpoint beside it."""
    match = _NAME.fullmatch(path.name)
    good = newest_complete(path.parent, int(match[1]) if match else None, skip=(path,))
    if good is None:
        return f"{otherwise}; no other complete checkpoint stands beside it"
    return f"the last good checkpoint is {good}: --ckpt-step {int(good.name.removeprefix('iter_'))}"


def pointed(folder: Path) -> int | None:
    """Iteration that the pointer file names; None without one, or when it holds no number."""
    try:
        text = (folder / POINTER).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    if not text.isdecimal():
        log.warning("%s holds %r, not an iteration", folder / POINTER, text[:40])
        return None
    return int(text)


def publish(temporary: Path, final: Path) -> None:
    """Gives a finished folder its name, durably; a checkpoint that has it already makes room."""
    sync(temporary)
    old = hidden(final, "old") if final.exists() else None
    if old is not None:
        os.rename(final, old)
    os.rename(temporary, final)
    sync(final.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def point_to(final: Path) -> None:
    """Makes a checkpoint the latest, by atomic replacement of the pointer."""
    pointer = final.parent / POINTER
    temporary = pointer.with_name(f".{pointer.name}.tmp")
    write_text(temporary, f"{int(final.name.removeprefix('iter_'))}\n")
    os.replace(temporary, pointer)
    sync(final.parent)


def prune(final: Path, keep_last: int, retain_interval: int | None = None) -> None:
    """Removes checkpoints older than the ``keep_last`` newest complete ones, of which ``final`` is the newest.

    Those of iterations divisible by ``retain_interval`` stay.

    Those of later iterations, left by a run that this one went back from, stay until it has passed them.
    """
    kept = 0
    newest_first = sorted(checkpoints(final.parent).items(), reverse=True)
    for iteration, path in newest_first[[path for _, path in newest_first].index(final) :]:
        retained = retain_interval is not None and iteration % retain_interval == 0
        if kept >= keep_last and path != final:
            if retained:
                continue
            going = hidden(path, "tmp")
            os.rename(path, going)
            shutil.rmtree(going, ignore_errors=True)
        elif path == final or is_complete(path):
            kept += 1


def sweep(folder: Path) -> None:
    """Removes what dead runs left half done; a checkpoint that was being replaced and has no successor comes back."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        match = _HIDDEN.fullmatch(path.name)
        if match and match[2] == "old" and not (folder / match[1]).exists():
            os.rename(path, folder / match[1])
        elif match:
            shutil.rmtree(path)


def write_text(file: Path, text: str) -> None:
    """Writes a small file and waits until it is on the disk."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
