"""Cache of index arrays on disk: keyed by a readable description, safe when many ranks build at once."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


def load_or_build(directory: Path | None, description: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
    """Arrays of ``description``, from the cache where it has them, else built and stored.

    Each array is written under a temporary name and renamed; the description goes last and marks the entry as whole.
    Ranks that build at the same time write equal contents, so the last rename wins without harm.

    Args:
        directory: folder of the cache; None builds in memory.
        description: everything the arrays depend on; its JSON text is the key.
        build: makes the arrays, by name.

    Returns:
        The arrays by name; memory-mapped and read-only where they come from the cache. A folder that cannot be
        written gives a warning and arrays in memory.
    """
    if directory is None:
        return build()
    text = json.dumps(description, indent=2, sort_keys=True)
    stem = hashlib.sha256(text.encode()).hexdigest()[:32]
    marker = directory / f"{stem}-description.txt"
    cached = _load(directory, stem, marker)
    if cached is not None:
        return cached
    arrays = build()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            _write(directory / f"{stem}-{name}.npy", functools.partial(_save_array, array))
        names = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
        _write(marker, lambda path: path.write_text(json.dumps({"key": description, "arrays": names}, indent=2)))
    except OSError as error:
        warnings.warn(
            f"index cache {directory} cannot be written ({error.strerror}); the indices stay in memory and are "
            "rebuilt at each start. Set --data-cache-path to a writable folder.",
            stacklevel=2,
        )
        return arrays
    return _load(directory, stem, marker) or arrays


def _load(directory: Path, stem: str, marker: Path) -> Arrays | None:
    """The stored arrays; None where the entry is absent or damaged, which means: build again."""
    try:
        names: dict[str, tuple[str, list[int]]] = json.loads(marker.read_text())["arrays"]
        arrays: Arrays = {}
        for name, (dtype, shape) in names.items():
            array = np.load(directory / f"{stem}-{name}.npy", mmap_mode="r", allow_pickle=False)
            if str(array.dtype) != dtype or list(array.shape) != shape:
                return None
            arrays[name] = array
        return arrays
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save_array(array: NDArray[Any], path: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, array)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
