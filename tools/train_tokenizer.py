"""Train a SentencePiece tokenizer that gives back every text exactly.

    python tools/train_tokenizer.py --input corpus/train.jsonl --output tokenizer.model --vocab-size 4096

Blanks and line ends are kept as they are, characters that training did not see become bytes, and </s> ends a document.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import sentencepiece

PIECE = 4000
"""Characters of text that the trainer sees at once."""


def texts(inputs: Sequence[Path], key: str) -> Iterator[str]:
    """Texts of JSON-lines files."""
    for path in inputs:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)[key]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{path}, line {number}: no JSON object with the key {key!r}") from None


def train(documents: Iterator[str], vocab_size: int, kind: str = "bpe") -> bytes:
    """Trains a model.

    Args:
        documents: texts.
        vocab_size: number of ids, with 256 of bytes, ``<unk>`` (0) and ``</s>`` (1).
        kind: ``bpe`` or ``unigram``.

    Returns:
        The model file's content.

    Raises:
        RuntimeError: the texts have too few different pieces for so large a vocabulary, or too many characters.
    """
    pieces = itertools.chain.from_iterable((t[i : i + PIECE] for i in range(0, len(t), PIECE)) for t in documents)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=pieces,
        model_writer=model,
        vocab_size=vocab_size,
        model_type=kind,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        max_sentence_length=4 * PIECE,
        unk_id=0,
        eos_id=1,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSON-lines files")
    parser.add_argument("--json-key", default="text", help="key of the text (default: text)")
    parser.add_argument("--output", type=Path, required=True, help="model file to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="number of ids (default: 4096)")
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="default: bpe")
    arguments = parser.parse_args(argv)
    try:
        model = train(
            texts(arguments.input, arguments.json_key),
            arguments.vocab_size,
            arguments.model_type,
        )
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    temporary = arguments.output.with_name(f".{arguments.output.name}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_bytes(model)
    temporary.replace(arguments.output)
    print(f"{arguments.output}: {arguments.vocab_size:,} ids, {arguments.model_type}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
