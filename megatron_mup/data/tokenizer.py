"""Tokenizers behind one small interface: local files only, and a library is imported when it is first needed."""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_mup.config.errors import ConfigError

TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "NullTokenizer")


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        vocab_size: number of ids, special ones included, unpadded; every id lies below it.
        eod: end-of-document id; None where the model names none.
    """

    vocab_size: int
    eod: int | None

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        ...

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on one core."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        ...


def build_tokenizer(kind: str, model: str | None, vocab_size: int | None = None) -> Tokenizer:
    """Makes a tokenizer.

    Args:
        kind: ``SentencePieceTokenizer``, ``HuggingFaceTokenizer``, ``TikTokenizer`` or ``NullTokenizer``.
        model: file or folder of the tokenizer; not for ``NullTokenizer``.
        vocab_size: number of ids of ``NullTokenizer``; ignored by the others.

    Raises:
        ConfigError: unknown kind, a package or file is missing, or the file cannot be read.
    """
    if kind == "NullTokenizer":
        if vocab_size is None:
            raise ConfigError(
                "--tokenizer-type NullTokenizer", "it has no file to learn its size from", "--vocab-size N"
            )
        return NullTokenizer(vocab_size)
    kinds: dict[str, Callable[[Path], Tokenizer]] = {
        "SentencePieceTokenizer": SentencePieceTokenizer,
        "HuggingFaceTokenizer": HuggingFaceTokenizer,
        "TikTokenizer": TikTokenizer,
    }
    if kind not in kinds:
        raise ConfigError(f"--tokenizer-type {kind}", "there is no such tokenizer", f"one of {', '.join(TYPES)}")
    if model is None:
        raise ConfigError(f"--tokenizer-type {kind}", "it needs a file", "set --tokenizer-model")
    path = Path(model)
    if not path.exists():
        raise ConfigError(f"--tokenizer-model {model}", "does not exist", "give a local file; nothing is downloaded")
    return kinds[kind](path)


def _import(package: str, kind: str, extra: str | None) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        fix = f"pip install {package}" if extra is None else f"pip install 'megatron-mup[{extra}]' (or {package})"
        raise ConfigError(f"--tokenizer-type {kind}", f"the package {package} is not installed", fix) from error


def _unreadable(path: Path, library: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--tokenizer-model {path}", f"{library} cannot read it ({error})", "check file and --tokenizer-type"
    )


class SentencePieceTokenizer:
    """A SentencePiece model; the end of a document is its ``</s>``."""

    def __init__(self, path: Path) -> None:
        """Reads the file."""
        library = _import("sentencepiece", "SentencePieceTokenizer", None)
        try:
            self._model = library.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError, TypeError) as error:
            raise _unreadable(path, "sentencepiece", error) from error
        self.vocab_size: int = self._model.vocab_size()
        self.eod: int | None = self._model.eos_id() if self._model.eos_id() >= 0 else None

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._model.encode(text)
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on one core."""
        ids: list[list[int]] = self._model.encode(list(texts), num_threads=1)
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return str(self._model.decode([int(i) for i in ids]))


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, or the folder of a model that holds one.

    Special tokens that the tokenizer puts around a text (such as a begin-of-text token) are kept, as Megatron-LM does.
    The end of a document is the ``eos_token`` of the folder's ``tokenizer_config.json`` or ``special_tokens_map.json``;
    without one, the first of ``EOD_NAMES`` in the vocabulary.
    """

    EOD_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOD>")

    def __init__(self, path: Path) -> None:
        """Reads the file."""
        library = _import("tokenizers", "HuggingFaceTokenizer", "data")
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"--tokenizer-model {path}",
                "the folder has no tokenizer.json",
                "save it as a fast tokenizer: AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)",
            )
        try:
            self._model = library.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise _unreadable(file, "tokenizers", error) from error
        # A text is never cut or padded here, whatever the file was saved with.
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1
        names = [*_configured_eos(file.parent), *self.EOD_NAMES]
        self.eod: int | None = next((vocabulary[name] for name in names if name in vocabulary), None)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self._model.encode(text).ids
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts; on one core where TOKENIZERS_PARALLELISM=false, which the preprocessing workers set."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts))]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return str(self._model.decode([int(i) for i in ids], skip_special_tokens=False))


def _configured_eos(folder: Path) -> list[str]:
    """The end-of-sequence token that a model folder names, if any."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        try:
            token = json.loads((folder / name).read_text()).get("eos_token")
        except FileNotFoundError:
            continue
        except (ValueError, AttributeError) as error:
            raise _unreadable(folder / name, "json", error) from error
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return [token]
    return []


# The split patterns that OpenAI published with these vocabularies.
_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"""
    r"""|\s*[\r\n]|\s+(?!\S)|\s"""
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TikTokenizer:
    """A tiktoken vocabulary: lines of base64 and rank, or Megatron-LM's JSON list of tokens.

    Line files named as in ``KNOWN`` keep OpenAI's pattern and end-of-text id; another one gets cl100k_base's pattern
    and the id after its last rank. In the JSON form ids 0 to 999 are special (``</s>``, the end of a document, is 2),
    ranks follow from 1000, and at most 131072 ids are used, as Megatron-LM does by default with its pattern v2.
    """

    KNOWN = {  # noqa: RUF012 (read only)
        "r50k_base": (_GPT2, 50256),
        "p50k_base": (_GPT2, 50256),
        "cl100k_base": (_CL100K, 100257),
        "o200k_base": (_O200K, 199999),
    }
    SPECIAL, LIMIT = 1000, 131072

    def __init__(self, path: Path) -> None:
        """Reads the file."""
        library = _import("tiktoken", "TikTokenizer", "data")
        try:
            if path.suffix == ".json":
                ranks = _json_ranks(path)
            else:
                pairs = (line.split() for line in path.read_bytes().splitlines() if line)
                ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
            if not ranks:
                raise ValueError("no token in it")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, "tiktoken", error) from error
        if path.suffix == ".json":
            inner = self.LIMIT - self.SPECIAL
            ranks = {token: rank for token, rank in ranks.items() if rank < inner}
            self._offset, pattern, eod, special = self.SPECIAL, _TEKKEN, 2, {}
            self.vocab_size = self.SPECIAL + len(ranks)
        else:
            self._offset = 0
            pattern, eod = self.KNOWN.get(path.stem, (_CL100K, max(ranks.values()) + 1))
            special = {"<|endoftext|>": eod}
            self.vocab_size = max(eod, *ranks.values()) + 1
        self.eod: int | None = eod
        try:
            self._model = library.Encoding(path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        except Exception as error:  # tiktoken's Rust part panics on a vocabulary without all bytes
            raise _unreadable(path, "tiktoken", error) from error

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it are plain text."""
        return self.tokenize_batch([text])[0]

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on one core."""
        encoded = [self._model.encode_ordinary(text) for text in texts]
        if self._offset:
            return [[i + self._offset for i in ids] for ids in encoded]
        return encoded

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids; the special ids of the JSON form are shown as <0> to <999>."""
        if not self._offset:
            return str(self._model.decode([int(i) for i in ids]))
        pieces = [
            self._model.decode_single_token_bytes(int(i) - self._offset) if i >= self._offset else b"<%d>" % int(i)
            for i in ids
        ]
        return b"".join(pieces).decode("utf-8", errors="replace")


def _json_ranks(path: Path) -> dict[bytes, int]:
    return {base64.b64decode(entry["token_bytes"]): int(entry["rank"]) for entry in json.loads(path.read_text())}


class NullTokenizer:
    """Ids written as numbers with blanks between them; the last id is the end of a document."""

    def __init__(self, vocab_size: int) -> None:
        """Needs no file."""
        self.vocab_size = vocab_size
        self.eod: int | None = vocab_size - 1

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text."""
        try:
            return [int(word) for word in text.split()]
        except ValueError as error:
            raise ConfigError(
                f"text {text[:40]!r}", "is not a list of numbers, as NullTokenizer needs", "another --tokenizer-type"
            ) from error

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts."""
        return [self.tokenize(text) for text in texts]

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return " ".join(str(int(i)) for i in ids)
