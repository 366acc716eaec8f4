"""Attention kernels at the shapes of presets on one GPU: time forward and with backward, and error.

    python benchmarks/attention.py [--preset dense-1b block-8b] [--seq-length 4096] [--repeats N] [--out FILE]

Causal, bf16, in the layers' layout (memory is sequence first); each call is replayed from a CUDA graph, times are means
in ms. Errors are relative norms of differences from the formula in fp32, in the first sample's first group of heads.
What isn't installed is left out and said so. FlashAttention-4 compiles its kernels in its first call: ``first_s``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

if __package__:
    from benchmarks.train_step import PRESETS
else:
    from train_step import PRESETS

from megatron_mup.kernels.flash4 import flash4
from megatron_mup.kernels.libraries import obstacle
from megatron_mup.layers.attention import BACKENDS, plain_attention

Tensors = tuple[torch.Tensor, ...]


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Mean time of a call on the device, from a CUDA graph of it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(2 * repeats):
        if number == repeats:
            start.record()
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return round(start.elapsed_time(end) / repeats, 4)


def attention(backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention ``[batch, heads, seq, width]`` by a kernel of ``--attention-backend``."""
    scale = query.shape[-1] ** -0.5
    if backend == "flash4":
        return flash4(query, key, value, scale)[0]
    if backend == "unfused":
        return plain_attention(query, key, value, scale, None, None)
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def both(backend: str, tensors: Tensors, grad: torch.Tensor) -> Tensors:
    """The output, and gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = attention(backend, *leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def measure(name: str, backends: list[str], seq: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each kernel."""
    hidden, _, heads, groups, _, batch = PRESETS[name]
    width, per_group = hidden // heads, heads // groups
    sizes = (heads, groups, groups, heads)
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    *tensors, grad = (torch.randn(seq, batch, n, width, **options).permute(1, 2, 0, 3) for n in sizes)

    def first_group(found: Tensors) -> list[torch.Tensor]:
        counts = (per_group, per_group, 1, 1)
        return [x[:1, :count].float() for x, count in zip(found, counts, strict=True)]

    group_grad, *group = first_group((grad, *tensors))
    exact = both("unfused", tuple(group), group_grad)
    rows = []
    for backend in backends:
        row: dict[str, Any] = {"preset": name, "backend": backend}
        if backend == "flash4" and (why := obstacle(backend)) is not None:
            rows.append(row | {"error": why})
            continue
        start = time.perf_counter()
        seen = first_group(both(backend, tuple(tensors), grad))
        row["first_s"] = round(time.perf_counter() - start, 1)
        errors = [((x - e).norm() / e.norm()).item() for x, e in zip(seen, exact, strict=True)]
        row["errors"] = dict(zip(("out", "query", "key", "value"), (round(e, 5) for e in errors), strict=True))
        with torch.no_grad():
            row["forward_ms"] = milliseconds(lambda backend=backend: attention(backend, *tensors), repeats)
        row["both_ms"] = milliseconds(lambda backend=backend: both(backend, tuple(tensors), grad), repeats)
        rows.append(row)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=list(PRESETS), default=["dense-1b", "block-8b"])
    parser.add_argument("--backend", nargs="+", default=["fused", "flash4", "flash"])
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    where = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }
    for name in args.preset:
        for row in measure(name, args.backend, args.seq_length, args.repeats, torch.device("cuda")):
            print(json.dumps(row | where), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(json.dumps(row | where) + "\n")


if __name__ == "__main__":
    main()
