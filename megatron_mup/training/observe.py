"""What passes between a model's modules, shown to a function while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_mup.config import Fp8Config
from megatron_mup.kernels.fp8_casts import E4M3, E5M2
from megatron_mup.kernels.te import Product
from megatron_mup.layers.attention import Attention
from megatron_mup.layers.fp8 import StaticLinear
from megatron_mup.layers.router import Routing
from megatron_mup.layers.te import TELinear
from megatron_mup.models.chunks import Model

Seen = Callable[[str, nn.Module, tuple[Any, ...], torch.Tensor], None]
"""Called with the full name of a module, the module, its positional inputs and its output."""

SeenCast = Callable[[str, str, torch.Tensor, torch.Tensor, torch.dtype], None]
"""Called with an FP8 layer's name, ``input``, ``weight`` or ``gradient``, its values, these times the recipe's scale,
and the type that they are cast to."""

ATTENTION_LOGITS = "attention logits"
_NAMES = {"decoder.layers": "residual", "output_layer": "logits", "decoder.final_layernorm": "final_layernorm"}


def class_of(name: str) -> str:
    """Class of a module: its name without the numbers of layers and experts; ``residual`` for a layer's output."""
    path = ".".join(part for part in name.split(".") if not part.isdigit())
    return _NAMES.get(path, path.removeprefix("decoder.layers."))


@contextmanager
def watch(model: Model, seen: Seen) -> Iterator[None]:
    """Shows ``seen`` the output of every module of a stage as it is computed, eagerly, in forward order.

    A module that hands on what one inside it put out is left out, and so is the stage itself. Logits come with their
    multiplier.
    """
    last: list[torch.Tensor | None] = [None]

    def hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        output = numbers(output)
        if not isinstance(output, torch.Tensor) or output is last[0]:
            return
        last[0] = output
        seen(name, module, inputs, output * model.logits_multiplier if module is model.output_layer else output)

    handles = [
        module.register_forward_hook(partial(hook, name))
        for name, module in model.named_modules()
        if module not in (model, *model.parts)
    ]
    model.watched = True
    # Compiled code would not call the hooks.
    with torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            model.watched = False
            for handle in handles:
                handle.remove()


def numbers(output: object) -> object:
    """What a module puts out; of a router the logits."""
    return output.logits if isinstance(output, Routing) else output


@contextmanager
def watch_attention(model: Model, seen: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Shows ``seen`` the logits of attention, scale included: a layer's name and ``[seq, seq]`` of a few heads of one
    sample at a time, ``-inf`` where a query may not look.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Attention)}

    def show(name: str, scale: float, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> None:
        heads = query.shape[1] // key.shape[1]
        allowed = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        for sample in range(query.shape[0]):
            visible = allowed if mask is None else mask[sample % len(mask), 0]
            for group in range(key.shape[1]):
                asked = query[sample, group * heads : (group + 1) * heads]
                logits = (asked @ key[sample, group].t()).float() * scale
                seen(name, logits.masked_fill(~visible, -torch.inf))

    for name, layer in layers.items():
        layer.watcher = partial(show, name, layer.scale)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.watcher = None


@contextmanager
def watch_fp8(model: Model, fp8: Fp8Config, seen: SeenCast) -> Iterator[None]:
    """Shows ``seen`` what FP8's linear layers multiply, in front of the cast and eagerly. Experts are left out.

    Outside a step's FP8 context Transformer Engine's layers multiply in bf16 here, so that nothing seen moves scales.
    """
    static = {n: m for n, m in model.named_modules() if isinstance(m, StaticLinear)}
    engine = [(name, m, m.product) for name, m in model.named_modules() if isinstance(m, TELinear)]
    for name, layer in static.items():
        layer.watcher = partial(_show_static, seen, name)
    for name, linear, product in engine:
        linear.product = _Watched(product, fp8, partial(seen, name))  # type: ignore[assignment]
    with torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            for layer in static.values():
                layer.watcher = None
            for _, linear, product in engine:
                linear.product = product


def _show_static(seen: SeenCast, name: str, kind: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    seen(name, kind, values, values, dtype)


class _Watched:
    """A product of Transformer Engine's that shows what it multiplies."""

    def __init__(
        self, product: Product, fp8: Fp8Config, seen: Callable[[str, torch.Tensor, torch.Tensor, torch.dtype], None]
    ) -> None:
        self._product, self._fp8, self._seen = product, fp8, seen

    def multiply(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Product.multiply`."""
        y = self._product.multiply(x, weight)
        self._show("input", x)
        self._show("weight", weight)
        if y.requires_grad:
            y.register_hook(partial(self._show, "gradient"))
        return y

    def _show(self, kind: str, values: torch.Tensor) -> None:
        values = values.detach().flatten(0, -2)
        dtype = E5M2 if kind == "gradient" and self._fp8.fp8_format == "hybrid" else E4M3
        largest = torch.finfo(dtype).max
        recipe = self._fp8.fp8_recipe
        scale = _delayed_scale(self._product, kind) if recipe == "delayed" else None
        scaled = scaled_by_own(values, kind, recipe, largest) if scale is None else values.float() * scale
        self._seen(kind, values, scaled, dtype)


def _delayed_scale(product: Product, kind: str) -> torch.Tensor | None:
    """The factor that recipe ``delayed`` has for an operand now; None before its first step."""
    direction, place = {"input": ("fwd", 0), "weight": ("fwd", 1), "gradient": ("bwd", 0)}[kind]
    quantizers = getattr(product._layer, "quantizers", {}).get(f"scaling_{direction}")
    return quantizers[place].scale if quantizers else None


def scaled_by_own(values: torch.Tensor, kind: str, recipe: str, largest: float) -> torch.Tensor:
    """Values ``[rows, columns]`` times what brings the largest of them, or of each block, to the range's end, in fp32.

    Blocks are those of Transformer Engine's recipes along rows, and have powers of two: 1 x 128 (in a weight 128 x 128)
    under ``blockwise``, 1 x 32 under ``mxfp8``; any other recipe has one scale.

    Args:
        values: what a layer casts.
        kind: ``input``, ``weight`` or ``gradient``.
        recipe: name of the recipe.
        largest: the end of the type's range.
    """
    sides = {"blockwise": (128 if kind == "weight" else 1, 128), "mxfp8": (1, 32)}.get(recipe)
    rows, columns = sides or values.shape
    blocks = values.float().unflatten(-1, (-1, columns)).unflatten(0, (-1, rows))
    scale = largest / blocks.abs().amax((1, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    if sides is not None:
        scale = scale.log2().floor().exp2()
    # Rounding of the quotient shall not look like a value beyond the range.
    return (blocks * scale).clamp(-largest, largest).view_as(values)
