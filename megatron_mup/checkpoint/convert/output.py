"""A conversion's result appears under its name when all of it is there and proven, or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from megatron_mup.checkpoint.agree import reason
from megatron_mup.checkpoint.convert.logits import Comparison
from megatron_mup.checkpoint.manifest import Manifest
from megatron_mup.checkpoint.save import save
from megatron_mup.checkpoint.state import LazyPiece
from megatron_mup.config import ConfigError
from megatron_mup.progress import bar


class ConversionError(Exception):
    """Both models compute something else; nothing was written.

    Attributes:
        comparison: by how much.
    """

    def __init__(self, comparison: Comparison) -> None:
        """Keeps the figures."""
        super().__init__(f"the converted model is another one: {comparison}; nothing was written")
        self.comparison = comparison


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A hidden folder to write to, which gets the name ``folder`` at the end, and goes if anything fails.

    Raises:
        ConfigError: there is something of this name, or it can't be written.
    """
    final = Path(folder).absolute()
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        raise ConfigError(f"--save {folder}", "is there already", "give a new folder")
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, final)
    except OSError as error:
        raise ConfigError(f"--save {folder}", f"can't be written: {reason(error)}", "choose another folder") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_pieces(folder: Path, pieces: Sequence[LazyPiece], manifest: Manifest) -> None:
    """Writes a checkpoint of tensors that are made one by one, with a bar."""
    with bar("writing tensors", len(pieces)) as advance:

        def counted(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
            def made() -> torch.Tensor:
                tensor = make()
                advance(1)
                return tensor

            return made

        save(folder, [replace(piece, make=counted(piece.make)) for piece in pieces], manifest)
