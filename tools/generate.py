"""Continue a text with a trained model, in one process, whatever the layout in which it was trained.

python tools/generate.py --load runs/my-model --prompt 'def main(' --temperature 0.8
"""

from __future__ import annotations

import argparse
import sys

import torch

from megatron_mup.config import ConfigError
from megatron_mup.data.tokenizer import Tokenizer, build_tokenizer
from megatron_mup.inference import LoadedModel, load_model, sample


def tokenizer_of(loaded: LoadedModel, kind: str | None = None, model: str | None = None) -> Tokenizer:
    """The tokenizer given, else the one that the run used.

    Raises:
        ConfigError: there is neither, or its file is missing.
    """
    data = loaded.config.data
    kind = kind or data.tokenizer_type
    if kind is None:
        raise ConfigError("--tokenizer-type", "the run had no tokenizer", "give one, and its --tokenizer-model")
    return build_tokenizer(kind, model or data.tokenizer_model, loaded.config.model.vocab_size)


def generate(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> str:
    """Prompt and continuation; an empty prompt starts a document.

    Raises:
        ConfigError: an empty prompt, and no end-of-document id to start from.
    """
    ids = tokenizer.tokenize(prompt)
    if not ids and tokenizer.eod is None:
        raise ConfigError("--prompt ''", "the tokenizer has no end-of-document id to start from", "give a prompt")
    new = sample(
        loaded.model,
        ids or [tokenizer.eod],
        max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eod=tokenizer.eod,
    )
    return tokenizer.detokenize(ids + new)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Flags of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="folder of checkpoints, as --save named it")
    parser.add_argument("--ckpt-step", type=int, help="iteration to load; default: the latest")
    parser.add_argument("--prompt", default="", help="text to continue; default: start a document")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to add at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability to draw from (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--tokenizer-type", help="default: the run's")
    parser.add_argument("--tokenizer-model", help="default: the run's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")
    arguments = parser.parse_args(argv)
    if arguments.temperature < 0:
        parser.error("--temperature must be at least 0")
    if not 0 < arguments.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, or 2 for a mistake that the message explains."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        loaded = load_model(arguments.load, arguments.ckpt_step, arguments.device)
        tokenizer = tokenizer_of(loaded, arguments.tokenizer_type, arguments.tokenizer_model)
        text = generate(
            loaded,
            tokenizer,
            arguments.prompt,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
