"""What passes between a model's modules, shown to a function while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from megatron_mup.layers.attention import Attention
from megatron_mup.layers.fp8 import StaticLinear
from megatron_mup.layers.router import Routing
from megatron_mup.models.chunks import Model

Seen = Callable[[str, nn.Module, tuple[Any, ...], torch.Tensor], None]
"""Called with the full name of a module, the module, its positional inputs and its output."""

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
def watch_fp8(model: Model, seen: Callable[[str, str, torch.Tensor, torch.dtype], None]) -> Iterator[None]:
    """Shows ``seen`` what FP8 layers multiply, eagerly: a layer's name, ``input``, ``weight`` or ``gradient``, the
    values in front of the cast, and its type.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, StaticLinear)}
    for name, layer in layers.items():
        layer.watcher = partial(seen, name)
    with torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            for layer in layers.values():
                layer.watcher = None
