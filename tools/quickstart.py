"""Pretrain a small GPT from nothing: corpus, tokenizer, data, training, loss curve, bits per byte, a sample of text.

    python tools/quickstart.py [--short] [flags of pretrain.py]

works in the folder quickstart/ and downloads nothing. What is done is not done again: started again, it goes on where
it was interrupted. It trains examples/quickstart/gpu.yaml on all GPUs it finds, or cpu.yaml in two processes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import build_corpus
import preprocess_data
import train_tokenizer

from megatron_mup.config import Config, ConfigError, parse_config

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("--train-iters", "8", "--lr-warmup-iters", "2", "--lr-wsd-decay-iters", "4", "--eval-interval", "4")
SHORT_EVALUATION = ("--eval-iters", "2", "--save-interval", "4", "--log-interval", "1")
PROMPT = 'class Stack:\n    """'
SAMPLE_TOKENS = 100
VOCAB_SIZE = 4096


class StageError(Exception):
    """A stage failed; the message says what to do."""


@dataclass(frozen=True)
class Paths:
    """Where everything is, below one folder."""

    folder: Path

    @property
    def corpus(self) -> Path:
        """JSON lines of text."""
        return self.folder / "corpus"

    @property
    def tokenizer(self) -> Path:
        """SentencePiece model."""
        return self.folder / "tokenizer.model"

    def data(self, part: str) -> Path:
        """Prefix of the indexed dataset of ``train`` or ``validation``."""
        return self.folder / "data" / f"{part}_text_document"

    @property
    def checkpoints(self) -> Path:
        """What training saves."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line per step."""
        return self.folder / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """Loss curve."""
        return self.folder / "loss.png"

    @property
    def log(self) -> Path:
        """Warnings and errors of the training processes."""
        return self.folder / "torchrun.log"

    @property
    def result(self) -> Path:
        """Bits per byte and sample of the finished run."""
        return self.folder / "result.json"


@dataclass(frozen=True)
class Machine:
    """How training is started here: with which recipe, in how many processes of how many threads."""

    recipe: Path
    processes: int
    threads: int

    @classmethod
    def find(cls) -> Machine:
        """One process per GPU, up to a power of two that divides the batch; without a GPU two that share the cores."""
        import torch

        recipes = ROOT / "examples" / "quickstart"
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if torch.cuda.is_available():
            count = min(8, 1 << (torch.cuda.device_count().bit_length() - 1))
            return cls(recipes / "gpu.yaml", count, max(1, cores // count))
        return cls(recipes / "cpu.yaml", 2, max(1, min(8, cores // 2)))


def make_corpus(paths: Paths) -> None:
    """Python's own sources as text."""
    if not all((paths.corpus / f"{part}.jsonl").exists() for part in ("train", "validation")):
        say("corpus: sources of Python's standard library")
        check(build_corpus.main(["--output-dir", str(paths.corpus)]))


def make_tokenizer(paths: Paths) -> None:
    """A vocabulary for it."""
    if not paths.tokenizer.exists():
        say("tokenizer: SentencePiece, trained on the corpus")
        train = str(paths.corpus / "train.jsonl")
        check(
            train_tokenizer.main(["--input", train, "--output", str(paths.tokenizer), "--vocab-size", str(VOCAB_SIZE)])
        )


def make_data(paths: Paths) -> None:
    """The corpus as token ids, in Megatron's format."""
    for part in ("train", "validation"):
        if all(paths.data(part).with_suffix(end).exists() for end in (".bin", ".idx")):
            continue
        say(f"data: {part} tokens to .bin and .idx")
        paths.data(part).parent.mkdir(exist_ok=True)
        flags = ["--input", str(paths.corpus / f"{part}.jsonl"), "--output-prefix", str(paths.folder / "data" / part)]
        tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(paths.tokenizer)]
        check(preprocess_data.main([*flags, *tokenizer, "--append-eod", "--workers", "2"]))


def training_flags(paths: Paths, machine: Machine, short: bool, extra: list[str]) -> list[str]:
    """Flags of pretrain.py; the user's come last and win."""
    return [
        *("--config", os.path.relpath(machine.recipe)),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(paths.tokenizer)),
        *("--train-data-path", str(paths.data("train")), "--valid-data-path", str(paths.data("validation"))),
        *("--data-cache-path", str(paths.folder / "data" / "cache"), "--metrics-file", str(paths.metrics)),
        *("--save", str(paths.checkpoints), "--load", str(paths.checkpoints)),
        *("--tensorboard-dir", str(paths.folder / "tensorboard")),
        *(SHORT + SHORT_EVALUATION if short else ()),
        *extra,
    ]


def train(paths: Paths, machine: Machine, flags: list[str], config: Config) -> None:
    """Trains, or goes on training, up to the recipe's last iteration."""
    if saved_iteration(paths) == config.training.train_iters:
        return
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(machine.processes)]
    say(f"training: torchrun --nproc-per-node {machine.processes} pretrain.py {' '.join(flags[:2])} …")
    environment = os.environ | {"OMP_NUM_THREADS": str(machine.threads), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *torchrun, str(ROOT / "pretrain.py"), *flags]
    with open(paths.log, "w", encoding="utf-8") as log:
        # In a session of its own, so that Ctrl-C reaches this process alone and training can save before it leaves.
        process = subprocess.Popen(command, env=environment, stderr=log, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            print("\nstopping: saving a checkpoint …", flush=True)
            process.terminate()
            process.wait()
            raise
    if code:
        tail = [line for line in paths.log.read_text(encoding="utf-8", errors="replace").splitlines() if "rror" in line]
        raise StageError("\n".join([*tail[:4], f"training failed; all it said is in {paths.log}"]))


def saved_iteration(paths: Paths) -> int | None:
    """Iteration of the latest complete checkpoint."""
    from megatron_mup.checkpoint import find, read_manifest

    path = find(paths.checkpoints)
    return None if path is None else read_manifest(path).iteration


def finish(paths: Paths, machine: Machine) -> None:
    """Loss curve, bits per byte of the validation text, and a sample."""
    import numpy as np
    import torch
    from generate import generate, tokenizer_of

    from megatron_mup.data.indexed_dataset import IndexedDataset
    from megatron_mup.inference import bits_per_byte, load_model, total_loss
    from megatron_mup.training.plot import loss_curve

    say("loss curve, validation bits per byte, sample")
    torch.set_num_threads(machine.processes * machine.threads)
    loaded = load_model(paths.checkpoints, device="cuda" if torch.cuda.is_available() else "cpu")
    size = sum(p.numel() for p in loaded.model.parameters())
    loss_curve(str(paths.metrics), str(paths.plot), f"quickstart: {size / 1e6:.1f} M parameters")
    tokenizer = tokenizer_of(loaded.config)
    validation = IndexedDataset(paths.data("validation"))
    stream = np.concatenate([[tokenizer.eod], *(validation.get(i) for i in range(len(validation)))])
    text_bytes = 0
    for text in train_tokenizer.texts([paths.corpus / "validation.jsonl"], "text"):
        text_bytes += len(text.encode())
    result = {
        "iteration": loaded.iteration,
        "parameters": size,
        "validation bits per byte": bits_per_byte(total_loss(loaded.model, stream), text_bytes),
        "validation bytes": text_bytes,
        "sample": generate(loaded, tokenizer, PROMPT, max_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=1),
        "checkpoint": str(loaded.path),
    }
    write_whole(paths.result, json.dumps(result, indent=1) + "\n")


def show(paths: Paths) -> None:
    """The closing lines."""
    result = json.loads(paths.result.read_text(encoding="utf-8"))
    print(f"\n--- the model continues {PROMPT!r} ---\n{result['sample']}\n---\n")
    print(f"loss curve   {paths.plot}")
    print(f"checkpoint   {result['checkpoint']}")
    python = os.path.relpath(sys.executable) if sys.prefix != sys.base_prefix else "python"
    print(f"try next     {python} tools/generate.py --load {paths.checkpoints} --prompt 'def main('")
    print(
        f"validation bits per byte: {result['validation bits per byte']:.3f} "
        f"({result['parameters'] / 1e6:.1f} M parameters, {result['iteration']} iterations)"
    )


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def check(code: int) -> None:
    """Stops after a tool that failed and has said why."""
    if code:
        raise StageError("stopped; correct this and start again")


def say(text: str) -> None:
    """A heading."""
    print(f"==> {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs what is not done yet; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few iterations only, to see that all of it works")
    parser.add_argument("--folder", type=Path, help="where to work; default: quickstart, or quickstart/short")
    arguments, extra = parser.parse_known_args(argv)
    # Not out of the blue, so that what a stage has begun is put away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    paths = Paths(arguments.folder or Path("quickstart", *(["short"] if arguments.short else [])))
    started = time.monotonic()
    try:
        machine = Machine.find()
        flags = training_flags(paths, machine, arguments.short, extra)
        config = parse_config(flags).config
        if paths.result.exists() and saved_iteration(paths) == config.training.train_iters:
            print(f"done already; remove the folder {paths.folder} to start anew")
        else:
            paths.folder.mkdir(parents=True, exist_ok=True)
            make_corpus(paths)
            make_tokenizer(paths)
            make_data(paths)
            train(paths, machine, flags, config)
            finish(paths, machine)
            say(f"done in {time.monotonic() - started:.0f} s")
        show(paths)
    except (StageError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
