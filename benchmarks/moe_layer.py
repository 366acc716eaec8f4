"""One MoE layer, forward and backward, beside dense products of the same FLOPs and other libraries' layers.

    python benchmarks/moe_layer.py [--sizes large,small,...] [--steps N] [--json OUT] [--profile OUT]

Sizes: ``large`` is Mixtral's layer, ``small`` what one of eight ranks has of a layer of 64 experts (8 experts, each
token in 4), ``small-64`` that whole layer; ``toy`` runs on a CPU. All in bf16, dropless, with a router whose weights
are random, so that experts get uneven numbers of tokens, as in a run.

FLOPs are those of the experts' two products over all assignments, three times (forward, and backward for inputs and
weights); routers, permutations and activations count none. The reference, ``dense products``, multiplies the same rows
by one matrix of an expert's size, without anything in between; ``share`` is a row's rate over the reference's.

Rows: our layer compiled and eager, and our grouped products alone, with nothing between them; Transformer Engine's
permutations and grouped linear layers behind our router; torchtitan's layer, eager and compiled. What can't be
imported, or fails, says so. ``waits``: whether the host waited for the device in a step (Transformer Engine's does by
design, for the sizes of its groups). Times are medians.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from megatron_mup.config.cli import parse_config
from megatron_mup.kernels.grouped import grouped_linear
from megatron_mup.layers.factory import LayerFactory
from megatron_mup.layers.moe import MoE, halved_swiglu
from megatron_mup.parallel.mesh import ALONE

WARM_UP = 5
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A layer and how many tokens go through it."""

    experts: int
    topk: int
    hidden: int
    ffn: int
    tokens: int

    @property
    def rows(self) -> int:
        """Assignments."""
        return self.tokens * self.topk

    @property
    def flops(self) -> int:
        """Of the experts' products, forward and backward."""
        return 3 * 2 * self.rows * self.hidden * 3 * self.ffn


SIZES = {
    "large": Size(8, 2, 4096, 14336, 8192),
    "small": Size(8, 4, 2048, 768, 16384),
    "small-64": Size(64, 4, 2048, 768, 16384),
    "toy": Size(4, 2, 64, 32, 128),
}
Outputs = tuple[torch.Tensor, ...]
Pass = Callable[[], Outputs]
"""Runs forward; its results are differentiated."""


def random(*shape: int, scale: float = 1.0, device: torch.device) -> torch.Tensor:
    """A leaf with a gradient."""
    return (torch.randn(shape, device=device, dtype=DTYPE) * scale).requires_grad_()


def dense_products(size: Size, device: torch.device) -> Pass:
    """Both products with one matrix each, independent of each other."""
    first, second = random(2 * size.ffn, size.hidden, device=device), random(size.hidden, size.ffn, device=device)
    x, inner = random(size.rows, size.hidden, device=device), random(size.rows, size.ffn, device=device)
    return lambda: (F.linear(x, first), F.linear(inner, second))


def grouped_products(size: Size, device: torch.device) -> Pass:
    """The same with a matrix for each expert, whose rows are as uneven as a router's."""
    first = random(size.experts, 2 * size.ffn, size.hidden, device=device)
    second = random(size.experts, size.hidden, size.ffn, device=device)
    x, inner = random(size.rows, size.hidden, device=device), random(size.rows, size.ffn, device=device)
    wanted = torch.rand(size.experts, device=device) + 1
    counts = (wanted / wanted.sum() * size.rows).long()
    counts[-1] += size.rows - counts.sum()
    return lambda: (grouped_linear(x, first, counts), grouped_linear(inner, second, counts))


def our_layer(size: Size, device: torch.device, flags: str = "") -> MoE:
    """Our layer, with the balancing loss that a run has."""
    config = parse_config(
        f"--num-layers 1 --hidden-size {size.hidden} --num-attention-heads 8 --num-experts {size.experts} "
        f"--moe-router-topk {size.topk} --moe-ffn-hidden-size {size.ffn} --moe-aux-loss-coeff 0.01 --swiglu "
        f"--disable-bias-linear --seq-length {size.tokens} --vocab-size 64 --bf16 {flags}".split()
    ).config
    with torch.device("meta"):
        layer = LayerFactory(config, 64, ALONE, DTYPE).moe("decoder.layers.0.mlp", 0)
    layer.to_empty(device=device)
    layer.router.reset()
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.02)
    return layer


def ours(size: Size, device: torch.device, flags: str = "") -> Pass:
    """A pass through our layer."""
    layer, x = our_layer(size, device, flags), random(size.tokens, 1, size.hidden, device=device)
    return lambda: (layer(x),)


def transformer_engine(size: Size, device: torch.device) -> Pass:
    """Transformer Engine's permutations and grouped linear layers, between our router and its gates."""
    import transformer_engine.pytorch as te

    router, x = our_layer(size, device).router, random(size.tokens, size.hidden, device=device)
    first, second = (
        te.GroupedLinear(size.experts, columns, rows, bias=False, params_dtype=DTYPE, device="cuda")
        for columns, rows in ((size.hidden, 2 * size.ffn), (size.ffn, size.hidden))
    )

    def forward() -> Outputs:
        routing = router(x[:, None])
        counts = torch.bincount(routing.experts.flatten(), minlength=size.experts).tolist()
        rows, places = te.moe_permute(x, routing.experts.int(), size.rows, map_type="index")
        rows = second(halved_swiglu(first(rows, counts)), counts)
        return (te.moe_unpermute(rows, places, routing.gates, map_type="index"),)

    return forward


def torchtitan(size: Size, device: torch.device, compiled: bool = False) -> Pass:
    """torchtitan's layer."""
    from torchtitan.models.moe import MoE as TheirMoE
    from torchtitan.models.moe import MoEArgs

    settings = MoEArgs(
        num_experts=size.experts,
        num_shared_experts=0,
        score_func="softmax",
        route_norm=True,
        score_before_experts=False,
        top_k=size.topk,
        load_balance_coeff=None,
    )
    with device:
        layer = TheirMoE(settings, size.hidden, size.ffn).to(DTYPE)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.02)
    if compiled:
        layer.compile()
    x = random(1, size.tokens, size.hidden, device=device)
    return lambda: (layer(x),)


REFERENCE, PROFILED = "dense products", "our layer, compiled"
CONTESTANTS: dict[str, Callable[[Size, torch.device], Pass]] = {
    REFERENCE: dense_products,
    PROFILED: functools.partial(ours, flags="--torch-compile"),
    "our layer": ours,
    "our grouped products": grouped_products,
    "Transformer Engine": transformer_engine,
    "torchtitan": torchtitan,
    "torchtitan, compiled": functools.partial(torchtitan, compiled=True),
}


def step(forward: Pass, grads: Outputs) -> None:
    """Forward and backward."""
    torch.autograd.backward(forward(), grads)


def measure(forward: Pass, steps: int, device: torch.device) -> dict[str, object]:
    """Median milliseconds of forward, and of both passes; whether the host waited in them."""
    outputs = forward()
    leaves, grads = _leaves(outputs), tuple(torch.randn_like(output) for output in outputs)
    del outputs

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        step(forward, grads)

    for _ in range(WARM_UP):
        both()
    forward_ms, ms = (_milliseconds(work, steps, device) for work in (forward, both))
    result: dict[str, object] = {"forward_ms": round(forward_ms, 3), "ms": round(ms, 3)}
    if device.type == "cuda":
        result["waits"] = _waits(both)
    return result


def _leaves(outputs: Outputs) -> list[torch.Tensor]:
    """Tensors whose gradients a backward pass from here adds up."""
    found, seen, todo = [], set(), [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


def _milliseconds(work: Callable[[], object], steps: int, device: torch.device) -> float:
    """Median from step to step, in which the host runs ahead of the device as it does in training."""
    on_gpu = device.type == "cuda"
    marks: list[object] = []
    for number in range(steps + 1):
        if on_gpu:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        if number < steps:
            work()
    torch.cuda.synchronize() if on_gpu else None
    times = [start.elapsed_time(end) if on_gpu else (end - start) * 1e3 for start, end in itertools.pairwise(marks)]
    return statistics.median(times)


def _waits(work: Callable[[], object]) -> bool:
    """Whether the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def compare(name: str, label: str, args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """One row, without its share of the reference."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    result: dict[str, object] = {"size": name, "name": label}
    try:
        forward = CONTESTANTS[label](SIZES[name], device)
        result |= measure(forward, args.steps, device)
        if args.profile and label == PROFILED:
            with open(args.profile, "a") as file:
                print(profile(name, forward, device), file=file)
    except Exception as error:  # other people's code, on a machine that may lack what it needs
        return result | {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
    return result | {"tflops": round(SIZES[name].flops / result["ms"] / 1e9, 2)}


def line(result: dict[str, object]) -> str:
    """A row of the table."""
    if "failed" in result:
        return f"{result['size']:9} {result['name']:22} failed: {result['failed']}"
    waits = {True: "yes", False: "no"}.get(result.get("waits"), "")
    return (
        f"{result['size']:9} {result['name']:22} {result['forward_ms']:9.3f} {result['ms']:9.3f} "
        f"{result['tflops']:8.1f} {result['share']:6.1%} {waits}"
    )


def profile(name: str, forward: Pass, device: torch.device) -> str:
    """Where the time goes."""
    grads = tuple(torch.randn_like(output) for output in forward())
    with torch.profiler.profile() as seen:
        for _ in range(5):
            step(forward, grads)
    key = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return f"{name}, five steps\n" + seen.key_averages().table(sort_by=key, row_limit=40, max_name_column_width=90)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="large,small,small-64")
    parser.add_argument("--only", default="", help="comma-separated parts of names of rows; the reference always runs")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--profile", metavar="OUT", help="tables of kernels, of our compiled layer")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{machine}, torch {torch.__version__}")
    print(f"{'size':9} {'':22} {'forward':>9} {'ms':>9} {'TFLOP/s':>8} {'share':>6} waits", flush=True)
    names = [label for label in CONTESTANTS if any(part in label for part in args.only.split(","))]
    sizes = {name: asdict(SIZES[name]) for name in args.sizes.split(",")}
    about = {"device": machine, "torch": torch.__version__, "command": " ".join(sys.argv), "sizes": sizes}
    results: list[dict[str, object]] = []
    for name in sizes:
        reference = None
        for label in dict.fromkeys([REFERENCE, *names]):
            result = compare(name, label, args, device)
            reference = reference or result.get("ms")
            if reference and "ms" in result:
                result["share"] = round(reference / result["ms"], 3)
            results.append(result)
            print(line(result), flush=True)
            if args.json:
                with open(args.json, "w") as file:
                    json.dump(about | {"results": results}, file, indent=1)
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
