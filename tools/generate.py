"""Continue texts with a trained model, whatever the layout in which it was trained.

python tools/generate.py --load runs/my-model --prompt 'def main(' --temperature 0.8
torchrun --nproc-per-node 4 tools/generate.py --load runs/my-model --prompt 'def main(' \\
    --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron_mup.config import Config, ConfigError
from megatron_mup.data.tokenizer import Tokenizer, build_tokenizer
from megatron_mup.inference import LoadedModel, load_model, logits_of, sample, stream
from megatron_mup.inference.sample import Logits
from megatron_mup.inference.sharded import load_sharded, sharded_logits


def tokenizer_of(config: Config, kind: str | None = None, model: str | None = None) -> Tokenizer:
    """The tokenizer given, else the one that the run used.

    Raises:
        ConfigError: there is neither, or its file is missing.
    """
    data = config.data
    kind = kind or data.tokenizer_type
    if kind is None:
        raise ConfigError("--tokenizer-type", "the run had no tokenizer", "give one, and its --tokenizer-model")
    return build_tokenizer(kind, model or data.tokenizer_model, config.model.vocab_size)


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
    ids = prompt_ids(tokenizer, prompt)
    new = sample(
        loaded.model,
        ids,
        max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        eod=tokenizer.eod,
    )
    return tokenizer.detokenize((ids if prompt else []) + new)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; an empty one starts a document.

    Raises:
        ConfigError: an empty prompt, and no end-of-document id to start from.
    """
    ids = tokenizer.tokenize(prompt)
    if not ids and tokenizer.eod is None:
        raise ConfigError("--prompt ''", "the tokenizer has no end-of-document id to start from", "give a prompt")
    return ids or [tokenizer.eod]  # type: ignore[list-item]


def printed(tokenizer: Tokenizer, prompts: list[str], steps: Iterator[list[int | None]]) -> Iterator[str]:
    """What to print as tokens come: one text as it grows, several when they are whole."""
    rows: list[list[int]] = [tokenizer.tokenize(prompt) for prompt in prompts]
    shown = ""
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
        if len(rows) == 1:
            text = tokenizer.detokenize(rows[0])
            # A character may take several tokens; what is incomplete waits.
            if text != shown and text.startswith(shown) and not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
    if len(rows) == 1:
        yield tokenizer.detokenize(rows[0])[len(shown) :] + "\n"
        return
    for number, row in enumerate(rows, 1):
        yield f"--- {number}\n{tokenizer.detokenize(row)}\n"


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Flags of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", required=True, help="folder of checkpoints, as --save named it")
    parser.add_argument("--ckpt-step", type=int, help="iteration to load; default: the latest")
    parser.add_argument(
        "--prompt", nargs="+", default=[""], help="text to continue, or several; default: start a document"
    )
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens to add at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    parser.add_argument("--top-p", type=float, default=0.95, help="share of probability to draw from (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--tokenizer-type", help="default: the run's")
    parser.add_argument("--tokenizer-model", help="default: the run's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1, help="ranks that share each matrix")
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1, help="pipeline stages")
    arguments = parser.parse_args(argv)
    if arguments.temperature < 0:
        parser.error("--temperature must be at least 0")
    if not 0 < arguments.top_p <= 1:
        parser.error("--top-p must be above 0 and at most 1")
    return arguments


def opened(arguments: argparse.Namespace) -> tuple[Logits, Config, torch.device]:
    """The model's function, its configuration and where it lives.

    Raises:
        ConfigError: it can't be loaded, or the processes don't make up the layout.
    """
    tensor, stages = arguments.tensor_model_parallel_size, arguments.pipeline_model_parallel_size
    ranks, device = int(os.environ.get("WORLD_SIZE", 1)), torch.device(arguments.device)
    if ranks != tensor * stages:
        raise ConfigError(
            f"{ranks} processes",
            f"the layout has {tensor} x {stages} ranks",
            f"start it with torchrun --nproc-per-node {tensor * stages}",
        )
    if ranks == 1:
        loaded = load_model(arguments.load, arguments.ckpt_step, device)
        return logits_of(loaded.model), loaded.config, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model, mesh, config = load_sharded(arguments.load, tensor, stages, device, arguments.ckpt_step)
    assert config.model.vocab_size is not None
    return sharded_logits(model, mesh, config.model.vocab_size), config, device


def main(argv: list[str] | None = None) -> int:
    """Runs the tool; returns its exit code: 0, or 2 for a mistake that the message explains."""
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        logits, config, device = opened(arguments)
        tokenizer = tokenizer_of(config, arguments.tokenizer_type, arguments.tokenizer_model)
        steps = stream(
            logits,
            [prompt_ids(tokenizer, prompt) for prompt in arguments.prompt],
            arguments.max_tokens,
            window=config.training.seq_length,
            device=device,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            seed=arguments.seed,
            eod=tokenizer.eod,
        )
        for text in printed(tokenizer, arguments.prompt, steps):
            if int(os.environ.get("RANK", 0)) == 0:
                print(text, end="", flush=True)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized() and "RANK" in os.environ:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
