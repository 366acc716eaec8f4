"""What a checkpoint holds: names and the shards of global tensors behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from megatron_mup.optim.main_params import MainParam

MODEL, OPTIMIZER = "model", "optimizer"
"""First parts of keys: ``model/<parameter>`` and ``optimizer/<kind>/<parameter>``."""


@dataclass(frozen=True)
class Piece:
    """This rank's shard of a global tensor, or a part of it where its rows don't follow one another there.

    Attributes:
        key: name in the checkpoint.
        tensor: the shard, live: loading writes into it. It may be empty.
        shape: global shape.
        offsets: index of the shard's first element in the global tensor, per dimension.
        is_copy: a tied copy: another rank's piece is saved under this key, and both load from it.
    """

    key: str
    tensor: torch.Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    is_copy: bool = False

    @property
    def is_saved(self) -> bool:
        """Whether this rank offers the piece for saving."""
        return not self.is_copy and self.tensor.numel() > 0

    def value(self) -> torch.Tensor:
        """What is written."""
        return self.tensor


@dataclass(frozen=True)
class LazyPiece(Piece):
    """A shard that is made when it is written, so that a large model passes through little memory.

    Attributes:
        tensor: on the meta device.
        make: makes the shard.
    """

    make: Callable[[], torch.Tensor] = field(kw_only=True)

    def value(self) -> torch.Tensor:
        """What is written."""
        return self.make()


def checkpoint_pieces(
    params: Iterable[MainParam], optimizer_state: Mapping[str, tuple[MainParam, torch.Tensor]] | None = None
) -> list[Piece]:
    """Pieces of this rank: values in the optimizer's precision and, if given, optimizer state.

    Args:
        params: this rank's parameters.
        optimizer_state: ``<kind>/<parameter>`` to parameter and tensor in its layout, as `Optimizer.state_tensors`
            gives it; None saves or loads weights only.

    Raises:
        ValueError: a tensor that doesn't have its shard's shape.
    """
    pieces = [piece for param in params for piece in _pieces(MODEL, param, param.value)]
    for name, (param, tensor) in (optimizer_state or {}).items():
        pieces += _pieces(f"{OPTIMIZER}/{name.partition('/')[0]}", param, tensor)
    return pieces


def whole_piece(key: str, tensor: torch.Tensor) -> Piece:
    """A tensor that each rank that has it holds whole."""
    return Piece(key, tensor, tuple(tensor.shape), (0,) * tensor.dim())


def _pieces(prefix: str, param: MainParam, tensor: torch.Tensor) -> list[Piece]:
    meta, layout = param.meta, param.layout
    if tuple(tensor.shape) != layout.local_shape:
        raise ValueError(f"{prefix}/{meta.name} has shape {tuple(tensor.shape)}, its shard {layout.local_shape}")
    key = f"{prefix}/{meta.tied_to or meta.name}"
    is_copy = meta.tied_to is not None
    return [Piece(key, part, layout.shape, offsets, is_copy) for offsets, part in layout.rectangles(tensor)]
