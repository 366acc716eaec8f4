"""Tokenizers travel with the model: their files are copied, not made anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_mup.checkpoint.convert.sentencepiece_file import export_sentencepiece
from megatron_mup.config import ConfigError, DataConfig

FOLDER = "tokenizer"
"""Where a converted checkpoint keeps its tokenizer, beside the checkpoints."""

_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja"),
)


def import_tokenizer(source: Path, target: Path, final: Path) -> dict[str, Any]:
    """Copies the tokenizer of a Hugging Face model.

    Args:
        source: the model's folder.
        target: the folder written to.
        final: its name once it is finished.

    Returns:
        Settings of `DataConfig`; empty when there is no tokenizer that can be read here.
    """
    found = [name for name in _FILES if (source / name).is_file()]
    kind = "HuggingFaceTokenizer" if "tokenizer.json" in found else "SentencePieceTokenizer"
    if not {"tokenizer.json", "tokenizer.model"} & set(found):
        return {}
    (target / FOLDER).mkdir()
    for name in found:
        shutil.copyfile(source / name, target / FOLDER / name)
    model = final / FOLDER
    return {
        "tokenizer_type": kind,
        "tokenizer_model": str(model if kind == "HuggingFaceTokenizer" else model / "tokenizer.model"),
    }


def export_tokenizer(data: DataConfig, target: Path) -> str | None:
    """Writes a run's tokenizer in Hugging Face's form.

    Returns:
        Why there is none, or None.
    """
    kind = data.tokenizer_type
    if kind not in ("HuggingFaceTokenizer", "SentencePieceTokenizer"):
        return f"the run's tokenizer is {kind or 'unknown'}, which has no file of Hugging Face's"
    source = Path(data.tokenizer_model or "")
    if not source.exists():
        return f"{source} is missing"
    if kind == "SentencePieceTokenizer":
        try:
            export_sentencepiece(source, target)
        except ConfigError as error:
            return str(error)
        return None
    folder = source if source.is_dir() else source.parent
    shutil.copyfile(source / "tokenizer.json" if source.is_dir() else source, target / "tokenizer.json")
    for name in _FILES[1:]:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    if not (target / "tokenizer_config.json").exists():
        _write(target / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    return None


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
