"""Turn the sources of Python's standard library into a text corpus: JSON lines with a validation part that stays fixed.

    python tools/build_corpus.py --output-dir corpus

writes train.jsonl and validation.jsonl, one document per source file, in the order of their paths. Which part a file
belongs to depends on its path alone, so bits per byte of different runs are of the same text. Files differ between
versions of Python. Needs no network: the sources are those of the Python that runs this. --source takes other folders,
as those of installed packages; of several, the folder's name is part of a path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "lib-dynload"}
)
"""Not the library, not shipped by every distribution of Python, or generated tables."""
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
"""Files and folders about the machine on which Python was built."""
VALIDATION_SHARE = 28
"""One file in so many is for validation."""


@dataclass(frozen=True)
class Document:
    """A source file: its path below the library's folder, with slashes, and its text."""

    path: str
    text: str

    @property
    def is_validation(self) -> bool:
        """Whether it belongs to the validation part; the same on every machine."""
        return int(hashlib.sha256(self.path.encode()).hexdigest(), 16) % VALIDATION_SHARE == 0


def documents(folders: Sequence[Path]) -> Iterator[Document]:
    """Python files below folders by path; no empty ones, no second copy of a text, none that isn't UTF-8."""
    seen = set()
    for folder in folders:
        prefix = "" if len(folders) == 1 else f"{folder.name}/"
        for path in sorted(_sources(folder)):
            try:
                text = (folder / path).read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if text.strip() and digest not in seen:
                seen.add(digest)
                yield Document(prefix + path, text)


def _sources(folder: Path) -> Iterator[str]:
    for at, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and not f.startswith(SKIPPED_PREFIXES)]
        for name in files:
            if name.endswith(".py") and not name.startswith(SKIPPED_PREFIXES):
                yield Path(at, name).relative_to(folder).as_posix()


def write_corpus(folders: Sequence[Path], output_dir: Path) -> dict[str, tuple[int, int]]:
    """Writes ``train.jsonl`` and ``validation.jsonl``; a file appears when it is complete.

    Returns:
        By part: documents, and bytes of their text in UTF-8.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Document]] = {"train": [], "validation": []}
    for document in documents(folders):
        parts["validation" if document.is_validation else "train"].append(document)
    sizes = {}
    for part, members in parts.items():
        temporary = output_dir / f".{part}.jsonl.tmp"
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for document in members:
                record = {"path": document.path, "text": document.text}
                file.write(json.dumps(record) + "\n")
        temporary.replace(output_dir / f"{part}.jsonl")
        sizes[part] = len(members), sum(len(d.text.encode()) for d in members)
    return sizes


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--source",
        type=Path,
        nargs="+",
        default=[Path(sysconfig.get_path("stdlib"))],
        help="folders of Python sources; default: the standard library",
    )
    arguments = parser.parse_args(argv)
    try:
        sizes = write_corpus(arguments.source, arguments.output_dir)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    for part, (count, size) in sizes.items():
        print(f"{part}: {count:,} documents, {size:,} bytes")
    if not all(count for count, _ in sizes.values()):
        print(
            f"error: {', '.join(map(str, arguments.source))} holds too few Python sources for a corpus", file=sys.stderr
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
