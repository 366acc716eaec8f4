"""Tokenized corpora on disk: ``PREFIX.bin`` holds the tokens, ``PREFIX.idx`` where each sequence lies.

Byte layout of Megatron-LM's indexed dataset, version 1, little-endian and unaligned. The ``.idx`` file::

    9 bytes  magic ``MMIDIDX\\0\\0``
    <Q       version, 1
    <B       dtype code
    <Q       N, number of sequences
    <Q       M, number of documents + 1
    N * <i4  tokens per sequence
    N * <i8  byte offset of each sequence in the .bin
    M * <i8  document boundaries, in sequences; first 0, last N
    N * <i1  modes (multimodal sets only; ignored here)
"""

from __future__ import annotations

import mmap
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import NDArray

from megatron_mup.config.errors import ConfigError
from megatron_mup.progress import track

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_SEQUENCE_TOKENS = 2**31 - 1
_CHUNK = 1 << 20  # entries handled at a time where a whole array might not fit in memory


def token_dtype(vocab_size: int) -> np.dtype:
    """Smallest storage type by Megatron's rule: uint16 below 65500 ids, int32 above."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def bin_path(prefix: str | Path) -> Path:
    """Path of the token file of ``prefix``."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """Path of the index file of ``prefix``."""
    return Path(f"{prefix}.idx")


class IndexedDatasetWriter:
    """Writes an indexed dataset as a stream; memory stays bounded for any number of sequences.

    Everything goes to temporary files beside the target. ``finalize`` renames them to ``PREFIX.bin`` and, last,
    ``PREFIX.idx``; ``abort`` removes them. As a context manager it finalizes on success and aborts on an exception.

    Args:
        prefix: path of the dataset without suffix.
        dtype: storage type of a token.
        vocab_size: number of token ids; ids outside [0, vocab_size) are refused. None: only the dtype bounds them.

    Raises:
        ConfigError: the folder cannot be written, or the dtype is not in the format.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype | type, vocab_size: int | None = None) -> None:
        """Opens the temporary files."""
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ConfigError(
                f"dtype {self.dtype} of {self.prefix}",
                "the .idx format has no code for it",
                f"use one of {', '.join(str(d) for d in CODES)}",
            )
        self._limit = int(np.iinfo(self.dtype).max) + 1
        if vocab_size is not None:
            self._limit = min(self._limit, vocab_size)
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0
        tag = f".tmp-{os.getpid()}"
        self._paths = {part: Path(f"{self.prefix}{part}{tag}") for part in (".bin", ".lengths", ".documents", ".idx")}
        self._files: dict[str, IO[bytes]] = {}
        try:
            Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
            for part in (".bin", ".lengths", ".documents"):
                self._files[part] = open(self._paths[part], "wb+")  # noqa: SIM115 (closed by finalize and abort)
        except OSError as error:
            if self._files:
                self.abort()
            raise ConfigError(
                f"output {self.prefix}", f"cannot be written ({error.strerror})", "give a prefix in a writable folder"
            ) from error
        self._files[".documents"].write(np.zeros(1, "<i8").tobytes())

    def add_document(self, tokens: NDArray[np.integer], sequence_lengths: NDArray[np.integer] | None = None) -> None:
        """Appends one document.

        Args:
            tokens: [tokens] ids of the document.
            sequence_lengths: [sequences] how the tokens divide into sequences. Default: one sequence, even if empty.
        """
        lengths = np.asarray([len(tokens)] if sequence_lengths is None else sequence_lengths, dtype=np.int64)
        self.add_documents(tokens, lengths, np.asarray([len(lengths)]))

    def add_documents(
        self,
        tokens: NDArray[np.integer],
        sequence_lengths: NDArray[np.integer],
        sequences_per_document: NDArray[np.integer],
    ) -> None:
        """Appends many documents at once.

        Args:
            tokens: [tokens] ids of all documents in a row.
            sequence_lengths: [sequences] tokens of each sequence.
            sequences_per_document: [documents] sequences of each document; 0 is an empty document.

        Raises:
            ConfigError: an id does not fit the vocabulary or the dtype, or a sequence is too long.
            ValueError: the three arguments contradict each other.
        """
        tokens, lengths = np.asarray(tokens), np.asarray(sequence_lengths, dtype=np.int64)
        counts = np.asarray(sequences_per_document, dtype=np.int64)
        if lengths.sum() != len(tokens) or counts.sum() != len(lengths) or (lengths < 0).any() or (counts < 0).any():
            raise ValueError("tokens, sequence_lengths and sequences_per_document do not add up")
        if len(tokens):
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._limit:
                raise ConfigError(
                    f"token id {low if low < 0 else high} for {self.prefix}",
                    f"ids must lie in [0, {self._limit}) for this vocabulary and {self.dtype}",
                    "use the tokenizer that belongs to --vocab-size, or a wider dtype",
                )
        if len(lengths) and int(lengths.max()) > MAX_SEQUENCE_TOKENS:
            raise ConfigError(
                f"a sequence of {int(lengths.max())} tokens for {self.prefix}",
                f"the .idx format counts up to {MAX_SEQUENCE_TOKENS}",
                "cut the document",
            )
        self._files[".bin"].write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self._files[".lengths"].write(lengths.astype("<i4").tobytes())
        self._files[".documents"].write((self.num_sequences + np.cumsum(counts)).astype("<i8").tobytes())
        self.num_tokens += len(tokens)
        self.num_sequences += len(lengths)
        self.num_documents += len(counts)

    def add_dataset(self, other: IndexedDataset) -> None:
        """Appends all documents of another dataset of the same dtype, copying its bytes in pieces."""
        if other.dtype != self.dtype:
            raise ConfigError(
                f"{other.prefix}", f"stores {other.dtype}, {self.prefix} stores {self.dtype}", "merge sets of one dtype"
            )
        for start in track(range(0, other.num_documents, _CHUNK), f"copying {other.prefix}"):
            bounds = other.document_indices[start : start + _CHUNK + 1]
            counts = np.diff(bounds)
            lengths = other.sequence_lengths[bounds[0] : bounds[-1]]
            self._files[".lengths"].write(np.ascontiguousarray(lengths).tobytes())
            self._files[".documents"].write((self.num_sequences + np.cumsum(counts)).astype("<i8").tobytes())
            self.num_tokens += other.copy_sequences(int(bounds[0]), int(bounds[-1]), self._files[".bin"])
            self.num_sequences += len(lengths)
            self.num_documents += len(counts)

    def finalize(self) -> None:
        """Writes the index and gives both files their names, the .idx last."""
        documents, lengths = self._files[".documents"], self._files[".lengths"]
        with open(self._paths[".idx"], "wb") as out:
            out.write(
                HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self.num_sequences, self.num_documents + 1),
            )
            lengths.seek(0)
            while block := lengths.read(4 * _CHUNK):
                out.write(block)
            lengths.seek(0)
            offset = 0
            while block := lengths.read(4 * _CHUNK):
                ends = offset + np.cumsum(np.frombuffer(block, "<i4"), dtype="<i8") * self.dtype.itemsize
                out.write(np.concatenate([np.asarray([offset], "<i8"), ends[:-1]]).tobytes())
                offset = int(ends[-1])
            documents.seek(0)
            while block := documents.read(8 * _CHUNK):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        self._files[".bin"].flush()
        os.fsync(self._files[".bin"].fileno())
        # An old index must not be seen with new tokens.
        idx_path(self.prefix).unlink(missing_ok=True)
        os.replace(self._paths[".bin"], bin_path(self.prefix))
        os.replace(self._paths[".idx"], idx_path(self.prefix))
        self.abort()

    def abort(self) -> None:
        """Closes and removes whatever temporary files are left."""
        for file in self._files.values():
            try:
                file.close()
            except OSError as error:  # a full disk: the buffered rest is lost, as intended
                warnings.warn(f"{file.name}: {error}", stacklevel=2)
        for path in self._paths.values():
            path.unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        """The writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finalizes on success, removes every trace otherwise."""
        try:
            if kind is None:
                self.finalize()
        finally:
            self.abort()


class IndexedDataset:
    """Reads ``PREFIX.bin`` and ``PREFIX.idx`` through memory maps.

    Attributes:
        prefix: path without suffix.
        dtype: storage type of a token.
        sequence_lengths: [N] int32 tokens per sequence.
        sequence_offsets: [N] int64 byte offset of each sequence in the .bin.
        document_indices: [documents + 1] int64 boundaries of the documents, in sequences.

    Raises:
        ConfigError: a file is missing, truncated, of another format or version, or the two contradict each other.
    """

    def __init__(self, prefix: str | Path) -> None:
        """Maps and checks both files."""
        self.prefix = str(prefix)
        idx, tokens = idx_path(prefix), bin_path(prefix)
        for path in (idx, tokens):
            if not path.is_file():
                fix = "give the path without .bin or .idx, or run tools/preprocess_data.py"
                raise ConfigError(f"data {self.prefix}", f"{path} does not exist", fix)
        index = _map(idx)
        if len(index) < HEADER.size:
            raise self._broken(idx, f"truncated: {len(index)} bytes, the header alone has {HEADER.size}")
        magic, version, code, num_sequences, num_bounds = HEADER.unpack_from(index)
        if magic != MAGIC:
            raise self._broken(idx, f"wrong magic {magic!r}: not an indexed dataset")
        if version != VERSION:
            raise self._broken(idx, f"version {version}, only version {VERSION} is known")
        if code not in DTYPES:
            raise self._broken(idx, f"dtype code {code} is not an integer type of the format")
        self.dtype = DTYPES[code]
        expected = HEADER.size + 12 * num_sequences + 8 * num_bounds
        if len(index) not in (expected, expected + num_sequences):
            state = "truncated" if len(index) < expected else "too long"
            raise self._broken(idx, f"{state}: {len(index)} bytes, {expected} expected for {num_sequences} sequences")
        offset = HEADER.size
        self.sequence_lengths = np.frombuffer(index, "<i4", num_sequences, offset)
        self.sequence_offsets = np.frombuffer(index, "<i8", num_sequences, offset + 4 * num_sequences)
        self.document_indices = np.frombuffer(index, "<i8", num_bounds, offset + 12 * num_sequences)
        self._tokens = _map(tokens)
        self._validate(idx, tokens)

    def _broken(self, path: Path, why: str) -> ConfigError:
        return ConfigError(f"data file {path}", why, "copy it again, or rebuild it with tools/preprocess_data.py")

    def _validate(self, idx: Path, tokens: Path) -> None:
        bounds, total = self.document_indices, 0
        if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != len(self.sequence_lengths):
            last = int(bounds[-1]) if len(bounds) else "nothing"
            raise self._broken(
                idx, f"document boundaries end at {last} but there are {len(self.sequence_lengths)} sequences"
            )
        if any((np.diff(bounds[i : i + _CHUNK + 1]) < 0).any() for i in range(0, len(bounds), _CHUNK)):
            raise self._broken(idx, "document boundaries decrease")
        for start in range(0, len(self.sequence_lengths), _CHUNK):
            lengths = self.sequence_lengths[start : start + _CHUNK].astype(np.int64)
            offsets = self.sequence_offsets[start : start + _CHUNK]
            if int(lengths.min()) < 0:
                raise self._broken(idx, f"sequence {start + int(lengths.argmin())} has a negative length")
            bad = (offsets < 0) | (offsets + lengths * self.dtype.itemsize > len(self._tokens))
            if bad.any():
                first = start + int(bad.argmax())
                raise self._broken(
                    tokens,
                    f"sequence {first} ends past the end of the file ({len(self._tokens)} bytes): "
                    "the .bin is truncated or belongs to another .idx",
                )
            total += int(lengths.sum())
        self.num_tokens = total

    @property
    def num_documents(self) -> int:
        """Documents in the set, empty ones included."""
        return len(self.document_indices) - 1

    @property
    def bin_bytes(self) -> int:
        """Size of the .bin file in bytes."""
        return len(self._tokens)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.sequence_lengths)

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        """Pickles as its path: another process maps the files anew."""
        return type(self), (self.prefix,)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> NDArray[np.integer]:
        """Tokens of one sequence, or of a part of it.

        Args:
            index: number of the sequence.
            offset: first token wanted.
            length: number of tokens. Default: to the end of the sequence.

        Returns:
            [length] read-only view of the file, in the stored dtype.

        Raises:
            IndexError: no such sequence, or the part leaves it.
        """
        if not 0 <= index < len(self.sequence_lengths):
            raise IndexError(f"sequence {index} of {len(self.sequence_lengths)} in {self.prefix}")
        size = int(self.sequence_lengths[index])
        if length is None:
            length = size - offset
        if offset < 0 or length < 0 or offset + length > size:
            raise IndexError(f"tokens {offset}:{offset + length} of sequence {index} ({size} tokens) in {self.prefix}")
        start = int(self.sequence_offsets[index]) + offset * self.dtype.itemsize
        return np.frombuffer(self._tokens, self.dtype, length, start)

    def copy_sequences(self, begin: int, end: int, out: IO[bytes]) -> int:
        """Writes the tokens of sequences [begin, end) to ``out``; returns how many."""
        sizes = self.sequence_lengths[begin:end].astype(np.int64) * self.dtype.itemsize
        starts = self.sequence_offsets[begin:end]
        # Runs of sequences that lie one after the other are one copy.
        cuts = np.flatnonzero(starts[1:] != starts[:-1] + sizes[:-1]) + 1
        for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(starts)], strict=True):
            if first == last:
                continue
            position, stop = int(starts[first]), int(starts[last - 1] + sizes[last - 1])
            while position < stop:
                piece = self._tokens[position : min(stop, position + (8 << 20))]
                out.write(piece)
                position += len(piece)
        return int(sizes.sum()) // self.dtype.itemsize

    def pieces(self, tokens: int = 1 << 23) -> Iterator[tuple[int, NDArray[np.integer]]]:
        """The whole .bin in file order: position of the first token, and [up to ``tokens``] ids, again and again."""
        total = len(self._tokens) // self.dtype.itemsize
        for start in range(0, total, tokens):
            yield (
                start,
                np.frombuffer(self._tokens, self.dtype, min(tokens, total - start), start * self.dtype.itemsize),
            )

    def document_of(self, sequence: int) -> int:
        """Number of the document that holds a sequence."""
        return int(np.searchsorted(self.document_indices, sequence, side="right")) - 1


def _map(path: Path) -> memoryview:
    """Read-only memory map of a file as bytes; an empty file, which cannot be mapped, is an empty view."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
