"""Whether files and folders that a run needs are there, before it starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from megatron_mup.config.config import Config
from megatron_mup.config.errors import ConfigError
from megatron_mup.config.fields import as_number, told, value_of


def check_paths(config: Config) -> None:
    """Refuses folders that can't be written and inputs that are missing.

    Folders to write to are made; a probe file is written and removed. Safe on many ranks at once.

    Raises:
        ConfigError: names the flag and the path.
    """
    for name in ("save", "non_persistent_local_ckpt_dir", "tensorboard_dir", "wandb_save_dir", "data_cache_path"):
        folder = value_of(config, name)
        if folder is not None and not (name == "data_cache_path" and config.data.mock_data):
            _probe(told(config, name), folder)
    if config.logging.profile:
        _probe(told(config, "profile_dir"), config.logging.profile_dir)
    for name in ("metrics_file", "html_report"):
        file = value_of(config, name)
        if file is None:
            continue
        if not file or os.path.isdir(file):
            raise ConfigError(told(config, name), "is a folder" if file else "is empty", "give the path of a file")
        _probe(told(config, name), os.path.dirname(file) or ".")
    _check_load(config)
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        _check_data(config, name)
    tokenizer = config.data.tokenizer_model
    # The other kinds take names of published tokenizers too.
    if config.data.tokenizer_type == "SentencePieceTokenizer" and tokenizer and not _exists(tokenizer):
        raise ConfigError(told(config, "tokenizer_model"), "no such file", "correct the path")


def _probe(what: str, folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-probe-") as probe:
            probe.write(b"probe")
            probe.flush()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            what, f"can't be written: {reason}", "choose a folder that this user can write to, with space left"
        ) from None


def _check_load(config: Config) -> None:
    checkpoint = config.checkpoint
    pretrained = checkpoint.pretrained_checkpoint
    if pretrained is not None and not (_exists(pretrained) and os.path.isdir(pretrained) and os.listdir(pretrained)):
        raise ConfigError(told(config, "pretrained_checkpoint"), "the folder is missing or empty", "correct the path")
    if checkpoint.load is None:
        return
    if _exists(checkpoint.load) and not os.path.isdir(checkpoint.load):
        raise ConfigError(told(config, "load"), "is a file", "give the folder that --save wrote to")
    for name in ("exit_on_missing_checkpoint", "finetune", "ckpt_step"):
        needed = value_of(config, name) not in (None, False) and not (name == "finetune" and pretrained)
        if needed and not (_exists(checkpoint.load) and os.listdir(checkpoint.load)):
            fix = "correct --load" if name == "finetune" else f"correct --load, or drop {told(config, name)}"
            raise ConfigError(told(config, "load", name), "the folder is missing or empty", fix)


def _check_data(config: Config, name: str) -> None:
    words = value_of(config, name)
    for prefix in words[1::2] if words and as_number(words[0]) is not None else words:
        missing = [prefix + end for end in (".bin", ".idx") if not _exists(prefix + end)]
        if missing:
            fix = "give the path without .bin and .idx; tools/preprocess_data.py makes both"
            if prefix.endswith((".bin", ".idx")) and _exists(prefix):
                fix = f"drop the ending: {Path(prefix).with_suffix('')}"
            raise ConfigError(told(config, name), f"no file {missing[0]}", fix)


def _exists(path: str) -> bool:
    try:
        return os.path.exists(path)
    except ValueError:
        return False
