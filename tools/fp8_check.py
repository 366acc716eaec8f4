"""Times a model's own matrix products in bf16 and in each FP8 recipe that this machine has, and says which pays.

    python tools/fp8_check.py --config recipe.yaml [any flag of pretrain.py] [--json]

Each row is the linear layers of one shape on one tensor-parallel rank, forward and backward, casts included, for the
tokens of a micro-batch. Recipes: static (this package, compiled; for unit-scaled models) and, where Transformer Engine
is installed, its delayed, tensorwise, blockwise and mxfp8. Exit code 0: a recipe is faster than bf16; 1: none is; 2: a
mistake in the flags; 3: this machine has no FP8.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_mup.config import Config, ConfigError, parse_config
from megatron_mup.config.rules import check_model
from megatron_mup.kernels import te
from megatron_mup.kernels.fp8 import device_has_fp8, fp8_linear
from megatron_mup.models.gpt import parameter_metas
from megatron_mup.training.trainer import vocabulary_size

BF16 = "bf16"
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
"""Transformer Engine's."""
REPEATS = 20
WAIT = 20_000_000
"""Cycles for which the GPU does nothing, about 10 ms, while the host launches what is measured."""


class Shape(NamedTuple):
    """A product ``[tokens, columns] x [rows, columns]^T``."""

    tokens: int
    rows: int
    columns: int

    def __str__(self) -> str:
        """As it is printed."""
        return f"{self.tokens} x {self.columns} -> {self.rows}"


Layer = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Input ``[tokens, in]`` and weight ``[out, in]`` to the output."""
Timings = dict[Shape, dict[str, float]]
"""Milliseconds of one forward and backward by recipe; a recipe that can't run on a shape is left out."""


def shapes(config: Config, vocab_size: int) -> Counter[Shape]:
    """How many layers of a rank have which shape; experts, whose rows depend on routing, are left out."""
    parallel, training = config.parallel, config.training
    tokens = training.micro_batch_size * training.seq_length // parallel.context_parallel_size
    found: Counter[Shape] = Counter()
    for meta in parameter_metas(config, vocab_size):
        if meta.layer is not None and meta.role.is_hidden_matrix and not meta.role.is_expert:
            sides = list(meta.shape)
            if meta.tp_dim is not None:
                sides[meta.tp_dim] //= parallel.tensor_model_parallel_size
            found[Shape(tokens, *sides)] += 1
    return found


def transformer_engine() -> dict[str, Layer]:
    """The layers' product under each of its recipes that this machine has; none where it can't be imported."""
    return {name: te_layer(te.recipe_of(name, "hybrid", 0, 1024, "max")) for name in RECIPES if not te.obstacle(name)}


def te_layer(recipe: object) -> Layer:
    """The product of `layers.te` under a recipe; each shape is a layer of its own, each call a step."""
    products: dict[torch.Size, te.Product] = {}

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with te.one_step(recipe, None, train=True):
            return products.setdefault(weight.shape, te.Product()).multiply(x, weight)

    return run


def milliseconds(layer: Layer, shape: Shape, device: torch.device) -> float:
    """Median time of forward and backward on a GPU, the host being ahead, as it is in a step of large layers."""
    x = torch.randn(shape.tokens, shape.columns, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.randn(shape.rows, shape.columns, dtype=torch.bfloat16, device=device, requires_grad=True)
    grad = torch.randn(shape.tokens, shape.rows, dtype=torch.bfloat16, device=device)
    pairs = []
    for _ in range(REPEATS + 5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(WAIT)
        start.record()
        layer(x, weight).backward(grad)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs[5:])


def timed(counts: Mapping[Shape, int], device: torch.device) -> Timings:
    """Times all recipes on all shapes."""
    layers: dict[str, Layer] = {BF16: F.linear, "static": torch.compile(fp8_linear, dynamic=False)}
    layers |= transformer_engine()
    times: Timings = {}
    for shape in counts:
        fits = all(side % 16 == 0 for side in shape)
        times[shape] = {n: milliseconds(layer, shape, device) for n, layer in layers.items() if fits or n == BF16}
    return times


def speedups(counts: Mapping[Shape, int], times: Timings) -> dict[str, float]:
    """How many times faster than bf16 all layers together are under each recipe; bf16 where a shape can't have it."""
    recipes = {name for found in times.values() for name in found} - {BF16}
    whole = sum(count * times[shape][BF16] for shape, count in counts.items())
    return {
        name: whole / sum(count * times[shape].get(name, times[shape][BF16]) for shape, count in counts.items())
        for name in sorted(recipes)
    }


def page(counts: Mapping[Shape, int], times: Timings) -> str:
    """The table, and the verdict."""
    gains = speedups(counts, times)
    lines = [f"{'layers':>6}  {'shape':28}" + "".join(f"{name:>12}" for name in [BF16, *gains])]
    for shape, count in counts.items():
        cells = [f"{times[shape][name]:9.3f} ms" if name in times[shape] else f"{'-':>12}" for name in [BF16, *gains]]
        lines.append(f"{count:6}  {shape!s:28}" + "".join(cells))
    lines.append(f"{'':6}  {'all layers, times bf16':28}{'1.00':>12}" + "".join(f"{g:12.2f}" for g in gains.values()))
    best = max(gains, key=gains.__getitem__, default=None)
    if best is None or gains[best] <= 1:
        lines.append("No recipe is faster than bf16 for these shapes.")
    else:
        lines.append(
            f"Fastest: {best}, {gains[best]:.2f} times bf16 in linear layers; the rest of a step stays as it is."
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measures and prints; returns the exit code."""
    try:
        config = parse_config([word for word in argv if word != "--json"]).config
        check_model(config)
        counts = shapes(config, vocabulary_size(config))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not device_has_fp8(device):
        what = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
        print(f"This machine has no FP8 ({what}); the products would be:")
        print("\n".join(f"{count:6}  {shape}" for shape, count in counts.items()))
        return 3
    times = timed(counts, device)
    gains = speedups(counts, times)
    if "--json" in argv:
        rows = [{**shape._asdict(), "layers": count, "ms": times[shape]} for shape, count in counts.items()]
        print(json.dumps({"device": torch.cuda.get_device_name(), "shapes": rows, "speedup": gains}))
    else:
        print(page(counts, times))
    return 0 if max(gains.values(), default=0) > 1 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
