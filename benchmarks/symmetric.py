"""The symmetric kernels: milliseconds of products on one GPU, replayed from a CUDA graph, beside `torch.bmm`.

    python benchmarks/symmetric.py [--sizes 4096,8x2048,...] [--only NAME ...] [--repeats N] [--json OUT]

A size is BATCHxN, for products of symmetric N x N matrices with all extra terms, or BATCHxNxK, for X^T X of [K, N], or
BATCHxNxKr, for X X^T of [N, K]. Candidates take turns, so that all have the same share of a GPU's warm and cold times.
Each of Triton's differs from its kernel's own tuning, which comes first, in what its name says. `cells` is the kernel
for results of few cells (kernels/symmetric.py).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from megatron_mup.kernels.late import kernels_of
from megatron_mup.kernels.symmetric import Product

SIZES = "1x4096,1x2048,4x2048,16x2048,4x2048x8192,4x2048x8192r,1x4096x14336,1x8192"
CHANGES: dict[str, dict[str, int | bool]] = {
    "Triton": {},
    "stages 3": {"stages": 3},
    "depth 32, stages 6": {"depth": 32, "stages": 6},
    "band 4": {"band": 4},
    "band 16": {"band": 16},
    "specialize": {"specialize": True},
}
TIMES = 10  # a graph's runs
Way = Callable[[Product], object]


def candidates() -> dict[str, Way]:
    """Ways to a product, by name."""
    triton = kernels_of("symmetric")
    found: dict[str, Way] = {}
    if torch.cuda.get_device_capability()[0] == 9:
        found["Hopper"] = kernels_of("symmetric_hopper").launch
        found["Hopper, one item a program"] = functools.partial(kernels_of("symmetric_hopper").launch, one_each=True)
        found["cells"] = kernels_of("symmetric_cells").launch
    for name, change in CHANGES.items():
        found[name] = functools.partial(triton.launch, tuning=replace(triton.TUNING, **change))
    found["torch.bmm"] = plain
    return found


def plain(product: Product) -> torch.Tensor:
    """Both halves, without the extra terms."""
    a, b = product[:2]
    return torch.bmm(a.mT, b) if product.by_columns else torch.bmm(a, b.mT)


def arguments(size: str) -> tuple[Product, float]:
    """What is multiplied, and the product's FLOPs, symmetric halves counted once."""
    by_columns = not size.endswith("r")
    batch, n, *depth = map(int, size.rstrip("r").split("x"))
    k = depth[0] if depth else n
    shape = (batch, k, n) if by_columns else (batch, n, k)
    a = torch.randn(*shape, device="cuda").mul_(k**-0.5).to(torch.bfloat16 if depth else torch.float16)
    out = torch.empty(batch, n, n, device="cuda", dtype=torch.float16)
    d, scale = (None, None) if depth else (a, torch.ones(batch, device="cuda"))
    return Product(a, a, out, d, scale, 0.5, 0.5, 1.0, by_columns), 1.0 * batch * n * n * k


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``TIMES`` runs as a graph."""
    graph = torch.cuda.CUDAGraph()
    run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(TIMES):
            run()
    return graph


def replayed(graphs: dict[str, torch.cuda.CUDAGraph], repeats: int) -> dict[str, float]:
    """Milliseconds of one run, median of graphs that take turns."""
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(repeats):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) / TIMES)
    return {name: round(statistics.median(times), 4) for name, times in found.items()}


def launched(run: Callable[[], object], times: int = 100) -> float:
    """Microseconds the host takes to launch one."""
    run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        run()
    taken = time.perf_counter() - begin
    torch.cuda.synchronize()
    return round(taken * 1e6 / times, 1)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--only", action="append", help="only candidates whose name contains this (or another such)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="OUT", help="file to write")
    args = parser.parse_args()
    ways = {n: way for n, way in candidates().items() if not args.only or any(part in n for part in args.only)}
    report: dict[str, object] = {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": kernels_of("symmetric").triton.__version__,
        "times": (table := {}),
    }
    for size in args.sizes.split(","):
        given, flops = arguments(size)
        graphs = {}
        for name, way in ways.items():
            try:
                graphs[name] = captured(functools.partial(way, given))
            except Exception as error:  # whatever a compiler says to a tuning that it can't do
                print(f"{size}, {name}: {type(error).__name__}", flush=True)
        table[size] = replayed(graphs, args.repeats)
        print(size, *(f"{n}: {ms} ({flops / ms / 1e9:.0f} TFLOP/s)" for n, ms in table[size].items()), sep="\n    ")
    small, _ = arguments("2x256")
    report["host_us"] = {name: launched(functools.partial(way, small)) for name, way in ways.items()}
    print("host, microseconds a launch:", report["host_us"])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
