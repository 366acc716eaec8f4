"""Newton-Schulz beside others': milliseconds and errors of five steps (or `squaring`'s two) on bf16 matrices.

    python benchmarks/newton_schulz.py [--sizes 4096x4096,...] [--beside FILE:FUNCTION ...] [--json OUT]

Others: ``torch.optim.Muon``'s function, emerging-optimizers if it can be imported (also with its symmetric kernel), and
each FUNCTION of a Python FILE, which takes one bf16 matrix and returns its orthonormal factor. Their kernels that tune
themselves choose among those of their configurations that ``--tuning`` names. A function works once
before it is timed, so that compiling and tuning stay out; how long that took is reported as ``start``. All work on
the same random matrices, several in turn so that the cache holds none.

Times are medians, eager (host time included where it shows) and replayed from a CUDA graph. The size ``llama-3-8b`` is
the whole set of a Llama-3-8B's matrices, each of them there: ours in the batches that Muon forms, twice, others' once
one by one and, if they take batches, once in the same ones. Errors are against the SVD
in fp64 on 512 x 1792: ``orthogonality`` is |O - U V^T|_F / sqrt(512), ``largest`` the largest singular value, on a
Gaussian matrix and on one with singular values down to 1e-3; on a GPU also, in fp32, on a square Gaussian matrix of
2048 rows, whose least singular values no five steps reach. Coefficient sets differ: compare errors within a set.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType

import torch

from megatron_mup.optim.batches import matrices_at_once
from megatron_mup.optim.newton_schulz import orthonormalize, orthonormalize_plain

TUNING = ";".join(
    [
        f"BLOCK_SIZE_M={m},BLOCK_SIZE_N={n},BLOCK_SIZE_K=64,num_stages={stages},num_warps={warps}"
        for m, n, stages, warps in ((128, 128, 3, 8), (128, 128, 4, 4), (128, 256, 3, 8), (64, 128, 4, 4))
    ]
    + [
        f"TILE_M=128,TILE_N=128,TILE_K=64,GROUP_SIZE_M=8,num_stages={stages},num_warps={warps}"
        for stages, warps in ((3, 4), (4, 4), (3, 8), (4, 8))
    ]
    # The only shape that emerging-optimizers' kernel leaves itself from 5000 rows on.
    + [f"TILE_M=128,TILE_N=256,TILE_K=64,GROUP_SIZE_M=8,num_stages={stages},num_warps=8" for stages in (3, 4)]
)
Function = Callable[[torch.Tensor], torch.Tensor]
SIZES = "2048x2048,2048x8192,4096x4096,4096x14336,8192x28672,llama-3-8b"
LLAMA_3_8B = {(4096, 4096): 64, (1024, 4096): 64, (14336, 4096): 64, (4096, 14336): 32}
SQUARE = 2048
CLEAN_BYTES = 1 << 28  # inputs in turn add up to more than any cache


def ours(coefficients: str) -> Function:
    """Our function with one of its coefficient sets."""
    steps = 2 if coefficients == "squaring" else 5
    return lambda x: orthonormalize(x, steps, coefficients, torch.bfloat16)


def settle(module: ModuleType, tunings: list[dict[str, int]]) -> None:
    """Leaves the kernels of a module few configurations to tune over: all of them take minutes."""
    for kernel in vars(module).values():
        configs = getattr(kernel, "configs", None)
        if not configs or not hasattr(kernel, "fn"):
            continue
        known = [{**c.kwargs, **vars(c)} for c in configs]
        fitting = [
            c
            for c, has in zip(configs, known, strict=True)
            if any(all(has.get(k) == v for k, v in t.items()) for t in tunings)
        ]
        kernel.configs = fitting or configs[:1]
        print(f"{module.__name__}: {kernel.fn.__name__} tunes over {len(kernel.configs)} of {len(configs)}", flush=True)


def load(path: str) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(f"beside_{abs(hash(path))}", path)
    if not spec or not spec.loader:
        raise SystemExit(f"--beside takes FILE:FUNCTION; {path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def contestants(beside: list[str], tunings: list[dict[str, int]]) -> dict[str, Function]:
    """All that can run here, by name."""
    found = {f"ours, {name}": ours(name) for name in ("quintic", "squaring", "jordan", "polar_express")}
    found["ours without Gram space, quintic"] = lambda x: orthonormalize_plain(x, 5, "quintic", torch.bfloat16)
    if importlib.util.find_spec("torch.optim._muon"):
        from torch.optim._muon import _zeropower_via_newtonschulz

        # A copy, because some releases normalize a bf16 input in place.
        found["torch.optim.Muon, jordan"] = lambda x: _zeropower_via_newtonschulz(
            x.clone(), (3.4445, -4.775, 2.0315), 5, 1e-7
        )
    if importlib.util.find_spec("emerging_optimizers"):
        from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

        def emerging(x: torch.Tensor, use_syrk: bool = False) -> torch.Tensor:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("medium")  # its way to ask for bf16
            try:
                return newton_schulz(x.float(), 5, "quintic", use_syrk=use_syrk)
            finally:
                torch.set_float32_matmul_precision(before)

        settle(importlib.import_module("emerging_optimizers.triton_kernels.syrk"), tunings)
        found["emerging-optimizers, quintic"] = emerging
        found["emerging-optimizers, quintic, syrk"] = lambda x: emerging(x, use_syrk=True)
    modules: dict[str, ModuleType] = {}
    for place in beside:
        path, _, name = place.rpartition(":")
        if path not in modules:
            modules[path] = load(path)
            settle(modules[path], tunings)
        found[name] = getattr(modules[path], name)
    return found


def synchronize() -> None:
    """Waits for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ms(run: Callable[[int], object], repeats: int) -> float:
    """Median of ``run(0)``, ``run(1)``, ...: device time between events, or host time without a device."""
    times = []
    for i in range(repeats):
        if torch.cuda.is_available():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(i)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run(i)
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def time_matrix(function: Function, inputs: list[torch.Tensor], repeats: int) -> dict[str, object]:
    """Eager and replayed milliseconds of one matrix."""
    begin = time.perf_counter()
    function(inputs[0])
    synchronize()
    result: dict[str, object] = {"start_s": round(time.perf_counter() - begin, 2)}
    for x in inputs:
        function(x)
    synchronize()
    result["ms"] = round(median_ms(lambda i: function(inputs[i % len(inputs)]), repeats), 3)
    if not torch.cuda.is_available():
        return result
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for x in inputs:
                function(x)
    except RuntimeError as error:  # a function that waits for the device can't be captured
        return result | {"graph_error": str(error).splitlines()[0]}
    graph.replay()
    rounds = max(3, repeats // len(inputs))
    return result | {"graph_ms": round(median_ms(lambda i: graph.replay(), rounds) / len(inputs), 3)}


@functools.cache
def whole_set(device: str) -> list[torch.Tensor]:
    """All matrices of a Llama-3-8B, 14 GB of them, by shape: ``[matrices, m, n]``."""
    return [
        torch.randn(count, m, n, device=device, dtype=torch.bfloat16).mul_(0.02) for (m, n), count in LLAMA_3_8B.items()
    ]


def time_set(function: Function, batched: bool, repeats: int, device: str) -> dict[str, object]:
    """Milliseconds of all matrices of a Llama-3-8B, one by one or in batches as Muon forms them."""
    parts: list[torch.Tensor] = []
    for matrices in whole_set(device):
        limit = matrices_at_once(2 * matrices[0].numel(), matrices.device)
        parts += matrices.split(limit) if batched else matrices.unbind()
    alike = {tuple(part.shape): part for part in parts}
    for part in alike.values():  # compiles and tunes
        function(part)
    synchronize()

    def run(_: int) -> None:
        for part in parts:
            function(part)

    result: dict[str, object] = {"ms": round(median_ms(run, repeats), 1)}
    return result | replayed_set(run, repeats) if device == "cuda" else result


def replayed_set(run: Callable[[int], None], repeats: int) -> dict[str, object]:
    """The same from a CUDA graph, if it can be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run(0)
    except RuntimeError as error:
        return {"graph_error": str(error).splitlines()[0]}
    return {"graph_ms": round(median_ms(lambda _: graph.replay(), repeats), 1)}


def time_set_both_ways(function: Function, repeats: int, device: str) -> dict[str, object]:
    """Of another's function: one by one, and in batches if it takes them; the faster counts."""
    ways = {"one by one": time_set(function, False, repeats, device)}
    try:
        few = whole_set(device)[0][:2]
        got = function(few)
        if got.shape == few.shape and torch.allclose(got[1].float(), function(few[1]).float(), atol=0.02):
            ways["in batches"] = time_set(function, True, repeats, device)
    except Exception as error:  # whatever it says to three dimensions
        print(f"takes no batches: {error!r}"[:160], flush=True)
    best = min(ways, key=lambda way: min(ms for key, ms in ways[way].items() if key.endswith("ms")))
    return ways[best] | {"way": best, "ways": ways}


@functools.cache
def known(device: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """bf16 matrices by kind, and their orthonormal factors, in the precision and on the device to compare them on."""
    generator = torch.Generator().manual_seed(0)
    m, n = 512, 1792
    gaussian = torch.randn(m, n, generator=generator, dtype=torch.float64)
    u, v = (torch.linalg.qr(torch.randn(k, m, generator=generator, dtype=torch.float64)).Q for k in (m, n))
    found = {}
    for name, matrix in (
        ("gaussian", gaussian),
        ("down to 1e-3", (u * torch.logspace(0, -3, m, dtype=torch.float64)) @ v.T),
    ):
        x = matrix.to(torch.bfloat16)
        left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
        found[name] = (x, left @ right)
    if device == "cuda":
        x = torch.randn(SQUARE, SQUARE, generator=generator).to(device, torch.bfloat16)
        left, _, right = torch.linalg.svd(x.float())
        found[f"gaussian {SQUARE} x {SQUARE}"] = (x, left @ right)
    return found


def errors(function: Function, device: str) -> dict[str, float]:
    """Against the SVD."""
    result = {}
    for name, (x, want) in known(device).items():
        got = function(x.to(device)).to(want)
        result[f"{name}: orthogonality"] = round((got - want).norm().item() / len(x) ** 0.5, 4)
        result[f"{name}: largest"] = round(torch.linalg.matrix_norm(got, 2).item(), 4)
    return result


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--beside", action="append", default=[], metavar="FILE:FUNCTION")
    parser.add_argument(
        "--tuning", default=TUNING, help="NAME=NUMBER,...;... for kernels of --beside that tune themselves"
    )
    parser.add_argument("--only", action="append", help="run only functions whose name contains this (or another such)")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", metavar="OUT", help="file to write")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tunings = [
        {name: int(number) for name, _, number in (pair.partition("=") for pair in one.split(","))}
        for one in args.tuning.split(";")
    ]
    functions = {
        name: f
        for name, f in contestants(args.beside, tunings).items()
        if not args.only or any(part in name for part in args.only)
    }
    found: dict[str, dict[str, float]] = {}
    for name, f in list(functions.items()):
        try:
            found[name] = errors(f, device)
        except Exception as error:  # another's function that doesn't work here
            if name.startswith("ours"):
                raise
            print(f"without {name}: {error!r}"[:400], flush=True)
            del functions[name]
    table: dict[str, dict[str, dict[str, object]]] = {name: {} for name in functions}
    report = {
        "command": " ".join(sys.argv),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "tuning": args.tuning,
        "errors": found,
        "times": table,
    }
    columns = args.sizes.split(",")
    for column in columns:
        inputs = []
        if column[0].isdigit():
            m, n = map(int, column.split("x"))
            count = max(1, min(16, CLEAN_BYTES // (2 * m * n)))
            inputs = [torch.randn(m, n, device=device).to(torch.bfloat16) for _ in range(count)]
        for name, function in functions.items():
            own = name.startswith("ours")
            try:
                if inputs:
                    table[name][column] = time_matrix(function, inputs, args.repeats)
                elif own:
                    table[name][column] = time_set(function, True, 2, device)
                else:
                    table[name][column] = time_set_both_ways(function, 1, device)
            except Exception as error:  # another's function that doesn't take this size
                if own:
                    raise
                table[name][column] = {"ms": "-", "error": repr(error)[:200]}
            print(f"{column:12} {name:40} {table[name][column]}", flush=True)
            if args.json:  # as far as it got
                with open(args.json, "w") as file:
                    json.dump(report, file, indent=1)
    print(f"{'ms eager / from a graph':40}" + "".join(f"{column:>18}" for column in columns))
    for name, row in table.items():
        cells = [f"{row[c]['ms']}" + (f" / {row[c]['graph_ms']}" if "graph_ms" in row[c] else "") for c in columns]
        print(f"{name:40}" + "".join(f"{cell:>18}" for cell in cells))
    for name, values in found.items():
        print(f"{name:40}" + "  ".join(f"{key} {value}" for key, value in values.items()))


if __name__ == "__main__":
    main()
