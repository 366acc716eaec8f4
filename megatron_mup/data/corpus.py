"""Raw text corpora: JSON lines, plain or compressed, and Parquet, read in batches of bounded size."""

from __future__ import annotations

import glob
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_mup.config.errors import ConfigError

BATCH_BYTES = 1 << 20
_PARQUET_ROWS = 64


@dataclass(frozen=True)
class TextBatch:
    """Some documents in a row of one file, not yet decoded."""

    path: str
    """The file."""
    first: int
    """Number of the first line or row, from 1."""
    lines: bytes | None
    """JSON lines; None for Parquet."""
    columns: dict[str, list[str | None]] | None
    """Texts by key; None for JSON lines."""
    consumed: int
    """Bytes of the file read since the batch before, compressed as they are on disk."""


def expand_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files that paths and globs name, each glob's in sorted order.

    Raises:
        ConfigError: one of them names no file.
    """
    files: list[Path] = []
    for pattern in patterns:
        found = [Path(pattern)] if Path(pattern).is_file() else [Path(p) for p in sorted(glob.glob(pattern))]
        found = [path for path in found if path.is_file()]
        if not found:
            raise ConfigError(f"--input {pattern}", "no such file", "give a file, or a glob in quotes")
        files += found
    return files


def read_batches(path: Path, keys: Sequence[str]) -> Iterator[TextBatch]:
    """Batches of about 1 MiB of one file; a single document may be larger.

    Args:
        path: ``.parquet``, or JSON lines, compressed if it ends in ``.gz`` or ``.zst``.
        keys: columns to read of a Parquet file.

    Raises:
        ConfigError: the file is damaged, lacks a column, or needs a package that is not installed.
    """
    if path.suffix == ".parquet":
        yield from _read_parquet(path, keys)
    else:
        yield from _read_lines(path)


def texts_of(batch: TextBatch, keys: Sequence[str]) -> dict[str, list[str]]:
    """Texts of a batch, by key; ``None`` documents do not occur, blank lines are left out.

    Raises:
        ConfigError: a line is not a JSON object, or a key is missing or no string; the line is named.
    """
    if batch.columns is not None:
        for key, column in batch.columns.items():
            for row, text in enumerate(column, batch.first):
                if not isinstance(text, str):
                    raise _bad_value(batch.path, "row", row, key, text)
        return batch.columns  # type: ignore[return-value]  # checked above
    texts: dict[str, list[str]] = {key: [] for key in keys}
    for number, line in enumerate((batch.lines or b"").split(b"\n"), batch.first):
        if not line or line.isspace():
            continue
        try:
            document = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{batch.path} line {number}", f"is not JSON ({error})", "mend or drop the line"
            ) from error
        if not isinstance(document, dict):
            raise ConfigError(
                f"{batch.path} line {number}",
                f"is a JSON {type(document).__name__}, not an object",
                'one object per line, e.g. {"text": "..."}',
            )
        for key in keys:
            if key not in document:
                raise ConfigError(
                    f"{batch.path} line {number}",
                    f"has no key {key!r}, only {', '.join(map(repr, document)) or 'none'}",
                    "set --json-keys",
                )
            if not isinstance(document[key], str):
                raise _bad_value(batch.path, "line", number, key, document[key])
            texts[key].append(_encodable(document[key]))
    return texts


def _encodable(text: str) -> str:
    """The text; half of a surrogate pair, which JSON allows but UTF-8 does not, becomes a question mark."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()


def _bad_value(path: str, unit: str, number: int, key: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{path} {unit} {number}", f"{key!r} holds {type(value).__name__}, not a string", "mend or drop it"
    )


def _damaged(path: Path, error: Exception) -> ConfigError:
    fix = "check the file: it may be cut off, or not be what its name says"
    return ConfigError(f"--input {path}", f"cannot be read ({error})", fix)


def _read_lines(path: Path) -> Iterator[TextBatch]:
    raw = open(path, "rb")  # noqa: SIM115 (closed below)
    errors: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    with raw:
        stream: IO[bytes]
        if path.suffix == ".gz":
            stream = gzip.open(raw)  # type: ignore[assignment]  # noqa: SIM115 (raw is closed)
        elif path.suffix == ".zst":
            library = _import("zstandard", path)
            errors += (library.ZstdError,)
            # Concatenated frames, as parallel compressors write them, are one file.
            stream = io.BufferedReader(
                library.ZstdDecompressor().stream_reader(raw, read_across_frames=True), buffer_size=BATCH_BYTES
            )
        else:
            stream = raw
        number, position = 1, 0
        while True:
            try:
                block = stream.read(BATCH_BYTES)
                if block and not block.endswith(b"\n"):
                    block += stream.readline()
            except errors as error:
                raise _damaged(path, error) from error
            if not block:
                return
            consumed, position = raw.tell() - position, raw.tell()
            yield TextBatch(str(path), number, block, None, consumed)
            number += block.count(b"\n")


def _read_parquet(path: Path, keys: Sequence[str]) -> Iterator[TextBatch]:
    parquet, arrow = _import("pyarrow.parquet", path), _import("pyarrow", path)
    try:
        file = parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    with file:
        missing = [key for key in keys if key not in file.schema_arrow.names]
        if missing:
            raise ConfigError(
                f"--input {path}",
                f"has no column {missing[0]!r}, only {', '.join(map(repr, file.schema_arrow.names))}",
                "set --json-keys",
            )
        bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
        columns: dict[str, list[str | None]] = {key: [] for key in keys}
        first, size = 1, 0
        try:
            for rows in file.iter_batches(batch_size=_PARQUET_ROWS, columns=list(keys)):
                for key in keys:
                    columns[key] += rows.column(key).to_pylist()
                size += rows.nbytes
                if size >= BATCH_BYTES:
                    count = len(columns[keys[0]])
                    yield TextBatch(str(path), first, None, columns, round(count * bytes_per_row))
                    columns, first, size = {key: [] for key in keys}, first + count, 0
        except (arrow.ArrowException, OSError) as error:
            raise _damaged(path, error) from error
        if count := len(columns[keys[0]]):
            yield TextBatch(str(path), first, None, columns, round(count * bytes_per_row))


def _import(package: str, path: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.partition(".")[0]
        raise ConfigError(
            f"--input {path}", f"the package {name} is not installed", f"pip install 'megatron-mup[data]' (or {name})"
        ) from error
