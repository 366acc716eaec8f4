"""A stand-in for the part of Transformer Engine that this package calls, for CPUs: exact products, and a diary."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn


class State:
    """Of the process, as there."""

    enabled, group, depth = False, None, 0
    diary: tuple[list[Any], ...] = ([],)

    @classmethod
    def tell(cls, *what: Any) -> None:
        cls.diary[0].append(what)

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def reset(cls) -> None:
        cls.tell("reset")

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        return True

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool) -> None:
        cls.tell("scales", "forward" if forward else "backward")

    class quantization_state:  # noqa: N801
        """Largest values by direction."""

        global_amax_buffer: ClassVar[dict[str, list[torch.Tensor]]] = {"forward": [torch.ones(3)]}


class Linear(nn.Module):
    """Multiplies by the attribute ``weight``, whatever it is; in FP8 it tells of every product."""

    def __init__(self, columns: int, rows: int, *, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        assert not bias
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype, device=device))

    def fast_setattr(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None) -> torch.Tensor:
        assert self.weight.dtype == x.dtype
        if State.enabled:
            State.tell("product", is_first_microbatch, self._is_fsdp2, self.weight.requires_grad)
        return F.linear(x, self.weight)


@contextlib.contextmanager
def autocast(enabled: bool, recipe: Any, amax_reduction_group: Any) -> Iterator[None]:
    State.enabled = enabled
    yield
    State.enabled = False
    if torch.is_grad_enabled():
        State.tell("scales", "forward")


class Recipe:
    def __init__(self, **kwargs: Any) -> None:
        self.kwargs = kwargs


class Format:
    HYBRID, E4M3 = "hybrid", "e4m3"


@contextlib.contextmanager
def installed() -> Iterator[list[Any]]:
    """Context in which imports of Transformer Engine find the stand-in; gives its diary."""
    names = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"Linear": Linear, "autocast": autocast},
        "transformer_engine.pytorch.quantization": {"FP8GlobalStateManager": State},
        "transformer_engine.common": {},
        "transformer_engine.common.recipe": {
            "Format": Format,
            "DelayedScaling": Recipe,
            "Float8CurrentScaling": Recipe,
            "Float8BlockScaling": Recipe,
            "MXFP8BlockScaling": Recipe,
        },
    }
    for name, attributes in names.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module
    for name in names:
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    State.diary[0].clear()
    try:
        yield State.diary[0]
    finally:
        for name in names:
            del sys.modules[name]
