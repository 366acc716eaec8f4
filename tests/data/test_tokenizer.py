import builtins
import importlib
import shutil
import sys

import pytest

from megatron_mup.config import ConfigError
from megatron_mup.data.tokenizer import build_tokenizer


@pytest.fixture(params=["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer", "TikTokenizer-json"])
def tokenizer(request, sentencepiece_model, huggingface_folder, tiktoken_file, tiktoken_json):
    files = {
        "SentencePieceTokenizer": sentencepiece_model,
        "HuggingFaceTokenizer": huggingface_folder,
        "TikTokenizer": tiktoken_file,
        "TikTokenizer-json": tiktoken_json,
    }
    return build_tokenizer(request.param.removesuffix("-json"), str(files[request.param]))


def test_there_and_back(tokenizer, texts):
    for text in texts:
        ids = tokenizer.tokenize(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        # the SentencePiece model normalises blanks; the others keep every byte
        assert tokenizer.detokenize(ids).split() == text.split()
    assert tokenizer.tokenize_batch(texts) == [tokenizer.tokenize(text) for text in texts]
    assert 0 <= tokenizer.eod < tokenizer.vocab_size


def test_ids_of_the_ends(sentencepiece_model, huggingface_folder, tiktoken_file, tiktoken_json, tmp_path):
    assert build_tokenizer("SentencePieceTokenizer", str(sentencepiece_model)).eod == 2
    assert build_tokenizer("HuggingFaceTokenizer", str(huggingface_folder)).eod == 2
    shutil.copy(huggingface_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    assert build_tokenizer("HuggingFaceTokenizer", str(tmp_path / "tokenizer.json")).eod == 1
    lines = build_tokenizer("TikTokenizer", str(tiktoken_file))
    assert (lines.eod, lines.vocab_size) == (262, 263)
    listed = build_tokenizer("TikTokenizer", str(tiktoken_json))
    assert (listed.eod, listed.vocab_size) == (2, 1262)
    assert listed.tokenize("  ") == [1000 + 256]
    assert listed.detokenize([2, 1065]) == "<2>A"
    assert build_tokenizer("NullTokenizer", None, 50).eod == 49


def test_null_tokenizer():
    null = build_tokenizer("NullTokenizer", None, 50)
    assert null.tokenize_batch(["1 2", ""]) == [[1, 2], []]
    assert null.detokenize([3, 4]) == "3 4"
    with pytest.raises(ConfigError, match="not a list of numbers"):
        null.tokenize("1 x")


@pytest.mark.parametrize(
    ("kind", "model", "reason"),
    [
        ("NullTokenizer", None, "no file to learn its size"),
        ("Sentencepiece", "x", "no such tokenizer"),
        ("TikTokenizer", None, "needs a file"),
        ("TikTokenizer", "nowhere", "does not exist"),
        ("SentencePieceTokenizer", "garbage", "sentencepiece cannot read"),
        ("HuggingFaceTokenizer", "garbage", "tokenizers cannot read"),
        ("TikTokenizer", "garbage", "tiktoken cannot read"),
        ("TikTokenizer", "garbage.json", "tiktoken cannot read"),
        ("HuggingFaceTokenizer", ".", "no tokenizer.json"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, kind, model, reason):
    monkeypatch.chdir(tmp_path)
    for name in ("garbage", "garbage.json"):
        (tmp_path / name).write_text("gar bage\n")
    with pytest.raises(ConfigError, match=reason):
        build_tokenizer(kind, model)


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [
        ("SentencePieceTokenizer", "sentencepiece", "pip install sentencepiece"),
        ("HuggingFaceTokenizer", "tokenizers", r"megatron-mup\[data\]"),
        ("TikTokenizer", "tiktoken", r"megatron-mup\[data\]"),
    ],
)
def test_missing_package_names_the_extra(tmp_path, monkeypatch, kind, package, extra):
    real = builtins.__import__

    def refuse(name, *rest, **named):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.delitem(sys.modules, package, raising=False)
    (tmp_path / "model").write_text("")
    with pytest.raises(ConfigError, match=extra):
        build_tokenizer(kind, str(tmp_path / "model"))
