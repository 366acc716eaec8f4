from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mup.data.tokenizer import build_tokenizer

TOOL = Path(__file__).parents[2] / "tools" / "train_tokenizer.py"
PACKAGE = Path(__file__).parents[2] / "megatron_mup"


def train(texts: list[str], folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    command = [sys.executable, str(TOOL), "--input", str(corpus), "--output", str(folder / "tokenizer.model"), *flags]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_text_comes_back_exactly(corpus, tmp_path, kind):
    assert train(corpus, tmp_path, "--vocab-size", "1024", "--model-type", kind).returncode == 0
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "tokenizer.model"))
    unseen = ["", " ", "\n", "  two  blanks \t\n\n\r\n\x0b end ", "naïve ﬁ ① 数 🙂 e\u0301", "\x00\x7f", "<unk></s>"]
    for text in corpus + unseen:
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.vocab_size == 1024
    assert tokenizer.eod == 1


def test_training_twice_gives_the_same_model(corpus, tmp_path):
    models = []
    for _ in range(2):
        train(corpus, tmp_path, "--vocab-size", "512")
        models.append((tmp_path / "tokenizer.model").read_bytes())
    assert models[0] == models[1]


def test_too_large_a_vocabulary_is_one_error_and_leaves_no_file(tmp_path):
    outcome = train(["too little text"], tmp_path, "--vocab-size", "4096")
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ")
    assert not (tmp_path / "tokenizer.model").exists()
