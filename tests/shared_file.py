"""Memory that ranks share, on the disk: in the place of GPUs' memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_mup.parallel import shared_memory


class SharedFile:
    """A buffer as `shared_memory.SymmetricBuffer`, on the disk."""

    folder = Path()
    made = 0

    def __init__(self, nbytes: int, group: dist.ProcessGroup, _device: torch.device, _timeout: float) -> None:
        ranks, self._group = dist.get_process_group_ranks(group), group
        SharedFile.made += 1
        files = [str(self.folder / f"{ranks}-{rank}-{SharedFile.made}") for rank in range(len(ranks))]
        Path(files[group.rank()]).write_bytes(bytes(nbytes))
        dist.barrier(group)
        self._bytes = [np.memmap(file, np.uint8, "r+") for file in files]

    def of(self, rank: int, count: int, dtype: torch.dtype, start: int) -> torch.Tensor:
        return torch.frombuffer(self._bytes[rank], dtype=dtype, count=count, offset=start * dtype.itemsize)

    def barrier(self) -> None:
        dist.barrier(self._group)


@contextmanager
def shared_through(folder: str | Path) -> Iterator[pytest.MonkeyPatch]:
    """All ranks of a group share memory through a folder that is empty at first, as if they were GPUs of a machine."""
    with pytest.MonkeyPatch.context() as patch:
        if SharedFile.folder != Path(folder):  # else a rank might still read what the last one made there
            SharedFile.folder, SharedFile.made = Path(folder), 0
        patch.setattr(shared_memory, "SymmetricBuffer", SharedFile)
        patch.setattr(shared_memory, "within_reach", lambda group, _device: group.size() > 1)
        yield patch
