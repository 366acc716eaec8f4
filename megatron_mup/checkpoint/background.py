"""Saving while training goes on: shards are copied to host memory, and a thread saves the copies."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mup.checkpoint import rng
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.save import save
from megatron_mup.checkpoint.state import Piece

GROUP = "background save"
"""Description of the saver's process group."""


class BackgroundSaver:
    """Saves one checkpoint at a time behind the run's back, just as `save` does. Collective.

    Its ranks talk over a group of their own, so that their collectives don't mix with the run's. Host memory holds one
    copy of this rank's shards, made once and used again.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", group_desc=GROUP) if dist.is_initialized() else None
        self._copies: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._done: Callable[[Path], None] | None = None
        self._path: Path | None = None

    def start(
        self,
        folder: str | Path,
        pieces: list[Piece],
        manifest: Manifest,
        keep_last: int | None,
        retain_interval: int | None,
        done: Callable[[Path], None],
    ) -> None:
        """Copies the pieces and returns; waits first for a save that is still under way.

        Args:
            folder, pieces, manifest, keep_last, retain_interval: as `save` takes them.
            done: told the checkpoint's folder by `finish`.

        Raises:
            ConfigError: the save before failed; the same on all ranks.
        """
        self.finish()
        copies, state = self._staged(pieces), rng.rng_state()

        def work() -> None:
            try:
                self._path = save(folder, copies, manifest, keep_last, self._group, state, retain_interval)
            except Exception as error:
                self._error = error

        self._done = done
        # Not a daemon: a run that ends waits for its last checkpoint.
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Waits for the save that is under way, if there is one.

        Raises:
            ConfigError: it failed; the same on all ranks. Earlier checkpoints stand.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        if self._done is not None and self._path is not None:
            self._done(self._path)

    def _staged(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces that this rank offers, with copies in host memory."""
        staged, offered = [], {(piece.key, piece.offsets): piece for piece in pieces if piece.is_saved}
        self._copies = {key: copy for key, copy in self._copies.items() if key in offered}
        for key, piece in offered.items():
            source = piece.value()
            copy = self._copies.get(key)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._copies[key] = copy
            copy.copy_(source, non_blocking=True)
            staged.append(replace(piece, tensor=copy))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged
