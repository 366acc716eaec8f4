"""What an indexed dataset holds, and whether it is whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mup.config.errors import ConfigError
from megatron_mup.data.indexed_dataset import IndexedDataset
from megatron_mup.progress import bar

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Summary:
    """Counts and lengths of a dataset."""

    documents: int
    empty_documents: int
    """Documents without a token."""
    sequences: int
    tokens: int
    bin_bytes: int
    dtype: str
    shortest: int
    """Tokens of the shortest document; also the following are by document."""
    longest: int
    mean: float
    percentiles: dict[int, int]
    """Length by percentile."""
    histogram: list[tuple[int, int, int]]
    """(from, to, documents): lengths from <= n < to, by powers of two."""


def document_lengths(dataset: IndexedDataset) -> NDArray[np.int64]:
    """Tokens of each document: [documents]."""
    ends = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])
    lengths: NDArray[np.int64] = np.diff(ends[dataset.document_indices])
    return lengths


def summarize(dataset: IndexedDataset) -> Summary:
    """Counts documents and their lengths; reads the .idx only."""
    lengths = document_lengths(dataset)
    empty = len(lengths) == 0
    bins = np.bincount(np.ceil(np.log2(lengths + 1.0)).astype(np.int64)) if not empty else np.zeros(0, np.int64)
    return Summary(
        documents=len(lengths),
        empty_documents=int(np.sum(lengths == 0)),
        sequences=len(dataset),
        tokens=dataset.num_tokens,
        bin_bytes=dataset.bin_bytes,
        dtype=str(dataset.dtype),
        shortest=0 if empty else int(lengths.min()),
        longest=0 if empty else int(lengths.max()),
        mean=0.0 if empty else float(lengths.mean()),
        percentiles={}
        if empty
        else {
            p: int(v) for p, v in zip(PERCENTILES, np.percentile(lengths, PERCENTILES, method="nearest"), strict=True)
        },
        histogram=[(2**k // 2, 2**k, int(count)) for k, count in enumerate(bins) if count],
    )


@dataclass(frozen=True)
class Verification:
    """Result of reading every token."""

    lowest: int
    highest: int
    eod_count: int | None
    """Occurrences of the end-of-document id; None where it is not known."""
    unused_bytes: int
    """Bytes of the .bin that no sequence covers."""


def verify(dataset: IndexedDataset, vocab_size: int | None = None, eod: int | None = None) -> Verification:
    """Reads every token of a dataset, in pieces. What can be told from the .idx was checked when it was opened.

    Args:
        dataset: the dataset.
        vocab_size: ids must lie below it; None for any.
        eod: end-of-document id to count.

    Raises:
        ConfigError: a negative id, or one outside the vocabulary; its document is named.
    """
    lowest, highest, eods = 0, 0, 0
    with bar(f"reading {dataset.prefix}", dataset.bin_bytes) as advance:
        for start, tokens in dataset.pieces():
            low, high = int(tokens.min()), int(tokens.max())
            bad = low if low < 0 else high
            if low < 0 or (vocab_size is not None and high >= vocab_size):
                position = start + int(np.argmax(tokens == bad))
                raise ConfigError(
                    f"data {dataset.prefix}",
                    f"document {_document_at(dataset, position)} holds token id {bad}"
                    + (f", the vocabulary has {vocab_size} ids" if vocab_size is not None else ""),
                    "tokenize it again with the tokenizer of the run",
                )
            lowest, highest = min(lowest, low) if start else low, max(highest, high)
            eods += int(np.sum(tokens == eod)) if eod is not None else 0
            advance(tokens.nbytes)
    unused = dataset.bin_bytes - dataset.num_tokens * dataset.dtype.itemsize
    return Verification(lowest, highest, eods if eod is not None else None, unused)


def _document_at(dataset: IndexedDataset, position: int) -> int | str:
    """Document that holds the token at a position of the .bin."""
    offset = position * dataset.dtype.itemsize
    sizes = dataset.sequence_lengths.astype(np.int64) * dataset.dtype.itemsize
    inside = (dataset.sequence_offsets <= offset) & (offset < dataset.sequence_offsets + sizes)
    return dataset.document_of(int(inside.argmax())) if inside.any() else "none (unused bytes)"


def document_tokens(dataset: IndexedDataset, document: int) -> NDArray[np.integer]:
    """Tokens of one document, its sequences joined: [tokens]."""
    first, last = dataset.document_indices[document : document + 2].tolist()
    parts = [dataset.get(sequence) for sequence in range(first, last)]
    return np.concatenate([np.zeros(0, dataset.dtype), *parts])
