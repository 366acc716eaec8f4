"""Text corpora to indexed datasets, on several processes with bounded memory.

The parent reads batches of raw text and writes tokens; the workers parse and tokenize. At most ``2 * workers + 2``
batches are under way, and they are written in the order in which they were read, so the result does not depend on the
number of workers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mup.config.errors import ConfigError
from megatron_mup.data.corpus import TextBatch, expand_inputs, read_batches, texts_of
from megatron_mup.data.indexed_dataset import IndexedDatasetWriter, token_dtype
from megatron_mup.data.tokenizer import Tokenizer, build_tokenizer


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """What to tokenize, with what, and where to."""

    input: Sequence[str]
    """Files or globs."""
    output_prefix: str
    """The datasets are ``{output_prefix}_{key}_document.bin`` and ``.idx``."""
    tokenizer_type: str
    """Kind of tokenizer, see ``build_tokenizer``."""
    tokenizer_model: str | None = None
    """Its file or folder."""
    vocab_size: int | None = None
    """Number of ids of ``NullTokenizer``."""
    json_keys: Sequence[str] = ("text",)
    """Keys of the texts; each makes a dataset."""
    append_eod: bool = False
    """End each document that is not empty with the end-of-document id."""
    workers: int = 1
    """Tokenizing processes; 1 tokenizes in the calling process."""


@dataclass
class Progress:
    """How far a run has come."""

    total_bytes: int
    bytes: int = 0
    documents: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Encoded:
    """A tokenized batch: by key the tokens, the length of each sequence, the sequences (0 or 1) of each document."""

    parts: dict[str, tuple[NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]]
    documents: int
    consumed: int


def preprocess(options: PreprocessOptions, report: Callable[[Progress], None] = lambda _: None) -> Progress:
    """Tokenizes a corpus.

    Args:
        options: what to do.
        report: called after each batch.

    Returns:
        The totals.

    Raises:
        ConfigError: an input is missing or malformed (with line number), the corpus is empty, the output cannot be
            written, or a worker died. Files under the final names appear only when all of it went well.
    """
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers}", "at least one process is needed", "--workers 1 or more")
    encoder = _Encoder(options)
    files = expand_inputs(options.input)
    progress = Progress(sum(path.stat().st_size for path in files))
    dtype, vocab_size = token_dtype(encoder.tokenizer.vocab_size), encoder.tokenizer.vocab_size
    with ExitStack() as stack:
        writers = {
            key: stack.enter_context(IndexedDatasetWriter(f"{options.output_prefix}_{key}_document", dtype, vocab_size))
            for key in options.json_keys
        }
        batches = itertools.chain.from_iterable(read_batches(path, options.json_keys) for path in files)
        encoded = map(encoder, batches) if options.workers == 1 else _encode_parallel(options, batches)
        for result in encoded:
            for key, part in result.parts.items():
                writers[key].add_documents(*part)
                progress.tokens += len(part[0])
            progress.documents += result.documents
            progress.bytes += result.consumed
            report(progress)
        if progress.tokens == 0:
            raise ConfigError(
                f"--input {' '.join(options.input)}",
                f"holds {progress.documents} documents and no token",
                "check the files and --json-keys",
            )
    return progress


class _Encoder:
    """Parses and tokenizes a batch."""

    def __init__(self, options: PreprocessOptions) -> None:
        self.options = options
        self.tokenizer: Tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model, options.vocab_size)
        if options.append_eod and self.tokenizer.eod is None:
            raise ConfigError(
                "--append-eod",
                f"the tokenizer {options.tokenizer_model} names no end-of-document token",
                "use one that has it, or drop the flag",
            )
        self._dtype = token_dtype(self.tokenizer.vocab_size)

    def __call__(self, batch: TextBatch) -> _Encoded:
        texts = texts_of(batch, self.options.json_keys)
        parts = {key: self._encode(batch, texts[key]) for key in self.options.json_keys}
        return _Encoded(parts, len(texts[self.options.json_keys[0]]), batch.consumed)

    def _encode(
        self, batch: TextBatch, texts: list[str]
    ) -> tuple[NDArray[np.integer], NDArray[np.int64], NDArray[np.int64]]:
        try:
            documents = self.tokenizer.tokenize_batch(texts)
        except ConfigError as error:
            raise ConfigError(f"{batch.path} from line {batch.first}: {error.what}", error.why, error.fix) from error
        if self.options.append_eod and self.tokenizer.eod is not None:
            for ids in documents:
                if ids:
                    ids.append(self.tokenizer.eod)
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        tokens = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int64, count=int(lengths.sum()))
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= self.tokenizer.vocab_size):
            bad = int(np.argmax((tokens < 0) | (tokens >= self.tokenizer.vocab_size)))
            document = int(np.searchsorted(np.cumsum(lengths), bad, side="right"))
            raise ConfigError(
                f"{batch.path}, document {document + 1} after line {batch.first - 1}",
                f"holds token id {int(tokens[bad])}, the vocabulary has {self.tokenizer.vocab_size} ids",
                "set the --vocab-size that the ids were made with",
            )
        filled = lengths > 0
        return tokens.astype(self._dtype), lengths[filled], filled.astype(np.int64)


_worker: _Encoder | None = None


def _start_worker(options: PreprocessOptions) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = _Encoder(options)


def _encode_in_worker(batch: TextBatch) -> _Encoded:
    assert _worker is not None
    return _worker(batch)


def _encode_parallel(options: PreprocessOptions, batches: Iterator[TextBatch]) -> Iterator[_Encoded]:
    """Encoded batches in order; reads on only while few are under way."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.workers, context, _start_worker, (options,))
    try:
        window: deque[Future[_Encoded]] = deque()
        for batch in batches:
            window.append(pool.submit(_encode_in_worker, batch))
            if len(window) > 2 * options.workers + 1:
                yield window.popleft().result()
        while window:
            yield window.popleft().result()
    except BrokenProcessPool as error:
        raise ConfigError(
            f"--workers {options.workers}", "a worker died, perhaps for lack of memory", "use fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
