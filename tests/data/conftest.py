"""Tiny tokenizers and a small corpus, made from the standard library's own sources."""

import base64
import io
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def texts():
    folder = Path(json.__file__).parent
    lines = [line for path in sorted(folder.glob("*.py")) for line in path.read_text().splitlines(keepends=True)]
    documents = ["".join(lines[i : i + 9]) for i in range(0, len(lines), 9)]
    return [*documents[:60], "", "naïve – 東京 🙂", *documents[60:]]


@pytest.fixture(scope="session")
def sentencepiece_model(texts, tmp_path_factory):
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=400,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "sp.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def huggingface_folder(texts, tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.enable_truncation(5)
    folder = tmp_path_factory.mktemp("hf")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    return folder


_MERGES = [b"  ", b"re", b"in", b"    ", b"def"[:2], b"def"]


@pytest.fixture(scope="session")
def tiktoken_file(tmp_path_factory):
    tokens = [bytes([i]) for i in range(256)] + _MERGES
    path = tmp_path_factory.mktemp("tik") / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


@pytest.fixture(scope="session")
def tiktoken_json(tmp_path_factory):
    tokens = [bytes([i]) for i in range(256)] + _MERGES
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode("latin-1")}
        for rank, token in enumerate(tokens)
    ]
    path = tmp_path_factory.mktemp("tikjson") / "small.json"
    path.write_text(json.dumps(entries))
    return path
