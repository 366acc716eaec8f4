"""A SentencePiece model as a ``tokenizer.json``.

transformers reads SentencePiece files as Llama's: with its prefix and its treatment of blanks, whatever the file says.
So the file's own settings are written out.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.convert.hf_files import hf_library
from megatron_mup.config import ConfigError

_BLANK = "\u2581"
_UNIGRAM, _BPE = 1, 2
_CONTROL, _USER_DEFINED = 3, 4


def export_sentencepiece(source: Path, target: Path) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and the model itself.

    Raises:
        ConfigError: the model is of another kind than unigram or BPE, or reads a text differently afterwards.
    """
    sentencepiece = hf_library("sentencepiece")
    proto = hf_library("sentencepiece.sentencepiece_model_pb2").ModelProto()
    proto.ParseFromString(source.read_bytes())
    model = sentencepiece.SentencePieceProcessor(model_file=str(source))
    tokenizer = _tokenizer(proto)
    _check(model, tokenizer, source, [p.piece for p in proto.pieces if p.type == _USER_DEFINED][:20])
    tokenizer.save(str(target / "tokenizer.json"))
    facts: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(model, f"{name}_id")()
        if number >= 0:
            facts[f"{name}_token"] = model.id_to_piece(number)
    (target / "tokenizer_config.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(source, target / "tokenizer.model")


def _tokenizer(proto: Any) -> Any:
    library = hf_library("tokenizers")
    normalizers, decoders = library.normalizers, library.decoders
    trained, rules = proto.trainer_spec, proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    if trained.model_type == _UNIGRAM:
        model = library.models.Unigram(pieces, unk_id=trained.unk_id, byte_fallback=trained.byte_fallback)
    elif trained.model_type == _BPE:
        vocabulary = {piece: i for i, (piece, _) in enumerate(pieces)}
        model = library.models.BPE(
            vocabulary,
            _merges(pieces, vocabulary),
            unk_token=trained.unk_piece,
            fuse_unk=True,
            byte_fallback=trained.byte_fallback,
        )
    else:
        raise ConfigError(
            "tokenizer", f"a SentencePiece model of type {trained.model_type}", "only unigram and BPE can be exported"
        )
    tokenizer = library.Tokenizer(model)
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(library.Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _BLANK))
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else back)
    for kind in (_CONTROL, _USER_DEFINED):
        tokens = [
            library.AddedToken(p.piece, normalized=False, special=kind == _CONTROL)
            for p in proto.pieces
            if p.type == kind
        ]
        tokenizer.add_tokens(tokens)
    return tokenizer


def _merges(pieces: list[tuple[str, float]], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; pieces of higher score are made first, as SentencePiece does."""
    found = []
    for piece, score in pieces:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _check(model: Any, tokenizer: Any, source: Path, symbols: list[str]) -> None:
    """Both must read texts alike: the model's own pieces in a row, odd blanks, and symbols that users defined.

    Around such symbols tokenizers' prefix and blanks can't be SentencePiece's.
    """
    ids = [i for i in range(model.get_piece_size()) if not (model.is_control(i) or model.is_unknown(i))]
    texts = [model.decode(ids[start : start + 50]) for start in range(0, min(len(ids), 20_000), 50)]
    texts += [f"a {symbol} b{symbol}" for symbol in symbols]
    for text in (*texts, "", " a  b ", "\n\ttwo\n\n  three\u00a0\u3000é"):
        if tokenizer.encode(text, add_special_tokens=False).ids != model.encode(text):
            raise ConfigError(
                f"tokenizer {source}",
                f"would read {text[:40]!r} differently as a tokenizer.json",
                "export without it: move the file away, and give its users the SentencePiece model",
            )
