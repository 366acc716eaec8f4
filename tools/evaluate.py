"""Loss and perplexity of a checkpoint on tokenized data, in one process, whatever the layout in which it was trained.

python tools/evaluate.py --load runs/my-model --data-path data/validation_text_document
"""

from __future__ import annotations

import argparse
import json
import math
import sys

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_mup.config import ConfigError
from megatron_mup.data.indexed_dataset import IndexedDataset
from megatron_mup.inference import load_model, total_loss


def tokens_of(prefix: str, most: int | None, vocab_size: int) -> NDArray[np.integer]:
    """The documents of a dataset one after another, the first so many tokens.

    Raises:
        ConfigError: it can't be read, is empty, or is of another vocabulary.
    """
    data = IndexedDataset(prefix)
    parts, count = [], 0
    for index in range(len(data)):
        parts.append(data.get(index))
        count += len(parts[-1])
        if most is not None and count >= most:
            break
    tokens = np.concatenate(parts)[:most] if parts else np.zeros(0, np.int64)
    if len(tokens) < 2:
        raise ConfigError(f"--data-path {prefix}", "holds less than two tokens", "give another one")
    if tokens.max() >= vocab_size:
        raise ConfigError(
            f"--data-path {prefix}",
            f"it has id {tokens.max()}, and the model's vocabulary {vocab_size} ids",
            "give data of the model's tokenizer",
        )
    return tokens


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, or 2 for a mistake that the message explains."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="folder of checkpoints, as --save named it")
    parser.add_argument("--ckpt-step", type=int, help="iteration to load; default: the latest")
    parser.add_argument("--data-path", nargs="+", required=True, help="prefixes of .bin/.idx pairs")
    parser.add_argument("--max-tokens", type=int, help="tokens of each to read at most; default: all")
    parser.add_argument("--batch-size", type=int, default=8, help="windows of the training length at once (default: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        loaded = load_model(arguments.load, arguments.ckpt_step, arguments.device)
        vocab_size = loaded.config.model.vocab_size
        assert vocab_size is not None
        for prefix in arguments.data_path:
            tokens = tokens_of(prefix, arguments.max_tokens, vocab_size)
            loss = total_loss(loaded.model, tokens, arguments.batch_size) / (len(tokens) - 1)
            result = {"data": prefix, "iteration": loaded.iteration, "tokens": len(tokens) - 1}
            print(json.dumps(result | {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
