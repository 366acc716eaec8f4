"""The transfer measurement: where the best learning rate lies as the model grows, on one GPU, a few minutes a call.

    python benchmarks/transfer_h100.py prepare --output transfer
    python benchmarks/transfer_h100.py run --output transfer --minutes 7      # as often as it takes: exit code 1, go on
    python benchmarks/transfer_h100.py report --output transfer

`prepare` makes a corpus of Python's standard library, a tokenizer of 4096 pieces and an indexed dataset, without a
network. `run` goes through widths 256 to 1024 and depths 4 to 32, CompleteP and the standard parametrization, AdamW and
Muon, at spacing sqrt 2 and the same tokens everywhere, and keeps each trial as it ends; it plans its order so that what
is done first tells most. `report` prints drifts and writes the figures. Every step is tools/transfer_sweep.py, whose
folders these are.

A trial is 2000 steps of 16 x 512 tokens: 16 M. At about 15 ms a step, which is launch-bound at these sizes, that is
half a minute, and the whole measurement (6 sizes x 7 rates x 4 + seeds) about three hours; --part takes one sweep.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools"
VOCAB_SIZE = 4096
PARTS = [
    (parametrization, optimizer) for optimizer in ("adam", "muon") for parametrization in ("completep", "standard")
]
"""In the order of their interest: what is claimed, then what it is compared with."""

RECIPE = """
--num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 4 --num-query-groups 4 --swiglu
--disable-bias-linear --untie-embeddings-and-output-weights --qk-layernorm --init-method-std 0.04
--seq-length 512 --micro-batch-size 16 --global-batch-size 16 --lr-decay-style linear --weight-decay 0.1
--bf16 --torch-compile --num-workers 2 --eval-interval 1000000 --eval-iters 32
--tokenizer-type SentencePieceTokenizer --lr 4e-3 --muon-lr 2e-2
"""
AXES = {"adam": "lr", "muon": "muon_lr,lr"}


def say(*command: str) -> int:
    """Runs a command of this repository; its exit code."""
    print("+", " ".join(command), flush=True)
    return subprocess.run([sys.executable, *command], cwd=ROOT).returncode


def prepare(folder: Path) -> int:
    """Corpus, tokenizer, dataset; what is there is kept."""
    corpus, tokenizer, data = folder / "corpus", folder / "tokenizer.model", folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    steps: list[tuple[Path, list[str]]] = [
        (corpus / "train.jsonl", ["build_corpus.py", "--output-dir", str(corpus)]),
        (
            tokenizer,
            [
                *("train_tokenizer.py", "--input", str(corpus / "train.jsonl")),
                *("--output", str(tokenizer), "--vocab-size", str(VOCAB_SIZE)),
            ],
        ),
    ]
    for part in ("train", "validation"):
        steps.append(
            (
                data / f"{part}_text_document.idx",
                [
                    *("preprocess_data.py", "--input", str(corpus / f"{part}.jsonl"), "--output-prefix"),
                    *(str(data / part), "--tokenizer-type", "SentencePieceTokenizer"),
                    *("--tokenizer-model", str(tokenizer), "--append-eod", "--workers", "2"),
                ],
            )
        )
    for made, (tool, *arguments) in steps:
        if not made.exists() and (code := say(str(TOOLS / tool), *arguments)):
            return code
    return 0


def sweep(folder: Path, parametrization: str, optimizer: str, arguments: argparse.Namespace, minutes: float) -> int:
    """One sweep, or its report where no time is given; exit code of the tool."""
    iterations = arguments.steps
    return say(
        str(TOOLS / "transfer_sweep.py"),
        *("--widths", arguments.widths, "--depths", arguments.depths, "--cross", "--extend", "3"),
        *("--axis", f"{AXES[optimizer]}:-3:3", "--seeds", str(arguments.seeds), "--minutes", str(minutes)),
        *("--output", str(folder / f"{parametrization}-{optimizer}")),
        *RECIPE.split(),
        *("--parametrization", parametrization, "--optimizer", optimizer),
        *("--train-iters", str(iterations), "--lr-warmup-iters", str(iterations // 10)),
        *("--tokenizer-model", str(folder / "tokenizer.model")),
        *("--train-data-path", str(folder / "data" / "train_text_document")),
        *("--valid-data-path", str(folder / "data" / "validation_text_document")),
    )


def main() -> int:
    """Runs one command; 1: call again to go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "run", "report"))
    parser.add_argument("--output", type=Path, required=True, help="folder of data, trials and figures")
    parser.add_argument("--minutes", type=float, default=7.0, help="no trial begins that would end later")
    parser.add_argument("--widths", default="256,512,1024")
    parser.add_argument("--depths", default="4,8,16,32")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3, help="at each optimum and its neighbours")
    parser.add_argument("--part", choices=[f"{p}-{o}" for p, o in PARTS], help="only this sweep")
    arguments = parser.parse_args()
    folder = arguments.output.resolve()
    if arguments.command == "prepare":
        return prepare(folder)
    begin, left = time.monotonic(), 0
    for parametrization, optimizer in PARTS:
        if arguments.part not in (None, f"{parametrization}-{optimizer}"):
            continue
        minutes = 0.0 if arguments.command == "report" else arguments.minutes - (time.monotonic() - begin) / 60
        left |= sweep(folder, parametrization, optimizer, arguments, max(0.0, minutes))
    return left


if __name__ == "__main__":
    sys.exit(main())
