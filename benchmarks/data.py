"""Speed and memory of the data room.

    python benchmarks/data.py index                       # sample order of 100 M samples, one core
    python benchmarks/data.py blend                       # blends of 100 M samples, one core
    python benchmarks/data.py preprocess --input FILE.jsonl --tokenizer-model FILE.model [--workers N]
    python benchmarks/data.py memory -- COMMAND ...       # peak memory of a command and its children (Linux)

Times are CPU seconds of the process, so that a busy machine tells the same; ``preprocess`` compares tokens per CPU
second with SentencePiece encoding the same texts in a loop.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")
SAMPLES = 100_000_000


def timed(name: str, work: Callable[[], T]) -> T:
    """Runs and prints wall and CPU time."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    print(f"{name}: wall {time.perf_counter() - wall:.1f} s, cpu {time.process_time() - cpu:.1f} s", flush=True)
    return result


def index() -> None:
    """Document, sample and shuffle index for documents short and long."""
    from megatron_mup.data.gpt_dataset import build_indices

    rng = np.random.default_rng(0)
    for documents, longest in ((SAMPLES, 2048), (SAMPLES // 8, 2 * 8192)):
        lengths = rng.integers(1, longest, size=documents, dtype=np.int32)
        samples = SAMPLES - SAMPLES // 1000
        timed(
            f"index of {documents:,} documents, {samples:,} samples",
            lambda: build_indices(lengths, 0, documents, samples, 1024, 1234),  # noqa: B023 - called at once
        )


def blend() -> None:
    """Which dataset each sample of a blend comes from."""
    from megatron_mup.data.greedy import greedy_blend

    rng = np.random.default_rng(1)
    for weights in ([0.5, 0.3, 0.2], rng.random(10), 10.0 ** rng.uniform(-3, 0, 30), [1, 1e-3, 1e-8]):
        shares = np.asarray(weights) / np.sum(weights)
        timed(f"blend of {len(shares)} datasets, {SAMPLES:,} samples", lambda: greedy_blend(shares, SAMPLES))  # noqa: B023


def preprocess(source: str, model: str, workers: int) -> None:
    """Tokens per CPU second, all processes counted, against SentencePiece alone."""
    import sentencepiece

    from megatron_mup.data.preprocess import PreprocessOptions
    from megatron_mup.data.preprocess import preprocess as run

    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    texts = [json.loads(line)["text"] for line in Path(source).read_text(encoding="utf-8").splitlines()]
    for _ in range(3):
        start = time.process_time()
        plain = sum(len(processor.encode(text)) for text in texts) / (time.process_time() - start)
        with tempfile.TemporaryDirectory() as folder:
            options = PreprocessOptions(
                input=[source],
                output_prefix=f"{folder}/out",
                tokenizer_type="SentencePieceTokenizer",
                tokenizer_model=model,
                append_eod=True,
                workers=workers,
            )
            start = _cpu()
            ours = run(options).tokens / (_cpu() - start)
        print(f"tokens per CPU second: sentencepiece {plain:,.0f}, preprocess {ours:,.0f}, ratio {ours / plain:.3f}")


def _cpu() -> float:
    """CPU seconds of this process and of its children that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def memory(command: list[str]) -> None:
    """Runs a command; prints peaks over it and its children: proportional set size, and what of it no file backs."""
    process, peak, own, start = subprocess.Popen(command), 0, 0, time.perf_counter()
    while process.poll() is None:
        peak, own = max(peak, _resident(process.pid, "Pss:")), max(own, _resident(process.pid, "Anonymous:"))
        time.sleep(0.2)
    print(
        f"exit {process.returncode}, wall {time.perf_counter() - start:.1f} s, peak {peak / 2**20:.3f} GiB, of its own "
        f"{own / 2**20:.3f} GiB"
    )


def _resident(root: int, field: str) -> int:
    """KiB of a process tree in a field of smaps; processes that end meanwhile count nothing."""
    total, pending = 0, [root]
    while pending:
        folder = Path("/proc") / str(pending.pop())
        try:
            fields = (folder / "smaps_rollup").read_text().split()
            total += int(fields[fields.index(field) + 1])
            pending += map(int, (folder / "task" / folder.name / "children").read_text().split())
        except OSError:
            continue
    return total


def main() -> None:
    """Runs one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("index", "blend", "preprocess", "memory"))
    parser.add_argument("--input")
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--workers", type=int, default=1)
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:split])
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, NumPy {np.__version__}")
    if args.what == "preprocess":
        preprocess(args.input, args.tokenizer_model, args.workers)
    elif args.what == "memory":
        memory(sys.argv[split + 1 :])
    else:
        {"index": index, "blend": blend}[args.what]()


if __name__ == "__main__":
    main()
