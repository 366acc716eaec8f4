"""Fixed-length GPT samples from an indexed dataset, in Megatron-LM's sample order.

A split is a range of sequences. Its sequences, repeated for as many epochs as the run needs and shuffled, form one long
stream of tokens; sample k is the ``seq_length + 1`` tokens that start at token ``k * seq_length`` of it; the samples
are then shuffled too. All three index arrays are built by vectorised NumPy and depend only on the sequence lengths, the
split, the seed, the sequence length and the number of samples asked for.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_mup.config.errors import ConfigError
from megatron_mup.data.index_cache import Arrays, load_or_build
from megatron_mup.data.indexed_dataset import IndexedDataset
from megatron_mup.progress import track

IGNORE_INDEX = -100
"""Label of a position without loss."""

SEPARATE_FINAL_EPOCH_BELOW = 0.80
_CHUNK = 1 << 20
_BLOCK = 1 << 16  # sequences whose temporaries stay in the processor's cache


def parse_split(split: str) -> tuple[tuple[float, float], ...]:
    """Ranges of the three splits, as fractions of the sequences.

    Args:
        split: up to three shares, ``"969,30,1"``; they need not sum to one.

    Returns:
        ``((begin, end), ...)`` of training, validation and test.

    Raises:
        ConfigError: not one to three non-negative numbers with a positive sum.
    """
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= s < float("inf") for s in shares) or sum(shares) <= 0:
        raise ConfigError(f"--split {split}", "needs one to three shares, at least one above zero", "e.g. 969,30,1")
    shares += [0.0] * (3 - len(shares))
    total, bounds = sum(shares), [0.0]
    for share in shares:
        bounds.append(bounds[-1] + share / total)
    return tuple(itertools.pairwise(bounds))


def split_range(fractions: tuple[float, float], num_sequences: int) -> tuple[int, int]:
    """First and one-past-last sequence of a split; half-way bounds round to even."""
    return round(fractions[0] * num_sequences), round(fractions[1] * num_sequences)


def num_epochs(num_samples: int | None, tokens_per_epoch: int, seq_length: int) -> int:
    """Smallest number of epochs that holds ``num_samples`` samples and the one token after them; 1 for None."""
    if num_samples is None:
        return 1
    return max(1, -(-(num_samples * seq_length + 1) // tokens_per_epoch))


def build_indices(
    lengths: NDArray[np.int32], first: int, last: int, num_samples: int | None, seq_length: int, seed: int
) -> Arrays:
    """The three index arrays of one split.

    Args:
        lengths: [sequences] tokens per sequence of the whole dataset.
        first, last: range of the split.
        num_samples: samples the run needs; None for one epoch.
        seq_length: tokens per sample.
        seed: of the shuffles.

    Returns:
        ``document_index`` [epochs * (last - first)] int32; ``sample_index`` [samples + 1, 2], rows (position in
        ``document_index``, token offset); ``shuffle_index`` [samples].
    """
    lengths = np.array(lengths)  # the array in the .idx is not aligned, which slows every access
    per_epoch = count_tokens(lengths, first, last)
    epochs = num_epochs(num_samples, per_epoch, seq_length)
    total = (epochs * per_epoch - 1) // seq_length
    separate, before = False, total
    if epochs > 1 and num_samples is not None:
        sans_final = ((epochs - 1) * per_epoch - 1) // seq_length
        # A final epoch of which little is used is shuffled apart, so that the run sees the full ones evenly.
        separate = num_samples - sans_final < int(SEPARATE_FINAL_EPOCH_BELOW * ((per_epoch - 1) // seq_length))
        before = sans_final if separate else total
    random = np.random.RandomState(seed)

    # Shuffled as int64, for which NumPy's shuffle is a third faster; the permutation is that of any other type.
    documents = np.arange(first, last, dtype=np.int64)
    document_parts = [np.tile(documents, count) for count in ((epochs - 1, 1) if separate else (epochs,))]
    for part in document_parts:
        random.shuffle(part)
    document_index = np.concatenate(document_parts, dtype=np.int32, casting="same_kind")
    del document_parts

    dtype = np.uint32 if total < np.iinfo(np.uint32).max - 1 else np.int64
    shuffle_index = np.arange(total, dtype=np.int64)
    random.shuffle(shuffle_index[:before])
    random.shuffle(shuffle_index[before:])
    return {
        "document_index": document_index,
        "sample_index": build_sample_index(lengths, document_index, total, seq_length),
        "shuffle_index": shuffle_index.astype(dtype, copy=False),
    }


def build_sample_index(
    lengths: NDArray[np.int32], document_index: NDArray[np.int32], num_samples: int, seq_length: int
) -> NDArray[np.integer]:
    """Where each sample starts: row k is the sequence and the offset that hold token ``k * seq_length`` of the stream.

    Sequences are taken in blocks, so that temporary memory does not grow with the corpus.

    Args:
        lengths: [sequences] tokens per sequence.
        document_index: [positions] sequences in stream order.
        num_samples: number of samples; the stream holds more than ``num_samples * seq_length`` tokens.
        seq_length: tokens per sample.

    Returns:
        [num_samples + 1, 2] position in ``document_index`` and token offset; int32 where that suffices.
    """
    longest = int(lengths.max(initial=0))
    wide = max(len(document_index), longest) > np.iinfo(np.int32).max
    rows = np.zeros((num_samples + 1, 2), dtype=np.int64 if wide else np.int32)
    done = 0  # tokens before this block
    for start in track(range(0, len(document_index), _BLOCK), "index of samples"):
        sizes = lengths[document_index[start : start + _BLOCK]]
        ends = np.cumsum(sizes, dtype=np.int64)
        ends += done
        first = -(-done // seq_length)
        done = int(ends[-1])
        # Samples that start before the end of each sequence; the differences are those that start inside it.
        before = np.minimum((ends + (seq_length - 1)) // seq_length, num_samples + 1)
        counts = np.diff(before, prepend=min(first, num_samples + 1))
        inside = np.repeat(np.arange(len(sizes)), counts)
        block = rows[first : first + len(inside)]
        block[:, 0] = inside
        block[:, 0] += start
        ends -= sizes
        block[:, 1] = np.arange(first, first + len(inside), dtype=np.int64) * seq_length - ends[inside]
    rows[0] = 0  # Megatron starts at (0, 0) even where the first sequences are empty
    return rows


def count_tokens(lengths: NDArray[np.int32], first: int, last: int) -> int:
    """Tokens of sequences [first, last)."""
    return int(np.sum(lengths[first:last], dtype=np.int64))


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """How documents within a sample are told apart."""

    eod: int | None = None
    """End-of-document id; the other options need it."""
    reset_position_ids: bool = False
    """Positions restart after each EOD."""
    eod_mask_loss: bool = False
    """No loss where the input is EOD."""


def make_sample(text: NDArray[np.int64], options: DocumentOptions) -> dict[str, NDArray[Any]]:
    """Inputs and targets of a stretch of tokens.

    Args:
        text: [seq + 1] tokens.
        options: treatment of documents.

    Returns:
        ``tokens`` [seq] int64; ``labels`` [seq] int64, the next tokens, ``IGNORE_INDEX`` where there is no loss;
        ``position_ids`` [seq] int64; ``document_ids`` [seq] int32, 0 at first and one more after each EOD in ``tokens``
        (all 0 without an EOD id).
    """
    tokens, labels = text[:-1], text[1:]
    positions = np.arange(len(tokens), dtype=np.int64)
    documents = np.zeros(len(tokens), dtype=np.int32)
    if options.eod is not None:
        is_eod = tokens == options.eod
        documents[1:] = np.cumsum(is_eod[:-1])
        if options.eod_mask_loss:
            labels = np.where(is_eod, IGNORE_INDEX, labels)
        if options.reset_position_ids:
            starts = np.zeros_like(positions)
            starts[1:] = np.where(is_eod[:-1], positions[1:], 0)
            positions -= np.maximum.accumulate(starts)
    return {"tokens": tokens, "labels": labels, "position_ids": positions, "document_ids": documents}


class GPTDataset:
    """Samples of one split of one indexed dataset.

    Args:
        source: the tokens.
        fractions: range of the split as fractions of the sequences, see ``parse_split``.
        num_samples: samples the run needs; the dataset holds at least as many. None: one epoch.
        seq_length: tokens per sample.
        seed: of the sample order.
        vocab_size: ids at or above it are refused when read.
        options: treatment of documents within a sample.
        cache: folder of the index cache. None: in memory.
        name: what error messages call the split.

    Raises:
        ConfigError: the split receives no sequence or no token, or one epoch is asked for and holds no sample.
    """

    def __init__(
        self,
        source: IndexedDataset,
        fractions: tuple[float, float],
        num_samples: int | None,
        seq_length: int,
        seed: int,
        *,
        vocab_size: int,
        options: DocumentOptions | None = None,
        cache: Path | None = None,
        name: str = "training",
    ) -> None:
        """Builds the index arrays, or finds them in the cache."""
        self.source = source
        self.seq_length = seq_length
        self.vocab_size = vocab_size
        self.options = options or DocumentOptions()
        first, last = split_range(fractions, len(source))
        tokens = count_tokens(source.sequence_lengths, first, last)
        if tokens == 0:
            raise ConfigError(
                f"{name} split of {source.prefix}",
                f"receives {last - first} of {len(source)} sequences and no token",
                "raise its share in --split, give it data of its own (--valid-data-path), or ask nothing of it "
                "(--eval-iters 0)",
            )
        description = {
            "version": 1,
            "sequences": len(source),
            "lengths_crc32": _checksum(source.sequence_lengths),
            "first_sequence": first,
            "last_sequence": last,
            "num_samples": num_samples,
            "seq_length": seq_length,
            "seed": seed,
        }
        arrays = load_or_build(
            cache,
            description,
            lambda: build_indices(source.sequence_lengths, first, last, num_samples, seq_length, seed),
        )
        self.document_index = arrays["document_index"]
        self.sample_index = arrays["sample_index"]
        self.shuffle_index = arrays["shuffle_index"]
        if len(self) == 0:
            raise ConfigError(
                f"{name} split of {source.prefix}",
                f"has {tokens} tokens, fewer than one sample of {seq_length} and its last label",
                "use more data or a shorter --seq-length",
            )

    def __len__(self) -> int:
        """Number of samples, at least those asked for."""
        return len(self.shuffle_index)

    def __getitem__(self, index: int) -> dict[str, NDArray[Any]]:
        """One sample, see ``make_sample``.

        Raises:
            ConfigError: a token id is outside the vocabulary.
        """
        return make_sample(self._text(int(self.shuffle_index[index])), self.options)

    def _text(self, row: int) -> NDArray[np.int64]:
        """The ``seq_length + 1`` tokens of a sample, checked against the vocabulary."""
        (position, offset), (last, last_offset) = self.sample_index[row : row + 2].tolist()
        sequences = self.document_index[position : last + 1].tolist()
        if len(sequences) == 1:
            pieces = [self.source.get(sequences[0], offset, last_offset - offset + 1)]
        else:
            pieces = [self.source.get(sequences[0], offset)]
            pieces += [self.source.get(sequence) for sequence in sequences[1:-1]]
            pieces.append(self.source.get(sequences[-1], 0, last_offset + 1))
        text = np.concatenate(pieces, dtype=np.int64)
        if int(text.max()) >= self.vocab_size or int(text.min()) < 0:
            for sequence, piece in zip(sequences, pieces, strict=True):
                bad = (piece < 0) | (piece >= self.vocab_size)
                if bad.any():
                    raise ConfigError(
                        f"data {self.source.prefix}",
                        f"document {self.source.document_of(sequence)} holds token id {int(piece[bad][0])}, "
                        f"the vocabulary has {self.vocab_size} ids",
                        "set --vocab-size and the tokenizer with which the data was written",
                    )
        return text


def _checksum(lengths: NDArray[np.int32]) -> int:
    """CRC-32 of the sequence lengths: new data under an old name must not meet an old cache."""
    crc = 0
    for start in range(0, len(lengths), _CHUNK):
        crc = zlib.crc32(lengths[start : start + _CHUNK].tobytes(), crc)
    return crc
