"""Tunings of the symmetric kernel: milliseconds of products on one GPU, replayed from a CUDA graph.

    python benchmarks/symmetric.py [--sizes 4096,8x2048,...] [--repeats N] [--json OUT]

A size is BATCHxN, for products of symmetric N x N matrices with all extra terms, or BATCHxNxK, for X^T X of [K, N].
Each candidate differs from the kernel's own tuning, which comes first, in what its name says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_mup.kernels import symmetric_triton
from megatron_mup.kernels.symmetric_triton import Tuning

SIZES = "1x4096,1x2048,8x2048,8x2048x8192,2x4096x14336"
CHANGES: dict[str, dict[str, int | bool]] = {
    "as it is": {},
    "stages 3": {"stages": 3},
    "stages 2": {"stages": 2},
    "depth 32, stages 6": {"depth": 32, "stages": 6},
    "depth 128, stages 2": {"depth": 128, "stages": 2},
    "band 4": {"band": 4},
    "band 16": {"band": 16},
    "specialize": {"specialize": True},
}


def replayed(run: Callable[[], None], times: int, repeats: int) -> float:
    """Milliseconds of one of ``times`` runs in a graph, median."""
    graph = torch.cuda.CUDAGraph()
    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / times)
    return statistics.median(found)


def product(size: str, tuning: Tuning | None) -> tuple[Callable[[], None], float]:
    """A product to run, and its FLOPs, symmetric halves counted once."""
    batch, n, *depth = map(int, size.split("x"))
    k = depth[0] if depth else n
    a = torch.randn(batch, k, n, device="cuda").mul_(k**-0.5).to(torch.bfloat16 if depth else torch.float16)
    out = torch.empty(batch, n, n, device="cuda", dtype=torch.float16)
    d, scale = (None, None) if depth else (a, torch.ones(batch, device="cuda"))

    def run() -> None:
        symmetric_triton.launch(a, a, out, d, scale, 0.5, 0.5, 1.0, "columns" if depth else "symmetric", tuning)

    return run, 1.0 * batch * n * n * k


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="OUT", help="file to write")
    args = parser.parse_args()
    table: dict[str, dict[str, float | str]] = {}
    sizes = args.sizes.split(",")
    print(f"{'ms (TFLOP/s)':24}" + "".join(f"{size:>18}" for size in sizes), flush=True)
    for name, change in CHANGES.items():
        row: dict[str, float | str] = {}
        for size in sizes:
            tuning = replace(symmetric_triton.TUNING, **change)
            try:
                run, flops = product(size, tuning)
                row[size] = round(replayed(run, 10, args.repeats), 4)
                cell = f"{row[size]} ({flops / row[size] / 1e9:.0f})"
            except Exception as error:  # whatever a compiler says to a tuning that it can't do
                row[size] = cell = type(error).__name__
            print(f"{name if size == sizes[0] else '':{24 if size == sizes[0] else 0}}{cell:>18}", end="", flush=True)
        print(flush=True)
        table[name] = row
    if args.json:
        report = {
            "command": " ".join(sys.argv),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": symmetric_triton.triton.__version__,
            "times": table,
        }
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
