"""Elementwise passes of the matrix optimizers over many shards at once.

:func:`advance` brings momenta up to date and packs the updates; :func:`move` puts what is packed in another order;
:func:`apply` adds packed results to the weights. Each is one or two Triton kernels on a GPU and its plain twin,
``*_reference``, elsewhere. What lies where is told by `Pieces`, and the kernels read addresses from tables on the
device (`Shards`): so they can be replayed from a CUDA graph although gradients lie somewhere else in each step.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

from megatron_mup.kernels.late import kernels_of

TILE = 2048
"""Elements that one program of a kernel works on."""


@dataclass(frozen=True)
class Piece:
    """A run of elements that lie one after another both in a tensor and in a flat buffer.

    Attributes:
        tensor: number of the tensor.
        start: the run's first element there.
        place: its first element in the buffer.
        length: elements.
        matrix: number of the logical matrix that they belong to.
        buffer: number of the buffer, where there are several.
    """

    tensor: int
    start: int
    place: int
    length: int
    matrix: int
    buffer: int = 0


class Pieces:
    """Runs that one pass goes over; on a GPU also as tables of tiles (`tile_tables`).

    Args:
        pieces: the runs; empty ones are left out.
        device: where the tensors are.
        unaligned: tensors that don't begin at a multiple of 16 bytes.
    """

    def __init__(self, pieces: Sequence[Piece], device: torch.device, unaligned: Collection[int] = ()) -> None:
        self.pieces = tuple(piece for piece in pieces if piece.length)
        self.tables = tile_tables(self.pieces, device, unaligned) if device.type == "cuda" else []
        self._matrices: dict[int, torch.Tensor] = {}

    def tiles_of_matrices(self, size: int, count: int) -> torch.Tensor:
        """Numbers of the tiles that lie in each ``size`` elements of the buffer; -1 where there are no more.

        Made once, and not while a CUDA graph is recorded.

        Returns:
            int64 ``[count, most tiles of one]``.
        """
        if size not in self._matrices:
            places = torch.cat([tiles[:, 2] for _, tiles in self.tables]).cpu() // size
            order = places.argsort(stable=True)
            counts = places.bincount(minlength=count)
            rows = order.split(counts.tolist())
            table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            self._matrices[size] = table.to(self.tables[0][1].device)
        return self._matrices[size]


def tile_tables(
    pieces: Sequence[Piece], device: torch.device, unaligned: Collection[int]
) -> list[tuple[bool, torch.Tensor]]:
    """Pieces cut into tiles of at most `TILE` elements, those of several buffers evenly mixed.

    Returns:
        Tables ``[tiles, 6]`` int64 in the order of `Piece`, of whole and aligned tiles (True) and of the others.
    """
    tiles: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
    for p in pieces:
        for at in range(0, p.length, TILE):
            start, place, length = p.start + at, p.place + at, min(TILE, p.length - at)
            whole = length == TILE and start % 8 == 0 and place % 8 == 0 and p.tensor not in unaligned
            tiles[whole].append((p.tensor, start, place, length, p.matrix, p.buffer))
    return [(whole, _mixed(torch.tensor(rows)).to(device)) for whole, rows in tiles.items() if rows]


def _mixed(tiles: torch.Tensor) -> torch.Tensor:
    """Tiles so ordered that those of each buffer are spread evenly: buffers in other GPUs' memory are slower."""
    position = torch.empty(len(tiles), dtype=torch.float64)
    for buffer in tiles[:, 5].unique():
        (own,) = torch.where(tiles[:, 5] == buffer)
        position[own] = torch.arange(len(own), dtype=torch.float64) / len(own)
    return tiles[position.argsort(stable=True)]


class Shards:
    """Tensors of one dtype, and on a GPU the table of their addresses.

    Args:
        count: number of tensors.
        device: where they are.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.tensors: list[torch.Tensor] = []
        self.table = torch.zeros(max(1, count), dtype=torch.int64, device=device) if device.type == "cuda" else None
        self._addresses: list[int] = []

    @property
    def dtype(self) -> torch.dtype:
        """Of all of them."""
        return self.tensors[0].dtype if self.tensors else torch.float32

    def set(self, tensors: Sequence[torch.Tensor]) -> None:
        """Takes contiguous tensors of one dtype. On a GPU the table follows in the current stream, without waiting."""
        self.tensors = [tensor.view(-1) for tensor in tensors]
        addresses = [tensor.data_ptr() for tensor in self.tensors]
        if self.table is not None and addresses and addresses != self._addresses:
            self.table.copy_(torch.tensor(addresses, pin_memory=True), non_blocking=True)
            self._addresses = addresses

    def set_copies(self, tensors: Sequence[torch.Tensor]) -> None:
        """The same for tensors that are read only: copies of those that differ in dtype, are scattered or unaligned."""
        dtypes = {tensor.dtype for tensor in tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        tensors = [tensor.to(dtype).contiguous() for tensor in tensors]
        self.set([tensor.clone() if tensor.is_cuda and is_unaligned(tensor) else tensor for tensor in tensors])

    def forget(self) -> None:
        """Lets go of the tensors."""
        self.tensors = []


def is_unaligned(tensor: torch.Tensor) -> bool:
    """Whether kernels can't load 16 bytes at a time from its beginning on."""
    return tensor.data_ptr() % 16 != 0


@dataclass(frozen=True)
class Momentum:
    """How gradients G become updates U.

    ``M <- beta M + (1 - beta) G`` (ema) or ``beta M + G``; U is M, or with nesterov the same sum once more, of M and G.
    """

    beta: float
    ema: bool
    nesterov: bool


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The Triton kernels, where they can run; imported late, so that machines without a GPU need no Triton."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return kernels_of("shards")


def can_replay(device: torch.device) -> bool:
    """Whether passes on this device follow the tables, so that they can be part of a CUDA graph."""
    return _kernels(device) is not None


def advance(
    grads: Shards,
    momenta: Shards | None,
    out: torch.Tensor | Shards,
    pieces: Pieces,
    momentum: Momentum,
    matrices: int = 0,
) -> torch.Tensor | None:
    """Advances momenta in place and writes updates, in the buffer's precision, to where their pieces have a place.

    Args:
        grads: gradients; computed with in the momenta's precision.
        momenta: tensors like them; None: gradients are the updates.
        out: flat buffer, or several.
        pieces: what to do.
        momentum: how, if there are momenta.
        matrices: how many equal matrices the one buffer holds, none of which begins inside a piece.

    Returns:
        fp32 ``[matrices]``, Frobenius norms of what was written, where they come at no cost: from the kernel.
    """
    kernels = _kernels(_device_of(out))
    if kernels is None:
        advance_reference(grads, momenta, out, pieces, momentum)
        return None
    squares = kernels.advance(grads, momenta, out, pieces, momentum, matrices > 0)
    if squares is None or isinstance(out, Shards):
        return None
    return _norms(squares, pieces, out.numel() // matrices, matrices)


def _device_of(buffer: torch.Tensor | Shards) -> torch.device:
    return (buffer.tensors[0] if isinstance(buffer, Shards) else buffer).device


def _buffer_of(piece: Piece, buffer: torch.Tensor | Shards) -> torch.Tensor:
    return buffer.tensors[piece.buffer] if isinstance(buffer, Shards) else buffer


def _norms(squares: torch.Tensor, pieces: Pieces, size: int, count: int) -> torch.Tensor:
    """Of ``count`` matrices of ``size`` elements, from the sums of squares of tiles."""
    return squares[pieces.tiles_of_matrices(size, count)].sum(-1).sqrt()


def joined_norms(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    """Norms of matrices from those of two parts of each; None of a part that is empty, or of both on a CPU."""
    if one is None or other is None:
        return other if one is None else one
    return torch.hypot(one, other)


def advance_reference(
    grads: Shards, momenta: Shards | None, out: torch.Tensor | Shards, pieces: Pieces, momentum: Momentum
) -> None:
    """The plain twin of :func:`advance`, which defines it."""
    beta = momentum.beta
    for piece in pieces.pieces:
        own = slice(piece.start, piece.start + piece.length)
        update = grads.tensors[piece.tensor][own]
        if momenta is not None:
            kept = momenta.tensors[piece.tensor][own]
            grad = update.to(kept.dtype)
            if momentum.ema:
                kept.lerp_(grad, 1 - beta)
                update = grad.lerp(kept, beta) if momentum.nesterov else kept
            else:
                kept.mul_(beta).add_(grad)
                update = grad.add(kept, alpha=beta) if momentum.nesterov else kept
        _buffer_of(piece, out)[piece.place : piece.place + piece.length].copy_(update)


def move(source: torch.Tensor, out: torch.Tensor, pieces: Pieces, matrices: int = 0) -> torch.Tensor | None:
    """Copies runs of elements from one flat buffer to another of its precision.

    Args:
        source: the tensor of the pieces, whatever number they give it.
        out: the buffer in which they have a place.
        pieces: what to copy.
        matrices: how many equal matrices ``out`` holds, none of which begins inside a piece.

    Returns:
        As :func:`advance`.
    """
    kernels = _kernels(out.device)
    if kernels is None:
        move_reference(source, out, pieces)
        return None
    squares = kernels.move(source, out, pieces, matrices > 0)
    return None if squares is None else _norms(squares, pieces, out.numel() // matrices, matrices)


def move_reference(source: torch.Tensor, out: torch.Tensor, pieces: Pieces) -> None:
    """The plain twin of :func:`move`, which defines it."""
    for piece in pieces.pieces:
        out[piece.place : piece.place + piece.length].copy_(source[piece.start : piece.start + piece.length])


def apply(
    values: Shards, results: torch.Tensor | Shards, pieces: Pieces, gain: torch.Tensor, change: torch.Tensor
) -> None:
    """``W <- W + (gain R + change W)``, summed in fp32 and rounded once, in place.

    Args:
        values: weights W.
        results: flat buffer with R, or several.
        pieces: what to do.
        gain, change: fp32 ``[matrices]``, by number of the logical matrix.
    """
    kernels = _kernels(_device_of(results))
    if kernels is None:
        apply_reference(values, results, pieces, gain, change)
    else:
        kernels.apply(values, results, pieces, gain, change)


def apply_reference(
    values: Shards, results: torch.Tensor | Shards, pieces: Pieces, gain: torch.Tensor, change: torch.Tensor
) -> None:
    """The plain twin of :func:`apply`, which defines it."""
    for piece in pieces.pieces:
        value = values.tensors[piece.tensor][piece.start : piece.start + piece.length]
        result = _buffer_of(piece, results)[piece.place : piece.place + piece.length]
        delta = result.to(torch.float32) * gain[piece.matrix]
        value.add_(delta.add_(value.to(torch.float32) * change[piece.matrix]))
