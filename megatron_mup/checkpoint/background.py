"""Saving while training goes on: shards are copied to host memory, and the copies saved, behind the run's back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mup.checkpoint import rng
from megatron_mup.checkpoint.agree import on_all
from megatron_mup.checkpoint.host_copies import HostCopies, Key
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.save import save
from megatron_mup.checkpoint.state import Piece

GROUP = "background save"
"""Description of the saver's process group."""


class BackgroundSaver:
    """Saves one checkpoint at a time behind the run's back, just as `save` does. Collective.

    A thread copies and saves. The shards are live: whoever changes them calls `before_update` first, so that a step's
    forward and backward pass run while they are copied. Its ranks talk over a group of their own, so that their
    collectives don't mix with the run's. Host memory holds one copy of this rank's shards, made once and used again.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", group_desc=GROUP) if dist.is_initialized() else None
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._done: Callable[[Path], None] | None = None
        self._path: Path | None = None
        # Set when what remains to be copied is the device's work, up to the event.
        self._issued = threading.Event()
        self._issued.set()
        self._copied: torch.cuda.Event | None = None

    def prepare(self, pieces: list[Piece]) -> None:
        """Has host memory made for pieces like these, meanwhile; the first save finds it. Not collective."""
        self.finish()
        offered = _offered(pieces)

        def work() -> None:
            # What goes wrong does so in the first save too, and is told there, on all ranks.
            with contextlib.suppress(Exception):
                self._copies.of(offered)

        self._run(work, _device_of(offered))

    def start(
        self,
        folder: str | Path,
        pieces: list[Piece],
        manifest: Manifest,
        keep_last: int | None,
        retain_interval: int | None,
        done: Callable[[Path], None],
    ) -> None:
        """Begins to save the pieces as they are now; waits first for a save that is still under way.

        Args:
            folder, pieces, manifest, keep_last, retain_interval: as `save` takes them.
            done: told the checkpoint's folder by `finish`.

        Raises:
            ConfigError: the save before failed; the same on all ranks.
        """
        self.finish()
        offered, state = _offered(pieces), rng.rng_state()
        device = _device_of(offered)
        ready = torch.cuda.current_stream(device).record_event() if device is not None else None

        def work() -> None:
            copies = on_all(lambda: self._copied_pieces(offered, device, ready), self._group)
            self._path = save(folder, copies, manifest, keep_last, self._group, state, retain_interval)

        self._done = done
        self._issued.clear()
        self._run(work, device)

    def before_update(self) -> None:
        """To be called before shards that are being saved change; the host waits only for what isn't the device's."""
        self._issued.wait()
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None

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

    def _run(self, work: Callable[[], None], device: torch.device | None) -> None:
        def guarded() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # of this thread
                work()
            except Exception as error:
                self._error = error
            finally:
                self._issued.set()

        # Not a daemon: a run that ends waits for its last checkpoint.
        self._thread = threading.Thread(target=guarded, name="checkpoint")
        self._thread.start()

    @torch.no_grad()
    def _copied_pieces(
        self, offered: dict[Key, Piece], device: torch.device | None, ready: torch.cuda.Event | None
    ) -> list[Piece]:
        """The pieces with copies in host memory, complete; lets go of the pieces' own tensors."""
        done = None
        try:
            copies = self._copies.of(offered)
            stream = torch.cuda.Stream(device) if device is not None else None
            with torch.cuda.stream(stream):
                if stream is not None and ready is not None:
                    stream.wait_event(ready)
                for key, piece in offered.items():
                    copies[key].copy_(piece.value(), non_blocking=True)
                if stream is not None:
                    done = self._copied = stream.record_event(torch.cuda.Event(blocking=True))
        finally:
            self._issued.set()
        if done is not None:
            done.synchronize()
        pieces = [replace(piece, tensor=copies[key]) for key, piece in offered.items()]
        # A temporary or a replaced tensor is the allocator's again only now, when nobody reads it any more.
        offered.clear()
        return pieces


def _device_of(offered: dict[Key, Piece]) -> torch.device | None:
    """The GPU that holds shards."""
    return next((piece.tensor.device for piece in offered.values() if piece.tensor.is_cuda), None)


def _offered(pieces: list[Piece]) -> dict[Key, Piece]:
    """What this rank offers for saving, each place once."""
    return {(piece.key, piece.offsets): piece for piece in pieces if piece.is_saved}
