"""Tokenizers leave with the model and read every text as before."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_mup.checkpoint.convert.tokenizer import export_tokenizer
from megatron_mup.config import DataConfig
from megatron_mup.data.tokenizer import build_tokenizer
from megatron_mup.inference import load_model
from tests.checkpoint.convert.hf_cases import convert, make

TEXTS = [
    *(file.read_text(encoding="utf-8")[:2000] for file in sorted(Path(json.__file__).parent.glob("*.py"))),
    *("", "naïve – 東京 🙂", "  two  spaces\n\n\tend ", "ﬁ"),
]
EXACT = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}


def train_sentencepiece(file: Path, kind: str, **more: object) -> Path:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(TEXTS).split("\n")),
        model_writer=model,
        vocab_size=400,
        model_type=kind,
        hard_vocab_limit=False,
        minloglevel=2,
        **more,
    )
    file.write_bytes(model.getvalue())
    return file


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("rules", [{}, EXACT])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_sentencepiece(tmp_path, kind, rules, byte_fallback):
    symbols = ["<|x|>"] if rules else []
    file = train_sentencepiece(
        tmp_path / "sp.model", kind, byte_fallback=byte_fallback, user_defined_symbols=symbols, **rules
    )
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(file))
    assert export_tokenizer(data, tmp_path) is None
    ours = build_tokenizer("SentencePieceTokenizer", str(file))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, *(f"a {symbol}b" for symbol in symbols)]:
        assert theirs.encode(text) == ours.tokenize(text)
        if byte_fallback:
            assert theirs.decode(ours.tokenize(text)) == ours.detokenize(ours.tokenize(text))
    assert theirs.eos_token_id == ours.eod == 2


def test_a_kind_that_cannot_be_said_is_told(tmp_path):
    file = train_sentencepiece(tmp_path / "sp.model", "bpe", user_defined_symbols=["<|x|>"])
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(file))
    assert "differently as a tokenizer.json" in export_tokenizer(data, tmp_path)
    file = train_sentencepiece(tmp_path / "sp.model", "char")
    data = DataConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(file))
    assert "only unigram and BPE" in export_tokenizer(data, tmp_path)
    assert "NullTokenizer" in export_tokenizer(DataConfig(tokenizer_type="NullTokenizer"), tmp_path)
    gone = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path / "gone"))
    assert "is missing" in export_tokenizer(gone, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sp.model"]


def test_files_travel_both_ways(tmp_path):
    source, ours, back = make("llama", tmp_path / "hf", eos_token_id=2), tmp_path / "ours", tmp_path / "back"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<pad>", "<s>", "<end>"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:2], trainer)
    tokenizer.save(str(source / "tokenizer.json"))
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}
    (source / "tokenizer_config.json").write_text(json.dumps(facts))

    assert convert("from-hf", "--load", source, "--save", ours) == 0
    data = load_model(ours).config.data
    assert build_tokenizer(data.tokenizer_type, data.tokenizer_model).eod == 2
    assert convert("to-hf", "--load", ours, "--save", back) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()
    assert transformers.AutoConfig.from_pretrained(back).eos_token_id == 2
