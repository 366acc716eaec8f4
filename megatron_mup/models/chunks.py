"""Several stages of a pipeline on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from megatron_mup.layers.router import Router
from megatron_mup.models.gpt import GPT
from megatron_mup.parametrization.meta import ParamMeta


class Chunks(nn.Module):
    """The stages of one rank under a schedule that gives it several, in order. Outside a pass they are one model.

    Modules and parameters have the names that they have in the whole model, as in a single stage.

    Args:
        parts: the stages.

    Attributes:
        metas: full parameter name to `ParamMeta` for every parameter here.
        output_layer: of the last stage; None where that is elsewhere.
    """

    def __init__(self, parts: list[GPT]) -> None:
        super().__init__()
        self._parts = nn.ModuleList(parts)
        self.metas: dict[str, ParamMeta] = {name: meta for part in parts for name, meta in part.metas.items()}
        self.vocab_size, self.logits_multiplier = parts[0].vocab_size, parts[0].logits_multiplier

    @property
    def parts(self) -> list[GPT]:
        """The stages, in order."""
        return list(self._parts)  # type: ignore[arg-type]

    @property
    def output_layer(self) -> nn.Module | None:
        """The projection to the vocabulary, if its stage is here."""
        return self.parts[-1].output_layer

    @property
    def watched(self) -> bool:
        """Whether someone looks at the output of modules."""
        return self.parts[-1].watched

    @watched.setter
    def watched(self, value: bool) -> None:
        for part in self.parts:
            part.watched = value

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[Any]:
        """Modules of all stages by their names in the whole model; the stages themselves have the same name."""
        memo = set() if memo is None else memo
        for part in self.parts:
            yield from part.named_modules(memo, prefix, remove_duplicate)

    def routers(self) -> dict[int, Router]:
        """Routers of the layers with experts, by the number of the layer."""
        return {number: router for part in self.parts for number, router in part.routers().items()}

    def expert_biases(self) -> dict[str, torch.Tensor]:
        """Biases of the routers, live, by name."""
        return {name: bias for part in self.parts for name, bias in part.expert_biases().items()}


Model = GPT | Chunks
"""What a rank holds: one stage of the pipeline, or several."""
