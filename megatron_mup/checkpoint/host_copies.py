"""Host memory for copies of shards, page-locked where a GPU writes to it."""

from __future__ import annotations

import logging
import mmap

import torch

from megatron_mup.checkpoint.state import Piece

Key = tuple[str, tuple[int, ...]]
"""Key and offsets of a piece."""

log = logging.getLogger(__name__)


class HostCopies:
    """One tensor in host memory for each piece, of just its size; made once and used again.

    PyTorch's own pinned memory rounds every tensor up to a power of two.
    """

    def __init__(self) -> None:
        self._tensors: dict[Key, torch.Tensor] = {}
        self._pinned: list[int] = []

    def of(self, pieces: dict[Key, Piece]) -> dict[Key, torch.Tensor]:
        """Memory for these pieces; that for others is freed before. The values are anything."""
        shapes = {key: (copy.shape, copy.dtype) for key, copy in self._tensors.items()}
        if shapes != {key: (piece.tensor.shape, piece.tensor.dtype) for key, piece in pieces.items()}:
            self._free()
            self._tensors = {key: _host_memory(piece.tensor) for key, piece in pieces.items()}
            if any(piece.tensor.is_cuda for piece in pieces.values()):
                self._pin()
        return self._tensors

    def _pin(self) -> None:
        """Page-locks the memory, so that the GPU writes to it by itself, and fast."""
        for tensor in self._tensors.values():
            error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
            if int(error):
                log.warning("host memory can't be page-locked (CUDA error %d): saving takes longer", int(error))
                return
            self._pinned.append(tensor.data_ptr())

    def _free(self) -> None:
        for address in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(address)
        self._pinned, self._tensors = [], {}


def _host_memory(like: torch.Tensor) -> torch.Tensor:
    """A tensor in pages of its own: what is page-locked must share none. ``like`` isn't empty."""
    pages = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)
